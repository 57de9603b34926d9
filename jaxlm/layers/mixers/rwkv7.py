"""RWKV-7 (Peng et al. 2025, arXiv 2503.14456): time mixing on the generalised delta rule, and channel mixing.

Initial values follow the authors' training code (RWKV-LM, RWKV-v7/train_temp).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field

from jaxlm.layers.linear import Dense
from jaxlm.layers.mixers.common import ChunkSize, LayerContext, State, head_size, split_heads, zeros_state
from jaxlm.layers.mixers.delta import l2_normalise
from jaxlm.ops.convolution import short_convolution
from jaxlm.ops.delta_rule import dplr_delta_rule
from jaxlm.parallel.context import constrain
from jaxlm.params import param
from jaxlm.schema import Schema

MIXED = ("r", "w", "k", "v", "a", "g")
# Log decays are -exp(-1/2) sigmoid(..), so that decays are in (0.545, 1).
DECAY_BOUND = -math.exp(-0.5)


class RWKV7Settings(Schema):
    """Generalised delta rule: per-channel decay, and a removal key apart from the write key."""

    op: ClassVar[str] = "dplr_delta_rule"
    kind: Literal["rwkv7"] = "rwkv7"
    head_dim: int = Field(64, gt=0, description="Channels a head.")
    decay_rank: int | None = Field(None, gt=0, description="Rank of the decay's projection; null: 2.5 sqrt(width), in 32s.")
    rate_rank: int | None = Field(
        None, gt=0, description="Rank of the in-context learning rate's projection; null: 2.5 sqrt(width), in 32s."
    )
    value_rank: int | None = Field(
        None, gt=0, description="Rank of the value residual's projection; null: 1.7 sqrt(width), in 32s."
    )
    gate_rank: int | None = Field(None, gt=0, description="Rank of the output gate's projection; null: 5 sqrt(width), in 32s.")
    value_residual: Literal["none", "make", "mix"] = Field(
        "none",
        description="'make': the first layer, whose values the later ones mix into theirs; 'mix': these; 'none': neither.",
    )
    chunk_size: ChunkSize = 64

    @property
    def produces(self) -> str | None:
        return "v_first" if self.value_residual == "make" else None

    @property
    def consumes(self) -> str | None:
        return "v_first" if self.value_residual == "mix" else None

    def heads(self, width: int) -> int:
        return head_size(width, self.head_dim, "rwkv7: the width over head_dim, as")

    def rank(self, name: Literal["decay", "rate", "value", "gate"], width: int) -> int:
        """The rank set, or the authors' factor times sqrt(width), scaled by head_dim / 64, in multiples of 32."""
        factor = {"decay": 2.5, "rate": 2.5, "value": 1.7, "gate": 5.0}[name] * self.head_dim / 64
        return getattr(self, f"{name}_rank") or max(32, 32 * round(factor * width**0.5 / 32))

    def sequence_flops(self, width: int, context: int) -> float:
        """Read by a, write by b, write by k, read by r: 2K^2 each a head."""
        return 8.0 * width * self.head_dim


def _orthogonal(dense: Dense, gain: float, rngs: nnx.Rngs) -> Dense:
    """The projection with an orthogonal kernel (orthonormal rows or columns, whichever are fewer) times a gain."""
    kernel = jax.nn.initializers.orthogonal(gain)(rngs.params(), dense.kernel.shape, jnp.float32)
    dense.kernel[...] = kernel
    return dense


def initial_mix(names: Sequence[str], context: LayerContext) -> Float[Array, "N D"]:
    """mu of the inputs of these projections: how much of the token before they see."""
    exponents = {"r": 0.2, "w": 0.9, "k": 0.7, "v": 0.7, "a": 0.9, "g": 0.2}
    fall = 1 - jnp.asarray(context.index, jnp.float32) / context.depth
    channel = jnp.arange(context.width, dtype=jnp.float32)
    return jnp.stack([1 - (channel / context.width) ** (exponents[name] * fall) for name in names])


def initial_channels(
    channels: int, head_dim: int, context: LayerContext
) -> tuple[Float[Array, " C"], Float[Array, " C"], Float[Array, " C"]]:
    """A ramp from -0.5 to 0.5 over the channels, and the biases of the decay and of the in-context learning rate."""
    rise = jnp.asarray(context.index, jnp.float32) / max(context.depth - 1, 1)
    channel = jnp.arange(channels, dtype=jnp.float32)
    linear = channel / (channels - 1) - 0.5
    zigzag = 2 * (channel % head_dim) / (head_dim - 1) - 1
    zigzag = zigzag * jnp.abs(zigzag)
    decay = -6 + 6 * (channel / (channels - 1)) ** (1 + rise**0.3) + 0.5 + 2.5 * zigzag
    return linear, decay, -0.19 + 0.3 * zigzag + 0.4 * linear


class LoRA(nnx.Module):
    """activation(x W_down) W_up (+ bias): zero at the start but for the bias, as W_down is; W_up is orthogonal, gain 0.1."""

    def __init__(self, width: int, rank: int, bias: Float[Array, D] | None, *, rngs: nnx.Rngs):
        self.down = Dense(width, rank, axes=("embed", None), gain=0, rngs=rngs)
        gain = 0.1 * max(1.0, rank / width) ** 0.5
        self.up = _orthogonal(Dense(rank, width, axes=(None, "heads"), rngs=rngs), gain, rngs)
        self.bias = None if bias is None else param(bias, ("heads",), "dynamics")

    def __call__(self, x: Float[Array, "B T D"], activation=None) -> Float[Array, "B T D"]:
        """Float32 with a bias, which sets a recurrence's gates; x's dtype without."""
        hidden = self.down(x)
        y = constrain(self.up(hidden if activation is None else activation(hidden)), "batch", "sequence", "heads")
        return y if self.bias is None else y.astype(jnp.float32) + self.bias[...]


def token_shift(
    x: Float[Array, "B T D"], state: Float[Array, "B 1 D"] | None, segment_ids: Int[Array, "B T"] | None
) -> tuple[Float[Array, "B T D"], Float[Array, "B 1 D"]]:
    """x_{t-1} - x_t, with x_{-1} from the state and zero before a document's first token; and the last x."""
    # The convolution with taps (1, 0) knows documents, states and sequence shards.
    taps = jnp.zeros((2, x.shape[-1]), x.dtype).at[0].set(1)
    previous, state = short_convolution(x, taps, state=state, segment_ids=segment_ids)
    return previous - x, state


class RWKV7(nnx.Module):
    """S_t = Diag(exp(w_t)) S_{t-1} - (kk_t a_t)^T (kk_t S_{t-1}) + k_t^T v_t, o_t = r_t S_t (section 4, eq. 3-22).

    Inputs are x_t + mu (x_{t-1} - x_t), a mu for each of r, w, k, v, a, g. w = -exp(-1/2) sigmoid(W_w), a = sigmoid(W_a),
    kk = k k_k of unit length a head, k <- k (1 + (a - 1) k_a). Then GroupNorm over each head, plus (r k r_k summed over
    the head) v, times the gate, and the output projection.

    With value_residual = mix, v <- v + (v_first - v) sigmoid(W_v), v_first being the values of the layer that has
    value_residual = make (the model's first).
    """

    def __init__(self, settings: RWKV7Settings, context: LayerContext, *, rngs: nnx.Rngs):
        self.settings = settings
        width, depth = context.width, context.depth
        self.heads, size = settings.heads(width), settings.head_dim
        layer = jnp.asarray(context.index, jnp.float32)
        self.mix = param(initial_mix(MIXED, context), (None, None), "dynamics")
        linear, decay, rate = initial_channels(width, size, context)
        self.decay = LoRA(width, settings.rank("decay", width), decay, rngs=rngs)
        self.rate = LoRA(width, settings.rank("rate", width), rate, rngs=rngs)
        mixes = settings.value_residual == "mix"
        self.value = LoRA(width, settings.rank("value", width), 0.73 - 0.4 * linear, rngs=rngs) if mixes else None
        self.gate = LoRA(width, settings.rank("gate", width), None, rngs=rngs)
        self.k_k = param(0.71 - 0.1 * linear, ("heads",), "dynamics")
        self.k_a = param(jnp.full(width, 1.02), ("heads",), "dynamics")
        self.r_k = param(jnp.full((self.heads, size), -0.04), ("heads", None), "dynamics")

        project = lambda gain: _orthogonal(Dense(width, width, axes=("embed", "heads"), rngs=rngs), gain, rngs)  # noqa: E731
        self.r, self.k, self.v = project(1.0), project(0.1), project(1.0)
        scale = jnp.broadcast_to(((layer + 1) / depth) ** 0.7, (self.heads, size))
        self.norm_scale = param(scale, ("heads", None), "norm")
        self.norm_bias = param(jnp.zeros((self.heads, size)), ("heads", None), "bias")
        self.output = Dense(width, width, axes=("heads", "embed"), gain=0, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State]:
        y, state, _ = self.exchange(x, state, segment_ids, None)
        return y, state

    def exchange(
        self,
        x: Float[Array, "B T D"],
        state: State | None,
        segment_ids: Int[Array, "B T"] | None,
        shared: Float[Array, "B T D"] | None,
    ) -> tuple[Float[Array, "B T D"], State, Float[Array, "B T D"] | None]:
        """As a call; `shared` are the first layer's values, to mix into these; the third result these, if they are first."""
        settings = self.settings
        delta, shift = token_shift(x, None if state is None else state["shift"], segment_ids)
        mixed = {name: x + delta * mu for name, mu in zip(MIXED, self.mix[...].astype(x.dtype), strict=True)}
        heads = lambda y: split_heads(y, self.heads)  # noqa: E731
        per_head = lambda p: p[...].reshape(self.heads, -1)  # noqa: E731

        r, k, flat_v = self.r(mixed["r"]), self.k(mixed["k"]), self.v(mixed["v"])
        w = DECAY_BOUND * jax.nn.sigmoid(self.decay(mixed["w"], jnp.tanh))
        rate = heads(jax.nn.sigmoid(self.rate(mixed["a"])))
        gate = self.gate(mixed["g"], jax.nn.sigmoid)
        if self.value is not None:
            flat_v = flat_v + (shared - flat_v) * jax.nn.sigmoid(self.value(mixed["v"])).astype(x.dtype)
        r, k, v = heads(r), heads(k).astype(jnp.float32), heads(flat_v)
        removal = l2_normalise(k * per_head(self.k_k))
        k = k * (1 + (rate - 1) * per_head(self.k_a))
        k, a, b = (y.astype(x.dtype) for y in (k, -removal, removal * rate))
        o, recurrent = dplr_delta_rule(
            r, k, v, a, b, heads(w), scale=1.0,
            initial_state=None if state is None else state["recurrent"],
            segment_ids=segment_ids, chunk_size=settings.chunk_size,
        )  # fmt: skip
        bonus = jnp.sum(r.astype(jnp.float32) * k.astype(jnp.float32) * self.r_k[...], axis=-1, keepdims=True)
        y = self._group_norm(o) + bonus * v
        y = self.output(y.astype(x.dtype).reshape(x.shape) * gate)
        made = flat_v if settings.value_residual == "make" else None
        return y, {"recurrent": recurrent, "shift": shift}, made

    def _group_norm(self, o: Float[Array, "B T H V"]) -> Float[Array, "B T H V"]:
        centred = o.astype(jnp.float32)
        centred = centred - jnp.mean(centred, axis=-1, keepdims=True)
        variance = jnp.mean(centred**2, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + 1e-5 * self.settings.head_dim)
        return normed * self.norm_scale[...] + self.norm_bias[...]

    def init_state(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> State:
        size = self.settings.head_dim
        shift = jnp.zeros((batch, 1, self.mix.shape[-1]), dtype)
        return {"recurrent": zeros_state(batch, self.heads, size, size), "shift": shift}


class RWKVChannelMixingSettings(Schema):
    """Two matrices with a squared ReLU, on inputs mixed with the token before."""

    kind: Literal["rwkv"] = "rwkv"
    ratio: float = Field(4.0, gt=0, description="Hidden channels as a multiple of the model width.")

    def hidden_size(self, width: int) -> int:
        return head_size(width * self.ratio, 1, "ffn.ratio of kind rwkv")


class RWKVChannelMixing(nnx.Module):
    """relu((x_t + mu (x_{t-1} - x_t)) W_k)^2 W_v (arXiv 2503.14456, section 4.4), whose state is the last token."""

    def __init__(self, settings: RWKVChannelMixingSettings, context: LayerContext, *, rngs: nnx.Rngs):
        width, hidden = context.width, settings.hidden_size(context.width)
        fall = 1 - jnp.asarray(context.index, jnp.float32) / context.depth
        mix = 1 - (jnp.arange(width, dtype=jnp.float32) / width) ** fall**4
        self.mix = param(mix, (None,), "dynamics")
        self.key = _orthogonal(Dense(width, hidden, axes=("embed", "mlp"), rngs=rngs), 1.0, rngs)
        self.value = Dense(hidden, width, axes=("mlp", "embed"), gain=0, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        state: Float[Array, "B 1 D"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B 1 D"]]:
        delta, state = token_shift(x, state, segment_ids)
        hidden = jnp.square(jax.nn.relu(self.key(x + delta * self.mix[...].astype(x.dtype))))
        return self.value(constrain(hidden, "batch", "sequence", "mlp")), state

    def init_state(self, batch: int, dtype: jax.typing.DTypeLike) -> Float[Array, "B 1 D"]:
        return jnp.zeros((batch, 1, self.mix.shape[-1]), dtype)
