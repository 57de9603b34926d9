"""Sequences split over devices equal one device: recurrences, convolutions, attention, positions."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm import params
from jaxlm.layers.ffn import SwiGLUSettings
from jaxlm.layers.mixers.attention import AttentionSettings
from jaxlm.layers.mixers.delta import GatedDeltaNetSettings
from jaxlm.models.language_model import LanguageModel, ModelSettings
from jaxlm.ops import forms
from jaxlm.ops.attention import attention, init_attention_cache
from jaxlm.ops.convolution import short_convolution
from jaxlm.ops.delta_rule import delta_rule, dplr_delta_rule
from jaxlm.ops.diagonal import diagonal_recurrence, diagonal_ssm, selective_scan
from jaxlm.ops.fast_weights import memora, moneta, ttt_linear, yaad
from jaxlm.ops.linear_attention import linear_attention
from jaxlm.ops.log_linear import LogLinearState, log_linear_attention
from jaxlm.ops.logsumexp import running_logsumexp
from jaxlm.ops.segments import counts_in_runs, positions_in_runs, resets, run_index
from jaxlm.parallel import sequence
from jaxlm.parallel.context import use_mesh
from jaxlm.parallel.mesh import make_mesh

B, T, H, K, V = 2, 32, 2, 4, 6

COLLECTIVE = re.compile(r"= (\([^)]*\)|\S+) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def mesh_of(shards):
    return make_mesh({"sequence": shards, "data": 1}, jax.devices()[:shards])


def documents(T=T):
    """One row whose documents cross shard borders and end at one; one row of many short documents."""
    ids = np.zeros((B, T), np.int32)
    ids[0, 5:] = 1
    ids[0, T // 2 :] = 2
    ids[1] = np.random.default_rng(0).integers(0, 2, size=T)
    return jnp.asarray(ids)


def split(fn, shards):
    """`fn`, traced under a mesh with that many shards."""

    def under_mesh(*args):
        with use_mesh(mesh_of(shards)):
            return jax.jit(lambda *args: fn(*args))(*args)

    return under_mesh


def assert_close(got, wanted, tolerance=2e-5):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        x, y = np.asarray(x), np.asarray(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(1, np.abs(y).max()))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def decays(*shape):
    return jnp.asarray(np.random.default_rng(9).choice([0.0, -0.01, -0.3, -2.0, -20.0], size=shape), jnp.float32)


def linear(g):
    arrays = (normal(0, B, T, H, K), normal(1, B, T, H, K), normal(2, B, T, H, V))
    arrays = arrays if g is None else (*arrays, g)
    return partial(linear_attention, chunk_size=4), arrays, normal(3, B, H, K, V)


def delta(g, *gates):
    k = normal(1, B, T, H, K)
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    beta = jax.nn.sigmoid(normal(5, B, T, H))

    def op(q, k, v, beta, *rest, **options):
        return delta_rule(q, k, v, beta, *rest[:1], write=rest[1] if rest[1:] else None, chunk_size=4, **options)

    arrays = (normal(0, B, T, H, K), k, normal(2, B, T, H, V), *(gates[:1] or (2 * beta,)))
    arrays += (() if g is None else (g,)) + gates[1:]
    return op, arrays, normal(3, B, H, K, V)


def dplr():
    k = normal(1, B, T, H, K)
    a = -k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    b = -a * jax.nn.sigmoid(normal(5, B, T, H, K))
    arrays = (normal(0, B, T, H, K), normal(4, B, T, H, K), normal(2, B, T, H, V), a, b, decays(B, T, H, K))
    return partial(dplr_delta_rule, chunk_size=4), arrays, normal(3, B, H, K, V)


def gates(seed, *shape):
    return jax.nn.sigmoid(normal(seed, *shape))


def complex_normal(seed, *shape):
    return normal(seed, *shape) + 1j * normal(seed + 50, *shape)


def diagonal(varying=True, number=normal):
    """Real or complex factors in the unit disc, changing in time or not; two channel axes."""
    log_a = decays(B, T, H, K) if varying else decays(H, K)
    b = number(1, B, T, H, K)
    log_a = log_a + 1j * normal(2, *log_a.shape) if jnp.iscomplexobj(b) else log_a
    return partial(diagonal_recurrence, chunk_size=4), (log_a, b), number(3, B, H, K)


def ssm():
    a = jnp.stack([0.9 * jnp.cos(normal(0, H, K)), 0.9 * jnp.sin(normal(0, H, K))], axis=1)
    return partial(diagonal_ssm, chunk_size=4), (normal(1, B, T, H), a, normal(2, H, 2, K)), normal(3, B, H, 2, K)


def selective():
    arrays = (normal(0, B, T, H), gates(1, B, T, H), -gates(2, H, K), normal(3, B, T, K), normal(4, B, T, K))
    return partial(selective_scan, chunk_size=4), arrays, normal(5, B, H, K)


def log_linear(levels, *position):
    """Rows that so many tokens of their first document came before."""
    position = jnp.asarray(position, jnp.int32)
    # A digit of the position that is 0 stands for nothing; the last takes in what outgrows the levels.
    filled = (jnp.minimum(position, 2 ** (levels - 1) - 1)[:, None] >> jnp.arange(levels - 1)) & 1

    def op(*arrays, initial_state, segment_ids):
        state = LogLinearState(initial_state, position)
        return log_linear_attention(*arrays, initial_state=state, segment_ids=segment_ids, chunk_size=2)

    # Milder decays than the others': what a level's matrix held some shards ago is still seen.
    arrays = (normal(0, B, T, H, K), normal(1, B, T, H, K), normal(2, B, T, H, V), decays(B, T, H) / 20)
    return op, (*arrays, gates(4, B, T, H, levels)), filled[:, None, :, None, None] * normal(3, B, H, levels - 1, K, V)


def logsumexp(before):
    def op(logits, *, initial_state, segment_ids):
        z, log_decay = running_logsumexp(logits, initial_state, segment_ids)
        return (z, log_decay), z[:, -1]

    return op, (3 * normal(0, B, T, H, K),), before


# op(*arrays, initial_state=, segment_ids=) -> (outputs, final state): a line per op.
OPS = {
    "linear_attention": lambda: linear(None),
    "linear_attention-scalar": lambda: linear(decays(B, T, H)),
    "linear_attention-vector": lambda: linear(decays(B, T, H, K)),
    "delta_rule": lambda: delta(None),
    "delta_rule-scalar": lambda: delta(decays(B, T, H)),
    "delta_rule-vector": lambda: delta(decays(B, T, H, K)),
    "delta_rule-gates": lambda: delta(decays(B, T, H, K), gates(6, B, T, H, K), gates(7, B, T, H, V)),
    "dplr_delta_rule": dplr,
    "diagonal_recurrence": diagonal,
    "diagonal_recurrence-constant": lambda: diagonal(varying=False),
    "diagonal_recurrence-complex": lambda: diagonal(number=complex_normal),
    "diagonal_ssm": ssm,
    "selective_scan": selective,
    "log_linear_attention": lambda: log_linear(10, 11, 6),
    "log_linear_attention-outgrown": lambda: log_linear(6, 29, 37),
    "running_logsumexp": lambda: logsumexp(3 * normal(1, B, H, K)),
    "running_logsumexp-of-nothing": lambda: logsumexp(jnp.full((B, H, K), -jnp.inf)),
}


def loss(op, segment_ids):
    def value(arrays, state):
        o, final = op(*arrays, initial_state=state, segment_ids=segment_ids)
        total = sum(jnp.sum(jnp.sin(x.real) + jnp.cos(x.imag)) for x in jax.tree.leaves((o, final)))
        return total, (o, final)

    return jax.value_and_grad(value, argnums=(0, 1), has_aux=True)


@pytest.mark.parametrize("shards", [8, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 4))])
@pytest.mark.parametrize("case", OPS)
def test_shards_give_the_values_and_gradients_of_one_device(case, shards):
    op, arrays, state = OPS[case]()
    run = loss(op, documents())
    assert_close(split(run, shards)(arrays, state), jax.jit(run)(arrays, state))


@pytest.mark.parametrize("case", ["linear_attention", "delta_rule-scalar", "log_linear_attention", "running_logsumexp"])
def test_one_document_over_all_shards(case):
    op, arrays, state = OPS[case]()
    run = loss(op, None)
    assert_close(split(run, 8)(arrays, state), jax.jit(run)(arrays, state))


@pytest.mark.parametrize("case", ["log_linear_attention", "running_logsumexp"])
def test_shards_of_three_tokens(case):
    """Neither a power of two nor a multiple of the chunk: positions say where digits move, wherever a shard begins."""
    op, arrays, state = OPS[case]()
    run, arrays = loss(op, documents()[:, :24]), tuple(x[:, :24] for x in arrays)
    assert_close(split(run, 8)(arrays, state), jax.jit(run)(arrays, state))


@pytest.mark.slow
@pytest.mark.parametrize("shards", [2, 4, 8])
def test_a_hybrid_of_three_to_one(shards):
    settings = ModelSettings(
        vocab_size=32, width=16, depth=4, pattern=("delta", "delta", "delta", "attention"),
        mixers={
            "delta": GatedDeltaNetSettings(heads=2, head_dim=4, chunk_size=4), "attention": AttentionSettings(heads=2),
        },
        ffn=SwiGLUSettings(hidden=16),
    )  # fmt: skip
    graphdef, tree = params.split(LanguageModel(settings, rngs=nnx.Rngs(0)))
    ids = jax.random.randint(jax.random.key(0), (B, T), 0, 32)

    def loss(tree):
        logits, _ = nnx.merge(graphdef, tree)(ids, segment_ids=documents())
        return jnp.mean(jnp.sin(logits)), logits

    run = jax.value_and_grad(loss, has_aux=True)
    assert_close(split(run, shards)(tree), jax.jit(run)(tree))


@pytest.mark.parametrize("case", ["linear_attention-vector", "delta_rule-scalar", "log_linear_attention"])
def test_the_logarithmic_prefix_equals_the_gathered_one(case, monkeypatch):
    op, arrays, state = OPS[case]()
    # Only a document over several shards asks for products of their transitions.
    run = loss(op, documents().at[0].set(0))
    wanted = split(run, 8)(arrays, state)
    monkeypatch.setattr(sequence, "ALL_GATHER_BYTES", 0)
    assert_close(split(run, 8)(arrays, state), wanted)


def collectives(fn, *args):
    """(kind, bytes) of what a compiled function sends."""
    with use_mesh(mesh_of(8)):
        text = jax.jit(lambda *args: fn(*args)).lower(*args).compile().as_text()
    found = []
    for shapes, kind in COLLECTIVE.findall(text):
        sizes = [np.prod([int(n) for n in dims.split(",") if n] or [1]) for dims in re.findall(r"\w+\[([\d,]*)\]", shapes)]
        found.append((kind, int(sum(sizes)) * 4))
    return sorted(found)


# Of each kind of state and transition, forward and backward.
TRAFFIC = (
    "linear_attention-scalar", "delta_rule-scalar", "dplr_delta_rule", "diagonal_recurrence", "diagonal_recurrence-constant",
    "diagonal_ssm", "selective_scan", "log_linear_attention", "running_logsumexp",
)  # fmt: skip


# The logarithmic prefix is one mechanism for all of them.
FAST_TRAFFIC = [
    ("linear_attention-scalar", True), ("linear_attention-scalar", False), ("delta_rule-scalar", True),
    ("diagonal_recurrence", True), ("log_linear_attention", True), ("running_logsumexp", True),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "gathered"),
    [
        (case, gathered) if (case, gathered) in FAST_TRAFFIC else pytest.param(case, gathered, marks=pytest.mark.slow)
        for case in TRAFFIC
        for gathered in (True, False)
    ],
)
def test_traffic_does_not_depend_on_the_number_of_tokens(case, gathered, monkeypatch):
    if not gathered:
        monkeypatch.setattr(sequence, "ALL_GATHER_BYTES", 0)
    op, arrays, state = OPS[case]()
    sent = []
    for length in (64, 512):

        def zeros(x, length=length):
            timed = x.shape[1] == T
            x = jnp.zeros((x.shape[0], length, *x.shape[2:]) if timed else x.shape, x.dtype)
            return jax.device_put(x, jax.NamedSharding(mesh_of(8), jax.P(None, "sequence") if timed else jax.P()))

        run = loss(op, jnp.zeros((B, length), jnp.int32))
        sent.append(collectives(run, jax.tree.map(zeros, arrays), state))
    assert sent[0] == sent[1]
    assert any(kind == ("all-gather" if gathered else "collective-permute") for kind, _ in sent[0])


def test_resets_runs_positions_and_counts_know_the_shards_before():
    counted = jnp.asarray(np.random.default_rng(0).integers(0, 3, size=(B, T, 2)))
    start = np.asarray([[5, 0], [7, 1]])

    def all_four(ids):
        reset = resets(ids)
        counts = counts_in_runs(counted, reset, jnp.asarray(start))
        return reset, run_index(reset), positions_in_runs(reset, jnp.asarray([5, 7]), T), counts

    expected = jax.jit(all_four)(documents())
    for b, t in np.ndindex(B, T):
        [*starts] = np.flatnonzero(expected[0][b, : t + 1])
        before = start[b] if not starts else 0
        np.testing.assert_array_equal(expected[3][b, t], before + counted[b, starts[-1] if starts else 0 : t].sum(0))
    for shards in (2, 8):
        for x, y in zip(split(all_four, shards)(documents()), expected, strict=True):
            np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("packed", [False, True])
def test_convolution_reads_the_shard_before(packed):
    x, weight, bias, state = normal(0, B, T, 6), normal(1, 4, 6), normal(2, 6), normal(3, B, 3, 6)
    ids = documents() if packed else None

    def run(x, weight, bias, state):
        y, last = short_convolution(x, weight, bias, state=state, segment_ids=ids, activation="silu")
        return jnp.sum(jnp.sin(y)) + jnp.sum(jnp.cos(last)), (y, last)

    run = jax.value_and_grad(run, argnums=(0, 1, 2, 3), has_aux=True)
    assert_close(split(run, 8)(x, weight, bias, state), jax.jit(run)(x, weight, bias, state))
    # A halo of three tokens, not the row.
    sent = collectives(lambda *a: run(*a), x, weight, bias, state)
    assert max(size for kind, size in sent if kind == "collective-permute") <= B * 3 * 6 * 4


def test_a_token_decoded_with_its_document_is_not_split():
    x, weight, state, ids = normal(0, B, 1, 6), normal(1, 4, 6), normal(3, B, 3, 6), jnp.zeros((B, 1), jnp.int32)
    run = lambda *arrays: short_convolution(*arrays, state=state, segment_ids=ids)  # noqa: E731
    assert_close(split(run, 8)(x, weight), run(x, weight))


@pytest.mark.parametrize("window", [None, 3, 12])
def test_attention_sees_all_shards_before(window):
    q, k, v = normal(0, B, T, 4, K), normal(1, B, T, 2, K), normal(2, B, T, 2, V)

    def run(q, k, v):
        o, _ = attention(q, k, v, window=window, segment_ids=documents())
        return jnp.sum(jnp.sin(o)), o

    run = jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True)
    assert_close(split(run, 8)(q, k, v), jax.jit(run)(q, k, v))
    # A window that fits a shard takes its width from the neighbour; otherwise all keys come.
    gathered = max(size for kind, size in collectives(run, q, k, v) if kind == "all-gather")
    assert (gathered >= B * T * 2 * K * 4) == (window != 3)


def of_twelve_tokens():
    """A call without segment ids, whose `resets` would ask first, by the name of what has forms and of the op."""
    q, gate, x, pair = jnp.zeros((1, 12, 1, 2)), jnp.zeros((1, 12, 1)), jnp.zeros((1, 12, 3)), jnp.zeros((3, 2, 2))
    norm, inner = jnp.ones((1, 2)), {"w_in": jnp.zeros((1, 2, 4)), "w_out": jnp.zeros((1, 4, 2))}
    miras = (q, q, q, q, q)
    return {
        "linear_attention": {"linear_attention": partial(linear_attention, q, q, q)},
        "delta_rule": {"delta_rule": partial(delta_rule, q, q, q, gate)},
        "dplr_delta_rule": {"dplr_delta_rule": partial(dplr_delta_rule, q, q, q, q, q, q)},
        "attention": {
            "attention": partial(attention, q, q, q),
            "with a cache": partial(attention, q, q, q, cache=init_attention_cache(1, 16, 1, 2, jnp.float32)),
        },
        "diagonal_recurrence": {
            "diagonal_recurrence": partial(diagonal_recurrence, jnp.zeros(3), x),
            "diagonal_ssm": partial(diagonal_ssm, x, pair, pair),
            "selective_scan": partial(selective_scan, x, x, jnp.zeros((3, 2)), jnp.zeros((1, 12, 2)), jnp.zeros((1, 12, 2))),
        },
        "log_linear_attention": {"log_linear_attention": partial(log_linear_attention, q, q, q, gate, jnp.ones((1, 12, 1, 5)))},
        "ttt_linear": {
            "ttt_linear": partial(
                ttt_linear, q, q, q, gate, jnp.ones(4), {"w": jnp.zeros((1, 2, 2)), "b": norm}, norm, norm, chunk_size=4
            )
        },
        "miras": {
            "moneta": partial(moneta, *miras, inner, norm, norm),
            "yaad": partial(yaad, *miras, gate, inner, norm, norm),
            "memora": partial(memora, *miras, inner, norm, norm),
        },
    }  # fmt: skip


@pytest.mark.parametrize("op", forms.OPS)
def test_shards_that_do_not_divide_the_sequence_are_an_error(op):
    """In every form, those too that are not split natively: XLA would pad them in silence."""
    for name, call in of_twelve_tokens()[op].items():
        for form in ("auto", *forms.OPS[op]):
            if form == "kernel" or (form == "fft" and name == "selective_scan"):
                continue
            with use_mesh(mesh_of(8)), pytest.raises(ValueError, match=r"T=12 tokens do not divide over mesh.sequence=8"):
                call(form=form)


def test_so_they_are_where_there_are_no_forms():
    with use_mesh(mesh_of(8)), pytest.raises(ValueError, match=r"T=12 tokens do not divide over mesh.sequence=8"):
        short_convolution(jnp.zeros((1, 12, 2)), jnp.zeros((2, 2)))
    with use_mesh(mesh_of(8)), pytest.raises(ValueError, match=r"T=12 tokens do not divide over mesh.sequence=8"):
        running_logsumexp(jnp.zeros((1, 12, 1, 2)), None, None)


def test_a_convolution_wider_than_a_shard_is_an_error():
    with use_mesh(mesh_of(8)), pytest.raises(ValueError, match="shards of 1 tokens are shorter than the 3"):
        short_convolution(jnp.zeros((1, 8, 2)), jnp.zeros((4, 2)))
