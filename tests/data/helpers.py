"""Small corpora, and the slow and obvious way to pack them."""

import numpy as np

from jaxlm.data import Corpus


def corpus_of(documents, name="tiny"):
    documents = [np.asarray(document, np.uint16) for document in documents]
    return Corpus(
        name,
        np.array([len(document) for document in documents], np.int64),
        sum(len(document) - 1 for document in documents),
        lambda document, start, stop: documents[document][start:stop],
    )


def pack_slowly(documents, length, rows):
    """Rows of documents that are already in their order: one token at a time."""
    stream = [(i, token) for i, document in enumerate(documents) for token in document]
    packed = []
    for r in range(rows):
        window = stream[r * length : r * length + length + 1]
        row = {name: [] for name in ("tokens", "targets", "segment_ids", "positions")}
        segment = position = 0
        for t in range(length):
            document, token = window[t]
            new = t == 0 or document != window[t - 1][0]
            segment, position = (segment + 1, 0) if new else (segment, position + 1)
            for name, value in zip(row, (token, window[t + 1][1], segment, position), strict=True):
                row[name].append(value)
        packed.append(row)
    return packed


def write_texts(directory, count, size=40):
    """`count` files under `directory`, the text of each unlike any other's."""
    directory.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (directory / f"{i:04}.txt").write_text(f"<{i}>" * (1 + (i * 7) % size))
    return directory


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
