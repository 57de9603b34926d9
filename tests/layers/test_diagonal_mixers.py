"""HGRN, minGRU, minLSTM, S4D and Mamba against their equations, written out token by token in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm import params as params_lib
from jaxlm.layers.mixers.common import LayerContext
from jaxlm.layers.mixers.hgrn import HGRN, HGRNSettings
from jaxlm.layers.mixers.mamba import Mamba, MambaSettings
from jaxlm.layers.mixers.minimal import MinGRU, MinGRUSettings, MinLSTM, MinLSTMSettings
from jaxlm.layers.mixers.s4d import S4D, S4DSettings
from jaxlm.schema import UserError

WIDTH, DEPTH, T = 8, 4, 11
SEGMENTS = np.array([[3] * 5 + [1] + [3] * 5, [0] * 11])
DOCUMENTS = [(0, 0, 5), (0, 5, 6), (0, 6, 11), (1, 0, 11)]

MODULES = {HGRNSettings: HGRN, MambaSettings: Mamba, MinGRUSettings: MinGRU, MinLSTMSettings: MinLSTM, S4DSettings: S4D}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(x))


def hgrn(p, x, settings, index):
    table = np.zeros((DEPTH, p["bound_logit"].size))
    table[:index] = p["bound_logit"]
    bound = (np.exp(table) / np.exp(table).sum(0))[:index].sum(0)
    h, out = 0, []
    for x_t in x:
        f = bound + (1 - bound) * sigmoid(x_t @ p["forget"]["kernel"])
        h = f * h + (1 - f) * silu(x_t @ p["input"]["kernel"])
        normed = h / np.sqrt(np.mean(h**2) + 1e-5) * p["output"]["norm"]["scale"]
        out.append(normed * silu(x_t @ p["output"]["gate"]["kernel"]) @ p["output"]["project"]["kernel"])
    return np.array(out)


def g(x):
    return np.where(x >= 0, x + 0.5, sigmoid(x))


def mingru(p, x, settings, index):
    project, h, out = p["project"], 0, []
    for x_t in x:
        z = sigmoid(x_t @ project["update"]["kernel"])
        h = (1 - z) * h + z * g(x_t @ project["hidden"]["kernel"])
        assert (h > 0).all()
        out.append(h @ p["output"]["kernel"])
    return np.array(out)


def minlstm(p, x, settings, index):
    project, h, out = p["project"], 0, []
    for x_t in x:
        f, i = (sigmoid(x_t @ project[name]["kernel"]) for name in ("forget", "input"))
        h = f / (f + i) * h + i / (f + i) * g(x_t @ project["hidden"]["kernel"])
        out.append(h @ p["output"]["kernel"])
    return np.array(out)


def s4d(p, x, settings, index):
    rate = -np.exp(p["log_a_real"]) + 1j * p["a_imag"]
    dt = np.exp(p["log_dt"])[:, None]
    c = p["c"][:, 0] + 1j * p["c"][:, 1]
    if settings.discretisation == "zoh":
        a, b = np.exp(dt * rate), (np.exp(dt * rate) - 1) / rate
    else:
        a, b = (1 + dt * rate / 2) / (1 - dt * rate / 2), dt / (1 - dt * rate / 2)
    h, out = 0, []
    for u in x:
        h = a * h + b * u[:, None]
        y = 2 * np.sum(c * h, axis=-1).real + p["skip"] * u
        y = y * 0.5 * (1 + np.array([math.erf(v / 2**0.5) for v in y]))
        value, gate = np.split(y @ p["output"]["kernel"] + p["output"]["bias"], 2)
        out.append(value * sigmoid(gate))
    return np.array(out)


def mamba(p, x, settings, index, *, memory=False):
    rank, n, width = -(-WIDTH // 16) if settings.dt_rank is None else settings.dt_rank, settings.state, settings.convolution
    inner = x @ p["input"]["kernel"]
    padded = np.concatenate([np.zeros((width - 1, inner.shape[1])), inner])
    h, out = 0, []
    for t, x_t in enumerate(x):
        u = silu((padded[t : t + width] * p["convolution"]).sum(0) + p["convolution_bias"])
        selected = u @ p["select"]["kernel"]
        dt = softplus(selected[:rank] @ p["dt"]["kernel"] + p["dt_bias"])
        b, c = selected[rank : rank + n], selected[rank + n :]
        h = np.exp(-dt[:, None] * np.exp(p["a_log"])) * h + dt[:, None] * b * u[:, None]
        m = h @ c + p["skip"] * u
        out.append(m if memory else (m * silu(x_t @ p["gate"]["kernel"])) @ p["output"]["kernel"])
    return np.array(out)


# name -> (settings, layer's index, oracle)
CASES = {
    "hgrn": (HGRNSettings(expand=1.5, chunk_size=4), 3, hgrn),
    "hgrn, first layer": (HGRNSettings(chunk_size=4), 0, hgrn),
    "mingru": (MinGRUSettings(chunk_size=4), 1, mingru),
    "minlstm": (MinLSTMSettings(chunk_size=4), 1, minlstm),
    "s4d": (S4DSettings(state=6, chunk_size=4), 1, s4d),
    "s4d, inv and bilinear": (S4DSettings(state=6, initialisation="inv", discretisation="bilinear", chunk_size=4), 1, s4d),
    "s4d, real": (S4DSettings(state=6, initialisation="real", chunk_size=4), 1, s4d),
    "mamba": (MambaSettings(state=3, dt_rank=2, chunk_size=4), 1, mamba),
}


def make(settings, index=1, noise=0.3, width=WIDTH):
    """The module, with parameters far from where they start, and these as float64."""
    module = MODULES[type(settings)](settings, LayerContext(width, DEPTH, jnp.asarray(index)), rngs=nnx.Rngs(0))
    structure, tree = params_lib.split(module)
    infos = params_lib.describe(module)
    rng = np.random.default_rng(0)
    move = lambda i, x: x if i.role == "constant" else x + noise * rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
    tree = params_lib.map_info(move, infos, tree)
    return nnx.merge(structure, tree), jax.tree.map(lambda x: np.asarray(x, np.float64), tree), infos


@jax.jit
def call(module, x, state=None, segment_ids=None):
    return module(x, state, segment_ids)


def tokens(seed=0):
    return np.random.default_rng(seed).normal(size=(2, T, WIDTH)).astype(np.float32)


@pytest.mark.parametrize("case", CASES)
def test_equations(case):
    """A row of three documents and one of a single document; the same from nothing, in one piece."""
    settings, index, oracle = CASES[case]
    module, p, _ = make(settings, index)
    x = tokens()
    packed, _ = call(module, x, None, SEGMENTS)
    plain, _ = call(module, x)
    for row, start, end in DOCUMENTS:
        wanted = oracle(p, x[row, start:end].astype(np.float64), settings, index)
        np.testing.assert_allclose(packed[row, start:end], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    wanted = oracle(p, x[0].astype(np.float64), settings, index)
    np.testing.assert_allclose(plain[0], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    assert np.abs(plain[0, 5:] - packed[0, 5:]).max() > 1e-3 * np.abs(wanted).max()


def test_mamba_memory_is_the_scan_with_its_skip_before_the_gate():
    settings, index, _ = CASES["mamba"]
    module, p, _ = make(settings, index)
    x = tokens()
    y, state, memory = jax.jit(lambda m, x: m.with_memory(x))(module, x)
    wanted = mamba(p, x[1].astype(np.float64), settings, index, memory=True)
    np.testing.assert_allclose(memory[1], wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
    gated = np.asarray(memory, np.float64) * silu(x.astype(np.float64) @ p["gate"]["kernel"])
    np.testing.assert_allclose(y, gated @ p["output"]["kernel"], rtol=0, atol=1e-5 * np.abs(y).max())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), (y, state), call(module, x))


def stacked(settings, width=WIDTH):
    def build(index, key):
        return MODULES[type(settings)](settings, LayerContext(width, DEPTH, index), rngs=nnx.Rngs(key))

    module = params_lib.stack(build, jnp.arange(DEPTH), jax.random.split(jax.random.key(0), DEPTH))
    return params_lib.split(module)[1], params_lib.describe(module)


def test_hgrn_bounds_start_at_layer_over_depth_and_stay_trainable():
    """cumsum(softmax(zeros over layers)) less its first row; the first layer's bound is 0 whatever its logit."""
    tree, infos = stacked(HGRNSettings())
    assert (infos["bound_logit"].role, infos["position"].role) == ("dynamics", "constant")
    for index in range(DEPTH):
        module, _, _ = make(HGRNSettings(), index, noise=0)
        np.testing.assert_array_equal(tree["position"][index], index / DEPTH)
        np.testing.assert_allclose(jax.nn.sigmoid(module.lower_bound_logit()), index / DEPTH, rtol=1e-6)
        structure, p = params_lib.split(module)
        gradient = jax.grad(lambda p, structure=structure: jnp.sum(nnx.merge(structure, p)(tokens())[0] ** 2))(p)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
        assert (np.abs(gradient["bound_logit"]).max() > 0) == (index > 0)
        assert gradient["position"] == 0


@pytest.mark.parametrize(
    ("initialisation", "first", "last"),
    [
        ("lin", (0.5, 0), (0.5, np.pi * 31)),
        ("inv", (0.5, 64 / np.pi * 63), (0.5, 64 / np.pi * (64 / 63 - 1))),
        ("real", (1, 0), (32, 0)),
    ],
)
def test_s4d_starts_as_published(initialisation, first, last):
    tree, infos = stacked(S4DSettings(initialisation=initialisation), width=64)
    rates = np.stack([np.exp(tree["log_a_real"]), tree["a_imag"]], axis=-1)
    assert rates.shape == (DEPTH, 64, 32, 2)
    np.testing.assert_allclose(rates[:, :, 0], np.broadcast_to(first, (DEPTH, 64, 2)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(rates[:, :, -1], np.broadcast_to(last, (DEPTH, 64, 2)), rtol=1e-5, atol=1e-5)
    low, high = np.log(1e-3), np.log(0.1)
    assert tree["log_dt"].min() >= low
    assert tree["log_dt"].max() <= high
    np.testing.assert_allclose(np.mean(tree["log_dt"]), (low + high) / 2, atol=0.3)
    # Of a complex standard normal each part has variance 1/2.
    np.testing.assert_allclose(np.std(tree["c"]), 0.5**0.5, rtol=0.03)
    np.testing.assert_allclose(np.std(tree["skip"]), 1, rtol=0.2)
    roles = {name: infos[name].role for name in ("log_dt", "log_a_real", "a_imag", "c", "skip")}
    assert roles == {**dict.fromkeys(roles, "dynamics"), "c": "convolution"}


def test_mamba_starts_as_published():
    tree, infos = stacked(MambaSettings())
    np.testing.assert_allclose(np.exp(tree["a_log"]), np.broadcast_to(np.arange(1, 17), (DEPTH, 2 * WIDTH, 16)), rtol=1e-6)
    np.testing.assert_array_equal(tree["skip"], 1)
    dt = softplus(np.asarray(tree["dt_bias"], np.float64))
    assert 1e-3 * 0.999 < dt.min() < 0.01 < dt.max() < 0.1001
    assert all(infos[name].role == "dynamics" for name in ("a_log", "dt_bias", "skip"))


@pytest.mark.parametrize(
    ("settings", "width", "wanted"),
    [
        # H (N/2) (2 + 1 + 1) + 2 H + 2 H^2 + 2 H
        (S4DSettings(), 256, 256 * 32 * 4 + 2 * 256 + 2 * 256**2 + 2 * 256),
        # 24 of these, their norms, the last norm and 50,280 embeddings are the 129,135,360 of mamba-130m.
        (MambaSettings(), 768, (129_135_360 - 50_280 * 768 - 768) // 24 - 768),
        # q, k, v, o of one width, and the table's row and the norm.
        (HGRNSettings(), 64, 4 * 64**2 + 2 * 64),
        (MinGRUSettings(expand=1.5), 64, 3 * 64 * 96),
        (MinLSTMSettings(expand=2.0), 64, 4 * 64 * 128),
    ],
)
def test_parameter_counts(settings, width, wanted):
    module = nnx.eval_shape(
        lambda: MODULES[type(settings)](settings, LayerContext(width, 24, jnp.asarray(1)), rngs=nnx.Rngs(0))
    )
    assert params_lib.count(params_lib.describe(module)) == wanted


@pytest.mark.parametrize("case", ["hgrn", "mingru", "minlstm", "mamba", "s4d"])
def test_bfloat16_activations_keep_float32_states(case):
    settings, index, _ = CASES[case]
    module, _, _ = make(settings, index)
    x = jnp.asarray(tokens(), jnp.bfloat16)
    state = module.init_state(2, T, jnp.bfloat16)
    y, after = call(module, x, state)
    assert y.dtype == jnp.bfloat16
    assert jax.tree.map(lambda s: (s.shape, s.dtype), after) == jax.tree.map(lambda s: (s.shape, s.dtype), state)
    assert after["recurrent"].dtype == jnp.float32
    wanted, _ = call(module, x.astype(jnp.float32))
    assert np.linalg.norm(np.asarray(y, np.float32) - wanted) < 0.02 * np.linalg.norm(wanted)


@pytest.mark.parametrize("case", ["hgrn", "hgrn, first layer", "mingru", "minlstm"])
def test_saturated_gates_have_finite_gradients(case):
    settings, index, _ = CASES[case]
    structure, p = params_lib.split(make(settings, index)[0])
    loss = lambda p, x: jnp.sum(nnx.merge(structure, p)(x)[0] ** 2)  # noqa: E731
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(p, 1e4 * tokens())
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))
    assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(gradient[0]["output"]))


def test_settings_that_cannot_be_are_named():
    with pytest.raises(ValueError, match=r"s4d.state=7 is odd.* use 8"):
        S4DSettings(state=7)
    for settings in (HGRNSettings(expand=1.3), MambaSettings(expand=1.3), MinGRUSettings(expand=1.3)):
        with pytest.raises(UserError, match=rf"{settings.kind}.expand: 10.4 channels"):
            make(settings)


def test_flops_per_token():
    assert HGRNSettings(expand=2.0).sequence_flops(64, 100) == 2 * 128
    assert MambaSettings(state=16).sequence_flops(64, 100) == 6 * 16 * 128
    assert S4DSettings(state=64).sequence_flops(64, 100) == 11 * 32 * 64
