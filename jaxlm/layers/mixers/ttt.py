"""TTT-Linear (Sun et al. 2024, arXiv 2407.04620; the layer with the Mamba backbone of the official code)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import AfterValidator, Field

from jaxlm.layers.linear import Dense
from jaxlm.layers.mixers.common import LayerContext, State, head_size, split_heads
from jaxlm.layers.norms import LayerNorm
from jaxlm.layers.positions import positions_in_segments, rotary
from jaxlm.ops.convolution import short_convolution
from jaxlm.ops.fast_weights import ttt_linear, ttt_state
from jaxlm.parallel.context import constrain
from jaxlm.params import param
from jaxlm.schema import Schema


def _power_of_two(size: int) -> int:
    if size & (size - 1):
        raise ValueError(f"{size} is not a power of two; the default is 16")
    return size


FrozenChunk = Annotated[
    int,
    Field(
        gt=0,
        description="Tokens, a power of two, whose gradients are taken at the same inner weights. Part of the model: "
        "another size is another model.",
    ),
    AfterValidator(_power_of_two),
]


class TTTLinearSettings(Schema):
    """A linear inner model a head, trained on each token to make its value of its key."""

    op: ClassVar[str] = "ttt_linear"
    kind: Literal["ttt_linear"] = "ttt_linear"
    head_dim: int = Field(64, gt=0, description="Channels a head: the inner model's width.")
    base_rate: float = Field(1.0, gt=0, description="Largest inner learning rate, before it is divided by head_dim.")
    rope_base: float = Field(10_000.0, gt=1, description="Base of the rotary embedding of positions inside the chunk.")
    convolution: int = Field(4, gt=0, description="Width of the two short convolutions that tell q and k apart.")
    chunk_size: FrozenChunk = 16

    def heads(self, width: int) -> int:
        return head_size(width, self.head_dim, "ttt_linear: the width over head_dim, as")

    def sequence_flops(self, width: int, context: int) -> float:
        """2 K^2 a head each for the prediction of the value, the update and the output."""
        return 6.0 * width * self.head_dim


class TTTLinear(nnx.Module):
    """o_t = f_t(q_t) with f(x) = x + LN(x W + b) trained by gradient descent; LN(o) gelu(W_g x) W_o (section 2).

    q and k share a projection, followed by a convolution each (with a bias, no activation), and are rotated by the
    position in the chunk. The inner learning rate of token s, read at position t of the chunk, is

        base_rate max(0, 1 / (t + 1) + token_rate_t) sigmoid(w x_s + b) / head_dim.

    Gradients of W and b are taken at the values that enter the chunk, so chunk_size is a hyper-parameter of the model, not
    of how it is computed.
    """

    def __init__(self, settings: TTTLinearSettings, context: LayerContext, *, rngs: nnx.Rngs):
        self.settings = settings
        width, heads, size = context.width, settings.heads(context.width), settings.head_dim
        self.qk = Dense(width, width, axes=("embed", "heads"), rngs=rngs)
        self.v = Dense(width, width, axes=("embed", "heads"), rngs=rngs)
        bound = settings.convolution**-0.5
        uniform = lambda *shape: jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)  # noqa: E731
        self.q_convolution = param(uniform(settings.convolution, width), (None, "heads"), "convolution")
        self.q_bias = param(uniform(width), ("heads",), "bias")
        self.k_convolution = param(uniform(settings.convolution, width), (None, "heads"), "convolution")
        self.k_bias = param(uniform(width), ("heads",), "bias")
        self.rate = Dense(width, heads, axes=("embed", "heads"), bias=True, rngs=rngs)
        self.token_rate = param(jnp.zeros(settings.chunk_size), (None,), "dynamics")
        self.inner_weight = param(0.02 * jax.random.normal(rngs.params(), (heads, size, size)), ("heads", None, None), "hidden")
        self.inner_bias = param(jnp.zeros((heads, size)), ("heads", None), "bias")
        self.inner_norm_scale = param(jnp.ones((heads, size)), ("heads", None), "norm")
        self.inner_norm_bias = param(jnp.zeros((heads, size)), ("heads", None), "bias")
        self.norm = LayerNorm(width, eps=1e-6, axis="heads")
        self.gate = Dense(width, width, axes=("embed", "heads"), rngs=rngs)
        self.output = Dense(width, width, axes=("heads", "embed"), gain=context.output_gain, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        settings, heads = self.settings, self.inner_bias.shape[-2]
        before = state or dict.fromkeys(("inner", "q", "k"))
        start = None if state is None else state["inner"].position
        # A state's position is that in its chunk, which is all that matters.
        positions = positions_in_segments(segment_ids, x.shape[:2], start) % settings.chunk_size
        shared = constrain(self.qk(x), "batch", "sequence", "heads")

        def convolve(weight, bias, name):
            weight, bias = weight[...].astype(x.dtype), bias[...].astype(x.dtype)
            y, past = short_convolution(shared, weight, bias, state=before[name], segment_ids=segment_ids)
            return rotary(split_heads(y, heads), positions, base=settings.rope_base), past

        q, q_state = convolve(self.q_convolution, self.q_bias, "q")
        k, k_state = convolve(self.k_convolution, self.k_bias, "k")
        rate = jax.nn.sigmoid(constrain(self.rate(x), "batch", "sequence", "heads").astype(jnp.float32))
        token_scale = 1 / (1 + jnp.arange(settings.chunk_size, dtype=jnp.float32)) + self.token_rate[...]
        weights = {"w": self.inner_weight[...], "b": self.inner_bias[...]}
        o, inner = ttt_linear(
            q, k, split_heads(self.v(x), heads), settings.base_rate / settings.head_dim * rate,
            jax.nn.relu(token_scale), weights, self.inner_norm_scale[...], self.inner_norm_bias[...],
            initial_state=before["inner"], segment_ids=segment_ids, chunk_size=settings.chunk_size,
        )  # fmt: skip
        y = self.norm(o.reshape(x.shape)) * jax.nn.gelu(self.gate(x))
        return self.output(y), {"inner": inner, "q": q_state, "k": k_state}

    def init_state(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> State:
        past = lambda weight: jnp.zeros((batch, weight.shape[-2] - 1, weight.shape[-1]), dtype)  # noqa: E731
        inner = ttt_state(batch, *self.inner_bias.shape[-2:])
        return {"inner": inner, "q": past(self.q_convolution), "k": past(self.k_convolution)}
