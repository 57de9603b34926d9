"""Gates out of their range are refused where their values are known: arrays outside a trace, and constants within one."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def check_range(name: str, x: Array | None, low: float, high: float, remedy: str) -> None:
    """Raises ValueError if x is known and an element of it lies outside [low, high]; tracers and None pass."""
    if x is None or isinstance(x, jax.core.Tracer) or x.size == 0:
        return
    # A constant under jit is known too, but operations on it are not unless they are evaluated now.
    with jax.ensure_compile_time_eval():
        smallest, largest = float(jnp.min(x)), float(jnp.max(x))
    if smallest < low or largest > high:
        wanted = f"<= {high:g}" if low == -math.inf else f">= {low:g}" if high == math.inf else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name} must be {wanted}, got {smallest if smallest < low else largest:.3g}: {remedy}")


def check_log_decay(log_decay: Float[Array, ...] | None, name: str = "log_decay") -> None:
    """Raises ValueError for known decays that make the state grow."""
    if log_decay is None or isinstance(log_decay, jax.core.Tracer):
        return
    with jax.ensure_compile_time_eval():
        real = jnp.real(log_decay)
    check_range(
        name, real, -math.inf, 0, "it is the logarithm of a factor in [0, 1], such as logsigmoid(gate) or -softplus(gate)"
    )
