import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data import BytesTokenizerSettings, JsonTokenizerSettings, load_tokenizer
from jaxlm.data.tokenizers import token_dtype
from jaxlm.schema import UserError

# Two, three and four bytes a character, control characters, and the names of special tokens.
HARD = "naïve 世界 🎉👩‍👩‍👧 \x00\r\n\t  <|endoftext|> <|endof \ufeff\u0301 the cat"


@pytest.fixture(params=["bytes", "json"])
def tokenizer(request):
    if request.param == "bytes":
        return load_tokenizer(BytesTokenizerSettings())
    return load_tokenizer(request.getfixturevalue("bpe"))


def saved(tmp_path, tokenizer, name="tokenizer.json"):
    tokenizer.save(str(tmp_path / name))
    return JsonTokenizerSettings(path=str(tmp_path / name))


def test_bytes_are_bytes():
    tokenizer = load_tokenizer(BytesTokenizerSettings())
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)
    ids = tokenizer.encode("aé")
    assert ids.tolist() == [97, 195, 169]
    assert ids.dtype == np.uint16
    assert tokenizer.token_bytes.tolist() == [1] * 256 + [0]
    assert tokenizer.decode([97, 256, 98]) == "ab"


def test_round_trip_and_token_bytes(tokenizer):
    for text in (HARD, "", "the cat sat on the mat"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
        assert tokenizer.end_of_text not in ids
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes.dtype == np.int32
    assert tokenizer.token_bytes[tokenizer.end_of_text] == 0
    assert tokenizer.decode([tokenizer.end_of_text]) == ""


@settings(deadline=None, max_examples=100)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_round_trip_of_any_text(bpe, text):
    for tokenizer in (load_tokenizer(BytesTokenizerSettings()), load_tokenizer(bpe)):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_bpe_merges_and_agrees_with_its_library(bpe):
    import tokenizers

    tokenizer = load_tokenizer(bpe)
    library = tokenizers.Tokenizer.from_file(bpe.path)
    text = "the cat sat on the mat"
    assert len(tokenizer.encode(text)) < len(text) / 2
    assert tokenizer.encode(text).tolist() == library.encode(text).ids
    assert library.decode(tokenizer.encode(text).tolist()) == text
    assert tokenizer.end_of_text == library.token_to_id("<|endoftext|>")
    assert tokenizer.vocab_size == library.get_vocab_size()
    # The library on its own would make this the special token.
    assert library.encode("<|endoftext|>").ids == [tokenizer.end_of_text]


def test_encode_batch_is_encode_of_each(tokenizer):
    texts = ["the cat", "", HARD]
    for batched, text in zip(tokenizer.encode_batch(texts), texts, strict=True):
        np.testing.assert_array_equal(batched, tokenizer.encode(text))
        assert batched.dtype == tokenizer.dtype


def test_stream_decoder_holds_back_unfinished_characters(tokenizer):
    ids = tokenizer.encode(HARD)
    decoder = tokenizer.stream_decoder()
    pieces = [decoder.push([i]) for i in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + decoder.finish() == HARD
    if tokenizer.vocab_size == 257:
        assert pieces[:5] == ["n", "a", "", "ï", "v"]


def test_broken_utf8_is_replaced():
    tokenizer = load_tokenizer(BytesTokenizerSettings())
    cut = [97, 0xF0, 0x9F, 0x8E]
    assert tokenizer.decode(cut) == "a\ufffd"
    decoder = tokenizer.stream_decoder()
    assert decoder.push(cut) == "a"
    assert decoder.finish() == "\ufffd"
    decoder = tokenizer.stream_decoder()
    assert decoder.push(cut) + decoder.push([98]) + decoder.finish() == tokenizer.decode([*cut, 98]) == "a\ufffdb"


def test_ids_outside_the_vocabulary_are_named(tokenizer):
    with pytest.raises(UserError, match=rf"token {tokenizer.vocab_size} at position 1 is outside the vocabulary of"):
        tokenizer.decode([1, tokenizer.vocab_size])
    with pytest.raises(UserError, match="token -1 at position 0"):
        tokenizer.stream_decoder().push([-1])


def test_half_a_surrogate_pair_is_named(tokenizer):
    with pytest.raises(UserError, match=r"U\+D83C at character 2"):
        tokenizer.encode("ab\ud83c")


def test_dtype_holds_every_id():
    assert token_dtype(2**16) == np.uint16
    assert token_dtype(2**16 + 1) == np.uint32


def test_fingerprint_tells_definitions_apart_but_not_their_spelling(bpe, tmp_path):
    definition = json.loads(Path(bpe.path).read_text())
    definition["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    definition = dict(reversed(definition.items()))
    (tmp_path / "same.json").write_text(json.dumps(definition, indent=7))
    same = load_tokenizer(JsonTokenizerSettings(path=str(tmp_path / "same.json")))
    assert same.fingerprint == load_tokenizer(bpe).fingerprint
    assert len(same.encode("the cat sat on the mat")) > 2
    definition["model"]["merges"].pop()
    (tmp_path / "other.json").write_text(json.dumps(definition))
    other = load_tokenizer(JsonTokenizerSettings(path=str(tmp_path / "other.json")))
    assert len({other.fingerprint, same.fingerprint, load_tokenizer(BytesTokenizerSettings()).fingerprint}) == 3


def test_added_tokens_and_gaps_in_the_vocabulary(bpe, tmp_path):
    import tokenizers

    library = tokenizers.Tokenizer.from_file(bpe.path)
    library.add_tokens(["    ", "世"])
    library.add_special_tokens(["<|im_start|>"])
    tokenizer = load_tokenizer(saved(tmp_path, library))
    text = "if x:\n    世 <|im_start|>"
    ids = tokenizer.encode(text)
    assert library.token_to_id("世") in ids
    assert library.token_to_id("<|im_start|>") not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.token_bytes[library.token_to_id("<|im_start|>")] == 0


def test_sentencepiece_style(tmp_path):
    import tokenizers
    from tokenizers import decoders, models, normalizers, processors

    # With a gap in the ids, and a template that puts </s> before every text.
    vocabulary = {"<unk>": 0, "</s>": 1, **{f"<0x{b:02X}>": 2 + b for b in range(256)}}
    for token in ("\u2581", "a", "b", "\u2581a"):
        vocabulary[token] = len(vocabulary) + 10
    merges = [("\u2581", "a")]
    library = tokenizers.Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    library.normalizer = normalizers.Replace(" ", "\u2581")
    library.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    library.add_special_tokens(["<unk>", "</s>"])
    library.post_processor = processors.TemplateProcessing("</s> $A", special_tokens=[("</s>", 1)])
    settings = saved(tmp_path, library).model_copy(update={"end_of_text": "</s>"})
    tokenizer = load_tokenizer(settings)
    assert library.encode("a").ids == [1, vocabulary["a"]]
    assert tokenizer.end_of_text == 1
    assert tokenizer.vocab_size == vocabulary["\u2581a"] + 1 > library.get_vocab_size()
    text = "b a é"
    ids = tokenizer.encode(text)
    assert ids.tolist() == [vocabulary["b"], vocabulary["\u2581a"], vocabulary["\u2581"], 2 + 0xC3, 2 + 0xA9]
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].tolist() == [1, 2, 1, 1, 1]


def test_bad_files_are_named(bpe, tmp_path):
    def load(**changes):
        return load_tokenizer(bpe.model_copy(update=changes))

    with pytest.raises(UserError, match=r"data\.tokenizer\.path: nowhere\.json: no such file.*jaxlm tokenize"):
        load(path="nowhere.json")
    (tmp_path / "bad.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match=r"bad\.json is not a tokenizer of the tokenizers library"):
        load(path=str(tmp_path / "bad.json"))
    (tmp_path / "worse.json").write_text("{")
    with pytest.raises(UserError, match=r"worse\.json is not a tokenizer of the tokenizers library"):
        load(path=str(tmp_path / "worse.json"))
    with pytest.raises(
        UserError, match=r"end_of_text: '<\|endoftxt\|>' is no special token.*did you mean '<\|endoftext"
    ):
        load(end_of_text="<|endoftxt|>")
    definition = json.loads(Path(bpe.path).read_text())
    definition["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    (tmp_path / "wordpiece.json").write_text(json.dumps(definition))
    with pytest.raises(UserError, match=r"wordpiece\.json decodes by WordPiece.*byte-level BPE"):
        load(path=str(tmp_path / "wordpiece.json"))


def test_a_missing_extra_is_named(bpe, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"extra.*jaxlm\[tokenizers\]"):
        load_tokenizer(bpe)
