"""The whole model, for every mixer: decode equals parallel, packing, causality, resumption, stacking, counts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax._src.core import jaxprs_in_params

from jaxlm import params as params_lib
from jaxlm.layers import mixers as mixers_module
from jaxlm.layers.ffn import SwiGLU, SwiGLUSettings
from jaxlm.layers.mixers.attention import Attention, AttentionSettings
from jaxlm.layers.mixers.cross import CrossAttentionSettings, GMUSettings, KeyValueSettings
from jaxlm.layers.mixers.delta import DeltaNetSettings, GatedDeltaNetSettings, KDASettings
from jaxlm.layers.mixers.gla import GLASettings
from jaxlm.layers.mixers.hgrn import HGRNSettings
from jaxlm.layers.mixers.hgrn2 import HGRN2Settings
from jaxlm.layers.mixers.lightnet import LightNetSettings
from jaxlm.layers.mixers.linear import LinearSettings
from jaxlm.layers.mixers.log_linear import LogLinearSettings
from jaxlm.layers.mixers.mamba import MambaSettings
from jaxlm.layers.mixers.mamba2 import Mamba2Settings
from jaxlm.layers.mixers.minimal import MinGRUSettings, MinLSTMSettings
from jaxlm.layers.mixers.miras import MemoraSettings, MonetaSettings, YaadSettings
from jaxlm.layers.mixers.mla import MLASettings
from jaxlm.layers.mixers.mom import MoMSettings
from jaxlm.layers.mixers.retention import RetentionSettings
from jaxlm.layers.mixers.rwkv7 import RWKV7Settings, RWKVChannelMixingSettings
from jaxlm.layers.mixers.s4d import S4DSettings
from jaxlm.layers.mixers.ttt import TTTLinearSettings
from jaxlm.models.language_model import LanguageModel, ModelSettings, abstract_model, train_flops_per_token
from jaxlm.parallel.context import DEFAULT_RULES, use_mesh
from jaxlm.parallel.mesh import make_mesh, param_shardings

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
    "attention-differential": AttentionSettings(heads=8, kv_heads=4, differential=True, biases=("q", "v", "output")),
    "mla": MLASettings(heads=2, kv_rank=8, nope_dim=8, rope_dim=4, value_dim=8),
    "mom": MoMSettings(heads=2, chunk_size=8),
    "mom-hgrn2": MoMSettings(heads=2, rule="hgrn2", chunk_size=8),
    "mom-log-linear": MoMSettings(heads=2, rule="log_linear", max_length=64, chunk_size=8),
    "mom-s4d": MoMSettings(heads=2, rule="s4d", chunk_size=8),
    "mom-mamba2": MoMSettings(heads=2, rule="mamba2", shared=False, chunk_size=8),
    "deltanet": DeltaNetSettings(heads=2, chunk_size=8),
    "deltanet-negative": DeltaNetSettings(heads=2, negative_eigenvalues=True, chunk_size=8),
    "gated-deltanet": GatedDeltaNetSettings(heads=2, value_heads=4, head_dim=8, chunk_size=8),
    "kda": KDASettings(heads=2, decay_bound=-5.0, chunk_size=8),
    "gdn2": KDASettings(heads=2, gates="channel", negative_eigenvalues=True, chunk_size=8),
    "hgrn": HGRNSettings(chunk_size=8),
    "hgrn2": HGRN2Settings(head_dim=8, chunk_size=8),
    "lightnet": LightNetSettings(head_dim=8, gate_rank=4, chunk_size=8),
    "lightnet-zero-start": LightNetSettings(head_dim=8, gate_rank=4, zero_start=True, chunk_size=8),
    "mamba": MambaSettings(state=4, chunk_size=8),
    "mamba2": Mamba2Settings(head_dim=16, state=8, groups=2, chunk_size=8),
    "mingru": MinGRUSettings(chunk_size=8),
    "minlstm": MinLSTMSettings(chunk_size=8),
    "s4d": S4DSettings(state=8, chunk_size=8),
    "s4d-inv-bilinear": S4DSettings(state=8, initialisation="inv", discretisation="bilinear", chunk_size=8),
    "s4d-real": S4DSettings(state=8, initialisation="real", chunk_size=8),
    "log-linear": LogLinearSettings(heads=2, max_length=32, chunk_size=8),
    "ttt": TTTLinearSettings(head_dim=16, chunk_size=4),
    "moneta": MonetaSettings(heads=2, expansion=2, gate_rank=4, chunk_size=4),
    "yaad": YaadSettings(heads=2, expansion=2, gate_rank=4, chunk_size=4),
    "memora": MemoraSettings(heads=2, expansion=2, gate_rank=4, chunk_size=4),
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


def samba(**changes):
    """Mamba and windows by turns, each followed by a channel mixer (arXiv 2406.07522)."""
    mixers = {"mamba": MIXERS["mamba"], "swa": AttentionSettings(heads=2, window=5, qk_norm=False)}
    return ModelSettings(
        vocab_size=VOCAB, width=32, depth=4, pattern=("mamba", "swa"), mixers=mixers, ffn=SwiGLUSettings(hidden=48), **changes
    )


def sambay(**changes):
    """As phi4-mini-flash: Mamba and windows, then blocks that read a memory and keys and values of the first half.
    Differential attention throughout."""
    attention = AttentionSettings(heads=4, kv_heads=2, differential=True, qk_norm=False, rope_base=None)
    mixers = {
        "mamba": MIXERS["mamba"], "memory": MIXERS["mamba"].model_copy(update={"produces": "memory"}),
        "window": attention.model_copy(update={"window": 5}), "full": attention.model_copy(update={"produces": "kv"}),
        "gmu": GMUSettings(), "cross": CrossAttentionSettings(heads=4, differential=True),
    }  # fmt: skip
    stages = [
        {"pattern": ["mamba", "window"], "repeat": 2}, {"pattern": ["memory", "full"]},
        {"pattern": ["gmu", "cross"], "repeat": 2},
    ]  # fmt: skip
    return ModelSettings(
        vocab_size=VOCAB, width=32, depth=10, pattern=None, stages=stages, mixers=mixers, ffn=SwiGLUSettings(hidden=48),
        **changes,
    )  # fmt: skip


def yoco(**changes):
    """Windows, then keys and values made once for the cross-attention of the second half, which has no cache."""
    mixers = {
        "swa": MIXERS["attention-window"], "kv": KeyValueSettings(kv_heads=2, head_dim=8, k_norm=True),
        "cross": CrossAttentionSettings(heads=4, head_dim=8, rope_base=10_000.0),
    }  # fmt: skip
    stages = [{"pattern": ["swa"]}, {"pattern": ["kv"]}, {"pattern": ["cross"], "repeat": 2}]
    return ModelSettings(
        vocab_size=VOCAB, width=32, depth=4, pattern=None, stages=stages, mixers=mixers, ffn=SwiGLUSettings(hidden=48),
        **changes,
    )  # fmt: skip


def rwkv7(**changes):
    """A first layer whose values the later ones mix into theirs, and channel mixers with a state."""
    roles = {"1": "make", "2": "mix"}
    mixers = {name: RWKV7Settings(head_dim=8, value_residual=role, chunk_size=8) for name, role in roles.items()}
    return ModelSettings(
        vocab_size=VOCAB, width=32, depth=3, pattern=None, stages=[{"pattern": ["1"]}, {"pattern": ["2"], "repeat": 2}],
        mixers=mixers, ffn=RWKVChannelMixingSettings(ratio=1.5), norm="layer", embedding_norm=True, **changes,
    )  # fmt: skip


def build(settings, seed=0):
    """A model whose parameters are far enough from their small initial values to make differences visible.

    Op by op: models have most shapes in common, and what has been compiled for one is there for the next.
    """
    infos = params_lib.describe(abstract_model(settings))
    keys = iter(jax.random.split(jax.random.key(seed + 1), 1000))
    _, tree = params_lib.split(LanguageModel(settings, rngs=nnx.Rngs(seed)))
    noisy = lambda i, x: x if i.role in ("constant", "norm") else x + 0.1 * jax.random.normal(next(keys), i.shape)  # noqa: E731
    return nnx.merge(nnx.split(abstract_model(settings))[0], params_lib.map_info(noisy, infos, tree))


def tokens(length, batch=2, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, VOCAB)


@jax.jit
def call(model, tokens, state=None, segment_ids=None):
    return model(tokens, state, segment_ids)


MODELS = {
    "hybrid": hybrid, "staged": staged, "rwkv7": rwkv7, "samba": samba, "sambay": sambay, "yoco": yoco,
    # A memory in front of its block's norm, and a unit that norms it.
    "ngmu": lambda: ModelSettings(
        vocab_size=VOCAB, width=32, depth=2, pattern=("memory", "gmu"), ffn=SwiGLUSettings(hidden=48), mixers={
            "memory": MIXERS["mamba2"].model_copy(update={"produces": "memory"}), "gmu": GMUSettings(norm=True, norm_groups=2),
        },
    ),
}  # fmt: skip


# One of each kind of state stays in the fast lane; its siblings' mathematics is tested with their layers there.
SLOW = {
    "gla", "retention", "linear", "attention", "attention-nope", "attention-partial-rope", "attention-differential", "deltanet",
    "kda", "hgrn", "lightnet", "mamba", "minlstm", "moneta", "yaad", "hybrid", "mom-hgrn2", "mom-mamba2", "mom-s4d",
    "mom-log-linear", "deltanet-negative", "gdn2", "s4d-inv-bilinear", "s4d-real", "samba", "yoco", "ngmu",
    "lightnet-zero-start",
}  # fmt: skip
CASES = [pytest.param(case, marks=pytest.mark.slow if case in SLOW else ()) for case in [*MIXERS, *MODELS]]


@pytest.fixture(scope="module", params=CASES)
def model(request):
    return build(MODELS[request.param]() if request.param in MODELS else settings_for(MIXERS[request.param]))


def test_every_kind_of_mixer_has_a_line():
    lines = {mixer.kind for mixer in MIXERS.values()}
    models = {settings.mixer(name).kind for make in MODELS.values() for settings in [make()] for name in settings.layer_names()}
    assert lines | models == set(mixers_module.MIXERS)


# Few different shapes: compiling takes these tests most of their time.
PIECE = 7  # no multiple of a chunk
LENGTH = 2 * PIECE + 1


def test_decode_and_split_prefill_equal_one_parallel_call(model):
    x = tokens(LENGTH)
    expected, none = call(model, x)
    assert none is None
    state = model.init_state(2, length=LENGTH)
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), state)
    logits = []
    for piece in (x[:, :PIECE], *(x[:, i : i + 1] for i in range(PIECE, LENGTH))):
        out, state = call(model, piece, state)
        assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == shapes
        logits.append(out)
    np.testing.assert_allclose(jnp.concatenate(logits, 1), expected, atol=1e-4)


def test_a_packed_row_gives_each_document_what_it_gives_alone(model):
    lengths = (PIECE, 1, PIECE)
    x = tokens(LENGTH)
    segment_ids = jnp.repeat(jnp.asarray([3, 1, 3]), jnp.asarray(lengths))[None].repeat(2, 0)
    packed, state = call(model, x, model.init_state(2, length=LENGTH), segment_ids)
    start = 0
    for length in lengths:
        alone, last = call(model, x[:, start : start + length], model.init_state(2, length=LENGTH))
        np.testing.assert_allclose(packed[:, start : start + length], alone, atol=1e-4)
        start += length
    # The state left behind is the last document's: continuing either gives the same.
    more = tokens(1, seed=9)
    np.testing.assert_allclose(call(model, more, state)[0], call(model, more, last)[0], atol=1e-4)


def test_later_tokens_do_not_change_earlier_logits_by_one_bit(model):
    x = tokens(LENGTH)
    before = call(model, x)[0]
    for t in (3, 10):
        after = call(model, x.at[:, t:].set((x[:, t:] + 1) % VOCAB))[0]
        np.testing.assert_array_equal(before[:, :t], after[:, :t])
        assert not np.array_equal(before[:, t:], after[:, t:])


def token_by_token(model, tokens, segment_ids):
    """Logits of one row by calls of one token each; a document starts from a fresh state."""
    fresh = model.init_state(1, length=len(tokens))
    starts = jnp.pad(segment_ids[1:] != segment_ids[:-1], (1, 0))

    def step(state, x):
        token, start = x
        logits, state = model(token[None, None], jax.tree.map(lambda new, old: jnp.where(start, new, old), fresh, state))
        return state, logits[0, 0]

    return jax.lax.scan(step, fresh, (tokens, starts))[1]


# Two gradients take long to compile: of these models in the fast lane, of the others in the slow one.
FAST_GRADIENTS = {"gla-convolution", "attention-window", "gated-deltanet", "mamba2"}
GRADIENT_CASES = [
    pytest.param(case, marks=() if case in FAST_GRADIENTS else pytest.mark.slow) for case in [*MIXERS, *MODELS]
]  # fmt: skip


@pytest.mark.parametrize("model", GRADIENT_CASES, indirect=True)
def test_gradients_equal_those_of_single_token_calls(model):
    """Of every parameter; of rows of two documents, more than a chunk long, whose border each has elsewhere."""
    graphdef, tree = params_lib.split(model)
    x = tokens(9)
    segment_ids = jnp.asarray([[4] * 6 + [1] * 3, [0] * 2 + [3] * 7])

    def gradient(logits):
        return jax.jit(jax.grad(lambda tree: jnp.mean(jnp.sin(3 * logits(nnx.merge(graphdef, tree))))))(tree)

    expected = gradient(lambda model: jax.vmap(lambda x, ids: token_by_token(model, x, ids))(x, segment_ids))
    got = gradient(lambda model: model(x, segment_ids=segment_ids)[0])
    rms = lambda x: float(jnp.sqrt(jnp.mean(x**2)))  # noqa: E731

    wrong = []
    for (name, info), a, b in zip(
        params_lib.leaves(params_lib.describe(model)), jax.tree.leaves(expected), jax.tree.leaves(got), strict=True
    ):
        # Constants alone have no gradient.
        right = rms(a) == rms(b) == 0 if info.role == "constant" else rms(a - b) < 1e-4 * rms(a)
        if not right:
            wrong.append(f"{name}: rms {rms(a):.2e}, of the difference {rms(a - b):.2e}")
    assert not wrong, "\n".join(wrong)


def test_prefill_stops_early_for_all_tokens_but_the_last(monkeypatch):
    """SambaY: the cross-decoder and the full attention in front of it see one token, with the same logits and state, after
    windows shorter than the prompt and than its documents."""
    model = build(sambay())
    x = tokens(LENGTH)
    segment_ids = jnp.asarray([[1] * 5 + [2] * 10, [0] * 15])
    expected, state = call(model, x, model.init_state(2, length=LENGTH), segment_ids)
    exchange = Attention.exchange

    def windows_alone(self, *args):
        assert self.settings.window is not None, "full attention over all tokens"
        return exchange(self, *args)

    monkeypatch.setattr(Attention, "exchange", windows_alone)
    lengths = []
    swiglu = SwiGLU.__call__
    monkeypatch.setattr(SwiGLU, "__call__", lambda self, x, *_: (lengths.append(x.shape[1]), swiglu(self, x))[1])
    prefill = jax.jit(lambda model, *args: model.prefill(*args))
    got, got_state = prefill(model, x, model.init_state(2, length=LENGTH), segment_ids)
    np.testing.assert_allclose(got, expected[:, -1], atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), got_state, state)
    # Stacked pairs of Mamba and window; Mamba with a memory; full attention; pairs of memory unit and cross-attention.
    assert lengths == [LENGTH, LENGTH, LENGTH, 1, 1, 1]


def test_stacked_blocks_equal_blocks_called_one_by_one():
    """Two periods and what is left over."""
    mixers = {name: MIXERS[case] for name, case in {"gla": "gla-convolution", "swa": "attention-window"}.items()}
    model = build(
        ModelSettings(vocab_size=VOCAB, width=32, depth=5, pattern=("gla", "swa"), mixers=mixers, ffn=SwiGLUSettings(hidden=48))
    )
    x = tokens(11)
    h = model.embedding(x, jnp.float32)
    graphdef, stacked = params_lib.split(model.stages[0])
    periods = [nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], stacked)) for i in range(2)]
    call_block = jax.jit(lambda block, h: block(h, None, None, {})[0])
    for block in [block for period in periods for block in period.blocks] + list(model.stages[1].blocks):
        h = call_block(block, h)
    np.testing.assert_allclose(model.norm(h) @ model.readout_kernel(), call(model, x)[0], atol=1e-4)


@pytest.mark.parametrize("remat", [pytest.param("dots", marks=pytest.mark.slow), "full"])
def test_remat_changes_no_gradient(remat):
    """Of scanned blocks and of one that stands alone."""
    mixers = {"gla": MIXERS["gla-convolution"], "swa": MIXERS["attention-window"]}
    settings = ModelSettings(
        vocab_size=VOCAB, width=32, depth=3, pattern=None, stages=[{"pattern": ["gla"], "repeat": 2}, {"pattern": ["swa"]}],
        mixers=mixers, ffn=SwiGLUSettings(hidden=48),
    )  # fmt: skip
    _, tree = params_lib.split(build(settings))

    def recomputed(jaxpr, scanned=False):
        """Whether it is within a scan, of everything that is recomputed."""
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("checkpoint", "remat2"):
                yield scanned
            for inner in jaxprs_in_params(equation.params):
                yield from recomputed(inner, scanned or equation.primitive.name == "scan")

    def gradient(remat):
        graphdef, _ = nnx.split(abstract_model(settings.model_copy(update={"remat": remat})))
        loss = lambda t: jnp.mean(nnx.merge(graphdef, t)(tokens(11))[0] ** 2)  # noqa: E731
        return jax.jit(jax.grad(loss))(tree), sorted(recomputed(jax.make_jaxpr(loss)(tree).jaxpr))

    (plain, none), (again, some) = gradient("none"), gradient(remat)
    assert (none, some) == ([], [False, True])
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
    """Of flash-linear-attention's layers: GLA 24 x 2048 untied and 24 x 1024 tied, vocabulary 32,000."""
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
    model = abstract_model(hybrid(), jnp.bfloat16)
    hidden, _ = jax.eval_shape(lambda model, x: model.hidden(x), model, tokens(8))
    assert hidden.dtype == jnp.bfloat16
    assert jax.eval_shape(lambda model, x: model(x), model, tokens(8))[0].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(params_lib.split(model)[1])} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pattern": ("gla", "atention")}, "unknown mixer 'atention'; did you mean 'attention'"),
        ({"mixers": {"swa": AttentionSettings()}}, "swa not used by the pattern"),
        ({"mixers": {"m": {"kind": "gated_deltnet"}}}, "unknown kind 'gated_deltnet'; did you mean 'gated_deltanet'"),
        ({"stages": [{"pattern": ["gla"]}]}, "pattern and stages are both given"),
        ({"pattern": None}, "pattern and stages are both null"),
        ({"pattern": ("gla", "gmu")}, "'gmu' reads 'memory', which no earlier block makes; put a mixer with produces: memory"),
        (
            {"pattern": ("m", "gmu"), "mixers": {"m": MambaSettings(produces="memory")}},
            "'m' makes 'memory' more than once; one block makes it",
        ),
        ({"pattern": None, "stages": [{"pattern": ["gla", "linear"], "repeat": 3}]}, "depth=8 but .* 6 blocks; set depth to 6"),
    ],
)
def test_wrong_patterns_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        ModelSettings(vocab_size=VOCAB, **changes)


def test_mixers_are_read_strictly_and_lists_stand_for_tuples():
    """What suggests kinds in Python leaves the reading of config files alone."""
    read = lambda text: ModelSettings.model_validate_json(text, strict=True)  # noqa: E731
    settings = read('{"pattern": ["m"], "mixers": {"m": {"kind": "attention", "biases": ["q", "v"]}}}')
    assert settings.mixer("m").biases == ("q", "v")
    with pytest.raises(ValueError, match="valid integer"):
        read('{"pattern": ["m"], "mixers": {"m": {"kind": "attention", "heads": "4"}}}')


def test_head_dims_that_do_not_divide_are_named():
    with pytest.raises(Exception, match=r"gla.expand_k: 16 channels do not divide over heads=3"):
        abstract_model(settings_for(GLASettings(heads=3)))
    with pytest.raises(ValueError, match="kv_heads=3 must divide heads=4"):
        AttentionSettings(heads=4, kv_heads=3)


@pytest.mark.slow
@pytest.mark.parametrize("case", [*MIXERS, *MODELS])
def test_eight_devices_equal_one(case):
    """Rows, heads and the sequence split two ways each: loss and every gradient, documents crossing the shards."""
    settings = MODELS[case]() if case in MODELS else settings_for(MIXERS[case])
    graphdef, tree = params_lib.split(build(settings))
    x = tokens(16)
    segment_ids = jnp.asarray([[0] * 5 + [1] * 6 + [2] * 5, [0] * 8 + [1] * 8])

    def loss(tree, x, segment_ids):
        hidden, _, auxiliary = nnx.merge(graphdef, tree).hidden_with_auxiliary(x, segment_ids=segment_ids)
        return jnp.mean(jnp.sin(3 * hidden)) + auxiliary

    value, gradient = jax.jit(jax.value_and_grad(loss))(tree, x, segment_ids)
    mesh = make_mesh({"data": 2, "sequence": 2, "tensor": 2})
    with use_mesh(mesh):
        shardings = param_shardings(params_lib.describe(abstract_model(settings)), mesh, DEFAULT_RULES)
        placed = jax.device_put(tree, shardings)
        value_8, gradient_8 = jax.jit(jax.value_and_grad(lambda *args: loss(*args)))(placed, x, segment_ids)
    np.testing.assert_allclose(value_8, value, rtol=1e-5, atol=1e-6)
    rms = lambda x: float(jnp.sqrt(jnp.mean(jnp.asarray(x) ** 2)))  # noqa: E731
    scale = max(rms(g) for g in jax.tree.leaves(gradient))
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(jax.device_get(gradient_8)), strict=True):
        assert rms(np.asarray(a) - b) <= 1e-4 * max(rms(a), 1e-3 * scale)
