"""Text to token ids and back: bytes, or any byte-exact tokenizer of the `tokenizers` library."""

from __future__ import annotations

import codecs
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from jaxtyping import Int32, UInt
from pydantic import Field

from jaxlm.schema import KnownKind, Schema, UserError, did_you_mean

END_OF_TEXT = "<|endoftext|>"


class BytesTokenizerSettings(Schema):
    """One token a byte of UTF-8, and one that starts every document: a vocabulary of 257."""

    kind: Literal["bytes"] = "bytes"


class JsonTokenizerSettings(Schema):
    """A tokenizer.json of the tokenizers library, as `jaxlm tokenize` or Hugging Face write it (extra: tokenizers)."""

    kind: Literal["json"] = "json"
    path: str = Field(description="The tokenizer.json; relative to the working directory.")
    end_of_text: str = Field(END_OF_TEXT, description="The special token of that file which starts every document.")


TokenizerSettings = Annotated[BytesTokenizerSettings | JsonTokenizerSettings, Field(discriminator="kind"), KnownKind()]


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """What turns text into ids and back.

    Attributes:
      name: for messages.
      vocab_size: ids are below it.
      end_of_text: the special id that starts every document, and so also ends the one before. `encode` never gives it.
      pieces: the UTF-8 bytes that each id stands for; those of special ids are empty.
      encode_batch: the ids of each text.
      fingerprint: hash of the definition: equal where equal texts give equal ids.
    """

    name: str
    vocab_size: int
    end_of_text: int
    pieces: Sequence[bytes] = dataclasses.field(repr=False)
    encode_batch: Callable[[Sequence[str]], list[UInt[np.ndarray, " _"]]] = dataclasses.field(repr=False)
    fingerprint: str

    @property
    def dtype(self) -> np.dtype:
        """The narrowest of uint16 and uint32 that holds every id."""
        return token_dtype(self.vocab_size)

    @functools.cached_property
    def token_bytes(self) -> Int32[np.ndarray, " vocab_size"]:
        """Bytes of text that each id stands for. Exact where the tokenizer does not normalise its input."""
        return np.array([len(piece) for piece in self.pieces], np.int32)

    def encode(self, text: str) -> UInt[np.ndarray, " T"]:
        """The ids of a text, without the leading `end_of_text`; the names of special tokens are text like any other.

        Raises:
          UserError: for half a surrogate pair, which no UTF-8 text can hold.
        """
        return self.encode_batch([text])[0]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; special ids give none, broken UTF-8 gives U+FFFD.

        Raises:
          UserError: for an id outside the vocabulary.
        """
        return self._bytes(ids).decode("utf-8", "replace")

    def stream_decoder(self) -> StreamDecoder:
        """A decoder for ids that come a few at a time."""
        return StreamDecoder(self._bytes)

    def _bytes(self, ids: Iterable[int]) -> bytes:
        ids = [int(i) for i in ids]
        for position, i in enumerate(ids):
            if not 0 <= i < self.vocab_size:
                raise UserError(
                    f"token {i} at position {position} is outside the vocabulary of {self.vocab_size} ({self.name})"
                )
        return b"".join([self.pieces[i] for i in ids])


class StreamDecoder:
    """Decodes ids as they come. What its calls return, joined, is what `Tokenizer.decode` gives for all ids at once."""

    def __init__(self, to_bytes: Callable[[Iterable[int]], bytes]):
        self._to_bytes = to_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Iterable[int]) -> str:
        """The text that is certain after these ids too; bytes of an unfinished character wait for the next call."""
        return self._decoder.decode(self._to_bytes(ids))

    def finish(self) -> str:
        """The end of the text: U+FFFD if an unfinished character is left, else nothing."""
        return self._decoder.decode(b"", final=True)


def load_tokenizer(settings: BytesTokenizerSettings | JsonTokenizerSettings) -> Tokenizer:
    """The tokenizer that the settings describe.

    Raises:
      UserError: for a file that is missing or no tokenizer, and where the `tokenizers` extra is not installed.
    """
    if settings.kind == "bytes":
        return _bytes_tokenizer()
    return _json_tokenizer(settings)


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def to_utf8(text: str) -> bytes:
    """UTF-8 of a text.

    Raises:
      UserError: for half a surrogate pair.
    """
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"the text holds U+{ord(text[error.start]):04X} at character {error.start}: half of a surrogate pair, "
            "which UTF-8 cannot express; remove it"
        ) from None


def import_tokenizers():
    """The tokenizers library.

    Raises:
      UserError: where it is not installed; names the extra.
    """
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            "data.tokenizer kind json and a new BPE need the tokenizers library; install the extra: "
            "pip install 'jaxlm[tokenizers]', or uv run --extra tokenizers"
        ) from None
    return tokenizers


def _bytes_tokenizer() -> Tokenizer:
    def encode_batch(texts: Sequence[str]) -> list[UInt[np.ndarray, " _"]]:
        return [np.frombuffer(to_utf8(text), np.uint8).astype(np.uint16) for text in texts]

    pieces = [bytes([i]) for i in range(256)] + [b""]
    return Tokenizer("bytes", 257, 256, pieces, encode_batch, hashlib.sha256(b"bytes, end_of_text 256").hexdigest())


def _json_tokenizer(settings: JsonTokenizerSettings) -> Tokenizer:
    library = import_tokenizers()
    path = Path(settings.path).expanduser()
    if not path.is_file():
        raise UserError(
            f"data.tokenizer.path: {settings.path}: no such file; give a tokenizer.json (`jaxlm tokenize` writes one)"
        )
    try:
        text = path.read_text(encoding="utf-8")
        definition = json.loads(text)
        tokenizer = library.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise UserError(
            f"data.tokenizer.path: {settings.path} is not a tokenizer of the tokenizers library ({error}); "
            "give a tokenizer.json as `jaxlm tokenize` writes it"
        ) from None
    # Without these a special token's name inside a text would become that token, and long texts would be cut.
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()

    added = tokenizer.get_added_tokens_decoder()
    special = {token.content: i for i, token in added.items() if token.special}
    if settings.end_of_text not in special:
        raise UserError(
            f"data.tokenizer.end_of_text: {settings.end_of_text!r} is no special token of {settings.path}"
            f"{did_you_mean(settings.end_of_text, special)} (it has {', '.join(sorted(special)) or 'none'})"
        )
    to_bytes = _piece_decoder(definition, settings.path)
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    vocab_size = max(vocabulary.values()) + 1
    pieces = [b""] * vocab_size
    for token, i in vocabulary.items():
        if i not in added:
            pieces[i] = to_bytes(token)
        elif not added[i].special:
            pieces[i] = token.encode()
    dtype = token_dtype(vocab_size)

    def encode_batch(texts: Sequence[str]) -> list[UInt[np.ndarray, " _"]]:
        for text in texts:
            to_utf8(text)
        return [
            np.array(found.ids, dtype) for found in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ]

    for unused in ("truncation", "padding"):
        definition.pop(unused, None)
    canonical = json.dumps([definition, settings.end_of_text], sort_keys=True)
    return Tokenizer(
        f"json {settings.path}", vocab_size, special[settings.end_of_text], pieces, encode_batch,
        hashlib.sha256(canonical.encode()).hexdigest(),
    )  # fmt: skip


def _piece_decoder(definition: dict, path: str) -> Callable[[str], bytes]:
    """How a vocabulary entry spells bytes: every byte as a printable character (GPT-2), or U+2581 for a space and
    <0xNN> for other bytes (SentencePiece; the space that some put before a text belongs to the first piece)."""
    decoder = definition.get("decoder") or {}
    steps = decoder.get("decoders", [decoder])
    kinds = {step.get("type") for step in steps}
    if "ByteLevel" in kinds:
        byte_of = _gpt2_bytes()

        def from_gpt2(token: str) -> bytes:
            # As the library does: an entry with any other character stands for itself.
            return bytes([byte_of[c] for c in token]) if all(c in byte_of for c in token) else token.encode()

        return from_gpt2
    if kinds & {"Metaspace", "ByteFallback"}:

        def from_sentencepiece(token: str) -> bytes:
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                return bytes.fromhex(token[3:5])
            return token.replace("\u2581", " ").encode()

        return from_sentencepiece
    raise UserError(
        f"data.tokenizer.path: {path} decodes by {', '.join(sorted(k for k in kinds if k)) or 'nothing'}, which does "
        "not say which bytes a token stands for; use a byte-level BPE (GPT-2, Llama 3, Qwen, `jaxlm tokenize`) or a "
        "SentencePiece tokenizer"
    )


def _gpt2_bytes() -> dict[str, int]:
    """The byte that each character of a byte-level BPE stands for: printable Latin-1 itself, the rest U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
