"""Softmax attention with grouped queries, QK-norm, rotary positions, sliding window, output gate; differential attention."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field, model_validator

from jaxlm.layers.linear import Dense
from jaxlm.layers.mixers.common import LayerContext, State, head_size, split_heads
from jaxlm.layers.norms import RMSNorm
from jaxlm.layers.positions import positions_in_segments, rotary
from jaxlm.ops.attention import attention, init_attention_cache, read_cache, score_cache, write_cache
from jaxlm.parallel.context import constrain
from jaxlm.params import param
from jaxlm.schema import Schema


class AttentionSettings(Schema):
    """Causal softmax attention."""

    op: ClassVar[str] = "attention"
    kind: Literal["attention"] = "attention"
    heads: int = Field(8, gt=0, description="Number of query heads.")
    kv_heads: int | None = Field(None, gt=0, description="Number of key/value heads (divides heads); null: as many as heads.")
    head_dim: int | None = Field(None, gt=0, description="Channels a head; null: width / heads.")
    qk_norm: bool = Field(True, description="RMSNorm of queries and keys per head (Qwen3).")
    rope_base: float | None = Field(10_000.0, gt=1, description="Base of the rotary embedding; null for none (NoPE).")
    rope_fraction: float = Field(1.0, gt=0, le=1, description="Share of the channels that rotate.")
    window: int | None = Field(None, gt=0, description="Tokens a query sees, itself included; null for all.")
    output_gate: Literal["none", "elementwise", "headwise"] = Field(
        "none", description="Multiply the heads' output by sigmoid of a projection of the layer's input (arXiv 2505.06708)."
    )

    biases: tuple[Literal["q", "k", "v", "output"], ...] = Field((), description="Projections with a bias.")
    differential: bool = Field(
        False, description="Heads in adjacent pairs, whose output is softmax_1 - lambda softmax_2 of their values (2410.05258)."
    )
    produces: Literal["kv"] | None = Field(
        None, description="kv: cross-attention in later blocks reads this layer's keys and values (YOCO, SambaY)."
    )

    @model_validator(mode="after")
    def _heads_divide(self):
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"kv_heads={self.kv_heads} must divide heads={self.heads}")
        if self.differential and self.groups % 2:
            raise ValueError(f"differential=true pairs heads: kv_heads={self.groups} must be even")
        return self

    @model_validator(mode="after")
    def _producer_keeps_all(self):
        if self.produces is not None and self.window is not None:
            raise ValueError(
                f"produces={self.produces} with window={self.window}: later blocks read every token; set window to null"
            )
        return self

    @property
    def groups(self) -> int:
        return self.kv_heads or self.heads

    def size(self, width: int) -> int:
        return self.head_dim or head_size(width, self.heads, "attention")

    def sequence_flops(self, width: int, context: int) -> float:
        # Scores and values, 2 FLOPs a product; a causal query sees (context + 1) / 2 keys on average, a windowed one fewer.
        window = min(self.window or context, context)
        keys_seen = window * (context - (window - 1) / 2) / context
        # Differential values are twice as wide as keys.
        return (6.0 if self.differential else 4.0) * self.heads * self.size(width) * keys_seen


class Differential(nnx.Module):
    """The pairing of heads in differential attention (Ye et al. 2024, arXiv 2410.05258; heads 2p and 2p + 1 are a pair).

    o_p = RMSNorm((softmax(q_1 k_1^T / sqrt(K)) - lambda softmax(q_2 k_2^T / sqrt(K))) v) (1 - lambda_init), with
    lambda = exp(l_q1 . l_k1) - exp(l_q2 . l_k2) + lambda_init (eq. 1-3), lambda_init = 0.8 - 0.6 exp(-0.3 layer), v the
    pair's values side by side; the vectors and the norm's scale are shared by the heads of a layer.

    A pair's keys side by side are one head of 2K channels, whose first half the first query reads and whose second half
    the second: queries padded by zeros make it one call of the op, with keys and values as wide as flash kernels want.
    """

    def __init__(self, head_dim: int, layer: Int[Array, ""], *, rngs: nnx.Rngs):
        vectors = 0.1 * jax.random.normal(rngs.params(), (4, head_dim))
        self.vectors = param(vectors, (None, None), "dynamics")
        self.initial = param(0.8 - 0.6 * jnp.exp(-0.3 * jnp.asarray(layer, jnp.float32)), (), "constant")
        self.norm = RMSNorm(2 * head_dim, eps=1e-5)

    def pad(self, q: Float[Array, "B T H K"]) -> Float[Array, "B T H 2K"]:
        """Queries of pairs, against their keys side by side."""
        batch, length, heads, size = q.shape
        which = jnp.eye(2, dtype=q.dtype)[:, :, None]
        return (q.reshape(batch, length, heads // 2, 2, 1, size) * which).reshape(batch, length, heads, 2 * size)

    def combine(self, o: Float[Array, "B T H 2K"]) -> Float[Array, "B T H/2 2K"]:
        """The normed differences of the pairs' outputs, in o's dtype."""
        q1, k1, q2, k2 = self.vectors[...].astype(jnp.float32)
        initial = jax.lax.stop_gradient(self.initial[...])
        weight = jnp.exp(jnp.sum(q1 * k1)) - jnp.exp(jnp.sum(q2 * k2)) + initial
        first, second = o[:, :, 0::2].astype(jnp.float32), o[:, :, 1::2].astype(jnp.float32)
        return ((1 - initial) * self.norm(first - weight * second)).astype(o.dtype)


def pairs(x: Float[Array, "B T G K"]) -> Float[Array, "B T G/2 2K"]:
    """Adjacent heads side by side."""
    return x.reshape(*x.shape[:2], x.shape[2] // 2, 2 * x.shape[3])


class Attention(nnx.Module):
    """softmax(q k^T / sqrt(K)) v with causal, document and window masks (Vaswani et al. 2017; GQA: arXiv 2305.13245)."""

    def __init__(self, settings: AttentionSettings, context: LayerContext, *, rngs: nnx.Rngs):
        self.settings = settings
        self.head_dim = size = settings.size(context.width)
        width, total, grouped = context.width, settings.heads * size, settings.groups * size
        biases = settings.biases
        self.q = Dense(width, total, axes=("embed", "heads"), bias="q" in biases, rngs=rngs)
        self.k = Dense(width, grouped, axes=("embed", "kv_heads"), bias="k" in biases, rngs=rngs)
        self.v = Dense(width, grouped, axes=("embed", "kv_heads"), bias="v" in biases, rngs=rngs)
        self.q_norm = RMSNorm(size) if settings.qk_norm else None
        self.k_norm = RMSNorm(size) if settings.qk_norm else None
        self.differential = Differential(size, context.index, rngs=rngs) if settings.differential else None
        gates = {"none": 0, "elementwise": total, "headwise": settings.heads // (1 + settings.differential)}
        gate = gates[settings.output_gate]
        self.gate = Dense(width, gate, axes=("embed", "heads"), rngs=rngs) if gate else None
        self.output = Dense(total, width, axes=("heads", "embed"), gain=context.output_gain, bias="output" in biases, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State | None]:
        y, state, _ = self.exchange(x, state, segment_ids, None)
        return y, state

    def exchange(
        self, x: Float[Array, "B T D"], state: State | None, segment_ids: Int[Array, "B T"] | None, shared: None
    ) -> tuple[Float[Array, "B T D"], State | None, dict[str, Any]]:
        """As a call, and what cross-attention reads (`jaxlm.layers.mixers.cross`)."""
        q, k, v, positions = self._project(x, x, state, segment_ids)
        before = None if state is None else state["cache"]
        o, after = attention(
            q, k, v, scale=self.head_dim**-0.5,
            window=self.settings.window, segment_ids=segment_ids, positions=positions, cache=before,
        )  # fmt: skip
        new_state = None if after is None else {"cache": after, "position": positions[:, -1] + 1}
        return self._output(x, o), new_state, {"k": k, "v": v, "positions": positions, "before": before, "after": after}

    def exchange_last(
        self, x: Float[Array, "B T D"], state: State, segment_ids: Int[Array, "B T"] | None
    ) -> tuple[Float[Array, "B 1 D"], State, dict[str, Any]]:
        """As `exchange` with a state, but y of the last token alone: all that a prefill wants of a producer whose values
        only later blocks read. Linear in the tokens."""
        q, k, v, positions = self._project(x[:, -1:], x, state, segment_ids)
        after = write_cache(state["cache"], k, v, positions, segment_ids)
        scores = self.head_dim**-0.5 * score_cache(q, after["k"])
        o = read_cache(scores, after["v"], after["positions"] >= 0).astype(x.dtype)
        made = {"k": k, "v": v, "positions": positions, "before": state["cache"], "after": after}
        return self._output(x[:, -1:], o), {"cache": after, "position": positions[:, -1] + 1}, made

    def _project(self, x_q, x, state, segment_ids):
        """Queries of x_q, the last tokens of x; keys, values and positions of x."""
        settings = self.settings
        q = split_heads(self.q(x_q), settings.heads)
        k = split_heads(self.k(x), settings.groups, "kv_heads")
        v = split_heads(self.v(x), settings.groups, "kv_heads")
        if settings.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        start = None if state is None else state["position"]
        positions = positions_in_segments(segment_ids, x.shape[:2], start)
        if settings.rope_base is not None:
            last = positions[:, -x_q.shape[1] :]
            q = rotary(q, last, base=settings.rope_base, fraction=settings.rope_fraction)
            k = rotary(k, positions, base=settings.rope_base, fraction=settings.rope_fraction)
        if self.differential is not None:
            q, k, v = self.differential.pad(q), pairs(k), pairs(v)
        return q, k, v, positions

    def _output(self, x, o):
        if self.differential is not None:
            o = self.differential.combine(o)
        o = constrain(o, "batch", "sequence", "heads", None)
        if self.gate is not None:
            o = o * jax.nn.sigmoid(self.gate(x)).reshape(*o.shape[:3], -1)
        return self.output(o.reshape(*x.shape[:2], -1))

    def init_state(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> State:
        slots = min(length, self.settings.window or length)
        sides = 2 if self.settings.differential else 1
        cache = init_attention_cache(batch, slots, self.settings.groups // sides, sides * self.head_dim, dtype)
        return {"cache": cache, "position": jnp.zeros(batch, jnp.int32)}
