"""Where documents come from, and the token corpora made of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import gzip
import json
import sysconfig
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, BinaryIO, Literal, NamedTuple

import numpy as np
from grain.sources import ArrayRecordDataSource
from jaxtyping import Bool, Int64, UInt
from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from jaxlm.data.hashing import bernoulli
from jaxlm.data.tokenizers import Tokenizer, to_utf8
from jaxlm.schema import KnownKind, Schema, UserError, did_you_mean

Weight = Annotated[
    float, Field(gt=0, allow_inf_nan=False, description="Share of the training rows, relative to the other sources.")
]
Paths = Annotated[tuple[str, ...], Field(min_length=1)]


class PythonStdlibSettings(Schema):
    """The .py files of the running interpreter's standard library, without installed packages and without its tests
    (which not every distribution ships); one file is one document."""

    kind: Literal["python_stdlib"] = "python_stdlib"
    weight: Weight = 1.0


class TextSettings(Schema):
    """Text files; one file is one document."""

    kind: Literal["text"] = "text"
    paths: Paths = Field(
        description="Files, directories (all files below them that are not hidden) and globs (** crosses directories); "
        "relative to the working directory."
    )
    encoding_errors: Literal["strict", "replace"] = Field(
        "strict", description="On bytes that are not UTF-8: strict stops and names the file, replace reads U+FFFD."
    )
    weight: Weight = 1.0


class JsonlSettings(Schema):
    """JSON lines: one object a line, one line a document; .gz files are decompressed."""

    kind: Literal["jsonl"] = "jsonl"
    paths: Paths = Field(description="Files, globs, and directories (their *.jsonl and *.jsonl.gz).")
    field: str = Field("text", description="The field that holds the text.")
    weight: Weight = 1.0


class ParquetSettings(Schema):
    """Parquet files; one row is one document (extra: parquet)."""

    kind: Literal["parquet"] = "parquet"
    paths: Paths = Field(description="Files, globs, and directories (their *.parquet).")
    column: str = Field("text", description="The column that holds the text.")
    weight: Weight = 1.0


class ArrayRecordSettings(Schema):
    """Tokens that `jaxlm tokenize` wrote; read as they are needed, so that they may be larger than memory."""

    kind: Literal["array_record"] = "array_record"
    paths: Paths = Field(description="Directories that `jaxlm tokenize` wrote.")
    weight: Weight = 1.0


SourceSettings = Annotated[
    PythonStdlibSettings | TextSettings | JsonlSettings | ParquetSettings | ArrayRecordSettings,
    Field(discriminator="kind"),
    KnownKind(),
]

NOT_STDLIB = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})
SUFFIXES = {"text": ("",), "jsonl": (".jsonl", ".jsonl.gz"), "parquet": (".parquet",)}

# The files of a dataset of tokens.
DATASET, INDEX, FORMAT = "dataset.json", "index.npz", 1

# Text is tokenized in pieces of about this many characters.
_CHUNK = 1 << 22


@dataclasses.dataclass(frozen=True)
class Split:
    """Which documents of a source to read.

    A document is held out by a hash of its key: for whole files their path below the directory given (or below the
    fixed part of the glob), for records that of their file and their number. So it stays on its side whatever else is
    in the corpus, in whatever order, wherever the directory lies.
    """

    part: Literal["all", "train", "held_out"] = "all"
    fraction: float = 0.0

    def mask(self, key: str, start: int = 0, stop: int = 1) -> Bool[np.ndarray, " n"]:
        """Which of the records start..stop-1 of the file `key` to read."""
        if self.part == "all":
            return np.ones(stop - start, bool)
        held_out = bernoulli(f"held out {key}", start, stop, self.fraction)
        return held_out if self.part == "held_out" else ~held_out


EVERYTHING = Split()


class SourceFile(NamedTuple):
    """A file and the name by which its documents are split."""

    path: Path
    key: str


class Document(NamedTuple):
    """A text, and how many bytes of its source's files have been read."""

    text: str
    bytes_read: int


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """Documents as tokens.

    Attributes:
      name: for messages.
      lengths: tokens of each document, its leading end_of_text included; at least 2.
      bytes: of UTF-8 text that the tokens stand for.
      read: `read(document, start, stop)` gives those tokens of a document.
    """

    name: str
    lengths: Int64[np.ndarray, " documents"]
    bytes: int
    read: Callable[[int, int, int], UInt[np.ndarray, " _"]]

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())


def load_corpus(source: Schema, tokenizer: Tokenizer, *, where: str, split: Split = EVERYTHING) -> Corpus:
    """The documents of one source as tokens.

    Text is tokenized into memory (2 bytes a token, 4 for vocabularies beyond 65,536); array_record is read as needed.
    Documents without text are left out.

    Args:
      source: one of `SourceSettings`.
      where: the setting that holds it, for messages, such as "data.sources.0".
      split: which documents. A part of a split may be empty; everything may not.

    Raises:
      UserError: for input that is missing, unreadable or empty, and for tokens of another tokenizer.
    """
    if source.kind == "array_record":
        return _open_datasets(source, tokenizer, where, split)
    pieces, lengths, size = [], [], 0
    start = np.array([tokenizer.end_of_text], tokenizer.dtype)
    for batch in batched_text(source, where, split, f"reading {where} ({source.kind})"):
        for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
            if len(ids):
                pieces += [start, ids]
                lengths.append(1 + len(ids))
                size += len(to_utf8(text))
    if not pieces and split.part == "all":
        raise UserError(f"{where} ({source.kind}): empty corpus: no document holds any text; give a source with text")
    tokens = np.concatenate([np.zeros(0, tokenizer.dtype), *pieces])
    lengths = np.array(lengths, np.int64)
    starts = np.cumsum(lengths) - lengths

    def read(document: int, start: int, stop: int) -> UInt[np.ndarray, " _"]:
        return tokens[starts[document] + start : starts[document] + stop]

    return Corpus(f"{where} ({source.kind})", lengths, size, read)


def concatenate(corpora: Sequence[Corpus]) -> Corpus:
    """The documents of several corpora, one corpus after the other."""
    ends = np.cumsum([len(corpus.lengths) for corpus in corpora])

    def read(document: int, start: int, stop: int) -> UInt[np.ndarray, " _"]:
        i = int(np.searchsorted(ends, document, side="right"))
        return corpora[i].read(document - int(ends[i]) + len(corpora[i].lengths), start, stop)

    return Corpus(
        ", ".join(corpus.name for corpus in corpora),
        np.concatenate([corpus.lengths for corpus in corpora]),
        sum(corpus.bytes for corpus in corpora),
        read,
    )


def list_files(source: Schema, where: str) -> list[SourceFile]:
    """The files that a source reads, each once, in a fixed order.

    Raises:
      UserError: for a path that does not exist, a glob that matches nothing, a directory without such files.
    """
    if source.kind == "python_stdlib":
        root = Path(sysconfig.get_paths()["stdlib"])
        found = [(path, path.relative_to(root)) for path in root.rglob("*.py") if path.is_file()]
        keys = sorted((key.as_posix(), path) for path, key in found if not NOT_STDLIB.intersection(key.parts))
        if not keys:
            raise UserError(
                f"{where}: empty corpus: this Python keeps no source files in {root}; use kind text instead"
            )
        # Distributions link some modules under a second name: a file counts once, by its own name.
        unique = {}
        for key, path in sorted(keys, key=lambda entry: entry[1].is_symlink()):
            unique.setdefault(path.resolve(), SourceFile(path, key))
        return sorted(unique.values(), key=lambda file: file.key)
    if source.kind == "array_record":
        return [
            SourceFile(path / shard["name"], shard["name"])
            for path in _dataset_paths(source, where)
            for shard in _read_dataset(path, where)["shards"]
        ]
    unique = {}
    for pattern in source.paths:
        for file in _expand(pattern, SUFFIXES[source.kind], where):
            unique.setdefault(file.path.resolve(), file)
    return list(unique.values())


def read_documents(source: Schema, where: str, split: Split = EVERYTHING) -> Iterator[Document]:
    """The documents of a source of text, in the order of `list_files`.

    Raises:
      UserError: for what cannot be read; names file and line.
    """
    done = 0
    readers = {"jsonl": _read_jsonl, "parquet": _read_parquet}
    for file in list_files(source, where):
        try:
            size = file.path.stat().st_size
            if source.kind in readers:
                for text, inside in readers[source.kind](source, file, where, split):
                    yield Document(text, done + inside)
            elif split.mask(file.key)[0]:
                yield Document(_decode(file.path.read_bytes(), file, source, where), done + size)
            done += size
        except OSError as error:
            raise UserError(
                f"{where}: {file.path}: cannot be read ({error}); repair the file or leave it out"
            ) from None


def batched_text(source: Schema, where: str, split: Split, description: str) -> Iterator[list[str]]:
    """The texts of `read_documents` in lists of some millions of characters; shows a bar if it takes more than 2 s."""
    total = sum(file.path.stat().st_size for file in list_files(source, where))
    batch, characters = [], 0
    with _progress(description, total) as advance:
        for text, bytes_read in read_documents(source, where, split):
            batch.append(text)
            characters += len(text)
            if characters >= _CHUNK:
                yield batch
                advance(bytes_read)
                batch, characters = [], 0
        if batch:
            yield batch


def _expand(pattern: str, suffixes: tuple[str, ...], where: str) -> list[SourceFile]:
    path = Path(pattern).expanduser()
    if path.is_file():
        return [SourceFile(path, path.name)]
    if path.is_dir():
        found = sorted(
            (key.as_posix(), file)
            for file, key in ((file, file.relative_to(path)) for file in path.rglob("*"))
            if file.is_file() and file.name.endswith(suffixes) and not any(part.startswith(".") for part in key.parts)
        )
        if not found:
            kind = " or ".join(f"*{suffix}" for suffix in suffixes if suffix) or "visible"
            raise UserError(f"{where}.paths: {pattern}: empty corpus: the directory has no {kind} files; give another")
        return [SourceFile(file, key) for key, file in found]
    if any(c in pattern for c in "*?["):
        parts = path.parts
        fixed = next(i for i, part in enumerate(parts) if any(c in part for c in "*?["))
        root = Path(*parts[:fixed])
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
        if not found:
            raise UserError(f"{where}.paths: {pattern}: no file matches (searched from {Path.cwd()}); correct the glob")
        return [SourceFile(file, file.relative_to(root).as_posix()) for file in found]
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    raise UserError(
        f"{where}.paths: {pattern}: no such file or directory (looked from {Path.cwd()})"
        f"{did_you_mean(path.name, siblings)}"
    )


def _decode(content: bytes, file: SourceFile, source: Schema, where: str) -> str:
    if source.kind == "text" and source.encoding_errors == "replace":
        return content.decode("utf-8", "replace")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        remedy = f"convert or leave out the file, or set {where}.encoding_errors=replace"
        if source.kind == "python_stdlib":
            remedy = "use kind text with encoding_errors=replace"
        raise UserError(
            f"{where}: {file.path} is not UTF-8 (byte 0x{content[error.start]:02X} at {error.start}); {remedy}"
        ) from None


def _flags(split: Split, key: str, block: int = 4096) -> Iterator[bool]:
    """Whether to read record 0, 1, 2, ... of a file."""
    start = 0
    while True:
        yield from split.mask(key, start, start + block).tolist()
        start += block


@contextlib.contextmanager
def _open_maybe_gzip(path: Path) -> Iterator[tuple[Iterable[bytes], BinaryIO]]:
    with open(path, "rb") as raw:
        if path.suffix == ".gz":
            with gzip.open(raw) as lines:
                yield lines, raw
        else:
            yield raw, raw


def _read_jsonl(source: JsonlSettings, file: SourceFile, where: str, split: Split) -> Iterator[Document]:
    path = file.path
    if path.suffix in (".zst", ".bz2", ".xz"):
        raise UserError(f"{where}: {path}: only .gz is read compressed; decompress the file or convert it to .gz")
    number = 0
    try:
        with _open_maybe_gzip(path) as (lines, raw):
            for number, (line, wanted) in enumerate(zip(lines, _flags(split, file.key), strict=False), 1):
                if wanted and not line.isspace():
                    yield Document(_text_of_line(line, source.field, f"{where}: {path}, line {number}"), raw.tell())
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{where}: {path}: damaged gzip after line {number} ({error}); make the file anew") from None


def _text_of_line(line: bytes, field: str, place: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:  # JSON that is malformed, or not UTF-8
        raise UserError(f"{place}: not JSON ({error}); correct or remove the line") from None
    if not isinstance(record, dict):
        raise UserError(f"{place}: a JSON object is needed, found {type(record).__name__}; correct or remove the line")
    if field not in record:
        names = ", ".join(sorted(record)) or "none"
        raise UserError(
            f"{place}: no field {field!r}{did_you_mean(field, record)} (it has {names}); set the source's field"
        )
    if not isinstance(record[field], str):
        raise UserError(f"{place}: field {field!r} is {type(record[field]).__name__}, not text; set the source's field")
    try:
        to_utf8(record[field])
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    return record[field]


def _read_parquet(source: ParquetSettings, file: SourceFile, where: str, split: Split) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{where}: kind parquet needs pyarrow; install the extra: pip install 'jaxlm[parquet]', "
            "or uv run --extra parquet"
        ) from None
    try:
        table = pyarrow.parquet.ParquetFile(file.path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{where}: {file.path} is no Parquet file ({error}); repair it or leave it out") from None
    with table:
        schema = table.schema_arrow
        if source.column not in schema.names:
            names = ", ".join(schema.names)
            hint = did_you_mean(source.column, schema.names)
            raise UserError(f"{where}.column: {file.path} has no column {source.column!r}{hint} (it has {names})")
        kind = schema.field(source.column).type
        if not (
            pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind) or pyarrow.types.is_string_view(kind)
        ):
            raise UserError(
                f"{where}.column: column {source.column!r} of {file.path} is {kind}, not text; name another"
            )
        size, rows = file.path.stat().st_size, max(table.metadata.num_rows, 1)
        flags, number = _flags(split, file.key), 0
        for batch in table.iter_batches(batch_size=1024, columns=[source.column]):
            for text in batch.column(0).to_pylist():
                number += 1
                if next(flags):
                    if text is None:
                        raise UserError(
                            f"{where}: {file.path}, row {number}: column {source.column!r} is null; remove the row"
                        )
                    yield Document(text, size * number // rows)


def _dataset_paths(source: ArrayRecordSettings, where: str) -> list[Path]:
    unique: dict[Path, Path] = {}
    for name in source.paths:
        path = Path(name).expanduser()
        if not (path / DATASET).is_file():
            problem = "is no dataset of tokens" if path.is_dir() else "no such directory"
            raise UserError(
                f"{where}.paths: {name}: {problem}; give a directory that `jaxlm tokenize` wrote (it holds {DATASET})"
            )
        unique.setdefault(path.resolve(), path)
    return list(unique.values())


def _read_dataset(path: Path, where: str) -> dict:
    try:
        dataset = json.loads((path / DATASET).read_text())
    except ValueError as error:
        raise UserError(f"{where}: {path / DATASET} is damaged ({error}); tokenize again") from None
    if dataset.get("format") != FORMAT:
        raise UserError(
            f"{where}: {path} has format {dataset.get('format')}, this jaxlm reads {FORMAT}; tokenize again with it"
        )
    return dataset


def _open_datasets(source: ArrayRecordSettings, tokenizer: Tokenizer, where: str, split: Split) -> Corpus:
    files, lengths, sizes, masks = [], [], [], []
    for path in _dataset_paths(source, where):
        dataset = _read_dataset(path, where)
        made_by = dataset["tokenizer"]
        if made_by["fingerprint"] != tokenizer.fingerprint:
            own = (path / "tokenizer.json").is_file()
            remedy = f"{{kind: json, path: {path / 'tokenizer.json'}}}" if own else "{kind: bytes}"
            raise UserError(
                f"{where}: {path} holds tokens of the tokenizer {made_by['name']} (vocabulary {made_by['vocab_size']}, "
                f"fingerprint {made_by['fingerprint'][:12]}), but data.tokenizer is {tokenizer.name} (vocabulary "
                f"{tokenizer.vocab_size}, fingerprint {tokenizer.fingerprint[:12]}); set data.tokenizer to {remedy}, "
                "or tokenize again"
            )
        try:
            with np.load(path / INDEX) as index:
                lengths.append(index["lengths"].astype(np.int64))
                sizes.append(index["bytes"].astype(np.int64))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"{where}: {path / INDEX} is missing or damaged ({error}); tokenize again") from None
        for shard in dataset["shards"]:
            file = path / shard["name"]
            if not file.is_file():
                raise UserError(f"{where}: {file} is missing; bring it back or tokenize again")
            files.append(str(file))
            masks.append(split.mask(shard["name"], 0, shard["documents"]))
    lengths, sizes = np.concatenate(lengths), np.concatenate(sizes)
    numbers = np.flatnonzero(np.concatenate(masks))
    try:
        records = ArrayRecordDataSource(files)
        count = len(records)
    except Exception as error:  # the reader raises bare RuntimeError and ValueError
        raise UserError(f"{where}: {', '.join(source.paths)}: a shard is damaged ({error}); tokenize again") from None
    if not count == len(lengths) == sum(map(len, masks)):
        raise UserError(
            f"{where}: {', '.join(source.paths)}: the shards hold {count} documents, their index {len(lengths)}; "
            "tokenize again"
        )
    dtype = tokenizer.dtype.newbyteorder("<")

    # Rows follow each other through long documents, so the same record is wanted many times in a row.
    @functools.lru_cache(maxsize=32)
    def record(number: int) -> UInt[np.ndarray, " _"]:
        tokens = np.frombuffer(records[number], dtype)
        if len(tokens) != lengths[number]:
            raise UserError(
                f"{where}: document {number} has {len(tokens)} tokens, its index says {lengths[number]}; tokenize again"
            )
        return tokens

    def read(document: int, start: int, stop: int) -> UInt[np.ndarray, " _"]:
        return record(int(numbers[document]))[start:stop]

    return Corpus(f"{where} (array_record)", lengths[numbers], int(sizes[numbers].sum()), read)


@contextlib.contextmanager
def _progress(description: str, total: int, patience: float = 2.0) -> Iterator[Callable[[int], None]]:
    """A function to call with the bytes read; a bar appears on a terminal once `patience` seconds have passed."""
    started, console = time.monotonic(), Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeRemainingColumn(),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    task = bar.add_task(description, total=total)

    def advance(bytes_read: int) -> None:
        if time.monotonic() - started > patience:
            bar.start()
        bar.update(task, completed=bytes_read)

    try:
        yield advance
    finally:
        bar.stop()
