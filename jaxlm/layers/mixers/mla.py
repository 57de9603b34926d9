"""Multi-head latent attention: keys and values from one small latent a token (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

from __future__ import annotations

from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int
from pydantic import Field

from jaxlm.layers.linear import Dense
from jaxlm.layers.mixers.common import LayerContext, State, split_heads
from jaxlm.layers.norms import RMSNorm
from jaxlm.layers.positions import positions_in_segments, rotary
from jaxlm.ops.attention import attention, init_attention_cache, read_cache, score_cache, write_cache
from jaxlm.parallel.context import constrain
from jaxlm.schema import Schema


class MLASettings(Schema):
    """Multi-head latent attention."""

    op: ClassVar[str] = "attention"
    kind: Literal["mla"] = "mla"
    heads: int = Field(16, gt=0, description="Number of heads.")
    kv_rank: int = Field(512, gt=0, description="Channels of the latent that keys and values come from.")
    q_rank: int | None = Field(None, gt=0, description="Channels of a latent that queries come from; null: straight from x.")
    nope_dim: int = Field(128, gt=0, description="Channels a head of queries and keys without position.")
    rope_dim: int = Field(64, gt=0, multiple_of=2, description="Rotating channels: of each query head, and of one key for all.")
    value_dim: int = Field(128, gt=0, description="Value channels a head.")
    rope_base: float | None = Field(
        10_000.0, gt=1, description="Base of the rotary embedding; null: the rotating channels stay, unrotated (Kimi-Linear)."
    )
    output_gate: Literal["none", "elementwise"] = Field(
        "none", description="Multiply the heads' output by sigmoid of a projection of the layer's input (arXiv 2505.06708)."
    )

    def sequence_flops(self, width: int, context: int) -> float:
        # The expanded form; a causal query sees (context + 1) / 2 keys on average.
        return 2.0 * self.heads * (self.nope_dim + self.rope_dim + self.value_dim) * (context + 1) / 2


class MultiHeadLatentAttention(nnx.Module):
    """c = RMSNorm(x W_DKV), k = [c W_UK ; RoPE(x W_KR)], v = c W_UV, o = softmax(q k^T / sqrt(nope_dim + rope_dim)) v.

    The rotated key is one for all heads, and not normed. The cache holds c and it: kv_rank + rope_dim numbers a token.
    A step absorbs W_UK into the query and W_UV into the output, so that all heads attend to the latents themselves
    (2.1.2); calls of several tokens expand keys and values, which costs fewer products there.

    Rotary pairs are half-split as everywhere here; DeepSeek's checkpoints have them interleaved, which is a permutation
    of the last rope_dim columns of each head of W_Q and of those of W_KR.
    """

    def __init__(self, settings: MLASettings, context: LayerContext, *, rngs: nnx.Rngs):
        self.settings = settings
        width, heads, rank = context.width, settings.heads, settings.kv_rank
        queries, values = heads * (settings.nope_dim + settings.rope_dim), heads * settings.value_dim
        self.q_down = Dense(width, settings.q_rank, axes=("embed", None), rngs=rngs) if settings.q_rank else None
        self.q_norm = RMSNorm(settings.q_rank) if settings.q_rank else None
        self.q = Dense(settings.q_rank or width, queries, axes=(None if settings.q_rank else "embed", "heads"), rngs=rngs)
        self.kv_down = Dense(width, rank, axes=("embed", None), rngs=rngs)
        self.kv_norm = RMSNorm(rank)
        self.k_rope = Dense(width, settings.rope_dim, axes=("embed", None), rngs=rngs)
        self.k_up = Dense(rank, heads * settings.nope_dim, axes=(None, "heads"), rngs=rngs)
        self.v_up = Dense(rank, values, axes=(None, "heads"), rngs=rngs)
        self.gate = Dense(width, values, axes=("embed", "heads"), rngs=rngs) if settings.output_gate != "none" else None
        self.output = Dense(values, width, axes=("heads", "embed"), gain=context.output_gain, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State | None]:
        settings = self.settings
        q = self.q(x if self.q_down is None else self.q_norm(self.q_down(x)))
        q, q_rope = jnp.split(split_heads(q, settings.heads), [settings.nope_dim], axis=-1)
        latent = self.kv_norm(self.kv_down(x))[:, :, None]
        k_rope = self.k_rope(x)[:, :, None]
        start = None if state is None else state["position"]
        positions = positions_in_segments(segment_ids, x.shape[:2], start)
        if settings.rope_base is not None:
            q_rope = rotary(q_rope, positions, base=settings.rope_base)
            k_rope = rotary(k_rope, positions, base=settings.rope_base)
        before = after = None
        if state is not None:
            before = state["cache"]
            after = write_cache(before, k_rope, latent, positions, segment_ids)
        if state is not None and x.shape[1] == 1:
            o = self._absorbed(q, q_rope, after).astype(x.dtype)
        else:
            expanded = None if before is None else {**before, **self._expand(before["k"], before["v"])}
            queries = jnp.concatenate([q, q_rope], axis=-1)
            o, _ = attention(
                queries, **self._expand(k_rope, latent), segment_ids=segment_ids, positions=positions, cache=expanded
            )
        o = constrain(o, "batch", "sequence", "heads", None)
        if self.gate is not None:
            o = o * jax.nn.sigmoid(self.gate(x)).reshape(o.shape)
        y = self.output(o.reshape(*x.shape[:2], -1))
        return y, None if after is None else {"cache": after, "position": positions[:, -1] + 1}

    def _expand(self, k_rope: Float[Array, "B S 1 R"], latent: Float[Array, "B S 1 C"]) -> dict[str, Array]:
        heads = self.settings.heads
        k, v = split_heads(self.k_up(latent[:, :, 0]), heads), split_heads(self.v_up(latent[:, :, 0]), heads)
        k_rope = jnp.broadcast_to(k_rope, (*k.shape[:3], k_rope.shape[-1]))
        return {"k": jnp.concatenate([k, k_rope], axis=-1), "v": v}

    def _absorbed(self, q: Float[Array, "B 1 H N"], q_rope: Float[Array, "B 1 H R"], cache) -> Float[Array, "B 1 H V"]:
        settings = self.settings

        def up(dense: Dense) -> Float[Array, "C H X"]:
            return dense.kernel[...].astype(q.dtype).reshape(settings.kv_rank, settings.heads, -1)

        float32 = {"precision": "highest", "preferred_element_type": jnp.float32}
        queries = jnp.einsum("bthn,chn->bthc", q, up(self.k_up), **float32)
        scores = score_cache(queries, cache["v"]) + score_cache(q_rope, cache["k"])
        scale = (settings.nope_dim + settings.rope_dim) ** -0.5
        o = read_cache(scale * scores, cache["v"], cache["positions"] >= 0)
        return jnp.einsum("bthc,chv->bthv", o.astype(q.dtype), up(self.v_up), **float32)

    def init_state(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> State:
        # The op's cache with the rotated key for k and the latent for v.
        cache = init_attention_cache(batch, length, 1, self.settings.rope_dim, dtype, self.settings.kv_rank)
        return {"cache": cache, "position": jnp.zeros(batch, jnp.int32)}
