import json
import os
import resource
import shutil

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from jaxlm.data import ArrayRecordSettings, BytesTokenizerSettings, JsonlSettings, Split, TextSettings, load_corpus
from jaxlm.data import load_tokenizer as load_tok
from jaxlm.data import tokenize as tokenize_module
from jaxlm.data.tokenize import tokenize_corpus
from jaxlm.schema import UserError
from tests.data.helpers import write_texts

BYTES = BytesTokenizerSettings()


@pytest.fixture
def text(tmp_path):
    return TextSettings(paths=(str(write_texts(tmp_path / "text", 50)),))


def documents(corpus):
    return [corpus.read(i, 0, n).tolist() for i, n in enumerate(corpus.lengths)]


def opened(path, tokenizer, split=Split()):  # noqa: B008
    return load_corpus(
        ArrayRecordSettings(paths=(str(path),)), load_tok(tokenizer), where="data.sources.0", split=split
    )


def test_train_write_and_read_back(text, tmp_path):
    pytest.importorskip("tokenizers", reason="the extra `tokenizers` is not installed")
    output = tmp_path / "deep" / "tokens"
    summary = tokenize_corpus([text], None, output, vocab_size=280, shard_tokens=700)
    assert sorted(os.listdir(tmp_path / "deep")) == ["tokens"]
    assert summary.vocab_size == load_tok(summary.tokenizer).vocab_size
    assert 257 < summary.vocab_size <= 280
    assert summary.tokenizer.path == str(output / "tokenizer.json")
    raw = load_corpus(text, load_tok(summary.tokenizer), where="x")
    corpus = opened(output, summary.tokenizer)
    assert documents(corpus) == documents(raw)
    np.testing.assert_array_equal(corpus.lengths, raw.lengths)
    assert corpus.read(7, 2, 5).tolist() == documents(raw)[7][2:5]
    assert corpus.bytes == raw.bytes == summary.bytes
    assert (summary.documents, summary.tokens) == (50, raw.tokens)
    assert summary.bytes_per_token == raw.bytes / raw.tokens > 1.5
    shards = sorted(p.name for p in output.glob("*.array_record"))
    assert len(shards) == summary.shards > 2
    # A shard ends with the document that reaches the limit.
    dataset = json.loads((output / "dataset.json").read_text())
    assert [shard["name"] for shard in dataset["shards"]] == shards
    for shard in dataset["shards"][:-1]:
        assert 700 <= shard["tokens"] < 700 + raw.lengths.max()
    assert sum(shard["tokens"] for shard in dataset["shards"]) == dataset["tokens"] == raw.tokens
    # What the summary prints is a config that reads it.
    assert f"paths: [{output}]" in str(summary)
    assert f"tokenizer: {{kind: json, path: {output}/tokenizer.json}}" in str(summary)


def test_a_record_is_the_tokens_of_a_document(text, tmp_path):
    tokenize_corpus([text], BYTES, tmp_path / "out")
    reader = ArrayRecordReader(str(tmp_path / "out" / "shard-00000.array_record"))
    assert reader.num_records() == 50
    assert "group_size:1," in reader.writer_options_string()
    content = (tmp_path / "text" / "0003.txt").read_bytes()
    assert reader.read([3])[0] == b"\x00\x01" + bytes(x for b in content for x in (b, 0))
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_a_given_tokenizer_is_copied_and_several_sources_follow_each_other(text, bpe, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "the cat"}\n{"text": ""}\n')
    sources = [JsonlSettings(paths=(str(tmp_path / "a.jsonl"),)), text]
    summary = tokenize_corpus(sources, bpe, tmp_path / "out")
    assert summary.documents == 51
    tokenizer = load_tok(summary.tokenizer)
    assert tokenizer.fingerprint == load_tok(bpe).fingerprint
    corpus = opened(tmp_path / "out", bpe)
    assert tokenizer.decode(documents(corpus)[0]) == "the cat"
    assert tokenizer.decode(documents(corpus)[1]) == (tmp_path / "text" / "0000.txt").read_text()


def test_datasets_split_by_record(text, tmp_path):
    tokenize_corpus([text], BYTES, tmp_path / "out", shard_tokens=700)
    train, held_out, everything = (
        documents(opened(tmp_path / "out", BYTES, Split(part, 0.2))) for part in ("train", "held_out", "all")
    )
    assert held_out
    assert sorted(train + held_out) == sorted(everything)
    assert [d for d in everything if d in held_out] == held_out
    shards = json.loads((tmp_path / "out" / "dataset.json").read_text())["shards"]
    masks = [Split("held_out", 0.2).mask(shard["name"], 0, shard["documents"]) for shard in shards]
    assert held_out == [everything[i] for i in np.flatnonzero(np.concatenate(masks))]
    corpus = opened(tmp_path / "out", BYTES, Split("held_out", 0.2))
    assert corpus.bytes == sum(len(d) - 1 for d in held_out)


def test_another_tokenizer_is_refused_and_both_are_named(text, bpe, tmp_path):
    tokenize_corpus([text], bpe, tmp_path / "out")
    vocabulary = load_tok(bpe).vocab_size
    with pytest.raises(
        UserError,
        match=rf"tokenizer json .*out/tokenizer\.json \(vocabulary {vocabulary}, .*data\.tokenizer is bytes "
        r"\(vocabulary 257, .*set data\.tokenizer to \{kind: json, path: .*out/tokenizer\.json\}",
    ):
        opened(tmp_path / "out", BYTES)
    tokenize_corpus([text], BYTES, tmp_path / "bytes")
    with pytest.raises(UserError, match=r"tokenizer bytes \(vocabulary 257.*set data\.tokenizer to \{kind: bytes\}"):
        opened(tmp_path / "bytes", bpe)


def test_damaged_datasets_are_named(text, tmp_path):
    tokenize_corpus([text], BYTES, tmp_path / "good", shard_tokens=700)

    def damaged(change):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        change(tmp_path / "bad")
        corpus = opened(tmp_path / "bad", BYTES)
        return documents(corpus)

    shard = "shard-00001.array_record"
    with pytest.raises(UserError, match=rf"{shard} is missing"):
        damaged(lambda p: (p / shard).unlink())
    with pytest.raises(UserError, match="a shard is damaged"):
        damaged(lambda p: (p / shard).write_bytes(b"x" * 200))
    with pytest.raises(UserError, match=r"shards hold \d+ documents, their index 50"):
        damaged(lambda p: shutil.copyfile(p / "shard-00000.array_record", p / shard))
    with pytest.raises(UserError, match=r"index\.npz is missing or damaged"):
        damaged(lambda p: (p / "index.npz").write_bytes(b"PK"))
    with pytest.raises(UserError, match=r"index\.npz is missing or damaged"):
        damaged(lambda p: (p / "index.npz").unlink())
    with pytest.raises(UserError, match=r"dataset\.json is damaged"):
        damaged(lambda p: (p / "dataset.json").write_text("{"))
    with pytest.raises(UserError, match="has format 7, this jaxlm reads 1"):
        damaged(lambda p: (p / "dataset.json").write_text('{"format": 7}'))
    with pytest.raises(UserError, match=r"bad: is no dataset of tokens.*jaxlm tokenize"):
        damaged(lambda p: (p / "dataset.json").unlink())
    with pytest.raises(UserError, match="nowhere: no such directory"):
        opened("nowhere", BYTES)
    with np.load(tmp_path / "good" / "index.npz") as index:
        lengths, sizes = index["lengths"], index["bytes"]
    with pytest.raises(UserError, match=r"document 0 has \d+ tokens, its index says"):
        damaged(lambda p: np.savez(p / "index.npz", lengths=lengths + 1, bytes=sizes))


def test_nothing_is_overwritten_or_left_behind(text, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out exists already and is left as it is"):
        tokenize_corpus([text], BYTES, tmp_path / "out")
    (tmp_path / "new.partial").mkdir()
    with pytest.raises(UserError, match=r"new\.partial exists: another tokenize is writing it, or was killed"):
        tokenize_corpus([text], BYTES, tmp_path / "new")
    assert (tmp_path / "new.partial").exists()

    before = sorted(os.listdir(tmp_path))
    (tmp_path / "text" / "9999.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"9999\.txt is not UTF-8"):
        tokenize_corpus([text], BYTES, tmp_path / "fails")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(tokenize_module, "_write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokenize_corpus([text], BYTES, tmp_path / "fails")
    assert sorted(os.listdir(tmp_path)) == before


def test_a_full_disk_leaves_nothing(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "a.txt").write_text("".join(map(chr, rng.integers(0x4E00, 0x9000, 60_000))))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match=r"out cannot be written .*free space"):
            tokenize_corpus([TextSettings(paths=(str(tmp_path / "a.txt"),))], BYTES, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert os.listdir(tmp_path) == ["a.txt"]


def test_records_that_did_not_reach_the_disk_are_missed(text, tmp_path, monkeypatch):
    class LossyWriter(ArrayRecordWriter):
        def write(self, record):
            if record != b"\x00\x01" + b"".join(bytes([c, 0]) for c in b"<0>"):
                super().write(record)

    monkeypatch.setattr(tokenize_module, "ArrayRecordWriter", LossyWriter)
    with pytest.raises(UserError, match="only 49 of 50 records were written"):
        tokenize_corpus([text], BYTES, tmp_path / "out")
    assert os.listdir(tmp_path) == ["text"]


def test_bad_arguments_are_named_before_anything_is_written(text, tmp_path):
    def fails(match, sources=None, tokenizer=BYTES, **values):
        with pytest.raises(UserError, match=match):
            tokenize_corpus([text] if sources is None else sources, tokenizer, tmp_path / "out", **values)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / "out.partial").exists()

    fails("vocab_size=256: a byte-level BPE needs at least 257", tokenizer=None, vocab_size=256)
    fails("shard_tokens=0", shard_tokens=0)
    fails("source 0.paths: nowhere: no such file", [TextSettings(paths=("nowhere",))])
    fails("source 1: kind array_record holds tokens already", [text, ArrayRecordSettings(paths=("x",))])
    (tmp_path / "empty").write_text("")
    fails("empty corpus", [TextSettings(paths=(str(tmp_path / "empty"),))])
