"""What the mixers share: where a layer sits, heads, the projections of q, k and v, and the gated output norm."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import AfterValidator, Field

from jaxlm.layers.convolution import ShortConvolution
from jaxlm.layers.linear import Dense
from jaxlm.layers.norms import RMSNorm
from jaxlm.parallel.context import constrain
from jaxlm.schema import UserError

State = dict[str, Array]


def _power_of_two(size: int) -> int:
    if size & (size - 1):
        raise ValueError(f"{size} is not a power of two; the default is 64")
    return size


ChunkSize = Annotated[
    int, Field(gt=0, description="Tokens a chunk of the chunked form: a power of two."), AfterValidator(_power_of_two)
]


class LayerContext(NamedTuple):
    """Where a mixer sits: the model's width and depth, and the layer's index (traced, where layers are stacked)."""

    width: int
    depth: int
    index: Int[Array, ""]

    @property
    def output_gain(self) -> float:
        """Initial scale of projections into the residual stream: 1/sqrt(2 depth), two of them a layer (GPT-2)."""
        return (2 * self.depth) ** -0.5


def head_size(total: float, heads: int, what: str) -> int:
    """Split `total` channels over `heads`.

    Raises:
      UserError: if they do not divide.
    """
    if total != int(total) or int(total) % heads:
        raise UserError(f"{what}: {total:g} channels do not divide over heads={heads}; change the width, heads or expansion")
    return int(total) // heads


def split_heads(x: Float[Array, "B T HK"], heads: int, axis: str = "heads") -> Float[Array, "B T H K"]:
    return constrain(x.reshape(*x.shape[:-1], heads, -1), "batch", "sequence", axis, None)


class QKV(nnx.Module):
    """Projections to queries, keys and values, each optionally followed by a short convolution with silu."""

    def __init__(self, width: int, keys: int, values: int, heads: int, convolution: int, *, rngs: nnx.Rngs):
        self.heads = heads
        sizes = {"q": keys, "k": keys, "v": values}
        self.project = nnx.Dict({n: Dense(width, s, axes=("embed", "heads"), rngs=rngs) for n, s in sizes.items()})
        self.convolve = nnx.Dict(
            {n: ShortConvolution(s, convolution, axis="heads", rngs=rngs) for n, s in sizes.items()} if convolution else {}
        )

    def __call__(self, x: Float[Array, "B T D"], state: State | None, segment_ids: Int[Array, "B T"] | None):
        heads, new_state = {}, {}
        for name, project in self.project.items():
            y = project(x)
            if name in self.convolve:
                y, new_state[name] = self.convolve[name](y, None if state is None else state[name], segment_ids)
            heads[name] = split_heads(y, self.heads)
        return heads["q"], heads["k"], heads["v"], new_state

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike) -> State:
        return {name: convolution.init_state(batch, dtype) for name, convolution in self.convolve.items()}


class HeadOutput(nnx.Module):
    """Per-head RMSNorm of the recurrence's output, times swish(x W_gate) if gated, then the output projection.

    The norm's scale is shared by all heads (fla: `FusedRMSNormGated`).
    """

    def __init__(self, context: LayerContext, values: int, head_dim: int, *, gate: bool, eps: float = 1e-5, rngs: nnx.Rngs):
        self.norm = RMSNorm(head_dim, eps=eps)
        self.gate = Dense(context.width, values, axes=("embed", "heads"), rngs=rngs) if gate else None
        self.project = Dense(values, context.width, axes=("heads", "embed"), gain=context.output_gain, rngs=rngs)

    def __call__(self, o: Float[Array, "B T H V"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        y = self.norm(o.astype(x.dtype)).reshape(*x.shape[:-1], -1)
        if self.gate is not None:
            y = y * jax.nn.silu(self.gate(x))
        return self.project(y)


def recurrent_flops(heads: int, keys: int, values: int) -> float:
    """Forward FLOPs per token of a matrix-valued recurrence: write k^T v and read q S, 2KV each and head."""
    return 4.0 * heads * keys * values


def zeros_state(batch: int, heads: int, keys: int, values: int) -> Float[Array, "B H K V"]:
    return jnp.zeros((batch, heads, keys, values), jnp.float32)
