"""The mathematics of sequences, pure functions in several forms each; they know no configs, parameters or meshes.

`linear_attention.linear_attention`, `attention.attention`, `convolution.short_convolution`; `forms.choose` decides
between the forms of an op and says why.
"""
