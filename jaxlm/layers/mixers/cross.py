"""Mixers that read what an earlier block made: cross-attention over its keys and values, the gated memory unit.

What an attention block with `produces: kv` hands on, `KV`, is a dict of
  k [B, T, G, K], v [B, T, G, V]: of the call's tokens, positions already in the keys;
  positions [B, T]: of the call's tokens in their documents;
  before, after: the block's cache (`jaxlm.ops.attention.init_attention_cache`) without and with these tokens, None for
    both in a call without state.
Readers keep no cache of their own. They may come for the last token of the call alone, as a prefill does that stops
early for all others (YOCO, arXiv 2405.05254).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field, model_validator

from jaxlm.layers.linear import Dense
from jaxlm.layers.mixers.attention import Differential
from jaxlm.layers.mixers.common import LayerContext, State, head_size, split_heads
from jaxlm.layers.norms import RMSNorm
from jaxlm.layers.positions import positions_in_segments, rotary
from jaxlm.ops.attention import attention, init_attention_cache, read_cache, score_cache, write_cache
from jaxlm.parallel.context import constrain
from jaxlm.schema import Schema, UserError

KV = dict[str, Any]


class CrossAttentionSettings(Schema):
    """Attention with queries of its own over the keys and values of an earlier block."""

    op: ClassVar[str] = "attention"
    consumes: ClassVar[str] = "kv"
    reads_only_shared: ClassVar[bool] = True
    kind: Literal["cross_attention"] = "cross_attention"
    heads: int = Field(8, gt=0, description="Number of query heads, a multiple of the producer's kv_heads.")
    head_dim: int | None = Field(None, gt=0, description="Channels a head, the producer's; null: width / heads.")
    qk_norm: bool = Field(False, description="RMSNorm of queries per head, where the producer has it for its keys.")
    rope_base: float | None = Field(
        None, gt=1, description="Base of the rotary embedding of queries: the producer's, null where it has none."
    )
    rope_fraction: float = Field(1.0, gt=0, le=1, description="Share of the channels that rotate: the producer's.")
    differential: bool = Field(False, description="Differential attention, as the producer's.")
    output_gate: Literal["none", "elementwise"] = Field(
        "none", description="Multiply the heads' output by sigmoid of a projection of the layer's input (arXiv 2505.06708)."
    )
    biases: tuple[Literal["q", "output"], ...] = Field((), description="Projections with a bias.")

    @model_validator(mode="after")
    def _heads_pair(self):
        if self.differential and self.heads % 2:
            raise ValueError(f"differential=true pairs heads: heads={self.heads} must be even")
        return self

    def size(self, width: int) -> int:
        return self.head_dim or head_size(width, self.heads, "cross_attention")

    def sequence_flops(self, width: int, context: int) -> float:
        # As a full causal layer of `attention` counts.
        return (6.0 if self.differential else 4.0) * self.heads * self.size(width) * (context + 1) / 2


class CrossAttention(nnx.Module):
    """Causal attention of a block's own queries over shared keys and values (YOCO, arXiv 2405.05254, section 2.2)."""

    def __init__(self, settings: CrossAttentionSettings, context: LayerContext, *, rngs: nnx.Rngs):
        self.settings = settings
        self.head_dim = size = settings.size(context.width)
        width, total = context.width, settings.heads * size
        self.q = Dense(width, total, axes=("embed", "heads"), bias="q" in settings.biases, rngs=rngs)
        self.q_norm = RMSNorm(size) if settings.qk_norm else None
        self.differential = Differential(size, context.index, rngs=rngs) if settings.differential else None
        gated = settings.output_gate == "elementwise"
        self.gate = Dense(width, total, axes=("embed", "heads"), rngs=rngs) if gated else None
        self.output = Dense(
            total, width, axes=("heads", "embed"), gain=context.output_gain, bias="output" in settings.biases, rngs=rngs
        )

    def exchange(
        self, x: Float[Array, "B T D"], state: None, segment_ids: Int[Array, "B T"] | None, shared: KV
    ) -> tuple[Float[Array, "B T D"], None, None]:
        """y for the call's tokens, or for the last of the producer's alone.

        Raises:
          UserError: if heads do not fit the producer's, or x has neither all of the producer's tokens nor the last one.
        """
        self._check(x, shared)
        settings, length = self.settings, x.shape[1]
        q = split_heads(self.q(x), settings.heads)
        if self.q_norm is not None:
            q = self.q_norm(q)
        positions = shared["positions"][:, -length:]
        if settings.rope_base is not None:
            q = rotary(q, positions, base=settings.rope_base, fraction=settings.rope_fraction)
        if self.differential is not None:
            q = self.differential.pad(q)
        scale = self.head_dim**-0.5
        if length == 1 and shared["after"] is not None:
            # The cache holds all that the last token sees, and nothing else.
            cache = shared["after"]
            o = read_cache(scale * score_cache(q, cache["k"]), cache["v"], cache["positions"] >= 0).astype(x.dtype)
        else:
            o, _ = attention(
                q, shared["k"], shared["v"], scale=scale,
                segment_ids=segment_ids, positions=positions, cache=shared["before"],
            )  # fmt: skip
        if self.differential is not None:
            o = self.differential.combine(o)
        o = constrain(o, "batch", "sequence", "heads", None)
        if self.gate is not None:
            o = o * jax.nn.sigmoid(self.gate(x)).reshape(o.shape)
        return self.output(o.reshape(*x.shape[:2], -1)), None, None

    def _check(self, x, shared: KV) -> None:
        settings, groups, size = self.settings, shared["k"].shape[2], shared["k"].shape[3]
        mine = (1 + settings.differential) * self.head_dim
        if size != mine or settings.heads % groups:
            raise UserError(
                f"cross_attention: heads={settings.heads} of head_dim={self.head_dim} with differential="
                f"{settings.differential} do not fit keys of {groups} heads of {size} channels; take head_dim and "
                "differential of the block that produces kv, and a multiple of its kv_heads"
            )
        length, made = x.shape[1], shared["k"].shape[1]
        if length != made and (length != 1 or shared["after"] is None):
            raise UserError(
                f"cross_attention: {length} tokens over keys of {made}; give all tokens, or with a state the last one"
            )

    def init_state(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> None:
        return None


class KeyValueSettings(Schema):
    """Keys and values for the cross-attention of later blocks, and nothing else (the middle of YOCO)."""

    op: ClassVar[str] = "attention"
    produces: ClassVar[str] = "kv"
    kind: Literal["key_value"] = "key_value"
    kv_heads: int = Field(8, gt=0, description="Number of key/value heads.")
    head_dim: int = Field(128, gt=0, description="Channels a head.")
    k_norm: bool = Field(False, description="RMSNorm of keys per head.")
    rope_base: float | None = Field(10_000.0, gt=1, description="Base of the rotary embedding of keys; null for none.")
    rope_fraction: float = Field(1.0, gt=0, le=1, description="Share of the channels that rotate.")

    def sequence_flops(self, width: int, context: int) -> float:
        return 0.0


class KeyValue(nnx.Module):
    """k = RoPE(x W_k), v = x W_v, made once for the whole cross-decoder (YOCO, arXiv 2405.05254, eq. 2); y = 0.

    The block's norm is YOCO's norm before the projection. Give the block `ffn: {kind: none}` in a stage of its own.
    """

    def __init__(self, settings: KeyValueSettings, context: LayerContext, *, rngs: nnx.Rngs):
        self.settings = settings
        total = settings.kv_heads * settings.head_dim
        self.k = Dense(context.width, total, axes=("embed", "kv_heads"), rngs=rngs)
        self.v = Dense(context.width, total, axes=("embed", "kv_heads"), rngs=rngs)
        self.k_norm = RMSNorm(settings.head_dim) if settings.k_norm else None

    def exchange(
        self, x: Float[Array, "B T D"], state: State | None, segment_ids: Int[Array, "B T"] | None, shared: None
    ) -> tuple[Float[Array, "B T D"], State | None, KV]:
        settings = self.settings
        k = split_heads(self.k(x), settings.kv_heads, "kv_heads")
        v = split_heads(self.v(x), settings.kv_heads, "kv_heads")
        if self.k_norm is not None:
            k = self.k_norm(k)
        start = None if state is None else state["position"]
        positions = positions_in_segments(segment_ids, x.shape[:2], start)
        if settings.rope_base is not None:
            k = rotary(k, positions, base=settings.rope_base, fraction=settings.rope_fraction)
        before = after = new_state = None
        if state is not None:
            before = state["cache"]
            after = write_cache(before, k, v, positions, segment_ids)
            new_state = {"cache": after, "position": positions[:, -1] + 1}
        made = {"k": k, "v": v, "positions": positions, "before": before, "after": after}
        return jnp.zeros_like(x), new_state, made

    def init_state(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> State:
        cache = init_attention_cache(batch, length, self.settings.kv_heads, self.settings.head_dim, dtype)
        return {"cache": cache, "position": jnp.zeros(batch, jnp.int32)}


class GMUSettings(Schema):
    """Gated memory unit: a gate over the memory of an earlier recurrent block."""

    op: ClassVar[None] = None
    consumes: ClassVar[str] = "memory"
    reads_only_shared: ClassVar[bool] = True
    kind: Literal["gmu"] = "gmu"
    memory: int | None = Field(None, gt=0, description="Channels of the memory; null: 2 * width, as Mamba and Mamba-2 make it.")
    norm: bool = Field(
        False, description="RMSNorm after gating (nGMU), for memories taken in front of their block's norm: mamba2's."
    )
    norm_groups: int = Field(1, gt=0, description="Equal parts of the channels that are normed each for itself.")

    @model_validator(mode="after")
    def _groups_of_a_norm(self):
        if self.norm_groups > 1 and not self.norm:
            raise ValueError(f"norm_groups={self.norm_groups} without a norm; set norm: true")
        return self

    def sequence_flops(self, width: int, context: int) -> float:
        return 0.0


class GatedMemoryUnit(nnx.Module):
    """y = (m * silu(x W1)) W2, m the memory of the same token (Ren et al. 2025, arXiv 2507.06607, section 2); no state."""

    def __init__(self, settings: GMUSettings, context: LayerContext, *, rngs: nnx.Rngs):
        self.settings = settings
        self.memory = settings.memory or 2 * context.width
        size = head_size(self.memory, settings.norm_groups, "gmu: a norm over norm_groups") if settings.norm else 0
        self.gate = Dense(context.width, self.memory, axes=("embed", "heads"), rngs=rngs)
        self.norm = RMSNorm(size, eps=1e-5) if settings.norm else None
        self.output = Dense(self.memory, context.width, axes=("heads", "embed"), gain=context.output_gain, rngs=rngs)

    def exchange(
        self, x: Float[Array, "B T D"], state: None, segment_ids: Int[Array, "B T"] | None, shared: Float[Array, "B T M"]
    ) -> tuple[Float[Array, "B T D"], None, None]:
        """y for the call's tokens, or for the last of them alone.

        Raises:
          UserError: if the memory's channels are not `memory`.
        """
        if shared.shape[-1] != self.memory:
            raise UserError(f"gmu: memory={self.memory} but the block before makes {shared.shape[-1]} channels; set gmu.memory")
        gated = shared[:, -x.shape[1] :].astype(x.dtype) * jax.nn.silu(self.gate(x))
        if self.norm is not None:
            parts = gated.reshape(*gated.shape[:2], self.settings.norm_groups, -1)
            gated = self.norm(parts).reshape(gated.shape)
        return self.output(gated), None, None

    def init_state(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> None:
        return None
