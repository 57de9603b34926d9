"""Pallas kernels as the ops call them: for the chip at hand, differentiable, under a mesh.

A kernel sees the arrays of one device, since no partitioner can split it: under a mesh it runs inside `shard_map` over batch
and heads, with the gradient defined outside. Where tokens are split too, `jaxlm.parallel.sequence` has done that already.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from contextvars import ContextVar
from functools import partial
from types import ModuleType

import jax

from jaxlm.parallel import sequence
from jaxlm.parallel.context import active, device

# (op, platform) -> the module with its kernels; see the signatures there.
MODULES = {
    ("linear_attention", "tpu"): "pallas_kernels.linear_attention.tpu",
    ("linear_attention", "gpu"): "pallas_kernels.linear_attention.gpu",
    ("delta_rule", "tpu"): "pallas_kernels.delta_rule.tpu",
    ("delta_rule", "gpu"): "pallas_kernels.delta_rule.gpu",
    ("diagonal_recurrence", "tpu"): "pallas_kernels.diagonal.tpu",
    ("diagonal_recurrence", "gpu"): "pallas_kernels.diagonal.gpu",
}

_INTERPRETED: ContextVar[tuple[str, str] | None] = ContextVar("jaxlm_interpreted", default=None)


@contextlib.contextmanager
def interpreted(platform: str, device_kind: str) -> Iterator[None]:
    """Within this context kernels run as if for that chip, by Pallas' interpreter: slowly, and on any machine."""
    token = _INTERPRETED.set((platform, device_kind))
    try:
        yield
    finally:
        _INTERPRETED.reset(token)


def target() -> tuple[str, str]:
    """Platform ("cpu", "gpu", "tpu") and device kind that computations are traced for: the mesh's, else the default ones."""
    pretended = _INTERPRETED.get()
    if pretended is not None:
        return pretended
    chip = device()
    return chip.platform, chip.device_kind


class OtherJax(ImportError):
    """The kernels are not written for this version of jax."""


def module(op: str, platform: str) -> ModuleType | None:
    """The kernels of an op for a platform, None where there are none.

    Raises:
      OtherJax: where they need what this version of jax does not have.
    """
    if not exists(op, platform):
        return None
    try:
        return importlib.import_module(MODULES[op, _named(platform)])
    except (ImportError, AttributeError) as error:
        if not _jax_lacks_it(error):
            raise
        raise OtherJax(f"the kernel needs jax >= 0.11.2 and does not import with jax {jax.__version__}: {error}") from error


def exists(op: str, platform: str) -> bool:
    """Whether there are kernels of an op for a platform."""
    return (op, _named(platform)) in MODULES


def _named(platform: str) -> str:
    return "gpu" if platform == "cuda" else platform


def _jax_lacks_it(error: ImportError | AttributeError) -> bool:
    """Whether what is missing was looked for in a module of jax, or in what one defines."""
    if isinstance(error, ImportError):
        owner = error.name
    elif isinstance(error.obj, ModuleType):
        owner = error.obj.__name__
    else:
        owner = getattr(error.obj, "__module__", None)  # of a class, and of what is an instance of one
    return (owner or "").partition(".")[0] in ("jax", "jaxlib")


def matrix_recurrence(op: str, scale, inputs: tuple, reset, state):
    """An op with a state [B, H, K, V] on prepared arrays.

    Args:
      op: "linear_attention" with inputs q, k, v, log_decay, or "delta_rule" with q, k, v, beta, log_decay: all [B, T, H, *],
        gates float32, log_decay None where there is none.
      scale: multiplies q.
      reset: bool [B, T] or None.
      state: float32.

    Returns:
      o [B, T, H, V] and the final state.
    """
    return _matrix_recurrence((scale, module(op, target()[0]), _INTERPRETED.get() is not None), inputs, reset, state)


_TOKENS, _STATE = ("batch", None, "heads", None), ("batch", "heads", None, None)
_RESET = ("batch", None)


def _on_devices(fn, in_axes, out_axes, q, *args):
    """Call `fn(q, *args)` on every device's rows and heads."""
    if active() is None:
        return fn(q, *args)
    return sequence.shard_map(fn, {"batch": q.shape[0], "heads": q.shape[2]}, in_axes, out_axes, q, *args)


def _axes(tree, axes):
    return jax.tree.map(lambda _: axes, tree)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matrix_recurrence(static, inputs, reset, state):
    scale, kernels, interpret = static

    def local(q, rest, reset, state):
        return kernels.forward(scale, q, *rest, reset, state, save=False, interpret=interpret)[:2]

    q, *rest = inputs
    in_axes = (_TOKENS, _axes(rest, _TOKENS), _axes(reset, _RESET), _STATE)
    return _on_devices(local, in_axes, (_TOKENS, _STATE), q, rest, reset, state)


def _matrix_recurrence_forward(static, inputs, reset, state):
    scale, kernels, interpret = static

    def local(q, rest, reset, state):
        return kernels.forward(scale, q, *rest, reset, state, save=True, interpret=interpret)

    q, *rest = inputs
    in_axes = (_TOKENS, _axes(rest, _TOKENS), _axes(reset, _RESET), _STATE)
    out_axes = (_TOKENS, _STATE, kernels.SAVED_AXES)
    o, final_state, saved = _on_devices(local, in_axes, out_axes, q, rest, reset, state)
    return (o, final_state), (inputs, reset, saved)


def _matrix_recurrence_backward(static, residuals, cotangents):
    scale, kernels, interpret = static
    inputs, reset, saved = residuals
    q, *rest = inputs

    def local(q, rest, reset, saved, do, d_final):
        gradients = kernels.backward(scale, q, *rest, reset, saved, do, d_final, interpret=interpret)
        return gradients[:-1], gradients[-1]

    in_axes = (_TOKENS, _axes(rest, _TOKENS), _axes(reset, _RESET), kernels.SAVED_AXES, _TOKENS, _STATE)
    out_axes = (_axes(inputs, _TOKENS), _STATE)
    d_inputs, d_state = _on_devices(local, in_axes, out_axes, q, rest, reset, saved, *cotangents)
    return d_inputs, None, d_state


_matrix_recurrence.defvjp(_matrix_recurrence_forward, _matrix_recurrence_backward)


def diagonal_recurrence(a, b, state):
    """h_t = a_t h_{t-1} + b_t of float32 arrays: a and b [B, T, *D], state [B, *D]. The gradient is `diagonal_gradient`."""
    kernels, interpret = module("diagonal_recurrence", target()[0]), _INTERPRETED.get() is not None

    def local(a, b, state):
        return kernels.forward(_flat(a, 2), _flat(b, 2), _flat(state, 1), interpret=interpret).reshape(b.shape)

    tokens, of_state = _channels(b)
    return _split(local, b, (tokens, tokens, of_state), tokens, a, b, state)


def diagonal_gradient(a, h, state, do, d_final):
    """Gradients of `diagonal_recurrence`, which returned h, with respect to a, b and state, from the cotangents of all h and,
    added to it, of the last."""
    kernels, interpret = module("diagonal_recurrence", target()[0]), _INTERPRETED.get() is not None

    def local(a, h, state, do, d_final):
        tokens, states = (_flat(x, 2) for x in (a, h, do)), (_flat(x, 1) for x in (state, d_final))
        da, db, d_state = kernels.backward(*tokens, *states, interpret=interpret)
        return da.reshape(h.shape), db.reshape(h.shape), d_state.reshape(state.shape)

    tokens, of_state = _channels(h)
    return _split(local, h, (tokens, tokens, of_state, tokens, of_state), (tokens, tokens, of_state), a, h, state, do, d_final)


def _flat(x, leading: int):
    return x.reshape(*x.shape[:leading], -1)


def _channels(x):
    """Logical axes of [B, T, *D] and of its state; the first axis of channels follows the heads."""
    channels = ("heads", *(None,) * (x.ndim - 3)) if x.ndim > 2 else ()
    return ("batch", None, *channels), ("batch", *channels)


def _split(fn, like, in_axes, out_axes, *args):
    if active() is None:
        return fn(*args)
    sizes = {"batch": like.shape[0]} | ({"heads": like.shape[2]} if like.ndim > 2 else {})
    return sequence.shard_map(fn, sizes, in_axes, out_axes, *args)
