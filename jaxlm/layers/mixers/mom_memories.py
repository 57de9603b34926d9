"""The memories of `jaxlm.layers.mixers.mom`: tokens grouped by the memory that they go to, and the recurrence over groups.

What the mixer's projections make of tokens comes in token order, and outputs go out in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlm.layers.mixers.common import State
from jaxlm.layers.mixers.delta import l2_normalise
from jaxlm.layers.mixers.minimal import positive
from jaxlm.ops.convolution import short_convolution
from jaxlm.ops.delta_rule import delta_rule, dplr_delta_rule
from jaxlm.ops.diagonal import (
    diagonal_recurrence,
    diagonal_transition,
    pair_product,
    run_ssm,
    selective_scan,
    selective_transition,
    ssm_transition,
)
from jaxlm.ops.linear_attention import linear_attention
from jaxlm.ops.log_linear import apply_digits, log_linear_state, log_linear_transition, run_log_linear
from jaxlm.ops.segments import resets
from jaxlm.parallel import sequence
from jaxlm.parallel.context import constrain

DELTA_RULES = ("deltanet", "gated_deltanet", "kda")
# Rules whose transition is a matrix, not a factor a key channel.
MATRIX_RULES = (*DELTA_RULES, "rwkv7")
# Rules of one number a channel.
DIAGONAL = ("hgrn", "mingru", "minlstm")
# What a transition does to a state, or to another one; elementwise in the others.
APPLY = {**dict.fromkeys(MATRIX_RULES, sequence.apply_matrix), "s4d": pair_product, "log_linear": apply_digits}


class _Groups(NamedTuple):
    """Where tokens go: blocks of slots, and in each memory's consecutive blocks its tokens in their order.

    Every memory has at least one block, the last one the blocks that nobody needs. Behind its tokens a memory's slots are
    empty.
    """

    slot: Int[Array, "B T R"]  # of a token in a memory; S where it does not go
    source: Int[Array, "B S"]  # t * R + r of the token and memory in a slot
    filled: Bool[Array, "B S"]
    ids: Int[Array, "B S"]  # run of the token in a slot; of the last token in empty ones
    first: Int[Array, "B R"]  # block of each memory
    memory: Int[Array, "B N"]  # whose a block is
    count: Int[Array, "B R"]  # tokens of a memory

    @property
    def size(self) -> int:
        """Slots a block."""
        return self.source.shape[1] // self.memory.shape[1]

    def gather(self, x: Float[Array, "B T R *X"] | Float[Array, "B T 1 *X"]) -> Float[Array, "B S *X"]:
        """What tokens hold for their memory, or for all; empty slots get what some token holds."""
        source = self.source // (self.slot.shape[2] // x.shape[2])
        return _take(x.reshape(x.shape[0], -1, *x.shape[3:]), source)

    def fill(self, x: Float[Array, "B S *X"]) -> Float[Array, "B S *X"]:
        """x with zeros in the empty slots."""
        return jnp.where(_over(self.filled, x), x, 0)

    def blocks(self, x: Array) -> Array:
        """[B, S, ..] as rows [B N, size, ..]."""
        return x.reshape(-1, self.size, *x.shape[2:])

    def lengths(self) -> Int[Array, " BN"]:
        """Tokens of each row of `blocks`."""
        return jnp.sum(self.blocks(self.filled), axis=1)

    def begins(self) -> Bool[Array, "B N"]:
        """Whether a block is its memory's first."""
        return jnp.arange(self.memory.shape[1]) == _take(self.first, self.memory)

    def fresh(self, run_before: Int[Array, "B 1"]) -> Bool[Array, "B N"]:
        """Whether a document starts between a block and what its memory has before; `run_before` enters its first one."""
        ids = self.ids.reshape(*self.memory.shape, self.size)
        before = jnp.concatenate([run_before, ids[:, :-1, -1]], axis=1)
        return ids[..., 0] != jnp.where(self.begins(), run_before, before)

    def inputs_before(self, x, tail, run_before, memory, end, run) -> Float[Array, "B n P E"]:
        """The P inputs of a memory before its token number `end`, zeros where they are not of the run `run`.

        Args:
          x: [B, S, E].
          tail: [B, R, P, E], before the first token of each memory.
          run_before: [B, 1], of the tail.
          memory, end, run: [B, n].
        """
        batch, memories, past, channels = tail.shape
        number = end[..., None] + jnp.arange(past) - past
        slot = jnp.where(
            number < 0,
            memory[..., None] * past + past + number,
            memories * past + _take(self.first, memory)[..., None] * self.size + number,
        )
        slot = slot.reshape(batch, end.shape[1] * past)
        tails = tail.reshape(batch, memories * past, channels)
        ids = jnp.concatenate([jnp.broadcast_to(run_before, tails.shape[:2]), self.ids], axis=1)
        inputs = _take(jnp.concatenate([tails, x], axis=1), slot).reshape(*number.shape, channels)
        mine = _take(ids, slot).reshape(number.shape) == run[..., None]
        return jnp.where(mine[..., None], inputs, 0)


def _over(mask: Array, like: Array) -> Array:
    """Axes of size 1 behind those of a mask, as many as an array has."""
    return mask.reshape(*mask.shape, *[1] * (like.ndim - mask.ndim))


def _take(x: Array, index: Int[Array, "B n"]) -> Array:
    return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)


def _group(routed: Int[Array, "B T R"], run: Int[Array, "B T"], visits: int, size: int) -> _Groups:
    """Groups of blocks of `size` slots; one block a memory where it holds all T tokens."""
    batch, length, memories = routed.shape
    count = jnp.sum(routed, axis=1)
    blocks = jnp.maximum(-(-count // size), 1)
    first = jnp.cumsum(blocks, axis=1) - blocks
    # At most this many: a token goes to `visits` memories, and each memory's last block has `size` empty slots or less.
    number = min(memories * -(-length // size), length * visits // size + memories)
    memory = jnp.sum(jnp.arange(number)[:, None] >= first[:, None], axis=2) - 1
    slots = number * size
    slot = jnp.where(routed > 0, first[:, None] * size + jnp.cumsum(routed, axis=1) - 1, slots)

    pairs = length * memories
    put = lambda slot: jnp.full(slots, pairs, jnp.int32).at[slot].set(jnp.arange(pairs, dtype=jnp.int32), mode="drop")  # noqa: E731
    source = jax.vmap(put)(slot.reshape(batch, pairs))
    filled, source = source < pairs, jnp.minimum(source, pairs - 1)
    # The last token's run, so that a memory that it does not visit ends without a state.
    ids = jnp.where(filled, _take(run, source // memories), run[:, -1:])
    return _Groups(slot, source, filled, ids, first, memory, count)


def read_memories(
    rule: str,
    chunk_size: int,
    taps: dict[str, Array],
    common: dict[str, Array],
    tokens: dict[str, Array],
    routing: tuple,
    weights: Float[Array, "B T X"],
    state: State | None,
) -> tuple[Float[Array, "B T H V"], State]:
    """Outputs of all tokens, and the states of convolutions and recurrences if they came with one.

    Args:
      rule, chunk_size: of the settings.
      taps: of the convolutions [W, H X], by the name of what they are for.
      common: what all tokens and memories have in common [H, *]: see `MoM._common`.
      tokens: as `MoM._tokens` gives them.
      routing: routed [B, T, R], 1 where a token goes to a memory; chosen [B, T, X], the memories that it goes to; run
        [B, T], the index of its document; for log_linear positions [B, T, R], how many tokens of the document a memory has
        got before, else None.
      weights: of the chosen memories' outputs.
    """
    batch, length, heads = *weights.shape[:2], tokens["v"].shape[3]
    span = partial(_read_span, rule, chunk_size)
    if not sequence.split(length):
        return span(False, taps, common, tokens, routing, weights, state)
    # Channels of convolutions go where their heads go.
    apart = lambda x: x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)  # noqa: E731
    flat = lambda x: x.reshape(*x.shape[:-2], math.prod(x.shape[-2:]))  # noqa: E731
    taps = {name: apart(x) for name, x in taps.items()}
    state_axes = None
    if state is not None:
        state = {name: apart(x) if name in taps else x for name, x in state.items()}
        state_axes = {name: ("batch", None, "heads", *[None] * (x.ndim - 3)) for name, x in state.items()}
        state_axes |= dict.fromkeys(taps, ("batch", None, None, "heads", None))
    common_axes = {name: ("heads", *[None] * (x.ndim - 1)) for name, x in common.items()}
    per_token = ("batch", sequence.AXIS)
    token_axes = {name: (*per_token, None, "heads", *[None] * (x.ndim - 4)) for name, x in tokens.items()}

    def local(taps, common, tokens, routing, weights, state):
        old = None if state is None else {name: flat(x) if name in taps else x for name, x in state.items()}
        o, new = span(True, {name: flat(x) for name, x in taps.items()}, common, tokens, routing, weights, old)
        return o, {name: x.reshape(state[name].shape) for name, x in new.items()}

    o, new = sequence.shard_map(
        local, {"batch": batch, sequence.AXIS: length, "heads": heads},
        (dict.fromkeys(taps, (None, "heads", None)), common_axes, token_axes, (per_token,) * 4, per_token, state_axes),
        ((*per_token, "heads", None), state_axes or {}), taps, common, tokens, routing, weights, state,
    )  # fmt: skip
    return o, {name: flat(x) if name in taps else x for name, x in new.items()}


def _read_span(rule: str, chunk_size: int, shard: bool, taps, common, tokens, routing, weights, state) -> tuple[Array, State]:
    """`read_memories` of whole rows, or of a shard's span of them inside `sequence.shard_map`."""
    routed, chosen, run, positions = routing
    batch, length, memories = routed.shape
    chunk = size = min(chunk_size, 1 << (length - 1).bit_length())
    if shard:
        # Every block has its states in memory: longer ones, while the empty slots behind a memory's tokens are few.
        size = max(size, (1 << (length // (4 * memories)).bit_length()) // 2)
    elif state is not None or rule in DIAGONAL:
        size = length
    groups = _group(routed, run, chosen.shape[2], size)
    run_before = jnp.zeros_like(run[:, :1])
    if shard:
        run_before = sequence.halo(run, run_before)
    place = lambda x: constrain(x, "batch", None, "heads", *[None] * (x.ndim - 3))  # noqa: E731
    values = {name: place(groups.gather(x)) for name, x in tokens.items()}
    positions = None if positions is None else groups.gather(positions)
    new_state = {}

    for name, weight in taps.items():
        inputs = values[name].reshape(batch, groups.source.shape[1], -1)
        tail = jnp.zeros((batch, memories, weight.shape[0] - 1, inputs.shape[-1]), inputs.dtype)
        tail = tail if state is None else state[name].astype(inputs.dtype)
        y, new_state[name] = _convolve(shard, inputs, weight, tail, groups, run_before, run[:, -1:])
        values[name] = place(y.reshape(values[name].shape))

    v = values["v"]
    skip = values.pop("skip", common.get("skip"))
    if rule == "mamba2":
        values["v"] = (values.pop("step")[..., None] * v).astype(v.dtype)
    if rule in DELTA_RULES:
        values |= {name: l2_normalise(values[name]) for name in ("q", "k")}
    values = {name: x if name in ("q", "a", "scales") else groups.fill(x) for name, x in values.items()}
    if state is None and not shard:
        # Memories follow each other in one row as documents do.
        ids = groups.ids * memories + jnp.repeat(groups.memory, size, axis=1)
        o, _ = _recur(rule, chunk, common, _Rows(values, ids, jnp.full(batch, ids.shape[1]), positions), None)
    else:
        blocks = jax.tree.map(groups.blocks, (values, groups.ids, positions))
        rows = _Rows(blocks[0], blocks[1], groups.lengths(), blocks[2])
        recur = partial(_recur, rule, chunk, common)
        fresh = groups.fresh(run_before)
        entering = None if state is None else state["recurrent"]
        last = None
        if shard:
            _, written = recur(rows, None)
            maps = _transition(rule, recur, common, rows, written), written
            entering, last = _entering_states(APPLY.get(rule, jnp.multiply), maps, groups, fresh, run[:, -1:], entering)
        # A document that starts with a block, or between it and what its memory has before, drops the state.
        entering = jnp.where(_over(fresh, entering), 0, entering)
        o, leaving = recur(rows, entering.reshape(-1, *entering.shape[2:]))
        new_state["recurrent"] = last if shard else leaving.reshape(entering.shape)
    o = o.reshape(v.shape)
    if skip is not None:
        o = o + (skip * v).astype(o.dtype)

    # A token's outputs, one a memory it went to, weighted.
    slot = jnp.take_along_axis(groups.slot, chosen, axis=2).reshape(batch, -1)
    o = _take(o, slot).reshape(*chosen.shape, *o.shape[2:])
    o = jnp.einsum("btrhv,btr->bthv", o.astype(jnp.float32), weights, precision="highest")
    if state is None:
        return o, {}
    return o, {name: x.astype(state[name].dtype) for name, x in new_state.items()}


def _convolve(
    shard: bool, inputs: Float[Array, "B S E"], weight: Float[Array, "W E"], tail: Float[Array, "B R P E"],
    groups: _Groups, run_before: Int[Array, "B 1"], last_run: Int[Array, "B 1"],
) -> tuple[Float[Array, "B N L E"], Float[Array, "B R P E"]]:  # fmt: skip
    """The short convolution of every block, and each memory's last P = W - 1 inputs; `tail` are those before the row.

    The tails that enter a shard come by the mechanism of all states. A memory may get fewer than P tokens on a shard, so
    that its tail spans several: of P inputs those of the shard are what is written, and the transition moves the ones
    before them by as many places; or drops them, where the document has changed.
    """
    memories, past, channels = tail.shape[1:]
    each = jnp.arange(memories)[None]
    last_inputs = lambda tail: groups.inputs_before(inputs, tail, run_before, each, groups.count, last_run)  # noqa: E731
    if shard:
        old, new = jnp.arange(past), jnp.arange(past)[:, None]
        moved = (old == new + groups.count[..., None, None]) & (run_before == last_run)[..., None, None]
        written = last_inputs(jnp.zeros_like(tail))
        tail, last = sequence.prefix(sequence.apply_matrix, moved.astype(tail.dtype), written, tail)
    else:
        last = last_inputs(tail)
    begin = (jnp.arange(groups.memory.shape[1]) - _take(groups.first, groups.memory)) * groups.size
    run = groups.ids.reshape(*begin.shape, groups.size)[..., 0]
    before = groups.inputs_before(inputs, tail, run_before, groups.memory, begin, run)
    y, _ = short_convolution(
        groups.blocks(inputs), weight.astype(inputs.dtype), state=before.reshape(groups.memory.size, past, channels),
        segment_ids=groups.blocks(groups.ids), activation="silu",
    )  # fmt: skip
    return y, last


def _entering_states(
    apply: Callable, maps: tuple[Array, Array], groups: _Groups, fresh: Bool[Array, "B N"], last_run: Int[Array, "B 1"],
    state: Float[Array, "B R *S"] | None,
) -> tuple[Float[Array, "B N *S"], Float[Array, "B R *S"]]:  # fmt: skip
    """The states that enter a shard's blocks, and those of all memories after the last shard.

    A block makes M s + N of the state s that enters it; `maps` are M and N of all blocks. Products over each memory's blocks
    make a shard an affine map of the memories' states, as it is of one state in other recurrences.
    """
    transition, written = (x.reshape(*groups.memory.shape, *x.shape[1:]) for x in maps)
    transition = jnp.where(_over(fresh, transition), 0, transition)
    begins = groups.begins()

    def step(carry, block):
        begins, transition, written = block
        before, state = carry
        before = jnp.where(_over(begins, transition), transition, apply(transition, before))
        state = jnp.where(_over(begins, written), written, apply(transition, state) + written)
        return (before, state), carry

    blocks = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (begins, transition, written))
    start = jax.tree.map(lambda x: jnp.zeros_like(x[:, 0]), (transition, written))
    end, before = jax.lax.scan(step, start, blocks)
    # From the memory's first block on: up to each block, and after its last.
    before = jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), before)
    after = jax.tree.map(lambda x, end: jnp.concatenate([x, end[:, None]], axis=1), before, end)
    next_first = jnp.pad(groups.first[:, 1:], ((0, 0), (0, 1)), constant_values=groups.memory.shape[1])
    # The last document may not visit a memory, whose slots may all be filled: no empty one then, which drops the state.
    ended = _take(groups.ids, next_first * groups.size - 1) != last_run
    whole = jax.tree.map(lambda x: jnp.where(_over(ended, x), 0, _take(x, next_first)), after)
    if state is None:
        state = jnp.zeros_like(whole[1])
    entering, last = sequence.prefix(apply, *whole, state)
    entering = _take(entering, groups.memory)
    return jnp.where(_over(begins, entering), entering, apply(before[0], entering) + before[1]), last


class _Rows(NamedTuple):
    """Tokens in rows, and empty slots behind them that hold zeros."""

    values: dict[str, Array]  # [N, L, H, *]
    ids: Int[Array, "N L"]
    lengths: Int[Array, " N"]
    positions: Int[Array, "N L"] | None  # of tokens, see `read_memories`


def _transition(rule: str, recur: Callable, common: dict[str, Array], rows: _Rows, written: Array) -> Array:
    """M of every row's state after it, M s + N, where s enters it."""
    values, v = rows.values, rows.values["v"]
    reset = resets(rows.ids)
    if rule in DIAGONAL:
        return diagonal_transition(values["log_decay"], reset, v.shape)
    if rule == "mamba":
        return jax.vmap(selective_transition, (2, 0, None), 1)(values["step"], common["rates"], reset)
    if rule == "s4d":
        factor = common["factor"]
        power = ssm_transition(factor.reshape(-1, *factor.shape[2:]), reset, v.shape[1], rows.lengths)
        return power.reshape(-1, *factor.shape)
    if rule == "log_linear":
        moved = log_linear_transition(*_log_linear_inputs(rows))
        return jnp.where(_over(rows.lengths == 0, moved), jnp.eye(moved.shape[-1], dtype=moved.dtype), moved)
    # What the op makes of the identity when nothing is written.
    size = values["k"].shape[-1]
    identity = jnp.eye(size, dtype=written.dtype) if rule in MATRIX_RULES else jnp.ones((size, 1), written.dtype)
    nothing = jnp.zeros((*v.shape[:-1], identity.shape[-1]), v.dtype)
    silent = values | {name: nothing.astype(values[name].dtype) for name in ("v", "write") if name in values}
    return recur(rows._replace(values=silent), jnp.broadcast_to(identity, (*written.shape[:2], *identity.shape)))[1]


def _recur(
    rule: str, chunk_size: int, common: dict[str, Array], rows: _Rows, initial: Float[Array, "N H *S"] | None
) -> tuple[Float[Array, "N L H V"], Float[Array, "N H *S"]]:
    """The op of a rule on rows."""
    values, options = rows.values, {"segment_ids": rows.ids, "chunk_size": chunk_size}
    if rule in DIAGONAL:
        v = values["v"].astype(jnp.float32)
        b = values["write"] * (v if rule == "hgrn" else positive(v))
        return diagonal_recurrence(values["log_decay"], b, initial_state=initial, **options)
    if rule == "mamba":

        def scan(u, step, rates, b, c, initial):
            return selective_scan(u.astype(jnp.float32), step, rates, b, c, initial_state=initial, **options)

        # Heads have a B and a C of their own, which the channels of a scan share.
        heads = jax.vmap(scan, (2, 2, 0, 2, 2, None if initial is None else 1), (2, 1))
        return heads(values["v"], values["step"], common["rates"], values["k"], values["q"], initial)
    if rule == "s4d":
        v, factor, read = values["v"].astype(jnp.float32), common["factor"], common["read"]
        flat = lambda x, axis: x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])  # noqa: E731
        y, state = run_ssm(
            flat(v, 2), flat(factor, 0), flat(read, 0), resets(rows.ids), None if initial is None else flat(initial, 1),
            form="recurrent" if v.shape[1] == 1 else "chunked", chunk_size=chunk_size, lengths=rows.lengths,
        )  # fmt: skip
        return y.reshape(v.shape), state.reshape(-1, *factor.shape)
    if rule == "log_linear":
        (q, _, v, _, scales), *_ = inputs = _log_linear_inputs(rows)
        if initial is None:
            initial = log_linear_state(q.shape[0], scales.shape[3], *q.shape[2:], v.shape[3]).digits
        o, digits = run_log_linear(q.shape[3] ** -0.5, chunk_size, *inputs, initial)
        return o.astype(v.dtype), jnp.where(_over(rows.lengths == 0, digits), initial, digits)
    op = dplr_delta_rule if rule == "rwkv7" else delta_rule if rule in DELTA_RULES else linear_attention
    scale = {"scale": 1.0} if rule in ("mamba2", "rwkv7") else {}
    return op(**values, **scale, initial_state=initial, **options)


def _log_linear_inputs(rows: _Rows) -> tuple[tuple[Array, ...], Int[Array, "N L"], Int[Array, " N"]]:
    """`inputs`, `positions` and `after` of `run_log_linear`, for rows that have tokens."""
    values = rows.values
    log_decay = jnp.where(resets(rows.ids)[..., None], -jnp.inf, values["log_decay"])
    last = jnp.maximum(rows.lengths - 1, 0)[:, None]
    after = _take(rows.positions, last) + 1
    positions = jnp.where(jnp.arange(rows.ids.shape[1]) > last, after, rows.positions)
    return (values["q"], values["k"], values["v"], log_decay[..., None], values["scales"]), positions, after[:, 0]
