import gzip
import itertools
import json
import os
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from jaxlm.data import (
    BytesTokenizerSettings,
    DataSettings,
    PythonStdlibSettings,
    SourceSettings,
    Split,
    load_corpus,
    load_tokenizer,
)
from jaxlm.data import sources as sources_module
from jaxlm.data.pipeline import check_held_out_apart
from jaxlm.data.sources import _flags, concatenate, list_files, read_documents
from jaxlm.schema import UserError
from tests.data.helpers import corpus_of, write_texts

TOKENIZER = load_tokenizer(BytesTokenizerSettings())


def source(**values):
    return TypeAdapter(SourceSettings).validate_python(values)


def texts(settings, split=Split()):  # noqa: B008
    return [document.text for document in read_documents(settings, "data.sources.0", split)]


def load(split=Split(), **values):  # noqa: B008
    return load_corpus(source(**values), TOKENIZER, where="data.sources.0", split=split)


def documents(corpus):
    return [corpus.read(i, 0, n).tolist() for i, n in enumerate(corpus.lengths)]


def test_a_corpus_of_text_by_hand(tmp_path):
    (tmp_path / "b.txt").write_bytes("é\r\n".encode())
    (tmp_path / "a.txt").write_text("xy")
    (tmp_path / "empty.txt").write_text("")
    corpus = load(kind="text", paths=[str(tmp_path)])
    assert documents(corpus) == [[256, 120, 121], [256, 0xC3, 0xA9, 13, 10]]
    assert corpus.lengths.tolist() == [3, 5]
    assert corpus.lengths.dtype == np.int64
    assert (corpus.bytes, corpus.tokens) == (6, 8)
    assert corpus.read(1, 2, 4).tolist() == [0xA9, 13]
    assert corpus.read(1, 2, 4).dtype == np.uint16


def test_concatenated_corpora():
    both = concatenate([corpus_of([[9, 1], [9, 2]]), corpus_of([]), corpus_of([[9, 3, 4]])])
    assert documents(both) == [[9, 1], [9, 2], [9, 3, 4]]
    assert both.bytes == 4


def test_files_directories_and_globs(tmp_path):
    write_texts(tmp_path / "in", 3)
    write_texts(tmp_path / "in" / "deep", 2)
    (tmp_path / "in" / ".hidden").write_text("no")
    (tmp_path / "in" / ".git").mkdir()
    (tmp_path / "in" / ".git" / "no").write_text("no")

    def keys(*paths):
        return [file.key for file in list_files(source(kind="text", paths=[str(tmp_path / p) for p in paths]), "x")]

    assert keys("in") == ["0000.txt", "0001.txt", "0002.txt", "deep/0000.txt", "deep/0001.txt"]
    assert keys("in/deep/0001.txt") == ["0001.txt"]
    assert keys("in/*.txt") == ["0000.txt", "0001.txt", "0002.txt"]
    assert keys("**/0001.txt") == ["in/0001.txt", "in/deep/0001.txt"]
    # A file that several paths name is read once, by its first name.
    assert keys("in/deep", "in") == ["0000.txt", "0001.txt", "0000.txt", "0001.txt", "0002.txt"]
    (tmp_path / "in" / "[x].txt").write_text("a name with brackets is a name")
    assert keys("in/[x].txt") == ["[x].txt"]


def test_python_stdlib_is_the_library_without_packages_and_tests():
    files = list_files(source(kind="python_stdlib"), "x")
    keys = [file.key for file in files]
    assert keys == sorted(keys)
    assert {"os.py", "json/decoder.py", "asyncio/events.py"} <= set(keys)
    assert not [key for key in keys if {"site-packages", "test", "tests", "idle_test"} & set(Path(key).parts)]
    root = Path(sysconfig.get_paths()["stdlib"])
    assert all(file.path == root / file.key for file in files)


def test_python_stdlib_split_is_disjoint_complete_and_stable():
    settings = source(kind="python_stdlib")
    train, held_out, everything = (texts(settings, Split(part, 0.1)) for part in ("train", "held_out", "all"))
    assert sorted(train + held_out) == sorted(everything)
    assert 0.05 * len(everything) < len(held_out) < 0.15 * len(everything)
    # By path, so what is held out here is held out everywhere.
    mask = {file.key: bool(Split("held_out", 0.05).mask(file.key)[0]) for file in list_files(settings, "x")}
    assert mask["asyncio/windows_utils.py"]
    assert not mask["os.py"]
    assert Path(os.__file__).read_text() in train


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_splits_do_not_depend_on_the_rest_of_the_corpus(tmp_path, kind):
    if kind == "text":
        few, many = write_texts(tmp_path / "few", 60), write_texts(tmp_path / "many", 200)
    else:
        few, many = tmp_path / "few" / f"a.{kind}", tmp_path / "many" / f"a.{kind}"
        write_records(few, kind, [f"<{i}>" for i in range(60)])
        write_records(many, kind, [f"<{i}>" for i in range(200)])
    split = {part: texts(source(kind=kind, paths=[str(few)]), Split(part, 0.2)) for part in ("train", "held_out")}
    more = {part: texts(source(kind=kind, paths=[str(many)]), Split(part, 0.2)) for part in ("train", "held_out")}
    everything = texts(source(kind=kind, paths=[str(many)]))
    for part in ("train", "held_out"):
        assert split[part]
        assert set(split[part]) <= set(more[part])
    assert not set(more["train"]) & set(more["held_out"])
    assert sorted(more["train"] + more["held_out"]) == sorted(everything)
    assert len(everything) == 200
    assert 20 <= len(more["held_out"]) <= 60


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet"])
def test_bytes_read_lead_to_the_size_of_the_files(tmp_path, kind):
    if kind == "text":
        write_texts(tmp_path, 5)
    else:
        for name in "ab":
            write_records(tmp_path / f"{name}.{kind}", kind, [f"<{i}>" * 500 for i in range(200)])
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    read = [document.bytes_read for document in read_documents(source(kind=kind, paths=[str(tmp_path)]), "x")]
    assert read == sorted(read)
    assert read[-1] == size
    assert read[0] < 0.6 * size


def test_records_are_split_one_by_one_as_all_at_once():
    split = Split("held_out", 0.3)
    one_by_one = list(itertools.islice(_flags(split, "a.jsonl", block=7), 50))
    assert one_by_one == split.mask("a.jsonl", 0, 50).tolist()
    assert one_by_one != split.mask("b.jsonl", 0, 50).tolist()


def write_records(path, kind, values, name="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "jsonl":
        path.write_text("".join(json.dumps({name: value, "other": 1}) + "\n" for value in values))
    else:
        pytest.importorskip("pyarrow", reason="the extra `parquet` is not installed")
        import pyarrow.parquet

        table = pyarrow.table({"other": list(range(len(values))), name: values})
        pyarrow.parquet.write_table(table, path, row_group_size=7)


def test_jsonl(tmp_path):
    lines = ['{"text": "a\\u00e9", "n": 1}', "", '{"n": 2, "text": "世"}', '{"text": ""}']
    (tmp_path / "1.jsonl").write_text("\n".join(lines))
    with gzip.open(tmp_path / "2.jsonl.gz", "wt") as file:
        file.write('{"text": "zipped"}\n')
    (tmp_path / "notes.md").write_text("not read")
    settings = source(kind="jsonl", paths=[str(tmp_path)])
    assert texts(settings) == ["aé", "世", "", "zipped"]
    assert load(kind="jsonl", paths=[str(tmp_path)]).lengths.tolist() == [4, 4, 7]
    assert texts(source(kind="jsonl", paths=[str(tmp_path / "1.jsonl")], field="text"))[0] == "aé"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"line 2: not JSON"),
        ('{"text": 3}', r"line 2: field 'text' is int, not text"),
        ('{"texts": "x"}', r"line 2: no field 'text'; did you mean 'texts'\? \(it has texts\)"),
        ("[1]", r"line 2: a JSON object is needed, found list"),
        ('{"text": "\\ud800"}', r"line 2: the text holds U\+D800 at character 0"),
        (b'{"text": "\xff"}', r"line 2: not JSON .*utf-8"),
    ],
)
def test_a_bad_line_of_jsonl_is_named(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    with pytest.raises(UserError, match=rf"data\.sources\.0: .*a\.jsonl, {message}"):
        load(kind="jsonl", paths=[str(path)])


def test_damaged_and_unknown_compression_is_named(tmp_path):
    whole = gzip.compress(b'{"text": "good"}\n' * 1000)
    (tmp_path / "cut.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz: damaged gzip after line"):
        load(kind="jsonl", paths=[str(tmp_path / "cut.jsonl.gz")])
    (tmp_path / "plain.jsonl.gz").write_bytes(b'{"text": "good"}\n')
    with pytest.raises(UserError, match=r"plain\.jsonl\.gz: damaged gzip after line 0"):
        load(kind="jsonl", paths=[str(tmp_path / "plain.jsonl.gz")])
    (tmp_path / "a.jsonl.zst").write_bytes(b"1")
    with pytest.raises(UserError, match=r"a\.jsonl\.zst: only \.gz is read compressed"):
        load(kind="jsonl", paths=[str(tmp_path / "a.jsonl.zst")])


def test_parquet(tmp_path):
    values = [f"row {i} é" for i in range(30)]
    write_records(tmp_path / "a.parquet", "parquet", values, name="body")
    assert texts(source(kind="parquet", paths=[str(tmp_path)], column="body")) == values
    with pytest.raises(
        UserError, match=r"data\.sources\.0\.column: .*a\.parquet has no column 'text' \(it has other, body\)"
    ):
        load(kind="parquet", paths=[str(tmp_path)])
    with pytest.raises(UserError, match=r"column 'other' of .*a\.parquet is int64, not text"):
        load(kind="parquet", paths=[str(tmp_path)], column="other")
    write_records(tmp_path / "null.parquet", "parquet", ["x", None])
    with pytest.raises(UserError, match=r"null\.parquet, row 2: column 'text' is null"):
        load(kind="parquet", paths=[str(tmp_path / "null.parquet")])
    (tmp_path / "no.parquet").write_text("no")
    with pytest.raises(UserError, match=r"no\.parquet is no Parquet file"):
        load(kind="parquet", paths=[str(tmp_path / "no.parquet")], column="body")


def test_a_missing_parquet_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_text("")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"extra.*jaxlm\[parquet\]"):
        load(kind="parquet", paths=[str(tmp_path)])


def test_missing_input_is_named(tmp_path, monkeypatch):
    write_texts(tmp_path / "texts", 2)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"data\.sources\.0\.paths: text: no such file or directory.*did you mean 'texts'"
    ):
        load(kind="text", paths=["text"])
    with pytest.raises(UserError, match=r"data\.sources\.0\.paths: texts/\*\.md: no file matches"):
        load(kind="text", paths=["texts/*.md"])
    with pytest.raises(UserError, match=r"texts: empty corpus: the directory has no \*\.jsonl or \*\.jsonl\.gz files"):
        load(kind="jsonl", paths=["texts"])
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"none: empty corpus: the directory has no visible files"):
        load(kind="text", paths=["none"])
    (tmp_path / "none" / "a").write_text("")
    with pytest.raises(UserError, match=r"data\.sources\.0 \(text\): empty corpus: no document holds any text"):
        load(kind="text", paths=["none"])


def test_undecodable_text_is_named_or_replaced(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9!")
    with pytest.raises(UserError, match=r"latin\.txt is not UTF-8 \(byte 0xE9 at 3\); .*encoding_errors=replace"):
        load(kind="text", paths=[str(tmp_path)])
    assert texts(source(kind="text", paths=[str(tmp_path)], encoding_errors="replace")) == ["caf\ufffd!"]


def test_a_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    path = write_texts(tmp_path, 1) / "0000.txt"

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match=rf"{path}: cannot be read .*Permission denied"):
        load(kind="text", paths=[str(path)])


@pytest.mark.parametrize("weight", [0, -1.0, float("inf"), float("nan")])
def test_weights_are_positive(weight):
    with pytest.raises(ValidationError, match=r"weight"):
        source(kind="python_stdlib", weight=weight)


def test_settings_name_what_is_wrong():
    with pytest.raises(ValidationError, match=r"text\.paths"):
        source(kind="text", paths=[])
    with pytest.raises(ValidationError, match="unknown kind 'csv' .known: python_stdlib, text, jsonl, parquet, array_record"):
        source(kind="csv", paths=["a"])


def test_a_bar_appears_only_when_it_takes_long(monkeypatch):
    shown = []
    monkeypatch.setattr(sources_module.Progress, "start", lambda self: shown.append(True))
    with sources_module._progress("reading", 10) as advance:
        advance(5)
    assert not shown
    with sources_module._progress("reading", 10, patience=0.0) as advance:
        time.sleep(0.01)
        advance(5)
    assert shown


def test_a_standard_library_with_links_counts_each_file_once(tmp_path, monkeypatch):
    """Debian's Python has a module under a second name, and dangling links where packages are not installed."""
    (tmp_path / "zebra.py").write_text("z = 1\n")
    (tmp_path / "alias.py").symlink_to("zebra.py")
    (tmp_path / "gone.py").symlink_to("nowhere.py")
    (tmp_path / "other.py").write_text("o = 1\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    files = list_files(PythonStdlibSettings(), "data.sources.0")
    assert [file.key for file in files] == ["other.py", "zebra.py"]
    check_held_out_apart(DataSettings(sources=(PythonStdlibSettings(),)))
