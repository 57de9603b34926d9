"""Mixture of memories: a router sends every token to a few of several linear-recurrent states (MoM, arXiv 2502.13685)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int
from pydantic import Field, model_validator

from jaxlm.layers.convolution import ShortConvolution
from jaxlm.layers.linear import Dense
from jaxlm.layers.mixers.common import ChunkSize, HeadOutput, LayerContext, State, head_size, recurrent_flops
from jaxlm.layers.mixers.delta import l2_normalise
from jaxlm.layers.mixers.hgrn import forget_gate
from jaxlm.layers.mixers.mamba2 import dt_bias
from jaxlm.layers.mixers.retention import head_log_decay
from jaxlm.ops.delta_rule import delta_rule
from jaxlm.ops.linear_attention import linear_attention
from jaxlm.ops.segments import resets, run_index
from jaxlm.parallel import sequence
from jaxlm.parallel.context import constrain
from jaxlm.params import param
from jaxlm.schema import Schema, UserError

DELTA_RULES = ("deltanet", "gated_deltanet", "kda")
# The log decay's projection: one number a head, or one a key channel through a low rank.
SCALAR_GATES = ("simple_gla", "mamba2", "gated_deltanet")
VECTOR_GATES = ("gla", "kda")
# Decays of a rate and a step size.
STEPS = ("mamba2", "gated_deltanet", "kda")
# Decays that do not depend on the data, by the name that `head_log_decay` has for them.
FIXED = {"retention": "retnet", "lightning": "lightning"}


class MoMSettings(Schema):
    """Linear attention or a delta rule on several states, of which a token reads and writes a few."""

    kind: Literal["mom"] = "mom"
    rule: Literal[
        "linear", "retention", "lightning", "simple_gla", "gla", "hgrn2", "mamba2", "deltanet", "gated_deltanet", "kda"
    ] = Field(
        "gated_deltanet",
        description="Recurrence of a memory. Decay: none in linear and deltanet; fixed in retention and lightning; a gate a "
        "head in simple_gla, mamba2 and gated_deltanet; a gate a key channel in gla, hgrn2 and kda.",
    )
    memories: int = Field(4, gt=0, description="Number of memories that the router chooses from.")
    top_k: int = Field(2, gt=0, description="Memories a token goes to.")
    shared: bool = Field(True, description="One more memory, to which all tokens go.")
    heads: int = Field(4, gt=0, description="Number of heads.")
    expand_k: float = Field(1.0, gt=0, description="Total key channels as a multiple of the model width.")
    expand_v: float = Field(1.0, gt=0, description="Total value channels as a multiple of the model width.")
    gate_rank: int = Field(16, gt=0, description="Rank of the projection of a gate a key channel.")
    convolution: int = Field(4, ge=0, description="Width of a short convolution on q, k and v; 0 for none.")
    output_gate: bool = Field(True, description="Multiply the normed output by swish of a projection.")
    balance: float = Field(0.01, ge=0, description="Coefficient of the auxiliary loss that spreads tokens over memories.")
    chunk_size: ChunkSize = 64

    @model_validator(mode="after")
    def _enough_memories(self):
        if self.top_k > self.memories:
            raise ValueError(f"top_k={self.top_k} is more than memories={self.memories}; lower it or add memories")
        return self

    @property
    def op(self) -> str:
        return "delta_rule" if self.rule in DELTA_RULES else "linear_attention"

    def sizes(self, width: int) -> tuple[int, int]:
        keys = head_size(width * self.expand_k, self.heads, "mom.expand_k")
        return keys, head_size(width * self.expand_v, self.heads, "mom.expand_v")

    def sequence_flops(self, width: int, context: int) -> float:
        keys, values = self.sizes(width)
        # A delta rule also reads the state by the key: 2KV more.
        one = recurrent_flops(self.heads, keys, values) * (1.5 if self.rule in DELTA_RULES else 1.0)
        return (self.top_k + self.shared) * one


class _Stack(nnx.Module):
    """`Dense` for every memory: x W_r for all r, or x_r W_r where x has a row a memory already."""

    def __init__(self, memories: int, in_features: int, out_features: int, axes: tuple[str | None, ...], *, rngs: nnx.Rngs):
        # As `Dense` starts.
        std = 1 / (in_features**0.5 * 0.87962566103423978)
        kernel = std * jax.random.truncated_normal(rngs.params(), -2, 2, (memories, in_features, out_features))
        self.kernel = param(kernel, (None, *axes), "hidden")

    def __call__(self, x: Float[Array, "B T D"] | Float[Array, "B T R D"]) -> Float[Array, "B T R E"]:
        equation = "btd,rde->btre" if x.ndim == 3 else "btrd,rde->btre"
        return jnp.einsum(equation, x, self.kernel[...].astype(x.dtype))


class _Decay(nnx.Module):
    """The log decay of every token in every memory, float32 [B, T, R, G], G one a head or one a key channel; and the step
    size that it is made of, if it is."""

    def __init__(self, settings: MoMSettings, width: int, memories: int, keys: int, *, rngs: nnx.Rngs):
        heads, rank = settings.heads, settings.gate_rank
        vector, steps = settings.rule in VECTOR_GATES, settings.rule in STEPS
        gates = keys if vector else heads
        self.down = _Stack(memories, width, rank, ("embed", None), rngs=rngs) if vector else None
        self.up = _Stack(memories, rank if vector else width, gates, (None if vector else "embed", "heads"), rngs=rngs)
        # Rates of 1 to 16, step sizes log-uniform from 0.001 to 0.1, common to all memories.
        rates = jnp.log(jax.random.uniform(rngs.params(), (heads,), minval=1, maxval=16))
        self.a_log = param(rates, ("heads",), "dynamics") if steps else None
        self.dt_bias = param(dt_bias(rngs.params(), (gates,), 1e-3, 0.1), ("heads",), "dynamics") if steps else None
        self.bias = None if steps else param(jnp.zeros((memories, gates)), (None, "heads"), "bias")

    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T R G"], Float[Array, "B T R G"] | None]:
        gate = self.up(x if self.down is None else self.down(x)).astype(jnp.float32)
        if self.a_log is None:
            return jax.nn.log_sigmoid(gate + self.bias[...]) / 16, None
        step = jax.nn.softplus(gate + self.dt_bias[...])
        rate = jnp.exp(self.a_log[...])
        return -jnp.repeat(rate, step.shape[-1] // rate.shape[0]) * step, step


class _Groups(NamedTuple):
    """Where tokens go: the slots of N sequences (n rows of the batch each), each a memory's tokens in their order."""

    slot: Int[Array, "B T R"]  # of a token in a memory, counted over all sequences of the row; S where it does not go
    source: Int[Array, "B S"]  # t * R + r of the token and memory in a slot
    filled: Bool[Array, "B S"]
    ids: Int[Array, "N L"]  # segment ids of the sequences

    def gather(self, x: Float[Array, "B T R E"]) -> Float[Array, "N L E"]:
        """What tokens hold for their memory; empty slots get what some token holds."""
        return self._take(x.reshape(x.shape[0], -1, x.shape[3]), self.source)

    def gather_common(self, x: Float[Array, "B T E"]) -> Float[Array, "N L E"]:
        """What tokens hold for all memories alike."""
        return self._take(x, self.source // self.slot.shape[2])

    def _take(self, x, index):
        return jnp.take_along_axis(x, index[..., None], axis=1).reshape(*self.ids.shape, x.shape[2])

    def fill(self, x: Array) -> Array:
        """x [N, L, ...] with zeros in the empty slots."""
        return jnp.where(self.filled.reshape(*self.ids.shape, *[1] * (x.ndim - 2)), x, 0)


class MoM(nnx.Module):
    """o_t = sum_r w_tr q_t S_tr over the top-k memories r of token t, and q_t S_t of the shared one (eq. 5-12).

    w are the softmax scores of the router's top-k, divided by their sum. Every memory has its own keys, values and gates;
    queries, short convolutions, rates and the output are common. A memory is the recurrence over the tokens that it gets,
    in their order: others neither write it nor let it decay, and its convolutions see its own tokens alone (what the
    reference does at inference; in training its convolutions run over the borders of memories).

    A rule is the recurrence of the mixer of that name, with these projections, convolutions and outputs around it: no
    rotary embedding in retention; B, C and x of mamba2 are k, q and v, a B and a C for each head, and its skip D x is
    added a memory; hgrn2's forget gate is k's projection, which has no convolution. RWKV-7, whose projections see the token
    before, and LightNet, whose sums would depend on where a memory begins in its row, are no rules here.

    Without a state, the tokens of each memory lie one after the other in one row, each memory from a multiple of the
    chunk size on, so that a token's place in its chunk depends on earlier tokens alone. The op then runs over
    T (top_k + shared) tokens and a few empty chunks. With a state, every memory is a row of its own of T tokens, the
    empty slots behind its tokens inert (no key, value nor decay), which leaves its last state as the final one: the op
    costs `memories` times the tokens. Projections of all tokens for all memories are computed either way.
    """

    def __init__(self, settings: MoMSettings, context: LayerContext, *, rngs: nnx.Rngs):
        self.settings = settings
        self.key_dim, self.value_dim = settings.sizes(context.width)
        width, heads, memories = context.width, settings.heads, settings.memories + settings.shared
        keys, values = self.key_dim * heads, self.value_dim * heads
        # muP: the fan-out does not grow with width.
        self.router = Dense(width, settings.memories, axes=("embed", None), role="output", rngs=rngs)
        self.q = Dense(width, keys, axes=("embed", "heads"), rngs=rngs)
        self.k = _Stack(memories, width, keys, ("embed", "heads"), rngs=rngs)
        self.v = _Stack(memories, width, values, ("embed", "heads"), rngs=rngs)
        sizes = {"q": keys, "k": keys, "v": values} if settings.convolution else {}
        if settings.rule == "hgrn2":
            sizes.pop("k", None)
            self.bound_logit = param(jnp.zeros(keys), ("heads",), "dynamics")
            self.position = param(jnp.asarray(context.index / context.depth, jnp.float32), (), "constant")
        self.convolve = nnx.Dict(
            {name: ShortConvolution(size, settings.convolution, axis="heads", rngs=rngs) for name, size in sizes.items()}
        )
        self.beta = _Stack(memories, width, heads, ("embed", "heads"), rngs=rngs) if settings.rule in DELTA_RULES else None
        self.decay = (
            _Decay(settings, width, memories, keys, rngs=rngs) if settings.rule in (*SCALAR_GATES, *VECTOR_GATES) else None
        )
        # Lightning's rates differ between layers, so stacked layers must carry them as an array.
        fixed = FIXED.get(settings.rule)
        self.rates = param(head_log_decay(fixed, heads, context), ("heads",), "constant") if fixed else None
        self.skip = param(jnp.ones(heads), ("heads",), "dynamics") if settings.rule == "mamba2" else None
        self.output = HeadOutput(context, values, self.value_dim, gate=settings.output_gate, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], state: State | None = None, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State | None]:
        y, state, _ = self.with_auxiliary(x, state, segment_ids)
        return y, state

    def with_auxiliary(
        self, x: Float[Array, "B T D"], state: State | None = None, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], State | None, Float[Array, ""]]:
        """As a call, and the router's auxiliary loss (float32), times its coefficient.

        With f_r the share of tokens whose top-k holds memory r and p_r the mean score of r, the loss is M sum_r f_r p_r
        (Switch Transformer, arXiv 2101.03961, eq. 4), top_k where tokens are spread evenly. Tokens of segment id 0, the
        padding of packed rows, do not count. The reference takes f and p over all layers together; here each layer adds
        its own loss.

        Raises:
          UserError: if there are more memories than tokens, unless a state is given.
        """
        settings = self.settings
        if state is None and x.shape[1] < settings.memories:
            raise UserError(
                f"mom: memories={settings.memories} are more than the {x.shape[1]} tokens of a row; use fewer or longer rows"
            )
        kernel = self.router.kernel[...].astype(jnp.float32)
        scores = jax.nn.softmax(jnp.matmul(x.astype(jnp.float32), kernel, precision="highest"), axis=-1)
        # Not lax.top_k, which XLA gathers from all devices; a sort of the few memories stays where its rows are.
        chosen = jnp.argsort(scores, axis=-1, descending=True)[..., : settings.top_k]
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        routed = jax.nn.one_hot(chosen, settings.memories, dtype=jnp.int32).sum(axis=2)
        auxiliary = self._balance_loss(scores, routed, segment_ids)
        if settings.shared:
            everyone = jnp.ones((*chosen.shape[:2], 1), jnp.int32)
            routed = jnp.concatenate([routed, everyone], axis=-1)
            chosen = jnp.concatenate([chosen, settings.memories * everyone], axis=-1)
            weights = jnp.concatenate([weights, everyone.astype(weights.dtype)], axis=-1)

        batch, length, memories = routed.shape
        run = jnp.zeros((batch, length), jnp.int32) if segment_ids is None else run_index(resets(segment_ids))
        size = min(settings.chunk_size, 1 << (length - 1).bit_length())
        groups = _one_row(routed, run, chosen.shape[2], size) if state is None else _rows(routed, run)
        heads = {"q": groups.gather_common(self.q(x)), "k": groups.gather(self.k(x)), "v": groups.gather(self.v(x))}
        new_state = {}
        if state is not None:
            # A memory whose first token stands behind a document's end starts afresh.
            keep = groups.ids[:, 0] == 0
            state = jax.tree.map(lambda s: _where(keep, s.reshape(batch * memories, *s.shape[2:])), state)
        for name, convolution in self.convolve.items():
            inputs = heads[name]
            heads[name], _ = convolution(inputs, None if state is None else state[name], groups.ids)
            if state is not None:
                new_state[name] = _last_inputs(state[name], inputs, groups)
        q, k, v = (constrain(y.reshape(*y.shape[:2], settings.heads, -1), "batch", None, "heads", None) for y in heads.values())
        initial = None if state is None else state["recurrent"]
        o, recurrent = self._recur(x, q, k, v, groups, initial, size)

        # A token's outputs, one a memory it went to, weighted.
        slot = jnp.take_along_axis(groups.slot, chosen, axis=2).reshape(batch, -1, 1, 1)
        o = jnp.take_along_axis(o.reshape(batch, -1, *o.shape[2:]), slot, axis=1).reshape(*chosen.shape, *o.shape[2:])
        o = jnp.einsum("btrhv,btr->bthv", o.astype(jnp.float32), weights, precision="highest")
        y = self.output(constrain(o, "batch", "sequence", "heads", None), x)
        if state is None:
            return y, None, auxiliary
        new_state["recurrent"] = recurrent
        return y, jax.tree.map(lambda s: s.reshape(batch, memories, *s.shape[1:]), new_state), auxiliary

    def _balance_loss(self, scores: Float[Array, "B T M"], routed: Int[Array, "B T M"], segment_ids) -> Float[Array, ""]:
        counted = jnp.ones(scores.shape[:2]) if segment_ids is None else (segment_ids != 0).astype(jnp.float32)
        counted = counted[..., None] / jnp.maximum(jnp.sum(counted), 1)
        share, mean = jnp.sum(counted * routed, axis=(0, 1)), jnp.sum(counted * scores, axis=(0, 1))
        return self.settings.balance * self.settings.memories * jnp.sum(share * mean)

    def _recur(self, x, q, k, v, groups: _Groups, initial, size: int):
        rule = self.settings.rule
        log_decay = step = None
        if self.rates is not None:
            log_decay = jnp.broadcast_to(jax.lax.stop_gradient(self.rates[...]), k.shape[:3])
        elif rule == "hgrn2":
            q = q if self.convolve else jax.nn.silu(q)
            position = jax.lax.stop_gradient(self.position[...])
            bound = (self.bound_logit[...] + jnp.log(position) - jnp.log1p(-position)).reshape(k.shape[2:])
            log_decay, rest = forget_gate(k.astype(jnp.float32), bound)
            k = rest.astype(k.dtype)
        elif self.decay is not None:
            log_decay, step = (None if y is None else groups.gather(y) for y in self.decay(x))
            if rule in VECTOR_GATES:
                log_decay = log_decay.reshape(k.shape)
        log_decay = None if log_decay is None else groups.fill(log_decay)
        common = {"initial_state": initial, "segment_ids": groups.ids, "chunk_size": size}
        if rule == "mamba2":
            write = groups.fill((step[..., None] * v).astype(v.dtype))
            o, recurrent = linear_attention(q, groups.fill(k), write, log_decay, scale=1.0, **common)
            return o + self.skip[...].astype(o.dtype)[:, None] * v, recurrent
        if rule not in DELTA_RULES:
            return linear_attention(q, groups.fill(k), groups.fill(v), log_decay, **common)
        beta = groups.fill(groups.gather(jax.nn.sigmoid(self.beta(x).astype(jnp.float32))))
        return delta_rule(l2_normalise(q), groups.fill(l2_normalise(k)), groups.fill(v), beta, log_decay, **common)

    def init_state(self, batch: int, length: int, dtype: jax.typing.DTypeLike) -> State:
        memories, heads = self.settings.memories + self.settings.shared, self.settings.heads
        convolution = {name: conv.init_state(batch * memories, dtype) for name, conv in self.convolve.items()}
        return {
            "recurrent": jnp.zeros((batch, memories, heads, self.key_dim, self.value_dim), jnp.float32),
            **{name: s.reshape(batch, memories, *s.shape[1:]) for name, s in convolution.items()},
        }


def _where(keep: Bool[Array, N], x: Array) -> Array:
    return jnp.where(keep.reshape(-1, *[1] * (x.ndim - 1)), x, 0)


def _sources(slot: Int[Array, "B T R"], slots: int) -> tuple[Int[Array, "B S"], Bool[Array, "B S"]]:
    """What is in each slot, and whether anything is."""
    pairs = slot.shape[1] * slot.shape[2]
    put = lambda slot: jnp.full(slots, pairs, jnp.int32).at[slot].set(jnp.arange(pairs, dtype=jnp.int32), mode="drop")  # noqa: E731
    source = jax.vmap(put)(slot.reshape(-1, pairs))
    return jnp.minimum(source, pairs - 1), source < pairs


def _one_row(routed: Int[Array, "B T R"], run: Int[Array, "B T"], visits: int, size: int) -> _Groups:
    """All memories of a row in one sequence, each from a multiple of `size` on."""
    length, memories = routed.shape[1:]
    counts = jnp.sum(routed, axis=1)
    padded = -(-counts // size) * size
    first = jnp.cumsum(padded, axis=1) - padded
    # At most this many: a token goes to `visits` memories, and each memory's last chunk has size - 1 empty slots or less.
    slots = (length * visits + memories * (size - 1)) // size * size
    # Whole chunks for every shard of the sequence.
    slots += -slots % (size * sequence.shards())
    slot = jnp.where(routed > 0, first[:, None] + jnp.cumsum(routed, axis=1) - 1, slots)
    source, filled = _sources(slot, slots)
    ids = source % memories * length + jnp.take_along_axis(run, source // memories, axis=1)
    # Empty slots follow the tokens of their memory and share the last one's id, which only grows along the sequence.
    ids = jax.lax.cummax(jnp.where(filled, ids, 0), axis=1)
    return _Groups(slot, source, filled, ids)


def _rows(routed: Int[Array, "B T R"], run: Int[Array, "B T"]) -> _Groups:
    """Every memory of a row in a sequence of its own; the empty slots belong to the row's last document."""
    batch, length, memories = routed.shape
    slots = memories * length
    first = length * jnp.arange(memories, dtype=jnp.int32)
    slot = jnp.where(routed > 0, first + jnp.cumsum(routed, axis=1) - 1, slots)
    source, filled = _sources(slot, slots)
    ids = jnp.where(filled, jnp.take_along_axis(run, source // memories, axis=1), run[:, -1:])
    return _Groups(slot, source, filled, ids.reshape(batch * memories, length))


def _last_inputs(state: Float[Array, "N W E"], inputs: Float[Array, "N L E"], groups: _Groups) -> Float[Array, "N W E"]:
    """The last W inputs before the empty slots, those of the last document; zeros where there are fewer."""
    past = state.shape[1]
    count = jnp.sum(groups.filled.reshape(groups.ids.shape), axis=1)
    index = count[:, None] + jnp.arange(past)
    ids = jnp.pad(groups.ids, ((0, 0), (past, 0)))
    mine = jnp.take_along_axis(ids, index, axis=1) == groups.ids[:, -1:]
    everything = jnp.concatenate([state.astype(inputs.dtype), inputs], axis=1)
    return jnp.where(mine[..., None], jnp.take_along_axis(everything, index[..., None], axis=1), 0).astype(state.dtype)
