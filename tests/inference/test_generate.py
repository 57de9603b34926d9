"""Generation: the state's decode against recomputing everything, batches against single prompts, text in pieces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.data import BytesTokenizerSettings, load_tokenizer
from jaxlm.inference import generate as generate_lib
from jaxlm.inference.generate import SamplingSettings, generate, generate_tokens, stream, warnings
from jaxlm.layers.ffn import SwiGLUSettings
from jaxlm.layers.mixers.attention import AttentionSettings
from jaxlm.layers.mixers.gla import GLASettings
from jaxlm.layers.mixers.linear import LinearSettings
from jaxlm.layers.mixers.retention import RetentionSettings
from jaxlm.models.language_model import ModelSettings
from jaxlm.schema import UserError
from tests.models.test_language_model import build

TOKENIZER = load_tokenizer(BytesTokenizerSettings())
MIXERS = {
    "gla": GLASettings(heads=2, convolution=4, chunk_size=8),
    "retention": RetentionSettings(heads=2, chunk_size=8),
    "linear": LinearSettings(heads=2, chunk_size=8),
    "window": AttentionSettings(heads=2, window=6),
    "attention": AttentionSettings(heads=4, kv_heads=2),
}


@pytest.fixture(scope="module")
def model():
    settings = ModelSettings(
        vocab_size=320, width=32, depth=5, pattern=tuple(MIXERS), mixers=MIXERS, ffn=SwiGLUSettings(hidden=48)
    )
    return build(settings)


def tokens_of(model, prompts, **settings):
    settings = SamplingSettings(**{"max_tokens": 12, "temperature": 0, **settings})
    return np.stack(list(generate_tokens(model, prompts, settings, vocab_size=257)), axis=1)


PROMPTS = [np.arange(3, 3 + n) % 250 for n in (21, 5, 1, 16)]


def test_greedy_decode_equals_recomputing_the_whole_text(model):
    [found] = tokens_of(model, PROMPTS[:1])
    call = jax.jit(lambda model, tokens: model(tokens)[0])
    text = list(PROMPTS[0])
    length = len(text) + 12
    for expected in found:
        padded = jnp.asarray([text + [0] * (length - len(text))])
        logits = call(model, padded)[0, len(text) - 1, :257]
        assert int(jnp.argmax(logits)) == expected
        text.append(int(expected))


@pytest.mark.parametrize("temperature", [pytest.param(0, marks=pytest.mark.slow), 1.0])
def test_ragged_prompts_continue_as_each_alone(model, temperature):
    together = tokens_of(model, PROMPTS, temperature=temperature)
    # A row's randomness follows its place in the batch, so each prompt is put there among copies of itself.
    for row, prompt in enumerate(PROMPTS):
        alone = tokens_of(model, [prompt] * len(PROMPTS), temperature=temperature)[row]
        np.testing.assert_array_equal(together[row], alone)
    assert len({tuple(row) for row in together}) == len(PROMPTS)


def test_a_prefill_in_pieces_equals_one_call(model, monkeypatch):
    whole = tokens_of(model, PROMPTS)
    monkeypatch.setattr(generate_lib, "PREFILL", 8)
    # Width 24: the prompt of 16 tokens would begin exactly where a piece does.
    np.testing.assert_array_equal(tokens_of(model, PROMPTS), whole)


def test_the_seed_decides(model):
    draw = lambda seed: tokens_of(model, PROMPTS[:2], temperature=1.0, seed=seed)  # noqa: E731
    np.testing.assert_array_equal(draw(3), draw(3))
    assert not np.array_equal(draw(3), draw(4))


def test_decode_is_compiled_once(model):
    settings = SamplingSettings(max_tokens=30, temperature=0.7, seed=11)
    list(generate_tokens(model, PROMPTS[:1], settings, vocab_size=257))
    _, decode = generate_lib._compiled(generate_lib.split(model)[0], 0.7, None, None, 257)
    assert decode._cache_size() == 1
    # Another seed draws with the same programs.
    list(generate_tokens(model, PROMPTS[:1], settings.model_copy(update={"seed": 12}), vocab_size=257))
    assert decode._cache_size() == 1
    assert generate_lib._compiled(generate_lib.split(model)[0], 0.7, None, None, 257)[1] is decode


def test_pieces_join_to_the_text(model):
    settings = SamplingSettings(max_tokens=40, seed=1, stop_at_end_of_text=False)
    prompts = ["def", "é and 漢字"]
    pieces = list(stream(model, TOKENIZER, prompts, settings))
    texts = generate(model, TOKENIZER, prompts, settings)
    assert ["".join(column) for column in zip(*pieces, strict=True)] == texts
    assert len(pieces) == 41


def test_characters_of_several_bytes_come_out_whole(model, monkeypatch):
    text = "é漢🙂"
    encoded = TOKENIZER.encode(text)
    monkeypatch.setattr(
        generate_lib, "generate_tokens", lambda *a, **k: iter([np.array([t]) for t in [*encoded, 256, 65]])
    )
    pieces = [piece for [piece] in stream(model, TOKENIZER, ["x"])]
    assert [p for p in pieces if p] == list(text)
    # The document ended at 256; what follows is not text of it.
    assert "".join(pieces) == text


def test_ids_of_padding_rows_are_never_drawn(model):
    assert tokens_of(model, PROMPTS, temperature=5.0, max_tokens=100).max() < 257


@pytest.mark.parametrize(
    ("prompts", "settings", "words"),
    [
        ([], {}, "give at least one"),
        (["a"], {"max_tokens": 0}, "max_tokens=0"),
        (["a"], {"temperature": -1.0}, "temperature=-1.0"),
        (["a"], {"top_k": 0}, "top_k=0"),
        (["a"], {"top_p": 0.0}, "top_p=0.0"),
        (["a"], {"top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_bad_settings_are_named(model, prompts, settings, words):
    with pytest.raises(UserError, match=words):
        generate(model, TOKENIZER, prompts, SamplingSettings(**settings))


@pytest.mark.parametrize(
    ("prompt", "vocab", "words"),
    [
        ([1, 300, 2], 257, "token 300 at position 1 is outside the vocabulary of 257"),
        ([-1], 257, "token -1 at position 0"),
        ([], 257, "prompt 0 has no tokens"),
        ([1], 1000, "the tokenizer has 1000 ids but the model only 320"),
    ],
)
def test_prompts_outside_the_vocabulary_are_named(model, prompt, vocab, words):
    with pytest.raises(UserError, match=words):
        next(generate_tokens(model, [np.array(prompt, int)], SamplingSettings(), vocab_size=vocab))


def test_lengths_beyond_windows_and_training_are_said(model):
    [window] = warnings(model, 10, 20, 100)
    assert "10 tokens but windowed attention layers see the last 6" in window
    _, longer = warnings(model, 10, 200, 100)
    assert "200 tokens, more than the 100" in longer
    assert warnings(model, 5, 20, 100) == []
