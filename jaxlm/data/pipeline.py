"""The batches of a run.

The global batch of a step is a function of the settings and the seed alone: each process makes only its own rows of
it, so how many processes there are changes nothing, and the iterator's state is one number.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction

import grain
import numpy as np
from jaxtyping import Shaped
from pydantic import Field

from jaxlm.data.packing import Row, TokenStream, empty_row
from jaxlm.data.sources import EVERYTHING, Corpus, SourceSettings, Split, concatenate, list_files, load_corpus
from jaxlm.data.tokenizers import BytesTokenizerSettings, Tokenizer, TokenizerSettings
from jaxlm.schema import Schema, UserError

Batch = dict[str, Shaped[np.ndarray, "B T"]]


class DataSettings(Schema):
    """What to train on, and in which portions."""

    sources: tuple[SourceSettings, ...] = Field(
        min_length=1, description="Where the text comes from; with several, rows are mixed by their weights."
    )
    held_out: tuple[SourceSettings, ...] | None = Field(
        None, min_length=1, description="Sources of held-out text, read whole; null: a part of each of data.sources."
    )
    held_out_fraction: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="Share of the documents held out, by a hash of their names; unused if held_out is given.",
    )
    tokenizer: TokenizerSettings = Field(BytesTokenizerSettings(), description="What turns text into tokens.")
    sequence_length: int = Field(1024, gt=0, description="Tokens of a row.")
    batch_size: int = Field(16, gt=0, description="Rows of a step, over all devices and processes.")
    prefetch: int = Field(4, ge=0, description="Batches prepared ahead by threads; 0 makes each when it is asked for.")


def train_batches(
    settings: DataSettings,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    sequence_length: int,
    seed: int,
    rows: Sequence[int],
) -> grain.DatasetIterator[Batch]:
    """An endless iterator over this process's part of the global batches.

    Element s is rows `rows` of global batch s, stacked: int32 tokens, targets, segment_ids, positions and float32
    weights, each [len(rows), sequence_length] (see `jaxlm.data.packing`). `get_state()` is the number of batches taken,
    whatever the number of processes and of batches prefetched; after `set_state` the same batches follow, bit for bit.

    Args:
      settings: names the sources; its sequence_length and batch_size are not read.
      tokenizer: what `load_tokenizer` made of settings.tokenizer.
      batch_size: rows of a global batch.
      sequence_length: T.
      seed: of the order of the documents.
      rows: indices into the global batch of the rows that this process needs.

    Raises:
      UserError: for sources that are missing, unreadable, empty, shorter than a row, of another tokenizer, or that are
        also held out.
    """
    check_held_out_apart(settings)
    held_out_here = settings.held_out is None and settings.held_out_fraction > 0
    split = Split("train", settings.held_out_fraction) if held_out_here else EVERYTHING
    streams = []
    for i, source in enumerate(settings.sources):
        where = f"data.sources.{i}"
        corpus = load_corpus(source, tokenizer, where=where, split=split)
        if not len(corpus.lengths):
            aside = f" besides the {settings.held_out_fraction:.3g} of them held out" if held_out_here else ""
            raise UserError(
                f"{corpus.name}: empty corpus: no document holds any text{aside}; give more, or data.held_out"
            )
        if corpus.tokens < sequence_length:
            raise UserError(
                f"data.sequence_length={sequence_length} is longer than the corpus {corpus.name}, which has "
                f"{corpus.tokens:,} tokens to train on; shorten it or give more text"
            )
        streams.append(TokenStream(corpus, f"seed {seed} source {i}"))
    weights = integer_weights([source.weight for source in settings.sources])

    def row(index: int) -> Row:
        source, number = mixture_index(index, weights)
        return streams[source].row(number, sequence_length)

    batches = grain.MapDataset.source(_Batches(row, batch_size, rows, sys.maxsize // batch_size))
    options = grain.ReadOptions(num_threads=min(settings.prefetch, 4), prefetch_buffer_size=settings.prefetch)
    return iter(batches.to_iter_dataset(options))


def held_out_batches(
    settings: DataSettings,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    sequence_length: int,
    max_tokens: int | None,
    rows: Sequence[int],
) -> Sequence[Batch]:
    """This process's part of the held-out batches: `settings.held_out`, or the held-out part of `settings.sources`.

    The held-out documents of all sources, one after another, are cut into rows that do not overlap. With `max_tokens`,
    rows evenly spaced over all of them are taken, so that a few files do not stand for all. What is missing in the last
    row and in the last batch is padding (segment 0, weight 0); every process gets the same number of batches. The
    sources' weights play no part.

    Args:
      max_tokens: targets of weight 1 at most; None for all of the text.
      The others: as for `train_batches`.

    Raises:
      UserError: for sources that are missing, unreadable, empty or of another tokenizer, and where nothing is held out.
    """
    if settings.held_out is None:
        split = Split("held_out", settings.held_out_fraction)
        named = [(f"data.sources.{i}", source) for i, source in enumerate(settings.sources)]
    else:
        split = EVERYTHING
        named = [(f"data.held_out.{i}", source) for i, source in enumerate(settings.held_out)]
    corpus = concatenate([load_corpus(source, tokenizer, where=where, split=split) for where, source in named])
    if not len(corpus.lengths):
        raise UserError(
            f"the held-out split is empty: data.held_out_fraction={settings.held_out_fraction} of the documents of "
            f"{corpus.name} leaves none with text; raise it, give more documents, or name other text as data.held_out"
        )
    return HeldOutBatches(corpus, batch_size, sequence_length, max_tokens, rows)


class HeldOutBatches(Sequence[Batch]):
    """What `held_out_batches` returns: made anew at each access, so that only the tokens take memory."""

    def __init__(
        self, corpus: Corpus, batch_size: int, sequence_length: int, max_tokens: int | None, rows: Sequence[int]
    ):
        self.corpus, self.sequence_length = corpus, sequence_length
        self._stream = TokenStream(corpus, None)
        targets = corpus.tokens - 1
        self._all_rows = -(-targets // sequence_length)
        self.tokens = targets if max_tokens is None else min(max_tokens, targets)
        self._taken = -(-self.tokens // sequence_length)
        self._batches = _Batches(self._row, batch_size, rows, -(-self._taken // batch_size))

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._batches[index]

    def _row(self, i: int) -> Row:
        if i >= self._taken:
            return empty_row(self.sequence_length)
        # Spaced so that the first is row 0; the last stops where max_tokens is reached.
        targets = min(self.sequence_length, self.tokens - i * self.sequence_length)
        return self._stream.first_epoch_row(i * self._all_rows // self._taken, self.sequence_length, targets)


class _Batches:
    """Batch s of rows: a source for grain."""

    def __init__(self, row: Callable[[int], Row], batch_size: int, rows: Sequence[int], count: int):
        self._row, self._batch_size, self._rows, self._count = row, batch_size, rows, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, s: int) -> Batch:
        made = [self._row(s * self._batch_size + i) for i in self._rows]
        return {name: np.stack([row[name] for row in made]) for name in made[0]}


def integer_weights(weights: Sequence[float]) -> list[int]:
    """Weights as the smallest integers of the same ratios; each is taken for the decimal fraction it is written as."""
    fractions = [Fraction(repr(weight)) for weight in weights]
    scale = math.lcm(*(f.denominator for f in fractions))
    integers = [int(f * scale) for f in fractions]
    return [i // math.gcd(*integers) for i in integers]


def mixture_index(k: int, weights: Sequence[int]) -> tuple[int, int]:
    """Which source gives element k of a mixture, and which of that source's elements it is.

    Every source's elements come in order without gaps, evenly spread; each sum(weights) elements hold exactly
    weights[i] of source i. The rule is that of grain.MapDataset.mix, which however rounds weights to hundredths of the
    smallest (0.1 and 0.3 become 100 and 299).
    """
    # Of the first k and the first k + 1 elements: those left for the sources from i on.
    before, after, rest = k, k + 1, sum(weights)
    for i, weight in enumerate(weights):
        rest_before, rest_after = before * (rest - weight) // rest, after * (rest - weight) // rest
        if before - rest_before != after - rest_after:
            return i, before - rest_before
        before, after, rest = rest_before, rest_after, rest - weight
    raise AssertionError("some source takes every element")


def check_held_out_apart(settings: DataSettings) -> None:
    """Check that no file is read both for training and as held-out text.

    Raises:
      UserError: naming the file and both sources.
    """
    if settings.held_out is None and settings.held_out_fraction == 0:
        return
    seen = {}
    for i, source in enumerate(settings.sources):
        for file in list_files(source, f"data.sources.{i}"):
            key, other = seen.setdefault(file.path.resolve(), (file.key, i))
            if settings.held_out is None and key != file.key:
                # The two names may fall on different sides of the split.
                raise UserError(
                    f"data.sources.{other} and data.sources.{i} both read {file.path}, named {key} and {file.key}, so "
                    "that a part may be both trained on and held out; leave it out of one, or give data.held_out"
                )
    for i, source in enumerate(settings.held_out or ()):
        for file in list_files(source, f"data.held_out.{i}"):
            if file.path.resolve() in seen:
                raise UserError(
                    f"data.sources.{seen[file.path.resolve()][1]} and data.held_out.{i} both read {file.path}, so that "
                    "held-out loss would be measured on text trained on; leave it out of one"
                )
