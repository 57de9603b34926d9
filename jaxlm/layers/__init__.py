"""flax.nnx modules in tree style: parameters plus an op, no shared submodules, no hidden state."""
