import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.data.hashing import permutation
from jaxlm.data.packing import TokenStream, empty_row, pack_row
from tests.data.helpers import assert_same, corpus_of, pack_slowly

END = 9
DOCUMENTS = [[END, 1, 2, 3], [END, 4], [END, 5, 6, 7, 8, 1, 2], [END, 3, 3]]


def test_values_of_a_row_by_hand():
    stream = TokenStream(corpus_of(DOCUMENTS), None)
    row = stream.row(1, 5)
    assert row["tokens"].tolist() == [4, 9, 5, 6, 7]
    assert row["targets"].tolist() == [9, 5, 6, 7, 8]
    assert row["segment_ids"].tolist() == [1, 2, 2, 2, 2]
    assert row["positions"].tolist() == [0, 0, 1, 2, 3]
    assert row["weights"].tolist() == [1, 1, 1, 1, 1]
    assert {name: row[name].dtype.name for name in row} == {
        "tokens": "int32",
        "targets": "int32",
        "segment_ids": "int32",
        "positions": "int32",
        "weights": "float32",
    }


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(2, 12), min_size=1, max_size=8), st.integers(1, 17), st.integers(0, 3))
def test_rows_are_the_naive_concatenation_split_over_epochs(sizes, length, seed):
    documents = [[END, *(np.arange(1, size) + 10 * i)] for i, size in enumerate(sizes)]
    key = f"seed {seed}"
    stream = TokenStream(corpus_of(documents), key)
    rows = 3 * sum(sizes) // length + 2
    ordered = []
    for epoch in range(rows * length // sum(sizes) + 2):
        ordered += [documents[i] for i in permutation(f"{key} epoch {epoch}", len(documents))]
    expected = pack_slowly(ordered, length, rows)
    for r in reversed(range(rows)):  # in any order
        row = stream.row(r, length)
        for name in expected[r]:
            assert row[name].tolist() == expected[r][name], (r, name)


def test_every_token_is_a_target_once_an_epoch():
    documents = [[END, *range(10 * i, 10 * i + 3 + i)] for i in range(1, 6)]
    stream = TokenStream(corpus_of(documents), "seed")
    total = sum(map(len, documents))
    length = 4
    targets = np.concatenate([stream.row(r, length)["targets"] for r in range(total)])
    for epoch in range(length):
        # The stream's first token is nobody's target, so the epoch of targets is one token late.
        found = targets[epoch * total : (epoch + 1) * total]
        assert sorted(found.tolist()) == sorted(token for document in documents for token in document)


def test_epochs_have_different_orders_and_seeds_too():
    documents = [[END, i] for i in range(20)]
    a, b = TokenStream(corpus_of(documents), "seed 0"), TokenStream(corpus_of(documents), "seed 1")
    first, second, other = a.row(0, 40), a.row(1, 40), b.row(0, 40)
    assert sorted(first["tokens"].tolist()) == sorted(second["tokens"].tolist()) == sorted(other["tokens"].tolist())
    assert first["tokens"].tolist() != second["tokens"].tolist()
    assert first["tokens"].tolist() != other["tokens"].tolist()


def test_padding():
    row = pack_row([np.array([END, 1, 2], np.uint16), np.array([END], np.uint16)], 6)
    assert row["tokens"].tolist() == [9, 1, 2, 0, 0, 0]
    assert row["targets"].tolist() == [1, 2, 9, 0, 0, 0]
    assert row["segment_ids"].tolist() == [1, 1, 1, 0, 0, 0]
    assert row["positions"].tolist() == [0, 1, 2, 0, 0, 0]
    assert row["weights"].tolist() == [1, 1, 1, 0, 0, 0]
    assert_same(empty_row(6), {name: np.zeros_like(values) for name, values in row.items()})


@pytest.mark.parametrize("targets", [None, 2])
def test_the_first_epoch_alone_ends_in_padding(targets):
    stream = TokenStream(corpus_of(DOCUMENTS), None)
    row = stream.first_epoch_row(2, 6, targets)  # tokens 12..15 are left: 2, END, 3, 3
    count = 3 if targets is None else targets
    assert row["tokens"].tolist() == [2, 9, 3, 0, 0, 0][:count] + [0] * (6 - count)
    assert row["targets"].tolist() == [9, 3, 3, 0, 0, 0][:count] + [0] * (6 - count)
    assert row["weights"].sum() == count
