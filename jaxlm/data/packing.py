"""Documents packed into rows of equal length: concatenated, then split.

The documents of a corpus in a permuted order, epoch after epoch, form one endless stream of N tokens an epoch. Row r of
length T is made of its tokens r T .. r T + T: neighbouring rows share one token, and every token is a target once an
epoch. A row is a pure function of (seed, r): nothing is carried from row to row, so any process can make any row alone.

Every document starts with end_of_text, so the target of a document's last token is the end_of_text of the next, and no
target needs masking. Inside a row each document is a segment of its own; the rest of a document that was cut at the
edge of a row starts the next row as a new segment, from position 0.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int64, Shaped, UInt

from jaxlm.data.hashing import permutation
from jaxlm.data.sources import Corpus

Row = dict[str, Shaped[np.ndarray, " T"]]


def pack_row(pieces: Sequence[UInt[np.ndarray, " _"]], length: int) -> Row:
    """One row from consecutive pieces of documents.

    Args:
      pieces: together length + 1 tokens, or fewer to have the row padded.
      length: T.

    Returns:
      tokens, targets (the token after each), segment_ids (1, 2, ... for the pieces; 0 for padding) and positions
      (0, 1, ... inside each piece), all int32 [T]; weights, float32 [T]: 1, and 0 for padding.
    """
    sizes = np.array([len(piece) for piece in pieces], np.int64)
    n = int(sizes.sum()) - 1
    stream = np.concatenate(pieces)
    starts = np.repeat(np.cumsum(sizes) - sizes, sizes)
    row = {name: np.zeros(length, np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    row["tokens"][:n] = stream[:-1]
    row["targets"][:n] = stream[1:]
    row["segment_ids"][:n] = np.repeat(np.arange(1, len(sizes) + 1), sizes)[:n]
    row["positions"][:n] = (np.arange(n + 1) - starts)[:n]
    row["weights"] = np.zeros(length, np.float32)
    row["weights"][:n] = 1
    return row


def empty_row(length: int) -> Row:
    """A row of padding."""
    row = {name: np.zeros(length, np.int32) for name in ("tokens", "targets", "segment_ids", "positions")}
    return row | {"weights": np.zeros(length, np.float32)}


class TokenStream:
    """The endless stream of a corpus, readable anywhere.

    Args:
      corpus: at least one document.
      key: names the order of the documents in each epoch; None keeps them as they are.
    """

    def __init__(self, corpus: Corpus, key: str | None):
        self.corpus, self.key, self.epoch_tokens = corpus, key, corpus.tokens
        # Two epochs meet in a row, and prefetching threads may be a row apart.
        self._order = functools.lru_cache(maxsize=2)(self._make_order)

    def _make_order(self, epoch: int) -> tuple[Int64[np.ndarray, " documents"], Int64[np.ndarray, " documents"]]:
        """The documents of an epoch in their order, and where each ends."""
        lengths = self.corpus.lengths
        order = np.arange(len(lengths)) if self.key is None else permutation(f"{self.key} epoch {epoch}", len(lengths))
        return order, np.cumsum(lengths[order])

    def read(self, start: int, stop: int) -> Iterator[UInt[np.ndarray, " _"]]:
        """Tokens start..stop-1, cut where a document ends."""
        while start < stop:
            epoch, offset = divmod(start, self.epoch_tokens)
            order, ends = self._order(epoch)
            i = int(np.searchsorted(ends, offset, side="right"))
            while start < stop and i < len(order):
                document = int(order[i])
                first = offset - int(ends[i]) + int(self.corpus.lengths[document])
                piece = self.corpus.read(document, first, min(first + stop - start, int(self.corpus.lengths[document])))
                yield piece
                start, offset, i = start + len(piece), offset + len(piece), i + 1

    def row(self, r: int, length: int) -> Row:
        """Row r of the endless stream."""
        return pack_row(list(self.read(r * length, r * length + length + 1)), length)

    def first_epoch_row(self, r: int, length: int, targets: int | None = None) -> Row:
        """Row r of the first epoch alone, padded where that ends, or after so many targets."""
        stop = min(r * length + 1 + (length if targets is None else targets), self.epoch_tokens)
        return pack_row(list(self.read(r * length, stop)), length)
