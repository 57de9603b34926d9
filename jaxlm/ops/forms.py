"""Which form of an op runs, and why.

The forms of an op compute the same numbers: `recurrent` token by token, `parallel` all pairs of tokens at once,
`chunked` in between, `kernel` with code made for one kind of device. A kernel joins by one entry in `KERNELS`: a
function that returns None where the kernel runs and beats the other forms, or else the reason why it does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

OPS = {
    "linear_attention": ("recurrent", "parallel", "chunked", "kernel"),
    "delta_rule": ("recurrent", "parallel", "chunked", "kernel"),
    "dplr_delta_rule": ("recurrent", "parallel", "chunked", "kernel"),
    "attention": ("recurrent", "parallel", "chunked", "kernel"),
    "diagonal_recurrence": ("recurrent", "parallel", "chunked", "fft", "kernel"),
    "log_linear_attention": ("recurrent", "parallel", "chunked", "kernel"),
    "ttt_linear": ("recurrent", "chunked", "kernel"),
    "miras": ("recurrent", "chunked", "kernel"),
}


@dataclass(frozen=True)
class Choice:
    """The form that runs, and the reason in words for people."""

    form: str
    reason: str


def _cudnn_attention_declines(
    *, dtype: jnp.dtype, platform: str, head_dim: int | None, value_dim: int | None, masked: bool, cached: bool
) -> str | None:
    """Limits of cuDNN flash attention as `jax.nn.dot_product_attention` offers it."""
    if platform not in ("gpu", "cuda"):
        return f"cuDNN attention needs an NVIDIA GPU, this is {platform}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN attention needs bfloat16 or float16, not {dtype.name}"
    if cached:
        return "cuDNN attention does not read a cache"
    if masked:
        return "cuDNN attention does not take segment ids"
    if head_dim is not None and (head_dim % 8 or head_dim > 128 or value_dim not in (None, head_dim)):
        return f"cuDNN attention needs K = V <= 128 divisible by 8, not K={head_dim}, V={value_dim}"
    return None


KERNELS = {"attention": _cudnn_attention_declines}


def choose(
    op: str,
    form: str,
    *,
    T: int,
    dtype: jax.typing.DTypeLike,
    platform: str | None = None,
    head_dim: int | None = None,
    value_dim: int | None = None,
    masked: bool = False,
    cached: bool = False,
) -> Choice:
    """Resolve `form` of `op` for T tokens of a dtype on a platform.

    "auto" takes the step for one token, else the kernel where it runs, else `chunked`.

    Args:
      op: a key of `OPS`.
      form: "auto" or one of the op's forms.
      T: tokens in the call.
      dtype: of the operands.
      platform: "cpu", "gpu" or "tpu"; None for the default backend's.
      head_dim: K; None where it is not known, then it rules nothing out. So with value_dim, V.
      masked: segment ids are given.
      cached: a key/value cache is given (attention).

    Raises:
      ValueError: for an op or a form that is not there, with those that are; for form="kernel" where the kernel cannot
        run, with the reason.
    """
    if op not in OPS:
        raise ValueError(f"op={op!r} is not there; choose one of {', '.join(OPS)}")
    if form not in ("auto", *OPS[op]):
        raise ValueError(f"form={form!r} is not a form of {op}; choose auto or one of {', '.join(OPS[op])}")
    if form not in ("auto", "kernel"):
        return Choice(form, "asked for")

    declined = "no kernel yet"
    if op in KERNELS:
        declined = KERNELS[op](
            dtype=jnp.dtype(dtype), platform=platform or jax.default_backend(),
            head_dim=head_dim, value_dim=value_dim, masked=masked, cached=cached,
        )  # fmt: skip
    if form == "kernel":
        if declined:
            raise ValueError(f'form="kernel" of {op} cannot run: {declined}; use form="auto"')
        return Choice("kernel", "asked for")
    if T == 1:
        return Choice("recurrent", "one token takes the step")
    if not declined:
        return Choice("kernel", "cuDNN flash attention")
    return Choice("chunked", declined)
