"""TTT-Linear, Moneta, Yaad and Memora against their equations: token by token in float64, gradients by autodiff."""

import itertools
import math
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxlm.ops.fast_weights import FastState, memora, miras_state, moneta, ttt_linear, ttt_state, yaad

B, T, H, D, E, C = 2, 16, 2, 4, 6, 4
# Documents that begin anywhere, one of a single token, an id that comes back, two that begin inside one chunk.
SEGMENTS = np.array([[3] * 2 + [1] + [3] * 8 + [2] + [3] * 4, [5] * 6 + [6] * 10])
FORMS = ("recurrent", "chunked")


def softmax(x):
    return jax.nn.softmax(x, axis=0)


def average_map(a):
    return a**3 / jnp.sqrt(jnp.mean(a**4) + 1e-6 / a.size)


# name -> op, its options, dual variables to weights
CASES = {
    "ttt": (ttt_linear, {}, None),
    "moneta": (moneta, {}, average_map),
    "moneta, printed": (moneta, {"retention": "printed"}, lambda a: a / jnp.sqrt(jnp.sum(a**4) + 1e-6)),
    "moneta, p = q = 2": (moneta, {"p": 2.0, "q_norm": 2.0}, lambda a: a),
    "yaad": (yaad, {}, lambda a: a),
    "memora": (memora, {}, softmax),
}


def inputs(name, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (rng.normal(size=(B, T, H, D)) for _ in range(3))
    norm = {"norm_scale": 1 + 0.3 * rng.normal(size=(H, D)), "norm_bias": 0.3 * rng.normal(size=(H, D))}
    arrays = {"q": q, "k": k, "v": v, **norm}
    if name == "ttt":
        arrays |= {"rate": rng.uniform(0, 0.5, size=(B, T, H)), "token_scale": rng.uniform(0.2, 1, size=C)}
        return arrays | {"weights": {"w": 0.5 * rng.normal(size=(H, D, D)), "b": 0.1 * rng.normal(size=(H, D))}}
    arrays["rate"] = rng.uniform(0, 0.3, size=(B, T, H, D))
    arrays["log_decay"] = rng.choice([0, -0.1, -1, -80], p=[0.3, 0.4, 0.25, 0.05], size=(B, T, H, D))
    if name == "yaad":
        arrays["threshold"] = rng.uniform(0.5, 5, size=(B, T, H))
    return arrays | {"weights": {"w_in": rng.normal(size=(H, D, E)), "w_out": rng.normal(size=(H, E, D))}}


def normalize(x):
    return (x - jnp.mean(x)) / jnp.sqrt(jnp.var(x) + 1e-6)


def ttt_model(w, norm, x):
    return x + norm[0] * normalize(x @ w["w"] + w["b"]) + norm[1]


def mlp(w, norm, x):
    return x + norm[0] * normalize(jax.nn.gelu(x @ w["w_in"]) @ w["w_out"]) + norm[1]


def pull(name, error, threshold):
    if name.startswith("moneta"):
        p = CASES[name][1].get("p", 3)
        return p * jnp.tanh(10 * error) * jnp.sqrt(error**2 + 1e-6) ** (p - 1)
    length = jnp.sqrt(jnp.sum(error**2))
    return jnp.where(length > threshold, threshold * error / length, error) if name == "yaad" else error


@cache
def compiled(name):
    model = ttt_model if name == "ttt" else mlp

    @jax.jit
    def gradient(w, norm, k, v, threshold):
        prediction, back = jax.vjp(lambda w: model(w, norm, k), w)
        return back(pull(name, prediction - v, threshold))[0]

    return jax.jit(model), gradient


def document(name, x, weights, norm):
    """One head of one document, by the equations."""
    read, gradient = compiled(name)
    threshold = x.get("threshold", np.zeros(len(x["q"])))
    dual, out = weights, []
    for t in range(len(x["q"])):
        grad = lambda at, t=t: gradient(at, norm, x["k"][t], x["v"][t], threshold[t])  # noqa: E731
        if name == "ttt":
            if t % C == 0:
                start, total = dual, jax.tree.map(np.zeros_like, dual)
            total = jax.tree.map(lambda s, g, t=t: s + x["rate"][t] * g, total, grad(start))
            dual = jax.tree.map(lambda w, s, t=t: w - x["token_scale"][t % C] * s, start, total)
            out.append(read(dual, norm, x["q"][t]))
            continue
        rate, alpha = x["rate"][t], np.exp(x["log_decay"][t])

        def move(w, g, rate=rate, alpha=alpha):
            return {
                "w_in": alpha[:, None] * w["w_in"] - rate[:, None] * g["w_in"],
                "w_out": alpha * w["w_out"] - rate * g["w_out"],
            }

        if t % C == 0:
            start = jax.tree.map(CASES[name][2], dual)
            moving = start
            if name == "memora":
                dual = jax.tree.map(jnp.log, jax.tree.map(softmax, move(jax.tree.map(jnp.log, start), grad(start))))
                start = moving = jax.tree.map(jnp.exp, dual)
        if name != "memora":
            moving, dual = move(moving, grad(start)), move(dual, grad(start))
        elif t % C:
            dual = move(dual, grad(start))
        out.append(read(moving, norm, x["q"][t]))
    return np.array(out)


def oracle(name, arrays, segment_ids):
    o = np.zeros((B, T, H, D))
    for b in range(B):
        cuts = [0, *(np.flatnonzero(np.diff(segment_ids[b])) + 1), T]
        for start, end in itertools.pairwise(cuts):
            for h in range(H):
                x = {
                    n: a[b, start:end, h] for n, a in arrays.items() if n not in ("weights", "token_scale") and "norm" not in n
                }
                x["token_scale"] = arrays.get("token_scale")
                weights = {n: w[h] for n, w in arrays["weights"].items()}
                o[b, start:end, h] = document(name, x, weights, (arrays["norm_scale"][h], arrays["norm_bias"][h]))
    return o


@cache
def jitted(name):
    op, options, _ = CASES[name]

    @jax.jit
    def call(arrays, segment_ids=None, state=None):
        run = partial(op, **arrays, **options, chunk_size=C, segment_ids=segment_ids, initial_state=state)
        return {form: run(form=form) for form in FORMS}

    return call


def cut(arrays, piece):
    return {n: a[:, piece] if n not in ("weights", "token_scale") and a.ndim > 2 else a for n, a in arrays.items()}


def empty(name):
    return ttt_state(B, H, D, jnp.float64) if name == "ttt" else miras_state(B, H, D, E, jnp.float64)


def halves(name, arrays, packed):
    """Both forms, from a state and cut inside documents and chunks; the second half continues what each form left."""
    first, second = slice(0, T // 2), slice(T // 2, T)
    ids = lambda piece: SEGMENTS[:, piece] if packed else None  # noqa: E731
    for before in jitted(name)(cut(arrays, first), ids(first), empty(name)).values():
        for o, state in jitted(name)(cut(arrays, second), ids(second), before[1]).values():
            yield np.concatenate([before[0], o], axis=1), state


# Memora runs packed rows token by token, so its chunks show in one document.
SLOW = [(name, packed) for name in CASES for packed in (True, False)]
FAST = [("ttt", True), ("moneta", True), ("yaad", True), ("memora", False)]


@pytest.mark.parametrize(
    ("name", "packed"), [case if case in FAST else pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]
)
def test_equations(x64, name, packed):
    arrays = inputs(name)
    wanted = oracle(name, arrays, SEGMENTS if packed else 0 * SEGMENTS)
    results = list(halves(name, arrays, packed))
    for o, state in results:
        np.testing.assert_allclose(o, wanted, rtol=0, atol=1e-9)
        # Documents of 4 and 10 tokens end the packed rows.
        np.testing.assert_array_equal(state.position, [0, 2] if packed else [0, 0])
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9), state, results[0][1])


@pytest.mark.parametrize("name", ["ttt", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "ttt")])
def test_rows_without_a_state_of_one_document_are_whole_chunks(x64, name):
    arrays = cut(inputs(name, 1), slice(0, 11))
    got, wanted = jitted(name)(arrays), jitted(name)(arrays, None, empty(name))
    for form in FORMS:
        np.testing.assert_allclose(got[form][0], wanted["recurrent"][0], rtol=0, atol=1e-9)
        np.testing.assert_array_equal(got[form][1].position, [3, 3])
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9), got[form][1], wanted["recurrent"][1])


@pytest.mark.parametrize(
    "name", ["ttt", *(pytest.param(name, marks=pytest.mark.slow) for name in ("moneta", "yaad", "memora"))]
)
def test_gradients_of_the_forms_agree(x64, name):
    """Of all inputs and weights; memora without documents, for those it runs token by token in both."""
    op, options, _ = CASES[name]
    arrays = inputs(name, 2)
    weight = np.random.default_rng(2).normal(size=(B, T, H, D))
    ids = None if name == "memora" else SEGMENTS

    def loss(arrays, form):
        o, state = op(**arrays, **options, chunk_size=C, form=form, segment_ids=ids)
        return jnp.sum(weight * o) + sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(state) if x.ndim > 1)

    wanted, got = jax.jit(lambda arrays: [jax.grad(loss)(arrays, form) for form in FORMS])(arrays)
    assert all(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(wanted))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-9 * max(1, np.abs(y).max())), got, wanted)


@pytest.mark.parametrize(("name", "packed"), FAST)
def test_later_tokens_do_not_change_earlier_outputs_by_one_bit(x64, name, packed):
    arrays = inputs(name, 3)
    changed = {n: a.copy() if n not in ("weights", "token_scale") else a for n, a in arrays.items()}
    for n in ("q", "k", "v", "rate", "log_decay", "threshold"):
        if n in changed:
            changed[n][:, 6:] += -1 if n == "log_decay" else 1
    for (before, _), (after, _) in zip(*(halves(name, x, packed) for x in (arrays, changed)), strict=True):
        np.testing.assert_array_equal(before[:, :6], after[:, :6])
        assert not np.array_equal(before[:, 6:8], after[:, 6:8])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ttt", "moneta", "yaad", "memora"])
def test_sharded_over_batch_and_heads_without_gathering(x64, name):
    op, options, _ = CASES[name]
    arrays, state = inputs(name, 4), empty(name)

    def loss(arrays, state):
        o, final = op(**arrays, **options, chunk_size=C, initial_state=state, segment_ids=SEGMENTS)
        return sum(jnp.sum(jnp.sin(x)) for x in [o, *jax.tree.leaves((final.start, final.change))]), o

    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4])

    def place(axes, tree):
        return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, P(*axes[: x.ndim]))), tree)

    def axes_of(name):
        of_heads = name == "weights" or "norm" in name
        return () if name == "token_scale" else ("tensor",) if of_heads else ("data", None, "tensor")

    sharded = {n: place(axes_of(n), x) for n, x in arrays.items()}, place(("data", "tensor"), state)
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    compiled = step.lower(*sharded).compile()
    for collective in ("all-gather", "all-to-all", "collective-permute"):
        assert collective not in compiled.as_text(), collective
    for x, y in zip(jax.tree.leaves(compiled(*sharded)), jax.tree.leaves(step(arrays, state)), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-9 * max(1, np.abs(y).max()))


def test_thresholds_of_yaad_split_the_errors(x64):
    """Else the equations would test one branch alone: with thresholds out of reach the outputs are others."""
    arrays = inputs("yaad")
    got, far, near = (
        next(halves("yaad", arrays | {"threshold": factor * arrays["threshold"]}, True))[0] for factor in (1, 100, 1e-6)
    )
    assert min(np.abs(got - far).max(), np.abs(got - near).max()) > 0.1


def test_gradient_keeps_about_the_square_root_of_the_states():
    """256 chunks of a state with 2 (16 16 + 16) elements: never more than 16 of them together."""
    x = jnp.zeros((1, 1024, 1, 16))
    weights = {"w": jnp.zeros((1, 16, 16)), "b": jnp.zeros((1, 16))}
    norm = jnp.ones((1, 16))

    def loss(x, weights):
        return jnp.sum(ttt_linear(x, x, x, x[..., 0], jnp.ones(4), weights, norm, norm, chunk_size=4)[0] ** 2)

    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, weights))
    shapes = {tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]", text)}
    assert max(math.prod(shape) for shape in shapes if shape[-2:] == (16, 16)) == 16 * 16 * 16
    assert max(map(math.prod, shapes)) == x.size


@pytest.mark.parametrize("name", ["ttt", pytest.param("yaad", marks=pytest.mark.slow)])
def test_bfloat16_inputs_keep_float32_states(name):
    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), inputs(name))
    low = arrays | {n: arrays[n].astype(jnp.bfloat16) for n in ("q", "k", "v")}
    exact = jitted(name)(arrays | {n: low[n].astype(jnp.float32) for n in ("q", "k", "v")}, SEGMENTS)["recurrent"][0]
    for o, state in jitted(name)(low, SEGMENTS).values():
        assert o.dtype == jnp.bfloat16
        assert {x.dtype for x in jax.tree.leaves((state.start, state.change))} == {jnp.dtype(jnp.float32)}
        assert np.linalg.norm(np.asarray(o, np.float32) - exact) < 0.03 * np.linalg.norm(exact)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("ttt", {"k": jnp.zeros((B, T, H, D + 1))}, "k must have the shape of q"),
        ("ttt", {"rate": jnp.zeros((B, T, H, D))}, r"rate must be \(2, 16, 2\)"),
        ("ttt", {"token_scale": jnp.zeros(3)}, r"token_scale must be \(4,\)"),
        ("ttt", {"weights": {"w": jnp.zeros((H, D, E)), "b": jnp.zeros((H, D))}}, r"weights\['w'\] must be \(2, 4, 4\)"),
        ("ttt", {"form": "parallel"}, "form='parallel' is not a form of ttt_linear"),
        ("yaad", {"threshold": jnp.zeros((B, T, H, D))}, "threshold must be"),
        ("yaad", {"chunk_size": 6}, "chunk_size must be a power of two, got 6"),
        ("memora", {"log_decay": jnp.zeros((B, T, H))}, "log_decay must be"),
        ("memora", {"initial_state": FastState({}, {}, None, jnp.zeros(B))}, "see ttt_state and miras_state"),
        ("moneta", {"q_norm": 2.5}, "q_norm must be 2 or at least 3, got 2.5"),
        ("moneta", {"p": 0.5}, "p must be at least 1, got 0.5"),
        ("moneta", {"retention": "none"}, 'choose "gradient" or "printed"'),
    ],
)
def test_input_that_does_not_fit_is_named(name, changes, message):
    arrays = jax.tree.map(jnp.asarray, inputs(name))
    with pytest.raises(ValueError, match=message):
        CASES[name][0](**{**arrays, "chunk_size": C, **changes})
