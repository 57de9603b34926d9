"""Dense projection."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxlm.params import param


class Dense(nnx.Module):
    """y = x W (+ b), in x's dtype; the parameters stay in their own.

    The kernel `[in, out]` starts as a truncated normal of standard deviation `gain / sqrt(in)`, the bias at zero. All
    mixers' projections start so, outputs into the residual stream with gain (2 depth)^-1/2 (`LayerContext.output_gain`),
    whatever a family's reference code does. Where a family's own start matters its file has it: RWKV-7's projections,
    rates and steps (dt, A), S4D, TTT's inner weights.

    Args:
      axes: logical axes of the kernel's two dimensions.
      role: role of the kernel (`jaxlm.params.ROLES`).
      gain: multiplier of the initial standard deviation; 0 starts the layer at zero.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axes: tuple[str | None, str | None],
        rngs: nnx.Rngs,
        role: str = "hidden",
        bias: bool = False,
        gain: float = 1.0,
    ):
        # A standard normal cut at two standard deviations has deviation 0.87962566; divide it out.
        std = gain / (in_features**0.5 * 0.87962566103423978)
        kernel = std * jax.random.truncated_normal(rngs.params(), -2, 2, (in_features, out_features))
        self.kernel = param(kernel, axes, role)
        self.bias = param(jnp.zeros(out_features), (axes[1],), "bias") if bias else None

    def __call__(self, x: Float[Array, "... in"]) -> Float[Array, "... out"]:
        y = x @ self.kernel[...].astype(x.dtype)
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)
