"""What `jaxlm tokenize` does: train a byte-level BPE, and write a corpus as shards of tokens.

    OUTPUT/tokenizer.json            unless the tokenizer is bytes
    OUTPUT/dataset.json              shards, counts, and the tokenizer's fingerprint
    OUTPUT/index.npz                 tokens (end_of_text included) and bytes of every document
    OUTPUT/shard-00000.array_record  one record a document: end_of_text and its tokens, little-endian uint16 or uint32

Held-out documents are not separated here: like every source, the shards are split when they are read, by record.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from jaxlm.data.sources import DATASET, EVERYTHING, FORMAT, INDEX, SourceSettings, batched_text, list_files
from jaxlm.data.tokenizers import (
    END_OF_TEXT,
    BytesTokenizerSettings,
    JsonTokenizerSettings,
    Tokenizer,
    import_tokenizers,
    load_tokenizer,
    to_utf8,
)
from jaxlm.schema import UserError

TOKENIZER = "tokenizer.json"


@dataclasses.dataclass(frozen=True)
class TokenizeSummary:
    """What was written; prints as a report that ends with the settings which read it."""

    output: Path
    tokenizer: BytesTokenizerSettings | JsonTokenizerSettings
    vocab_size: int
    documents: int
    tokens: int
    bytes: int
    shards: int

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens

    def __str__(self) -> str:
        changed = self.tokenizer.model_dump(exclude_defaults=True)
        tokenizer = ", ".join(f"{name}: {value}" for name, value in {"kind": self.tokenizer.kind, **changed}.items())
        return (
            f"{self.documents:,} documents, {self.bytes:,} bytes, {self.tokens:,} tokens ({self.bytes_per_token:.3f} "
            f"bytes per token, vocabulary {self.vocab_size:,}) in {self.shards} shard(s) of {self.output}\n"
            f"data:\n  sources: [{{kind: array_record, paths: [{self.output}]}}]\n  tokenizer: {{{tokenizer}}}"
        )


def tokenize_corpus(
    sources: Sequence[SourceSettings],
    tokenizer: BytesTokenizerSettings | JsonTokenizerSettings | None,
    output: str | Path,
    *,
    vocab_size: int = 32_000,
    shard_tokens: int = 100_000_000,
) -> TokenizeSummary:
    """Write the documents of text sources, in their order, as a dataset that the source `array_record` reads.

    Everything is written to OUTPUT.partial, checked, and only then given its name. Documents without text are left out.

    Args:
      sources: sources of text; their weights play no part.
      tokenizer: None to train a byte-level BPE on them.
      output: the directory to create.
      vocab_size: of a new BPE, the special token included; a small corpus may give less.
      shard_tokens: a shard ends with the document that reaches so many.

    Raises:
      UserError: for sources that cannot be read or hold no text, an output that exists, and sizes that make no sense.
    """
    output = Path(output).expanduser()
    partial = output.with_name(output.name + ".partial")
    if output.exists():
        raise UserError(f"{output} exists already and is left as it is; choose another output, or remove it")
    if shard_tokens < 1:
        raise UserError(f"shard_tokens={shard_tokens}: a shard holds at least one token")
    if tokenizer is None and vocab_size < 257:
        raise UserError(
            f"vocab_size={vocab_size}: a byte-level BPE needs at least 257 tokens: the bytes and {END_OF_TEXT}"
        )
    for i, source in enumerate(sources):
        if source.kind == "array_record":
            raise UserError(
                f"source {i}: kind array_record holds tokens already; tokenize the text that it was made of"
            )
        list_files(source, f"source {i}")
    if isinstance(tokenizer, JsonTokenizerSettings):
        load_tokenizer(tokenizer)
    try:
        partial.mkdir(parents=True)
    except FileExistsError:
        raise UserError(
            f"{partial} exists: another tokenize is writing it, or was killed; remove it if none is running"
        ) from None
    try:
        summary = _write(sources, tokenizer, partial, output, vocab_size, shard_tokens)
        partial.rename(output)
    except (OSError, RuntimeError) as error:  # the shard writer raises RuntimeError
        raise UserError(
            f"{output} cannot be written ({error}); nothing is left of it; free space or choose another place"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return summary


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path) -> None:
    """Train a byte-level BPE, which can write every text and read it back exactly, and save it as a tokenizer.json."""
    library = import_tokenizers()
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


def _batches(sources: Sequence[SourceSettings], action: str) -> Iterable[list[str]]:
    for i, source in enumerate(sources):
        yield from batched_text(source, f"source {i}", EVERYTHING, f"{action} source {i} ({source.kind})")


def _write(
    sources: Sequence[SourceSettings],
    settings: BytesTokenizerSettings | JsonTokenizerSettings | None,
    directory: Path,
    output: Path,
    vocab_size: int,
    shard_tokens: int,
) -> TokenizeSummary:
    if settings is None:
        train_bpe(
            (text for batch in _batches(sources, "learning from") for text in batch), vocab_size, directory / TOKENIZER
        )
        settings = JsonTokenizerSettings(path=str(directory / TOKENIZER))
    elif settings.kind == "json":
        shutil.copyfile(Path(settings.path).expanduser(), directory / TOKENIZER)
    tokenizer = load_tokenizer(settings)
    if settings.kind == "json":
        settings = settings.model_copy(update={"path": str(output / TOKENIZER)})

    shards, lengths, sizes = _write_shards(sources, tokenizer, directory, shard_tokens)
    if not lengths:
        raise UserError("empty corpus: no document of the sources holds any text; give sources with text")
    np.savez(directory / INDEX, lengths=np.array(lengths, np.int64), bytes=np.array(sizes, np.int64))
    dataset = {
        "format": FORMAT,
        "tokenizer": {
            "name": tokenizer.name if settings.kind == "bytes" else f"json {settings.path}",
            "vocab_size": tokenizer.vocab_size,
            "end_of_text": tokenizer.end_of_text,
            "fingerprint": tokenizer.fingerprint,
        },
        "dtype": tokenizer.dtype.name,
        "documents": len(lengths),
        "tokens": sum(lengths),
        "bytes": sum(sizes),
        "shards": shards,
    }
    (directory / DATASET).write_text(json.dumps(dataset, indent=2) + "\n")
    return TokenizeSummary(output, settings, tokenizer.vocab_size, len(lengths), sum(lengths), sum(sizes), len(shards))


def _write_shards(
    sources: Sequence[SourceSettings], tokenizer: Tokenizer, directory: Path, shard_tokens: int
) -> tuple[list[dict], list[int], list[int]]:
    """The shards written, and tokens and bytes of each document."""
    shards, lengths, sizes = [], [], []
    start = np.array([tokenizer.end_of_text], tokenizer.dtype)
    dtype = tokenizer.dtype.newbyteorder("<")
    writer = None
    try:
        for batch in _batches(sources, "tokenizing"):
            for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                if not len(ids):
                    continue
                if writer is None:
                    shards.append({"name": f"shard-{len(shards):05}.array_record", "documents": 0, "tokens": 0})
                    writer = ArrayRecordWriter(str(directory / shards[-1]["name"]), "group_size:1")
                writer.write(np.concatenate([start, ids]).astype(dtype).tobytes())
                lengths.append(1 + len(ids))
                sizes.append(len(to_utf8(text)))
                shards[-1]["documents"] += 1
                shards[-1]["tokens"] += lengths[-1]
                if shards[-1]["tokens"] >= shard_tokens:
                    writer.close()
                    writer = None
    finally:
        if writer is not None:
            writer.close()
    # The writer does not tell of every failed write (a full disk, say), so what lies there is counted.
    for shard in shards:
        reader = ArrayRecordReader(str(directory / shard["name"]))
        found = reader.num_records()
        reader.close()
        if found != shard["documents"]:
            raise UserError(
                f"{directory / shard['name']}: only {found} of {shard['documents']} records were written; "
                "is the disk full?"
            )
    return shards, lengths, sizes
