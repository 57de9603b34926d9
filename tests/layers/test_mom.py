"""Mixture of memories: against its equations token by token, with documents, states and the router's loss."""

import itertools
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxlm import params as params_lib
from jaxlm.layers.ffn import SwiGLUSettings
from jaxlm.layers.mixers.common import LayerContext
from jaxlm.layers.mixers.mom import MoM, MoMSettings
from jaxlm.parallel import sequence
from jaxlm.parallel.context import DEFAULT_RULES, use_mesh
from jaxlm.parallel.mesh import make_mesh
from jaxlm.schema import UserError
from tests.parallel.test_sequence import COLLECTIVE

WIDTH, DEPTH, LAYER = 12, 4, 1


def make(seed=1, **changes):
    settings = MoMSettings(**{"memories": 3, "top_k": 2, "heads": 2, "expand_v": 2 / 3, "gate_rank": 3, "convolution": 3,
                              "chunk_size": 4, "max_length": 16, **changes})  # fmt: skip
    mixer = MoM(settings, LayerContext(WIDTH, DEPTH, jnp.asarray(LAYER)), rngs=nnx.Rngs(0))
    keys = iter(jax.random.split(jax.random.key(seed), 100))
    noisy = lambda i, x: x if i.role == "constant" else x + 0.3 * jax.random.normal(next(keys), x.shape)  # noqa: E731
    tree = params_lib.map_info(noisy, params_lib.describe(mixer), params_lib.split(mixer)[1])
    return nnx.merge(params_lib.split(mixer)[0], tree)


def rows(length=11, batch=2):
    return jax.random.normal(jax.random.key(7), (batch, length, WIDTH))


@jax.jit
def call(mixer, x, state=None, segment_ids=None):
    return mixer.with_auxiliary(x, state, segment_ids)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def unit(x):
    return x / np.sqrt(np.sum(x * x, -1, keepdims=True) + 1e-6)


def convolve(x, taps):
    padded = np.concatenate([np.zeros((len(taps) - 1, x.shape[1])), x])
    y = np.stack([(padded[t : t + len(taps)] * taps).sum(0) for t in range(len(x))])
    return y * sigmoid(y)


def low_rank(p, x, r, activation=lambda x: x):
    return sigmoid(activation(x @ p["down"]["kernel"][r]) @ p["up"]["kernel"][r] + p["bias"])


def generalised_delta(p, heads, x, shift, r):
    """RWKV-7 over the tokens that a memory gets; `shift` is the token before each in the row, less the token."""
    own = p["generalised"]
    mixed = {name: x + shift * mu for name, mu in zip("rwkva", own["mix"], strict=True)}
    split = lambda y: y.reshape(len(x), heads, -1)  # noqa: E731
    q = split(mixed["r"] @ p["q"]["kernel"])
    k, v = (split(mixed[name] @ p[name]["kernel"][r]) for name in "kv")
    decay = np.exp(-np.exp(-0.5) * split(low_rank(own["decay"], mixed["w"], r, np.tanh)))
    rate = split(low_rank(own["rate"], mixed["a"], r))
    removal = unit(k * own["k_k"])
    k = k * (1 + (rate - 1) * own["k_a"])
    state, out = np.zeros((heads, k.shape[-1], v.shape[-1])), []
    for t in range(len(x)):
        removed = np.einsum("hk,hkv->hv", removal[t], state)
        state = decay[t][..., None] * state - (removal[t] * rate[t])[..., None] * removed[:, None]
        state = state + k[t][..., None] * v[t][:, None]
        bonus = np.sum(q[t] * k[t] * own["r_k"], -1, keepdims=True) * v[t]
        out.append(np.einsum("hk,hkv->hv", q[t], state) + bonus)
    return np.stack(out)


def channels(p, settings, x, r):
    """States of channels without keys: HGRN, minGRU, minLSTM and S4D."""
    rule, v = settings.rule, x @ p["v"]["kernel"][r]
    if settings.convolution:
        v = convolve(v, p["convolve"]["v"]["weight"])
    elif rule == "hgrn":
        v = v * sigmoid(v)
    if rule == "s4d":
        own = p["filter"]
        dt, rate = np.exp(own["log_dt"])[:, None], -np.exp(own["log_a_real"]) + 1j * own["a_imag"]
        factor = np.exp(dt * rate)
        read = 2 * (own["c"][:, 0] + 1j * own["c"][:, 1]) * (factor - 1) / rate
    else:
        gates = {name: sigmoid(x @ gate["kernel"][r]) for name, gate in p["gates"].items()}
        if rule == "hgrn":
            odds = LAYER / (DEPTH - LAYER) * np.exp(p["bound_logit"])
            forget = (odds + gates["forget"]) / (1 + odds)
        else:
            v = np.where(v >= 0, v + 0.5, sigmoid(v))
            forget = 1 - gates["update"] if rule == "mingru" else gates["forget"] / (gates["forget"] + gates["input"])
    state, out = 0, []
    for t in range(len(x)):
        if rule == "s4d":
            state = factor * state + v[t][:, None]
            out.append((read * state).real.sum(-1) + own["skip"] * v[t])
        else:
            state = forget[t] * state + (1 - forget[t]) * v[t]
            out.append(state)
    return np.reshape(out, (len(x), settings.heads, -1))


def memory(p, settings, x, shift, r):
    """One memory over the tokens it gets: projections, convolutions, recurrence. [n, D] -> [n, H, V]."""
    rule, heads = settings.rule, settings.heads
    if rule == "rwkv7":
        return generalised_delta(p, heads, x, shift, r)
    if rule in ("hgrn", "mingru", "minlstm", "s4d"):
        return channels(p, settings, x, r)
    q, k, v = x @ p["q"]["kernel"], x @ p["k"]["kernel"][r], x @ p["v"]["kernel"][r]
    if settings.convolution:
        taps = {name: p["convolve"][name]["weight"] for name in p["convolve"]}
        q, k, v = (convolve(y, taps[name]) if name in taps else y for name, y in (("q", q), ("k", k), ("v", v)))
    elif rule in ("hgrn2", "lightnet"):
        q = q * sigmoid(q)
    q, k, v = (y.reshape(len(x), heads, -1) for y in (q, k, v))
    delta = rule in ("deltanet", "gated_deltanet", "kda")
    if delta:
        q, k, beta = unit(q), unit(k), sigmoid(x @ p["beta"]["kernel"][r]).reshape(len(x), heads, -1)
        beta = 2 * beta if settings.negative_eigenvalues else beta
        write = beta if settings.gates == "head" else sigmoid(x @ p["write"]["kernel"][r]).reshape(v.shape)
    g = np.zeros((len(x), heads, 1))
    if rule == "retention":
        g = g + np.log(1 - 2.0 ** (-5 - np.arange(heads)))[:, None]
    if rule == "lightning":
        g = g - (8 / heads * (1 - LAYER / DEPTH) * np.arange(heads))[:, None]
    if rule == "hgrn2":
        odds = LAYER / (DEPTH - LAYER) * np.exp(p["bound_logit"].reshape(heads, -1))
        bound = odds / (1 + odds)
        forget = bound + (1 - bound) * sigmoid(k)
        g, k = np.log(forget), 1 - forget
    if rule == "lightnet":
        sums = np.cumsum(np.exp(k), axis=0)
        g, k = np.log(np.concatenate([sums[:1], sums[:-1]]) / sums), np.exp(k) / sums
    if rule in ("simple_gla", "mamba2", "gated_deltanet", "log_linear"):
        g = (x @ p["decay"]["up"]["kernel"][r])[..., None]
    if rule in ("gla", "kda"):
        g = (x @ p["decay"]["down"]["kernel"][r] @ p["decay"]["up"]["kernel"][r]).reshape(len(x), heads, -1)
    if rule in ("simple_gla", "gla"):
        g = -softplus(-(g + p["decay"]["bias"][r].reshape(heads, -1))) / 16
    if rule in ("mamba2", "gated_deltanet", "kda", "log_linear"):
        step = softplus(g + p["decay"]["dt_bias"].reshape(heads, -1))
        g = -np.exp(p["decay"]["a_log"])[:, None] * step
    if rule == "mamba":
        own = p["selection"]
        step = softplus(x @ own["down"]["kernel"][r] @ own["up"]["kernel"][r] + own["dt_bias"]).reshape(v.shape)
        g = -step[:, :, None] * np.moveaxis(np.exp(own["a_log"]).reshape(heads, v.shape[-1], -1), 1, 2)
    else:
        g = g[..., None]
    if rule == "log_linear":
        scales = softplus((x @ p["level"]["kernel"]).reshape(len(x), heads, -1) + p["level_bias"])
        out = np.zeros(v.shape)
        for s, t in itertools.combinations_with_replacement(range(len(x)), 2):
            score = np.exp(g[s + 1 : t + 1].sum(0))[:, 0, 0] * (q[t] * k[s]).sum(-1) / np.sqrt(k.shape[-1])
            out[t] += (scales[t, :, (t ^ s).bit_length()] * score)[:, None] * v[s]
        return out
    state = np.zeros((heads, k.shape[-1], v.shape[-1]))
    out, skip = [], p["skip"].reshape(heads, -1) if "skip" in p else None
    for t in range(len(x)):
        state = np.exp(g[t]) * state
        written = step[t] * v[t] if rule in ("mamba2", "mamba") else v[t]
        if delta:
            written = write[t] * v[t] - np.einsum("hk,hkv->hv", beta[t] * k[t], state)
        state = state + k[t][..., None] * written[:, None]
        read = np.einsum("hk,hkv->hv", q[t], state)
        out.append(read / np.sqrt(k.shape[-1]) if skip is None else read + skip * v[t])
    return np.stack(out)


def scores_of(p, x):
    e = np.exp(x @ p["router"]["kernel"])
    return e / e.sum(-1, keepdims=True)


def document(p, settings, x):
    """A whole document, memory by memory."""
    scores = scores_of(p, x)
    chosen = np.argsort(-scores, axis=-1)[:, : settings.top_k]
    shift = np.concatenate([np.zeros_like(x[:1]), x[:-1]]) - x
    o = memory(p, settings, x, shift, settings.memories) if settings.shared else 0.0
    o = np.broadcast_to(o, (len(x), settings.heads, p["v"]["kernel"].shape[-1] // settings.heads)).copy()
    for r in range(settings.memories):
        mine = np.flatnonzero((chosen == r).any(-1))
        if len(mine):
            weight = scores[mine, r] / np.take_along_axis(scores[mine], chosen[mine], -1).sum(-1)
            o[mine] += weight[:, None, None] * memory(p, settings, x[mine], shift[mine], r)
    o = o / np.sqrt(np.mean(o * o, -1, keepdims=True) + 1e-5) * p["output"]["norm"]["scale"]
    z = x @ p["output"]["gate"]["kernel"]
    return (o.reshape(len(x), -1) * z * sigmoid(z)) @ p["output"]["project"]["kernel"]


def numpy_params(mixer):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params_lib.split(mixer)[1])


def equations(p, settings, x, lengths):
    starts = np.cumsum([0, *lengths])
    pieces = [[document(p, settings, row[a:b]) for a, b in itertools.pairwise(starts)] for row in np.asarray(x, np.float64)]
    return np.stack([np.concatenate(row) for row in pieces])


def expected_rows(mixer, x, lengths):
    return equations(numpy_params(mixer), mixer.settings, x, lengths)


LENGTHS = (6, 1, 4)
IDS = jnp.repeat(jnp.asarray([[4, 1, 4]] * 2), jnp.asarray(LENGTHS), axis=1, total_repeat_length=11)
# Every rule, and the decoupled gates.
RULES = {rule: {"rule": rule} for rule in typing.get_args(MoMSettings.model_fields["rule"].annotation)}
RULES["kda, gates of gdn2"] = {"rule": "kda", "gates": "channel"}
CASES = {
    **RULES,
    "deltanet, negative": {"rule": "deltanet", "negative_eigenvalues": True},
    "kda, gates of gdn2, negative": {"rule": "kda", "gates": "channel", "negative_eigenvalues": True},
    "one of many, alone": {"rule": "gla", "memories": 5, "top_k": 1, "shared": False, "convolution": 0},
    "hgrn2, no convolution": {"rule": "hgrn2", "convolution": 0},
    "hgrn, no convolution": {"rule": "hgrn", "convolution": 0},
    "lightnet, no convolution": {"rule": "lightnet", "convolution": 0},
    "rwkv7, one of many": {"rule": "rwkv7", "memories": 5, "top_k": 1},
    "a convolution of one tap": {"rule": "gla", "convolution": 1},
}


# One of each op and kind of state; the gates of the others are tested with these by the slow lane.
FAST = ("gla", "gated_deltanet", "hgrn", "mingru", "minlstm", "mamba", "s4d", "log_linear")
DECODED = ("gated_deltanet", "hgrn", "mamba", "s4d", "log_linear")
each_rule = pytest.mark.parametrize("rule", [r if r in FAST else pytest.param(r, marks=pytest.mark.slow) for r in RULES])


@pytest.mark.parametrize("case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES])
def test_equals_its_equations_with_and_without_a_state(case):
    """Memories in one sequence (no state) and a sequence each (with one): the same numbers, those of the equations."""
    mixer, x = make(**CASES[case]), rows()
    expected = expected_rows(mixer, x, LENGTHS)
    y, none, _ = call(mixer, x, None, IDS)
    assert none is None
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    y, _, _ = call(mixer, x, mixer.init_state(2, 11, jnp.float32), IDS)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", [r if r in DECODED else pytest.param(r, marks=pytest.mark.slow) for r in RULES])
def test_every_memory_continues_its_own_state(rule):
    """Pieces with a border inside, at their edge, and single tokens continue what each memory had."""
    mixer, x = make(**RULES[rule]), rows(12)
    state = mixer.init_state(2, 12, jnp.float32)
    shapes = jax.tree.map(lambda s: (s.shape, s.dtype), state)
    out = []
    ids = jnp.asarray([[1] * 2 + [2] * 3] * 2)
    for piece, segment_ids in ((slice(0, 5), ids), (slice(5, 10), ids * 0), *((slice(t, t + 1), None) for t in (10, 11))):
        y, state, _ = call(mixer, x[:, piece], state, segment_ids)
        assert jax.tree.map(lambda s: (s.shape, s.dtype), state) == shapes
        out.append(y)
    np.testing.assert_allclose(np.concatenate(out, 1), expected_rows(mixer, x, (2, 10)), rtol=1e-4, atol=1e-5)
    # A document's end drops the states of all memories: of the one that the old document does not visit and the new one,
    # the opposite token, does (memory scores reversed), too.
    old, new = x[:, :1], -x[:, :1]
    ended = call(mixer, jnp.concatenate([old] * 4 + [new], axis=1), state, jnp.asarray([[1] * 4 + [2]] * 2))[1]
    fresh = call(mixer, new, mixer.init_state(2, 12, jnp.float32), None)[1]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), ended, fresh)


@pytest.mark.parametrize("rule", [r if r == "lightnet" else pytest.param(r, marks=pytest.mark.slow) for r in RULES])
def test_gradients_are_the_slopes_of_its_equations(rule):
    """Of every parameter along a direction, and of the input, against differences of the equations in float64."""
    mixer, x = make(**RULES[rule]), rows()
    graphdef, tree = params_lib.split(mixer)
    weights = np.random.default_rng(3).normal(size=x.shape)
    loss = lambda tree, x: jnp.sum(call(nnx.merge(graphdef, tree), x, None, IDS)[0] * weights)  # noqa: E731
    gradients = jax.tree.leaves_with_path(jax.jit(jax.grad(loss, argnums=(0, 1)))(tree, x))
    point = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (tree, x))
    for number, (path, gradient) in enumerate(gradients):
        name = jax.tree_util.keystr(path)
        if "rates" in name or "position" in name:
            assert not np.any(gradient)  # fixed by the architecture
            continue
        direction = np.random.default_rng(number).normal(size=gradient.shape)

        def along(step, number=number, direction=direction):
            leaves, structure = jax.tree.flatten(point)
            leaves[number] = leaves[number] + step * direction
            moved, x = jax.tree.unflatten(structure, leaves)
            return np.sum(equations(moved, mixer.settings, x, LENGTHS) * weights)

        slope = (along(1e-6) - along(-1e-6)) / 2e-6
        np.testing.assert_allclose(np.sum(gradient * direction), slope, rtol=1e-3, atol=1e-3, err_msg=name)


@each_rule
def test_later_tokens_do_not_change_earlier_outputs_by_one_bit(rule):
    mixer, x = make(**RULES[rule]), rows()
    for begin in (2, 5, 8):
        before, after = call(mixer, x, None, IDS)[0], call(mixer, x.at[:, begin:].multiply(-1), None, IDS)[0]
        np.testing.assert_array_equal(before[:, :begin], after[:, :begin])
        assert not np.array_equal(before[:, begin:], after[:, begin:])


def test_a_memory_of_many_chunks_is_causal_to_the_bit_wherever_it_stands():
    """How later tokens spread over memories does not change in which order one sums the states of its chunks."""
    mixer, x = make(rule="hgrn", chunk_size=1), rows(24)
    before = call(mixer, x)[0]
    for begin in (10, 17):
        after = call(mixer, x.at[:, begin:].multiply(-1))[0]
        np.testing.assert_array_equal(before[:, :begin], after[:, :begin])


def test_auxiliary_loss_of_an_even_and_a_padded_row():
    mixer, x = make(), rows()
    ids = IDS.at[:, 7:].set(0)
    scores = scores_of(numpy_params(mixer), np.asarray(x, np.float64))[:, :7].reshape(-1, 3)
    chosen = np.argsort(-scores, axis=-1)[:, :2]
    share = np.array([[np.mean(chosen[:, j] == e) for e in range(3)] for j in range(2)])
    loss = call(mixer, x, None, ids)[2]
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, 0.01 * 3 * np.sum(share * scores.mean(0)), rtol=1e-5)
    # A router that knows nothing gives every memory 1/M: the optimum, top_k.
    mixer.router.kernel[...] = jnp.zeros_like(mixer.router.kernel[...])
    np.testing.assert_allclose(call(mixer, x, None, ids)[2], 0.01 * 2, rtol=1e-6)


@pytest.mark.parametrize("rule", [r if r == "gla" else pytest.param(r, marks=pytest.mark.slow) for r in RULES])
def test_the_router_learns_from_the_output_and_from_the_loss(rule):
    mixer, x = make(**RULES[rule]), rows()
    graphdef, tree = params_lib.split(mixer)

    @jax.jit
    def gradients(tree, state=None):
        (y, loss), back = jax.vjp(lambda tree: call(nnx.merge(graphdef, tree), x, state)[::2], tree)
        return back((jnp.ones_like(y), jnp.zeros_like(loss)))[0], back((jnp.zeros_like(y), jnp.ones_like(loss)))[0]

    output, loss = gradients(tree)
    assert np.all(np.abs(output["router"]["kernel"]) > 0)
    assert np.all(np.abs(loss["router"]["kernel"]) > 0)
    # The loss trains the router alone; the output trains every memory's projections.
    loss.pop("router")
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(loss))
    for path, gradient in jax.tree.leaves_with_path(output):
        name = jax.tree_util.keystr(path)
        if gradient.shape[:1] == (4,):
            assert np.all(np.abs(gradient).max(tuple(range(1, gradient.ndim))) > 0), name
    # Memories in rows of their own have the same gradients.
    again, _ = gradients(tree, mixer.init_state(2, 11, jnp.float32))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), again, output)


@pytest.mark.slow
def test_sums_of_memories_without_tokens_have_gradients_that_are_numbers():
    """LightNet's: a memory may have got none so far, nor before the row."""
    mixer, x = make(rule="lightnet"), rows(3)
    gradients = jax.grad(lambda state: jnp.sum(jnp.sin(call(mixer, x, state)[0])))(mixer.init_state(2, 3, jnp.float32))
    jax.tree.map(lambda gradient: np.testing.assert_array_equal(np.isfinite(gradient), True), gradients)
    assert np.any(gradients["recurrent"])


@pytest.mark.parametrize("rule", [r if r == "gla" else pytest.param(r, marks=pytest.mark.slow) for r in RULES])
def test_rows_of_a_batch_stay_on_their_devices(rule):
    mixer, x = make(**RULES[rule]), rows()
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2])
    spread = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    compiled = jax.jit(lambda mixer, x: mixer(x, None, IDS)[0]).lower(mixer, spread).compile()
    np.testing.assert_allclose(compiled(mixer, spread), call(mixer, x, None, IDS)[0], atol=1e-5)
    assert not any(
        traffic in compiled.as_text() for traffic in ("all-gather", "all-to-all", "all-reduce", "collective-permute")
    )


def documents(length=32):
    """A row of documents that cross the borders of shards and end at one, and a row of many short ones."""
    ids = np.zeros((2, length), np.int32)
    ids[0, 5:], ids[0, length // 2 :] = 1, 2
    ids[1] = np.random.default_rng(0).integers(0, 2, size=length)
    return jnp.asarray(ids)


# Blocks of two tokens: a memory has several on a shard of 4 to 16 tokens. Convolutions reach back over more than a shard,
# where a memory gets few tokens.
SPLIT = {rule: {**case, "chunk_size": 2, "convolution": 4, "max_length": 64} for rule, case in RULES.items()}
SPLIT["blocks of several chunks"] = {"rule": "gla", "memories": 2, "top_k": 1, "shared": False, "chunk_size": 1}
SPLIT["a convolution of one tap"] = {"rule": "gla", "chunk_size": 2, "convolution": 1}
SPLIT["no state"] = SPLIT["gated_deltanet"]
SPLIT["logarithmic prefix"] = SPLIT["gated_deltanet"]
MESHES = {
    "2": {"sequence": 2}, "4": {"sequence": 4}, "8": {"sequence": 8}, "2 of all axes": {"sequence": 2, "data": 2, "tensor": 2},
}  # fmt: skip
EVERY_MESH = ("gla", "gated_deltanet", "lightnet", "rwkv7", "hgrn", "s4d", "blocks of several chunks")
SHARDS = [
    pytest.param(case, mesh, marks=() if (case, mesh) == ("gated_deltanet", "8") else pytest.mark.slow)
    for case in SPLIT
    for mesh in (MESHES if case in EVERY_MESH else ("8",))
]


@pytest.mark.parametrize(("case", "mesh"), SHARDS)
def test_shards_of_a_sequence_give_the_values_and_gradients_of_one_device(case, mesh, monkeypatch):
    """With documents over the shards' borders, from a state that earlier tokens left, and a token decoded after them."""
    mixer, x, ids = make(**SPLIT[case]), rows(32), documents()
    graphdef, tree = params_lib.split(mixer)
    state = None if case == "no state" else call(mixer, rows(5), mixer.init_state(2, 32, jnp.float32))[1]
    # Counts of tokens have no gradient.
    counts = {name: state.pop(name) for name in ("position",) if name in (state or {})}

    def loss(tree, x, state):
        mixer = nnx.merge(graphdef, tree)
        y, state, auxiliary = mixer.with_auxiliary(x, None if state is None else state | counts, ids)
        out = [y] if state is None else [y, mixer(x[:, :1], state)[0]]
        # LightNet's running sums are logarithms, some of nothing.
        out += [jax.nn.sigmoid(s) if name == "sum" else s for name, s in sorted((state or {}).items())]
        return auxiliary + sum(jnp.sum(jnp.sin(z)) for z in out), (out, auxiliary)

    run = jax.value_and_grad(loss, argnums=(0, 1) if state is None else (0, 1, 2), has_aux=True)
    expected = jax.jit(run)(tree, x, state)
    if case == "logarithmic prefix":
        monkeypatch.setattr(sequence, "ALL_GATHER_BYTES", 0)
    sizes = MESHES[mesh]
    with use_mesh(make_mesh({"data": 1, **sizes}, jax.devices()[: math.prod(sizes.values())])):
        got = jax.jit(lambda *args: run(*args))(tree, x, state)

    def close(path, a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * np.max(np.abs(b), initial=1), err_msg=jax.tree_util.keystr(path))

    jax.tree.map_with_path(close, got, expected)


SHARD_CAUSALITY = ("lightnet", "rwkv7", "hgrn", "s4d", "log_linear")


@pytest.mark.parametrize("rule", ["gated_deltanet", *(pytest.param(r, marks=pytest.mark.slow) for r in SHARD_CAUSALITY)])
def test_later_tokens_do_not_change_earlier_outputs_of_any_shard_by_one_bit(rule):
    mixer, x, ids = make(**SPLIT[rule]), rows(32), documents()
    with use_mesh(make_mesh({"data": 1, "sequence": 4}, jax.devices()[:4])):
        run = jax.jit(lambda mixer, x: mixer(x, None, ids)[0])
        before = run(mixer, x)
        for begin in (3, 9, 16, 25):
            after = run(mixer, x.at[:, begin:].multiply(-1))
            np.testing.assert_array_equal(before[:, :begin], after[:, :begin])
            assert not np.array_equal(before[:, begin:], after[:, begin:])


@pytest.mark.slow
@pytest.mark.parametrize("gathered", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_traffic_between_shards_does_not_depend_on_the_number_of_tokens(rule, gathered, monkeypatch):
    if not gathered:
        monkeypatch.setattr(sequence, "ALL_GATHER_BYTES", 0)
    graphdef, tree = params_lib.split(make(**RULES[rule], max_length=512))
    # Nothing but the sequence is split: other axes, of one device, would have collectives that send nothing.
    mesh = jax.make_mesh((8,), ("sequence",), axis_types=(AxisType.Auto,))
    rules = {name: ("sequence",) if name == "sequence" else () for name in DEFAULT_RULES}

    def loss(tree, x, ids):
        y, _, auxiliary = nnx.merge(graphdef, tree).with_auxiliary(x, None, ids)
        return jnp.sum(jnp.sin(y)) + auxiliary

    sent = []
    for length in (32, 128):
        put = lambda x: jax.device_put(x, NamedSharding(mesh, PartitionSpec(None, "sequence")))  # noqa: E731
        arrays = put(jnp.zeros((2, length, WIDTH))), put(jnp.zeros((2, length), jnp.int32))
        with use_mesh(mesh, rules):
            compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(tree, *arrays).compile()
        sent.append(sorted((kind, shapes) for shapes, kind in COLLECTIVE.findall(compiled.as_text())))
    assert sent[0] == sent[1]
    assert any(kind == ("all-gather" if gathered else "collective-permute") for kind, _ in sent[0])


def test_published_parameter_count():
    """Width 1024, 24 blocks, tied vocabulary of 32,000: 512.4 million (the released configuration named 340M)."""
    mixer = nnx.eval_shape(lambda: MoM(MoMSettings(), LayerContext(1024, 24, jnp.asarray(0)), rngs=nnx.Rngs(0)))
    count = params_lib.count(params_lib.describe(mixer))
    # Sheet 13's formula with m = 5 and K = V = 1024, and what it leaves out: a_log, dt_bias, convolutions, norm.
    assert count == 1024 * 1024 * (6 + 7) + 1024 * 4 + 2 * 5 * 1024 * 4 + 2 * 4 + 4 * 3 * 1024 + 256
    ffn = 3 * 1024 * SwiGLUSettings(ratio=3).hidden_size(1024)
    total = 24 * (count + ffn + 2 * 1024) + 32_000 * 1024 + 1024
    assert total == pytest.approx(512.4e6, abs=0.05e6)


def test_input_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match="top_k=3 is more than memories=2; lower it or add memories"):
        MoMSettings(memories=2, top_k=3)
    with pytest.raises(ValueError, match="gates=channel goes with rule=kda, not with rule=gla"):
        MoMSettings(rule="gla", gates="channel")
    with pytest.raises(ValueError, match="negative_eigenvalues goes with rule=deltanet, gated_deltanet, kda, not .*=rwkv7"):
        MoMSettings(rule="rwkv7", negative_eigenvalues=True)
    with pytest.raises(ValueError, match="expand_k=0.5: rule=hgrn has no key channels; leave it at 1"):
        MoMSettings(rule="hgrn", expand_k=0.5)
    with pytest.raises(UserError, match="mom.max_length=16 is less than the 17 tokens of a row"):
        make(rule="log_linear")(rows(17))
    with pytest.raises(UserError, match="mom.max_length=16 is less than the 17 tokens of a row"):
        make(rule="log_linear").init_state(1, 17, jnp.float32)
    with pytest.raises(UserError, match="expand_k: rule=s4d has 3 states a channel, which must be even"):
        make(rule="s4d", expand_k=0.5)
    with pytest.raises(UserError, match="memories=5 are more than the 3 tokens of a row"):
        make(memories=5)(rows(3))
