"""The whole model, for every mixer: decode equals parallel, packing, causality, resumption, stacking, counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlm import params as params_lib
from jaxlm.layers.ffn import SwiGLUSettings
from jaxlm.layers.mixers.attention import AttentionSettings
from jaxlm.layers.mixers.gla import GLASettings
from jaxlm.layers.mixers.linear import LinearSettings
from jaxlm.layers.mixers.retention import RetentionSettings
from jaxlm.models.language_model import LanguageModel, ModelSettings, abstract_model, train_flops_per_token

VOCAB = 64

# A line per mixer (and option that changes its state or mathematics).
MIXERS = {
    "gla": GLASettings(heads=2, chunk_size=8),
    "gla-convolution": GLASettings(heads=2, convolution=4, chunk_size=8, output_gate=False),
    "retention": RetentionSettings(heads=2, chunk_size=8),
    "lightning": RetentionSettings(heads=2, decay="lightning", rope_base=None, chunk_size=8),
    "linear": LinearSettings(heads=2, chunk_size=8),
    "linear-normalizer": LinearSettings(heads=2, normalizer=True, convolution=3, chunk_size=8),
    "attention": AttentionSettings(heads=4, kv_heads=2),
    "attention-window": AttentionSettings(heads=2, window=5, output_gate="elementwise"),
    "attention-nope": AttentionSettings(heads=2, qk_norm=False, rope_base=None, output_gate="headwise"),
    "attention-partial-rope": AttentionSettings(heads=2, rope_fraction=0.5),
}


def settings_for(mixer, depth=2, **changes):
    return ModelSettings(
        vocab_size=VOCAB, width=32, depth=depth, pattern=("m",), mixers={"m": mixer}, ffn=SwiGLUSettings(hidden=48), **changes
    )


def staged(**changes):
    """Stages that repeat and that do not, one of them without channel mixers."""
    stages = [
        {"pattern": ["linear"], "ffn": {"kind": "none"}}, {"pattern": ["gla", "retention"], "repeat": 2}, {"pattern": ["swa"]},
    ]  # fmt: skip
    names = {"gla": "gla-convolution", "swa": "attention-window", "retention": "retention", "linear": "linear"}
    mixers = {name: MIXERS[case] for name, case in names.items()}
    return ModelSettings(
        vocab_size=VOCAB, width=32, depth=6, pattern=None, stages=stages, mixers=mixers, ffn=SwiGLUSettings(hidden=48),
        norm="layer", embedding_norm=True, **changes,
    )  # fmt: skip


def hybrid(depth=5, **changes):
    mixers = {"gla": MIXERS["gla-convolution"], "swa": MIXERS["attention-window"], "retention": MIXERS["retention"]}
    return ModelSettings(
        vocab_size=VOCAB, width=32, depth=depth, pattern=("gla", "retention", "swa"), mixers=mixers,
        ffn=SwiGLUSettings(hidden=48), **changes,
    )  # fmt: skip


def build(settings, seed=0):
    """A model whose parameters are far enough from their small initial values to make differences visible."""
    infos = params_lib.describe(abstract_model(settings))

    @jax.jit
    def make():
        keys = iter(jax.random.split(jax.random.key(seed + 1), 1000))
        _, tree = params_lib.split(LanguageModel(settings, rngs=nnx.Rngs(seed)))
        noisy = lambda i, x: x if i.role in ("constant", "norm") else x + 0.1 * jax.random.normal(next(keys), i.shape)  # noqa: E731
        return params_lib.map_info(noisy, infos, tree)

    return nnx.merge(nnx.split(abstract_model(settings))[0], make())


def tokens(length, batch=2, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, VOCAB)


@jax.jit
def call(model, tokens, state=None, segment_ids=None):
    return model(tokens, state, segment_ids)


MODELS = {"hybrid": hybrid, "staged": staged}


@pytest.fixture(scope="module", params=[*MIXERS, *MODELS])
def model(request):
    return build(MODELS[request.param]() if request.param in MODELS else settings_for(MIXERS[request.param]))


def test_decode_and_split_prefill_equal_one_parallel_call(model):
    x = tokens(21)
    expected, none = call(model, x)
    assert none is None
    state = model.init_state(2, length=21)
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), state)
    logits = []
    for piece in (x[:, :13], *(x[:, i : i + 1] for i in range(13, 21))):
        out, state = call(model, piece, state)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == shapes
        logits.append(out)
    np.testing.assert_allclose(jnp.concatenate(logits, 1), expected, atol=1e-4)


def test_a_packed_row_gives_each_document_what_it_gives_alone(model):
    lengths = (9, 1, 7)
    x = tokens(sum(lengths), batch=1)
    segment_ids = jnp.repeat(jnp.asarray([3, 1, 3]), jnp.asarray(lengths))[None]
    packed, state = call(model, x, model.init_state(1, length=17), segment_ids)
    start = 0
    for length in lengths:
        alone, last = call(model, x[:, start : start + length], model.init_state(1, length=17))
        np.testing.assert_allclose(packed[:, start : start + length], alone, atol=1e-4)
        start += length
    # The state left behind is the last document's: continuing either gives the same.
    more = tokens(4, batch=1, seed=9)
    np.testing.assert_allclose(call(model, more, state)[0], call(model, more, last)[0], atol=1e-4)


def test_later_tokens_do_not_change_earlier_logits_by_one_bit(model):
    x = tokens(21)
    changed = x.at[:, 14:].set((x[:, 14:] + 1) % VOCAB)
    before, after = call(model, x)[0], call(model, changed)[0]
    np.testing.assert_array_equal(before[:, :14], after[:, :14])
    assert not np.array_equal(before[:, 14:], after[:, 14:])


def test_prefill_gives_the_last_logits_and_the_state(model):
    x = tokens(9)
    expected, state = call(model, x, model.init_state(2, length=12))
    got, got_state = jax.jit(lambda m, x, s: m.prefill(x, s))(model, x, model.init_state(2, length=12))
    np.testing.assert_allclose(got, expected[:, -1], atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got_state, state)


def test_stacked_blocks_equal_blocks_called_one_by_one():
    model = build(hybrid(depth=8))
    x = tokens(11)
    h = model.embedding(x, jnp.float32)
    graphdef, stacked = params_lib.split(model.stages[0])
    periods = [nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], stacked)) for i in range(2)]
    for block in [block for period in periods for block in period.blocks] + list(model.stages[1].blocks):
        h, *_ = block(h, None, None, {})
    np.testing.assert_allclose(model.norm(h) @ model.readout_kernel(), call(model, x)[0], atol=1e-4)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(remat):
    def gradient(settings):
        model = build(settings)
        graphdef, tree = params_lib.split(model)
        return jax.jit(jax.grad(lambda t: jnp.mean(nnx.merge(graphdef, t)(tokens(11))[0] ** 2)))(tree)

    plain, again = gradient(hybrid()), gradient(hybrid(remat=remat))
    rms = lambda x: float(jnp.sqrt(jnp.mean(x**2)))  # noqa: E731
    ratios = jax.tree.leaves(jax.tree.map(lambda a, b: rms(a - b) / rms(a) if rms(a) else rms(b), plain, again))
    assert max(ratios) < 1e-4


def test_lightning_decays_follow_the_layer():
    model = LanguageModel(settings_for(MIXERS["lightning"], depth=3), rngs=nnx.Rngs(0))
    rates = model.stages[0].blocks[0].mixer.log_decay[...]
    expected = [[-(8 / 2) * (1 - layer / 3) * h for h in range(2)] for layer in range(3)]
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_untied_readout_is_separate_and_tied_is_not():
    tied, untied = (abstract_model(settings_for(MIXERS["gla"], tied_embedding=t)) for t in (True, False))
    count = lambda model: params_lib.count(params_lib.describe(model))  # noqa: E731
    assert count(untied) - count(tied) == VOCAB * 32
    assert params_lib.describe(untied)["readout"]["kernel"].role == "output"


def gla_1b():
    return ModelSettings(
        vocab_size=32_000, width=2048, depth=24, pattern=("gla",), mixers={"gla": GLASettings(heads=4)}, tied_embedding=False
    )


def test_published_parameter_counts():
    """Sheet section 19: GLA 24 x 2048 untied and 24 x 1024 tied, vocabulary 32,000."""
    assert params_lib.count(params_lib.describe(abstract_model(gla_1b()))) == 1_365_514_240
    small = gla_1b().model_copy(update={"width": 1024, "tied_embedding": True})
    assert params_lib.count(params_lib.describe(abstract_model(small))) == 341_707_776


def test_flops_convention():
    settings = settings_for(AttentionSettings(heads=2), depth=3)
    infos = params_lib.describe(abstract_model(settings))
    matrices = 3 * (4 * 32 * 32 + 3 * 32 * 48) + VOCAB * 32
    # Scores and values: 4 H K per key seen, (T + 1) / 2 keys on average.
    assert train_flops_per_token(settings, infos, context=100) == 3 * (2 * matrices + 3 * 4 * 32 * 50.5)
    window = settings_for(AttentionSettings(heads=2, window=10))
    seen = sum(min(t + 1, 10) for t in range(100)) / 100
    assert window.sequence_flops(100) == pytest.approx(2 * 4 * 32 * seen)
    assert settings_for(GLASettings(heads=2)).sequence_flops(100) == 2 * 4 * 2 * 8 * 16


def test_compute_dtype_is_that_of_activations_only():
    model = LanguageModel(hybrid(), rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    hidden, _ = model.hidden(tokens(8))
    assert hidden.dtype == jnp.bfloat16
    assert model(tokens(8))[0].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params_lib.split(model)[1])} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pattern": ("gla", "atention")}, "unknown mixer 'atention'; did you mean 'attention'"),
        ({"mixers": {"swa": AttentionSettings()}}, "swa not used by the pattern"),
        ({"stages": [{"pattern": ["gla"]}]}, "pattern and stages are both given"),
        ({"pattern": None}, "pattern and stages are both null"),
        ({"pattern": None, "stages": [{"pattern": ["gla", "linear"], "repeat": 3}]}, "depth=8 but .* 6 blocks; set depth to 6"),
    ],
)
def test_wrong_patterns_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        ModelSettings(vocab_size=VOCAB, **changes)


def test_head_dims_that_do_not_divide_are_named():
    with pytest.raises(Exception, match=r"gla.expand_k: 16 channels do not divide over heads=3"):
        abstract_model(settings_for(GLASettings(heads=3)))
    with pytest.raises(ValueError, match="kv_heads=3 must divide heads=4"):
        AttentionSettings(heads=4, kv_heads=3)
