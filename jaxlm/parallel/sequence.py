"""Sequences split over devices: what recurrences, convolutions and attention say to their neighbours.

The mesh axis `sequence` cuts the time axis into W contiguous spans, one a shard. Every linear recurrence is affine in the
state that enters a span, S_out = M S_in + N, so shards exchange states, never tokens (LASP-2, arXiv 2502.07563, there for
M = 1): each folds its span to (M, N); an exclusive prefix over the shards gives each its entering state, and the op runs
once more from there. The traffic is the states': it does not depend on the number of tokens. Backward the same happens
to the states' cotangents in reverse, with M transposed.

Softmax attention gathers keys and values along the same axis (LASP-2H), or the window's worth from the shard before.

Everything here runs inside `jax.shard_map` over the whole mesh; without a mesh whose sequence axis has several shards the
ops never call it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxlm.parallel.context import active, no_mesh

AXIS = "sequence"

# Up to this many gathered bytes a shard, one all-gather beats the logarithm of W steps with a state each.
ALL_GATHER_BYTES = 32 * 2**20

Axes = tuple[str | None, ...]


class Recurrence(NamedTuple):
    """A linear recurrence as a shard sees it: pure functions of local arrays, and the logical axes of these arrays.

    outputs: (inputs, documents, state) -> (o, state after the last token), differentiable in inputs and state and affine in
      the state. `documents` [B, T] says where documents lie, as the op likes: True where one starts, or positions in them;
      None if all tokens continue the entering state. A document that starts at token 0 drops that state.
    transition: (inputs, documents) -> M of state_out = M state_in + N.
    apply: (M, state) -> M state, also for products of two M; elementwise unless given.
    transpose: M -> the M of cotangents; of an elementwise M it is M itself.
    """

    outputs: Callable
    transition: Callable
    input_axes: tuple
    output_axes: Any
    state_axes: Any
    apply: Callable = jnp.multiply
    transpose: Callable = lambda transition: transition


def apply_matrix(transition: Float[Array, "*b K K"], state: Float[Array, "*b K V"]) -> Float[Array, "*b K V"]:
    """`Recurrence.apply` where the transition mixes the state's rows (delta rules)."""
    return jnp.einsum("...ij,...jv->...iv", transition, state, precision=lax.Precision.HIGHEST)


def transpose_matrix(transition: Float[Array, "*b K K"]) -> Float[Array, "*b K K"]:
    return jnp.swapaxes(transition, -1, -2)


def shards() -> int:
    """Number of shards of the time axis under the current mesh; 1 without one."""
    current = active()
    return 1 if current is None else current[0].shape[AXIS]


def split(length: int) -> bool:
    """Whether a call on this many tokens is split: a single token (a decoding step) never is. `ops.forms.choose` asks for
    every op, whatever its form.

    Raises:
      ValueError: if the shards do not divide the tokens.
    """
    if shards() == 1 or length == 1:
        return False
    if length % shards():
        raise ValueError(
            f"T={length} tokens do not divide over mesh.sequence={shards()} shards; pad the sequence or change mesh.sequence"
        )
    return True


def shard_map(fn: Callable, sizes: dict[str, int], in_axes: tuple, out_axes: Any, *args: Any) -> Any:
    """Call `fn` on every device's part of `args`.

    Args:
      fn: sees local arrays; in it this module's collectives work, and ops and `constrain` see no mesh.
      sizes: of the logical axes that the arrays have, one each; an axis that its mesh axes do not divide is replicated.
      in_axes, out_axes: logical axes (a tuple of names or None) of every array, in the structure of args and result.
    """
    mesh, _ = active()
    placed = _placed(sizes)

    def specs(axes):
        return jax.tree.map(lambda a: PartitionSpec(*(placed.get(name) for name in a)), axes, is_leaf=_is_axes)

    def local(*args):
        with no_mesh():
            return fn(*args)

    # What is replicated over a mesh axis is computed alike on it, and `fn` sums what it must: nothing to be checked.
    return jax.shard_map(local, mesh=mesh, in_specs=specs(in_axes), out_specs=specs(out_axes), check_vma=False)(*args)


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple) and all(name is None or isinstance(name, str) for name in x)


def _placed(sizes: dict[str, int]) -> dict[str, tuple[str, ...]]:
    """The mesh axes of each logical axis, those of size 1 too: autodiff sums cotangents over whatever a spec leaves out."""
    mesh, rules = active()
    ways = {name: math.prod(mesh.shape[a] for a in rules[name]) for name in sizes}
    return {name: rules[name] for name, size in sizes.items() if size % ways[name] == 0}


def recurrence(op: Recurrence, sizes: dict[str, int], inputs: tuple, documents: Array | None, state: Any) -> tuple[Any, Any]:
    """Outputs and final state of a recurrence whose tokens are split over the sequence axis.

    Each shard makes two passes, one for the state alone and one for the outputs, and keeps for the backward its inputs and
    the one state that entered.

    Args:
      op: the local functions.
      sizes: as in `shard_map`.
      inputs: pytree of arrays (None where absent) in the structure of `op.input_axes`.
      documents: [B, T], computed over the whole sequence, without a gradient; None for a single document.
      state: enters the first shard.
    """
    # What the caller's cotangents and residuals are in: no closure, so that the backward may run under another trace.
    static = (op, tuple(sorted(sizes.items())))
    return _recurrence(static, inputs, documents, state)


def _document_axes(documents):
    return None if documents is None else ("batch", AXIS)


def _zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _recurrence(static, inputs, documents, state):
    return _recurrence_forward(static, inputs, documents, state)[0]


def _recurrence_forward(static, inputs, documents, state):
    op, sizes = static[0], dict(static[1])

    def local(inputs, documents, state):
        _, written = op.outputs(inputs, documents, _zeros(state))
        entering, final = prefix(op.apply, op.transition(inputs, documents), written, state)
        o, _ = op.outputs(inputs, documents, entering)
        return o, final, jax.tree.map(lambda x: x[None], entering)

    stacked = jax.tree.map(lambda axes: (AXIS, *axes), op.state_axes, is_leaf=_is_axes)
    o, final, entering = shard_map(
        local, sizes, (op.input_axes, _document_axes(documents), op.state_axes), (op.output_axes, op.state_axes, stacked),
        inputs, documents, state,
    )  # fmt: skip
    return (o, final), (inputs, documents, entering)


def _recurrence_backward(static, residuals, cotangents):
    op, sizes = static[0], dict(static[1])
    placed = _placed(sizes)
    mesh, _ = active()
    used = {axis for axes in placed.values() for axis in axes if mesh.shape[axis] > 1}

    def total(gradient, axes):
        """Sum over the shards that an input (a time-invariant decay, say) is common to."""
        own = {mesh_axis for name in axes if name is not None for mesh_axis in placed.get(name, ())}
        rest = tuple(sorted(used - own))
        return lax.psum(gradient, rest) if rest else gradient

    def local(inputs, documents, entering, do, d_final):
        state = jax.tree.map(lambda x: x[0], entering)
        _, pullback = jax.vjp(lambda inputs, state: op.outputs(inputs, documents, state), inputs, state)
        _, d_entering = pullback((do, _zeros(state)))
        transition = op.transpose(op.transition(inputs, documents))
        d_leaving, d_state = prefix(op.apply, transition, d_entering, d_final, reverse=True)
        d_inputs, _ = pullback((do, d_leaving))
        return jax.tree.map(lambda axes, x: total(x, axes), op.input_axes, d_inputs, is_leaf=_is_axes), d_state

    inputs, documents, entering = residuals
    stacked = jax.tree.map(lambda axes: (AXIS, *axes), op.state_axes, is_leaf=_is_axes)
    d_inputs, d_state = shard_map(
        local, sizes, (op.input_axes, _document_axes(documents), stacked, op.output_axes, op.state_axes),
        (op.input_axes, op.state_axes), inputs, documents, entering, *cotangents,
    )  # fmt: skip
    return d_inputs, None, d_state


_recurrence.defvjp(_recurrence_forward, _recurrence_backward)


def prefix(apply: Callable, transition: Any, written: Any, first: Any, *, reverse: bool = False) -> tuple[Any, Any]:
    """The states that enter each shard (in reverse: leave it), and the last one: s <- M s + N over the shards.

    Inside `shard_map`.

    Args:
      apply: as of `Recurrence`.
      transition, written: M and N of this shard.
      first: enters the first shard.
    """
    count = lax.axis_size(AXIS)
    rank = lax.axis_index(AXIS)
    rank = count - 1 - rank if reverse else rank

    def add(x, y):
        return jax.tree.map(jnp.add, x, y)

    def where(condition, x, y):
        return jax.tree.map(lambda x, y: jnp.where(condition, x, y), x, y)

    if count * sum(x.nbytes for x in jax.tree.leaves((transition, written))) <= ALL_GATHER_BYTES:

        def step(carry, shard):
            state, entering = carry
            index, transition, written = shard
            return (add(apply(transition, state), written), where(index == rank, state, entering)), None

        transitions, writes = lax.all_gather((transition, written), AXIS)
        order = jnp.arange(count)
        order = order[::-1] if reverse else order
        (last, entering), _ = lax.scan(step, (first, first), (order, transitions, writes), reverse=reverse)
        return entering, last

    def earlier(x, distance):
        pairs = [(i, i + distance) for i in range(count - distance)]
        return lax.ppermute(x, AXIS, [(count - 1 - i, count - 1 - j) for i, j in pairs] if reverse else pairs)

    distance = 1
    while distance < count:
        # Where nothing stands so far before, zeros come: N stays, and M must.
        transition_, written_ = earlier((transition, written), distance)
        written = add(apply(transition, written_), written)
        transition = where(rank >= distance, apply(transition, transition_), transition)
        distance *= 2
    transition_, written_ = earlier((transition, written), 1)
    entering = where(rank > 0, add(apply(transition_, first), written_), first)
    return entering, from_last(add(apply(transition, first), written), rank)


def from_last(x: Any, rank: Array | None = None) -> Any:
    """The last shard's value, on every shard. Inside `shard_map`."""
    rank = lax.axis_index(AXIS) if rank is None else rank
    return jax.tree.map(lambda x: lax.psum(jnp.where(rank == lax.axis_size(AXIS) - 1, x, jnp.zeros_like(x)), AXIS), x)


def halo(x: Array, first: Array) -> Array:
    """The tokens [B, W, ...] that stand before this shard's: the end of the shard before, `first` for the first shard."""
    width = first.shape[1]
    if x.shape[1] < width:
        raise ValueError(
            f"shards of {x.shape[1]} tokens are shorter than the {width} that the next shard needs; lower mesh.sequence"
        )
    count = lax.axis_size(AXIS)
    received = lax.ppermute(x[:, x.shape[1] - width :], AXIS, [(i, i + 1) for i in range(count - 1)])
    return jnp.where(lax.axis_index(AXIS) == 0, first, received)


def over_earlier(reduce: Callable, x: Array) -> Array:
    """`jnp.sum` or `jnp.max` over what the shards before this one have, of numbers >= 0; zeros on the first."""
    earlier = jnp.arange(lax.axis_size(AXIS)) < lax.axis_index(AXIS)
    gathered = lax.all_gather(x, AXIS)
    return reduce(jnp.where(earlier.reshape(-1, *[1] * x.ndim), gathered, 0), axis=0)
