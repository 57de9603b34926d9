"""Every kernel as a function of abstract arrays, to be compiled or timed, and the two numbers that bound it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

DECAYS = ("none", "scalar", "vector")
OPS = ("linear_attention", "delta_rule")
DIRECTIONS = ("forward", "backward")


class Shape(NamedTuple):
    """Rows, tokens, heads, key and value channels."""

    B: int = 2
    T: int = 4096
    H: int = 8
    K: int = 128
    V: int = 128


def abstract(
    op: str, direction: str, decay: str, platform: str, dtype: str = "bfloat16",
    *, resets: bool = False, save: bool = True, **sizes: int,
):  # fmt: skip
    """A kernel, and its arguments as `jax.ShapeDtypeStruct`: for `pallas_kernels.aot.report`.

    Arrays of tokens come as projections leave them, [B, T, H * channels].

    Args:
      op: of `OPS`; decay: of `DECAYS`; direction: of `DIRECTIONS`.
      platform: "tpu" or "gpu".
      resets: with documents that start inside the rows.
      save: whether the forward keeps what the backward needs.
      sizes: fields of `Shape`.
    """
    module = importlib.import_module(f"pallas_kernels.{op}.{platform}")
    B, T, H, K, V = Shape(**sizes)
    tokens = (B, T, H)
    low = partial(jax.ShapeDtypeStruct, dtype=jnp.dtype(dtype))
    precise = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    decays = {"none": None, "scalar": precise((*tokens, 1)), "vector": precise((*tokens, K))}
    gates = (precise((*tokens, 1)),) if op == "delta_rule" else ()
    inputs = (low((*tokens, K)), low((*tokens, K)), low((*tokens, V)), *gates, decays[decay])
    reset = jax.ShapeDtypeStruct((B, T), jnp.bool_) if resets else None
    state = precise((B, H, K, V))
    forward = partial(module.forward, 0.1, save=save)
    if direction == "forward":
        return flattened(forward, (*inputs, reset, state), tokens)
    o, final, saved = jax.eval_shape(forward, *inputs, reset, state)
    return flattened(partial(module.backward, 0.1), (*inputs, reset, saved, o, final), tokens)


def diagonal(direction: str, platform: str, B: int = 2, T: int = 4096, D: int = 1024):
    """The kernel of the diagonal recurrence, for `pallas_kernels.aot.report`."""
    module = importlib.import_module(f"pallas_kernels.diagonal.{platform}")
    tokens, state = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((B, T, D), (B, D)))
    if direction == "forward":
        return module.forward, (tokens, tokens, state)
    return module.backward, (tokens, tokens, tokens, state, state)


def flattened(function: Callable, arguments, tokens: tuple[int, int, int]):
    """The function of arrays [B, T, H * channels] instead of [B, T, H, channels], in its results too, and its arguments so."""

    def flat(x):
        return x.reshape(*tokens[:2], -1) if x.shape[:3] == tokens else x

    shapes = jax.tree.map(lambda x: x.shape, arguments)

    def call(*arrays):
        shaped = jax.tree.map(lambda x, shape: x.reshape(shape), arrays, shapes)
        return jax.tree.map(flat, function(*shaped))

    return call, jax.eval_shape(lambda *x: jax.tree.map(flat, x), *arguments)


def flops(op: str, direction: str, shape: Shape, chunk: int) -> int:
    """Of the matrix products in chunks, scores of all levels of a vector decay counted once, the delta rule's inverse as exact
    as its blocks: 2 / 3 C^2 a token. The diagonal recurrence has none."""
    if op == "diagonal_recurrence":
        return 0
    _, _, _, K, V = shape
    products = {
        ("linear_attention", "forward"): 4 * K * V + 2 * chunk * (K + V),
        ("linear_attention", "backward"): 10 * K * V + 6 * chunk * K + 4 * chunk * V,
        ("delta_rule", "forward"): 6 * K * V + chunk * (6 * K + 4 * V) + 2 * chunk**2 // 3,
        ("delta_rule", "backward"): 16 * K * V + chunk * (18 * K + 10 * V) + 4 * chunk**2,
    }[op, direction]
    return shape.B * shape.T * shape.H * products


def least_bytes(op: str, direction: str, decay: str, shape: Shape, itemsize: int = 2) -> int:
    """Every input read once and every output written once, without what the forward saves for the backward. The diagonal
    recurrence has float32 channels, K a head."""
    _, _, _, K, V = shape
    if op == "diagonal_recurrence":
        # a, b and h; a, h and the cotangent of h, those of a and b.
        return shape.B * shape.T * shape.H * 4 * K * (3 if direction == "forward" else 5)
    gates = 4 * {"none": 0, "scalar": 1, "vector": K}[decay] + (4 if op == "delta_rule" else 0)
    a_token = itemsize * (2 * K + 2 * V) + gates
    if direction == "backward":
        a_token += itemsize * (2 * K + V) + gates
    return shape.B * shape.T * shape.H * a_token
