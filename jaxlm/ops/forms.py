"""Which form of an op runs, and why.

The forms of an op compute the same numbers: `recurrent` token by token, `parallel` all pairs of tokens at once,
`chunked` in between, `kernel` with code made for one kind of device. A kernel joins by one entry in `KERNELS`: a
function that returns None where the kernel runs and is meant to beat the other forms, or else the reason why it does not;
docs/kernels.md says on which chips it was timed beside them.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxlm.ops import kernels
from jaxlm.parallel import sequence

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


@dataclass(frozen=True)
class Call:
    """What may decide whether a kernel can run, and `doctor` tells. None where it is not known: then it rules nothing out."""

    T: int
    dtype: jnp.dtype
    platform: str
    chip: str
    heads: int | None = None
    head_dim: int | None = None
    value_dim: int | None = None
    decay: str | None = None
    masked: bool = False
    cached: bool = False
    decoupled: bool = False
    read_out: bool = False


def _cudnn_attention_declines(call: Call) -> str | None:
    """Limits of cuDNN flash attention as `jax.nn.dot_product_attention` offers it."""
    if call.platform not in ("gpu", "cuda"):
        return f"cuDNN attention needs an NVIDIA GPU, this is {call.platform}"
    if call.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN attention needs bfloat16 or float16, not {call.dtype.name}"
    if call.cached:
        return "cuDNN attention does not read a cache"
    if call.masked:
        return "cuDNN attention does not take segment ids"
    K, V = call.head_dim, call.value_dim
    if K is not None and (K % 8 or K > 128 or V not in (None, K)):
        return f"cuDNN attention needs K = V <= 128 divisible by 8, not K={K}, V={V}"
    return None


def _pallas_declines(op: str, call: Call) -> str | None:
    if not kernels.exists(op, call.platform):
        return f"no Pallas kernel for {call.platform}"
    if call.decoupled:
        return f"the Pallas kernel of {op} has one gate beta, not one to erase and one to write"
    return _module_declines(op, call, K=call.head_dim, V=call.value_dim)


def _diagonal_declines(call: Call) -> str | None:
    if not kernels.exists("diagonal_recurrence", call.platform):
        return f"no Pallas kernel for {call.platform}"
    if call.read_out:
        return "the Pallas kernel keeps every state, where these ops read many states a channel out to one number"
    return _module_declines("diagonal_recurrence", call)


def _module_declines(op: str, call: Call, **known) -> str | None:
    try:
        module = kernels.module(op, call.platform)
    except kernels.OtherJax as error:
        return str(error)
    return module.declines(dtype=call.dtype, chip=call.chip, **known)


# op -> what its kernel is, and why it does not run (None where it does).
KERNELS: dict[str, tuple[str, Callable[[Call], str | None]]] = {
    "attention": ("cuDNN flash attention", _cudnn_attention_declines),
    "linear_attention": ("Pallas kernel", partial(_pallas_declines, "linear_attention")),
    "delta_rule": ("Pallas kernel", partial(_pallas_declines, "delta_rule")),
    "diagonal_recurrence": ("Pallas kernel", _diagonal_declines),
}


_KERNELS: ContextVar[bool] = ContextVar("jaxlm_kernels", default=True)


@contextlib.contextmanager
def use_kernels(use: bool) -> Iterator[None]:
    """Whether form="auto" takes kernels in what is traced within this context: without, to compare with.

    What jax has traced before it does not trace again: `jax.clear_caches()` first.
    """
    token = _KERNELS.set(use)
    try:
        yield
    finally:
        _KERNELS.reset(token)


# (op, what `choose` was told, its answer)
Asked = tuple[str, dict[str, Any], Choice]
_ASKED: ContextVar[list[Asked] | None] = ContextVar("jaxlm_asked", default=None)


@contextlib.contextmanager
def recorded() -> Iterator[list[Asked]]:
    """The choices of forms that are made within this context, once each: of what is traced there, in its order."""
    asked: list[Asked] = []
    token = _ASKED.set(asked)
    try:
        yield asked
    finally:
        _ASKED.reset(token)


def choose(
    op: str,
    form: str,
    *,
    T: int,
    dtype: jax.typing.DTypeLike,
    platform: str | None = None,
    chip: str | None = None,
    **known,
) -> Choice:
    """Resolve `form` of `op` for T tokens of a dtype on a platform.

    "auto" takes the step for one token, else the kernel where it runs, else `chunked`. Where a device has a kernel that does
    not take an op's call, the reason is logged once.

    Args:
      op: a key of `OPS`.
      form: "auto" or one of the op's forms.
      T: tokens in the call.
      dtype: of the operands.
      platform: "cpu", "gpu" or "tpu"; None for that of the mesh, else the default backend's.
      chip: its device kind, likewise.
      known: fields of `Call`: heads, head_dim (K), value_dim (V), decay ("none", "scalar" or "vector"), masked (segment ids
        are given), cached (a key/value cache is given), decoupled (gates of their own to erase and to write), read_out (a
        channel's states are read out to one number).

    Raises:
      ValueError: for an op or a form that is not there, with those that are; for form="kernel" where the kernel cannot
        run, with the reason; for tokens that the shards of the mesh's sequence axis do not divide.
    """
    choice = _choose(op, form, T, dtype, platform, chip, known)
    asked, said = _ASKED.get(), (op, {"T": T, "dtype": jnp.dtype(dtype).name} | known, choice)
    if asked is not None and said not in asked:
        asked.append(said)
    return choice


def _choose(op, form, T, dtype, platform, chip, known) -> Choice:
    if op not in OPS:
        raise ValueError(f"op={op!r} is not there; choose one of {', '.join(OPS)}")
    if form not in ("auto", *OPS[op]):
        raise ValueError(f"form={form!r} is not a form of {op}; choose auto or one of {', '.join(OPS[op])}")
    # Forms that are not split natively XLA would pad in silence: shards divide the tokens of every form, or of none.
    sequence.split(T)
    if form not in ("auto", "kernel"):
        return Choice(form, "asked for")

    name, declined = "", "no kernel yet"
    if op in KERNELS:
        name, declines = KERNELS[op]
        here = kernels.target()
        call = Call(T, jnp.dtype(dtype), platform or here[0], chip or (here[1] if platform in (None, here[0]) else ""), **known)
        declined = declines(call)
        if form == "auto" and not _KERNELS.get():
            return Choice("recurrent" if T == 1 else "chunked", "kernels are switched off")
    if form == "kernel":
        if declined:
            raise ValueError(f'form="kernel" of {op} cannot run: {declined}; use form="auto"')
        return Choice("kernel", "asked for")
    if T == 1:
        return Choice("recurrent", "one token takes the step")
    if not declined:
        return Choice("kernel", name)
    if platform is None and op in KERNELS and kernels.exists(op, call.platform):
        _log_once(f"{op} runs as chunked, without its kernel: {declined}")
    return Choice("chunked", declined)


@cache
def _log_once(message: str) -> None:
    """Models are traced many times, and each layer calls its op."""
    logging.getLogger("jaxlm").warning(message)
