"""Mixers of hybrids: differential attention, latent attention, cross-attention over shared keys and values, GMU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm import params as params_lib
from jaxlm.layers.ffn import SwiGLUSettings
from jaxlm.layers.mixers.attention import Attention, AttentionSettings, Differential
from jaxlm.layers.mixers.common import LayerContext
from jaxlm.layers.mixers.cross import (
    CrossAttention,
    CrossAttentionSettings,
    GatedMemoryUnit,
    GMUSettings,
    KeyValue,
    KeyValueSettings,
    write_cache,
)
from jaxlm.layers.mixers.mla import MLASettings, MultiHeadLatentAttention
from jaxlm.models.language_model import LanguageModel, ModelSettings, abstract_model
from jaxlm.ops.attention import attention, init_attention_cache
from jaxlm.schema import UserError

WIDTH, VOCAB = 16, 64


def make(module, settings, width=WIDTH, layer=3, dtype=jnp.float32):
    """A mixer with parameters far from their initial values."""
    context = LayerContext(width=width, depth=4, index=jnp.asarray(layer)) if module is not Differential else layer
    mixer = module(settings, context, rngs=nnx.Rngs(0))
    graphdef, tree = params_lib.split(mixer)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    noisy = lambda info, x: x if info.role == "constant" else x + 0.3 * jax.random.normal(next(keys), x.shape)  # noqa: E731
    return nnx.merge(
        graphdef, jax.tree.map(lambda x: x.astype(dtype), params_lib.map_info(noisy, params_lib.describe(mixer), tree))
    )


def weights(module):
    """The parameters as nested dicts of numpy arrays."""
    return jax.tree.map(np.asarray, params_lib.split(module)[1])


def rows(batch=2, length=7, width=WIDTH, dtype=jnp.float32, seed=5):
    return jax.random.normal(jax.random.key(seed), (batch, length, width), dtype)


def softmax(scores):
    e = np.exp(scores - scores.max())
    return e / e.sum()


def rms(x, scale, eps):
    return x / np.sqrt(np.mean(x * x, -1, keepdims=True) + eps) * scale


def turn(x, position, base):
    """The rotary embedding of one vector, half-split, by complex numbers."""
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * position * base ** (-np.arange(half) / half))
    return np.concatenate([z.real, z.imag], -1)


DOCUMENTS = np.array([[4] * 4 + [2] * 3, [0] * 1 + [3] * 6])


def softmax_attention(p, x, settings):
    """Plain attention within `DOCUMENTS` by its equations, token by token and head by head."""
    heads, size, base = settings.heads, settings.head_dim, settings.rope_base
    rotated = round(size * settings.rope_fraction)

    def project(name, x):
        return x @ p[name]["kernel"] + (p[name]["bias"] if name in settings.biases else 0)

    def head(name, row, h, position):
        y = project(name, row)[h * size : (h + 1) * size]
        if settings.qk_norm:
            y = rms(y, p[f"{name}_norm"]["scale"], 1e-6)
        return y if base is None else np.concatenate([turn(y[:rotated], position, base), y[rotated:]])

    def output(rows, ids, t):
        first = list(ids).index(ids[t])
        seen = range(first if settings.window is None else max(first, t - settings.window + 1), t + 1)
        o = np.zeros((heads, size))
        for h in range(heads):
            group = h * settings.groups // heads
            q = head("q", rows[t], h, t - first)
            scores = [q @ head("k", rows[s], group, s - first) / np.sqrt(size) for s in seen]
            values = [project("v", rows[s])[group * size : (group + 1) * size] for s in seen]
            o[h] = softmax(np.array(scores)) @ np.array(values)
        if settings.output_gate != "none":
            gate = project("gate", rows[t])
            o = o / (1 + np.exp(-gate.reshape(heads, size if settings.output_gate == "elementwise" else 1)))
        return project("output", o.reshape(-1))

    x = np.asarray(x)
    return [[output(rows, ids, t) for t in range(len(rows))] for rows, ids in zip(x, DOCUMENTS, strict=True)]


@pytest.mark.parametrize(
    "changes",
    [
        {"kv_heads": 2},
        {"qk_norm": False, "biases": ("q", "k", "v", "output")},
        {"window": 3, "output_gate": "elementwise"},
        {"kv_heads": 2, "qk_norm": False, "rope_base": None, "output_gate": "headwise"},
        {"kv_heads": 1, "rope_fraction": 0.5},
        {"kv_heads": 2, "rope_fraction": 0.25, "window": 2, "output_gate": "headwise"},
    ],
    ids=["grouped", "biases", "window-elementwise", "nope-headwise", "partial-rope", "together"],
)
def test_attention_equals_its_equations(changes, x64):
    settings = AttentionSettings(**{"heads": 4, "head_dim": 8, "rope_base": 50.0, **changes})
    layer, x = make(Attention, settings, dtype=jnp.float64), rows(dtype=jnp.float64)
    y = nnx.jit(lambda layer, x, ids: layer(x, segment_ids=ids)[0])(layer, x, jnp.asarray(DOCUMENTS))
    # Norms and rotary angles are float32.
    np.testing.assert_allclose(y, softmax_attention(weights(layer), x, settings), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"kv_heads": 2},
        {"kv_heads": 4, "qk_norm": False, "rope_base": None, "output_gate": "elementwise"},
        {"kv_heads": 1, "rope_fraction": 0.5},
    ],
    ids=["grouped", "nope-elementwise", "partial-rope"],
)
def test_keys_and_values_made_for_cross_attention_equal_their_equations(changes, x64):
    """YOCO's producer and a reader of the same input are plain attention."""
    settings = AttentionSettings(**{"heads": 4, "head_dim": 8, "rope_base": 50.0, **changes})
    alike = {name: getattr(settings, name) for name in ("head_dim", "rope_base", "rope_fraction")}
    made = KeyValueSettings(kv_heads=settings.groups, k_norm=settings.qk_norm, **alike)
    read = CrossAttentionSettings(heads=4, qk_norm=settings.qk_norm, output_gate=settings.output_gate, **alike)
    producer, reader = make(KeyValue, made, dtype=jnp.float64), make(CrossAttention, read, dtype=jnp.float64)
    x = rows(dtype=jnp.float64)

    @nnx.jit
    def both(producer, reader, x, ids):
        nothing, _, kv = producer.exchange(x, None, ids, None)
        return nothing, reader.exchange(x, None, ids, kv)[0]

    nothing, y = both(producer, reader, x, jnp.asarray(DOCUMENTS))
    assert not np.any(nothing)
    p = weights(producer) | weights(reader)
    np.testing.assert_allclose(y, softmax_attention(p, x, settings), rtol=1e-4, atol=1e-5)


def test_differential_attention_equals_its_equations(x64):
    settings = AttentionSettings(
        heads=8, kv_heads=4, head_dim=4, qk_norm=False, differential=True, biases=("q", "v", "output"), rope_base=50.0
    )
    layer, x = make(Attention, settings, dtype=jnp.float64), rows(dtype=jnp.float64)
    p = weights(layer)
    assert [sorted(p[name]) for name in ("q", "k")] == [["bias", "kernel"], ["kernel"]]
    initial = 0.8 - 0.6 * np.exp(-0.3 * 3)
    q1, k1, q2, k2 = p["differential"]["vectors"]
    weight = np.exp(q1 @ k1) - np.exp(q2 @ k2) + initial
    y = nnx.jit(lambda layer, x: layer(x)[0])(layer, x)
    for b, row in enumerate(np.asarray(x)):
        q = (row @ p["q"]["kernel"] + p["q"]["bias"]).reshape(-1, 8, 4)
        k = (row @ p["k"]["kernel"]).reshape(-1, 4, 4)
        v = (row @ p["v"]["kernel"] + p["v"]["bias"]).reshape(-1, 2, 8)
        q, k = (np.stack([turn(y[t], t, 50.0) for t in range(len(y))]) for y in (q, k))
        expected = []
        for t in range(len(row)):
            heads = []
            for pair in range(4):
                group = pair // 2
                first, second = (
                    softmax(np.array([q[t, 2 * pair + i] @ k[s, 2 * group + i] / 2 for s in range(t + 1)])) for i in range(2)
                )
                o = (first - weight * second) @ v[: t + 1, group]
                heads.append(rms(o, p["differential"]["norm"]["scale"], 1e-5) * (1 - initial))
            expected.append(np.concatenate(heads) @ p["output"]["kernel"] + p["output"]["bias"])
        # lambda_init is a float32 constant.
        np.testing.assert_allclose(y[b], expected, rtol=1e-5, atol=1e-6)


def test_lambda_follows_the_layer_and_trains():
    table = {0: 0.2, 1: 0.3555, 2: 0.4707, 5: 0.6661, 10: 0.7701, 15: 0.7933, 31: 0.7999}
    make_layer = jax.vmap(lambda index: params_lib.split(Differential(4, index, rngs=nnx.Rngs(0)))[1]["initial"])
    np.testing.assert_allclose(make_layer(jnp.asarray(list(table))), list(table.values()), atol=6e-5)
    layer = make(Differential, 4)
    graphdef, tree = params_lib.split(layer)
    loss = lambda tree: jnp.sum(nnx.merge(graphdef, tree).combine(rows(width=16).reshape(2, 7, 2, 8)) ** 3)  # noqa: E731
    grads = jax.jit(jax.grad(loss))(tree)
    assert np.all(np.abs(grads["vectors"]) > 0)
    assert float(grads["initial"]) == 0


@pytest.mark.parametrize(
    "changes", [{}, {"q_rank": 6, "output_gate": "elementwise"}, {"rope_base": None}], ids=["plain", "q-rank-gate", "nope"]
)
def test_mla_equals_its_equations_and_its_absorbed_step(changes, x64):
    changes = {"rope_base": 50.0, **changes}
    settings = MLASettings(heads=3, kv_rank=5, nope_dim=4, rope_dim=2, value_dim=6, **changes)
    layer, x = make(MultiHeadLatentAttention, settings, dtype=jnp.float64), rows(dtype=jnp.float64)
    p = weights(layer)
    expected = []
    for row in np.asarray(x):
        compressed = rms(row @ p["q_down"]["kernel"], p["q_norm"]["scale"], 1e-6) if "q_down" in p else row
        q = (compressed @ p["q"]["kernel"]).reshape(-1, 3, 6)
        latent = rms(row @ p["kv_down"]["kernel"], p["kv_norm"]["scale"], 1e-6)
        k = (latent @ p["k_up"]["kernel"]).reshape(-1, 3, 4)
        v = (latent @ p["v_up"]["kernel"]).reshape(-1, 3, 6)
        position = row @ p["k_rope"]["kernel"]
        out = []
        for t in range(len(row)):
            heads = []
            for h in range(3):
                turned = (lambda y, s: turn(y, s, 50.0)) if changes["rope_base"] else (lambda y, s: y)
                scores = [q[t, h, :4] @ k[s, h] + turned(q[t, h, 4:], t) @ turned(position[s], s) for s in range(t + 1)]
                heads.append(softmax(np.array(scores) / np.sqrt(6)) @ v[: t + 1, h])
            o = np.concatenate(heads)
            out.append((o / (1 + np.exp(-row[t] @ p["gate"]["kernel"])) if "gate" in p else o) @ p["output"]["kernel"])
        expected.append(out)
    # Norms and rotary angles are float32.
    call = nnx.jit(lambda layer, x, state: layer(x, state))
    np.testing.assert_allclose(call(layer, x, None)[0], expected, rtol=1e-4, atol=1e-5)

    state = layer.init_state(2, 7, jnp.float64)
    assert sum(state["cache"][name].shape[-1] for name in "kv") == 5 + 2
    steps = []
    for piece in (x[:, :4], *(x[:, t : t + 1] for t in range(4, 7))):
        y, state = call(layer, piece, state)
        steps.append(y)
    np.testing.assert_allclose(np.concatenate(steps, 1), expected, rtol=1e-4, atol=1e-5)


def test_writing_a_cache_equals_what_the_op_writes():
    @jax.jit
    def write(mine, ops, q, k, v, ids, positions):
        _, ops = attention(q, k, v, cache=ops, segment_ids=ids, positions=positions)
        return write_cache(mine, k, v, positions, ids), ops

    k, v, q = (jax.random.normal(key, (2, 8, 1, 3)) for key in jax.random.split(jax.random.key(0), 3))
    ids = jnp.asarray([[1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1]])
    positions = jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7]])
    for slots in (4, 16):
        mine = ops = init_attention_cache(2, slots, 1, 3, jnp.float32)
        for piece, segments in ((slice(0, 1), None), (slice(1, 7), ids), (slice(7, 8), None)):
            mine, ops = write(mine, ops, q[:, piece], k[:, piece], v[:, piece], segments, positions[:, piece])
            for name, buffer in ops.items():
                np.testing.assert_array_equal(mine[name], buffer)


def test_gated_memory_unit_equals_its_equations():
    x, memory = rows(), rows(width=12, seed=8)
    for settings in (GMUSettings(memory=12), GMUSettings(memory=12, norm=True, norm_groups=3)):
        layer = make(GatedMemoryUnit, settings)
        p = weights(layer)
        z = np.asarray(x) @ p["gate"]["kernel"]
        y = np.asarray(memory) * z / (1 + np.exp(-z))
        if settings.norm:
            y = rms(y.reshape(2, 7, 3, 4), p["norm"]["scale"], 1e-5).reshape(2, 7, 12)
        got, state, produced = layer.exchange(x, None, None, memory)
        np.testing.assert_allclose(got, y @ p["output"]["kernel"], atol=1e-5)
        assert state is produced is None
        # A prefill that stops early asks for the last token alone.
        np.testing.assert_allclose(layer.exchange(x[:, -1:], None, None, memory)[0], got[:, -1:], atol=1e-5)
    with pytest.raises(UserError, match="memory=12 but the block before makes 16 channels; set gmu.memory"):
        layer.exchange(x, None, None, x)


def yoco():
    """A self-decoder of windows, keys and values made once, a cross-decoder that reads them."""
    mixers = {
        "swa": AttentionSettings(heads=2, window=3), "kv": {"kind": "key_value", "kv_heads": 2, "head_dim": 8, "k_norm": True},
        "cross": CrossAttentionSettings(heads=4, head_dim=8, qk_norm=True, rope_base=10_000.0, output_gate="elementwise"),
    }  # fmt: skip
    stages = [{"pattern": ["swa"]}, {"pattern": ["kv"], "ffn": {"kind": "none"}}, {"pattern": ["cross"], "repeat": 2}]
    return stages, mixers


def sambay():
    """Full differential attention whose keys and values, without positions, later blocks read."""
    full = AttentionSettings(
        heads=4, kv_heads=2, qk_norm=False, rope_base=None, differential=True, biases=("q", "v", "output"), produces="kv"
    )
    mixers = {
        "swa": full.model_copy(update={"window": 3, "produces": None}), "full": full,
        "cross": CrossAttentionSettings(heads=4, differential=True, biases=("q", "output")),
    }  # fmt: skip
    return [{"pattern": ["swa", "full"]}, {"pattern": ["cross"]}], mixers


def build(stages, mixers):
    depth = sum(len(s["pattern"]) * s.get("repeat", 1) for s in stages)
    settings = ModelSettings(
        vocab_size=VOCAB, width=WIDTH, depth=depth, pattern=None, stages=stages, mixers=mixers, ffn=SwiGLUSettings(hidden=16)
    )
    infos = params_lib.describe(abstract_model(settings))

    @jax.jit
    def noisy():
        keys = iter(jax.random.split(jax.random.key(1), 1000))
        tree = params_lib.split(LanguageModel(settings, rngs=nnx.Rngs(0)))[1]
        fixed = ("constant", "norm")
        return params_lib.map_info(
            lambda i, x: x if i.role in fixed else x + 0.1 * jax.random.normal(next(keys), i.shape), infos, tree
        )

    return nnx.merge(nnx.split(abstract_model(settings))[0], noisy())


@jax.jit
def call(model, tokens, state=None, segment_ids=None):
    return model(tokens, state, segment_ids)


@pytest.mark.parametrize("stages_and_mixers", [yoco])
def test_shared_keys_and_values_through_a_model(stages_and_mixers):
    model = build(*stages_and_mixers())
    x = jax.random.randint(jax.random.key(0), (2, 12), 0, VOCAB)
    expected = call(model, x)[0]

    state, got = model.init_state(2, 12), []
    for piece in (x[:, :5], x[:, 5:10], x[:, 10:11], x[:, 11:]):
        logits, state = call(model, piece, state)
        got.append(logits)
    np.testing.assert_allclose(np.concatenate(got, 1), expected, atol=1e-4)

    # Two documents in a row: each gets what it gets alone. A prefill, whose cross-decoder runs for the last token
    # alone, gives its logits and the same state.
    ids = jnp.asarray([[1] * 5 + [2] * 5] * 2)
    packed, state = call(model, x[:, :10], model.init_state(2, 12), ids)
    alone, _ = call(model, x[:, 5:10], model.init_state(2, 12))
    np.testing.assert_allclose(packed, np.concatenate([expected[:, :5], alone], 1), atol=1e-4)
    last, early = jax.jit(type(model).prefill)(model, x[:, :10], model.init_state(2, 12), ids)
    np.testing.assert_allclose(last, packed[:, -1], atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), early, state)

    # Causality, bit by bit.
    changed = call(model, x.at[:, 8:].set((x[:, 8:] + 1) % VOCAB))[0]
    np.testing.assert_array_equal(changed[:, :8], expected[:, :8])
    assert not np.allclose(changed[:, 8:], expected[:, 8:])


def test_cross_attention_equals_the_producers_own_attention():
    """With the producer's query and output weights and its input, the reader's output is the producer's."""
    full = AttentionSettings(heads=4, kv_heads=2, rope_base=100.0, produces="kv")
    producer = make(Attention, full)
    reader = make(CrossAttention, CrossAttentionSettings(heads=4, qk_norm=True, rope_base=100.0))
    tree = params_lib.split(producer)[1]
    reader = nnx.merge(params_lib.split(reader)[0], {name: tree[name] for name in ("q", "q_norm", "output")})
    x = rows()

    @jax.jit
    def both(producer, reader, x):
        y, _, kv = producer.exchange(x, None, None, None)
        return y, kv, reader.exchange(x, None, None, kv)[0]

    y, kv, read = both(producer, reader, x)
    np.testing.assert_allclose(read, y, atol=1e-5)
    with pytest.raises(UserError, match="heads=4 of head_dim=8 .* do not fit keys of 2 heads of 4 channels"):
        make(CrossAttention, CrossAttentionSettings(heads=4, head_dim=8)).exchange(x, None, None, kv)
    with pytest.raises(UserError, match="3 tokens over keys of 7"):
        reader.exchange(x[:, :3], None, None, kv)


def count(module, settings, width):
    layer = nnx.eval_shape(lambda: module(settings, LayerContext(width, 32, jnp.asarray(0)), rngs=nnx.Rngs(0)))
    infos = params_lib.describe(layer)
    return params_lib.count(infos, frozenset({"hidden"})), params_lib.count(infos)


def test_published_parameter_counts():
    """Phi4-mini-flash (width 2560: 40 query and 20 key heads of 64) and PLM-1.8B (width 2048)."""
    phi = {"heads": 40, "head_dim": 64, "differential": True}
    full = AttentionSettings(**phi, kv_heads=20, qk_norm=False, rope_base=None, biases=("q", "v", "output"), produces="kv")
    vectors = 4 * 64 + 128
    assert count(Attention, full, 2560) == (19_660_800, 19_660_800 + 2560 + 1280 + 2560 + vectors)
    cross = CrossAttentionSettings(**phi, biases=("q", "output"))
    assert count(CrossAttention, cross, 2560) == (13_107_200, 13_107_200 + 2 * 2560 + vectors)
    assert count(GatedMemoryUnit, GMUSettings(), 2560) == (26_214_400, 26_214_400)
    # Nine Mamba layers: input, convolution with bias, x and dt projections, A, D, output.
    inner, rank, state = 5120, 160, 16
    mamba = 2560 * 2 * inner + 5 * inner + inner * (rank + 2 * state) + (rank + 1) * inner + inner * (state + 1) + inner * 2560
    mixers = 9 * mamba + 9 * 19_660_800 + 7 * 13_107_200 + 7 * 26_214_400
    assert mixers + 32 * 3 * 2560 * 10_240 == 3_339_955_200

    plm = MLASettings(heads=16, rope_base=1e5)
    attention_weights, with_norm = count(MultiHeadLatentAttention, plm, 2048)
    assert with_norm == attention_weights + 512
    assert 32 * (attention_weights + 2 * 2048 * 8192) + 151_936 * 2048 == 1_825_308_672


@pytest.mark.parametrize(
    ("make_settings", "words"),
    [
        (lambda: AttentionSettings(heads=3, differential=True), "kv_heads=3 must be even"),
        (lambda: AttentionSettings(window=4, produces="kv"), "produces=kv with window=4.*set window to null"),
        (lambda: CrossAttentionSettings(heads=3, differential=True), "heads=3 must be even"),
        (lambda: GMUSettings(norm_groups=2), "norm_groups=2 without a norm; set norm: true"),
        (lambda: MLASettings(rope_dim=3), "rope_dim\n.*multiple of 2"),
    ],
)
def test_settings_that_do_not_fit_are_named(make_settings, words):
    with pytest.raises(ValueError, match=words):
        make_settings()
