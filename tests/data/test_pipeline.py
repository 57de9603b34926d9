import itertools
from collections import Counter

import grain
import numpy as np
import pytest
from pydantic import ValidationError

from jaxlm.data import DataSettings, held_out_batches, load_corpus, load_tokenizer, train_batches
from jaxlm.data.pipeline import integer_weights, mixture_index
from jaxlm.data.sources import Split
from jaxlm.data.tokenize import tokenize_corpus
from jaxlm.schema import UserError
from tests.data.helpers import assert_same, pack_slowly, write_texts


def data(tmp_path, documents=40, **values):
    directory = tmp_path / "text"
    if not directory.exists():
        write_texts(directory, documents)
    settings = {"sources": [{"kind": "text", "paths": [str(directory)]}], "held_out_fraction": 0.2, **values}
    return DataSettings.model_validate(settings)


def train(settings, rows=range(4), batch_size=4, length=16, seed=0):
    tokenizer = load_tokenizer(settings.tokenizer)
    return train_batches(
        settings, tokenizer, batch_size=batch_size, sequence_length=length, seed=seed, rows=rows
    )  # fmt: skip


def held_out(settings, rows=range(4), batch_size=4, length=16, max_tokens=None):
    tokenizer = load_tokenizer(settings.tokenizer)
    return held_out_batches(
        settings, tokenizer, batch_size=batch_size, sequence_length=length, max_tokens=max_tokens, rows=rows
    )


def take(iterator, n):
    return list(itertools.islice(iterator, n))


def part_documents(settings, part):
    split = Split(part, settings.held_out_fraction)
    corpus = load_corpus(settings.sources[0], load_tokenizer(settings.tokenizer), where="x", split=split)
    return [corpus.read(i, 0, n).tolist() for i, n in enumerate(corpus.lengths)]


def test_a_batch_is_rows_of_the_stream(tmp_path):
    settings = data(tmp_path)
    documents = part_documents(settings, "train")
    total = sum(map(len, documents))
    batches = take(train(settings), 2 * total // 64 + 2)
    for batch in batches:
        assert {name: (x.shape, x.dtype.name) for name, x in batch.items()} == {
            "tokens": ((4, 16), "int32"),
            "targets": ((4, 16), "int32"),
            "segment_ids": ((4, 16), "int32"),
            "positions": ((4, 16), "int32"),
            "weights": ((4, 16), "float32"),
        }
    # Rows join to whole documents, every document once an epoch.
    stream = np.concatenate([batch["tokens"].ravel() for batch in batches]).tolist()
    starts = [i for i, token in enumerate(stream) if token == 256]
    found = [tuple(stream[a:b]) for a, b in itertools.pairwise(starts)]
    n = len(documents)
    for epoch in range(2):
        assert sorted(found[epoch * n : (epoch + 1) * n]) == sorted(map(tuple, documents))
    assert found[:n] != found[n : 2 * n]
    ordered = pack_slowly(found, 16, 8)
    for r in range(8):
        for name, values in ordered[r].items():
            assert batches[r // 4][name][r % 4].tolist() == values
    assert isinstance(train(settings), grain.DatasetIterator)


def test_the_seed_alone_decides(tmp_path):
    settings = data(tmp_path)
    a, b, other = take(train(settings), 30), take(train(settings), 30), take(train(settings, seed=1), 30)
    for x, y in zip(a, b, strict=True):
        assert_same(x, y)
    assert not np.array_equal(a[0]["tokens"], other[0]["tokens"])


@pytest.mark.parametrize("parts", [[range(2), range(2, 4)], [[0, 3], [1], [2]], [range(4), range(4)]])
def test_processes_together_make_the_global_batch(tmp_path, parts):
    settings = data(tmp_path)
    iterators = [train(settings, rows=rows) for rows in parts]
    for batch in take(train(settings), 25):
        for rows, iterator in zip(parts, iterators, strict=True):
            assert_same(next(iterator), {name: x[list(rows)] for name, x in batch.items()})
    states = [iterator.get_state() for iterator in iterators]
    assert states == [{"next_index": 25}] * len(parts)
    for whole in (held_out(settings), held_out(settings, max_tokens=100)):
        ours = [held_out(settings, rows=rows, max_tokens=whole.tokens) for rows in parts]
        assert {len(batches) for batches in ours} == {len(whole)}
        for i, batch in enumerate(whole):
            for rows, batches in zip(parts, ours, strict=True):
                assert_same(batches[i], {name: x[list(rows)] for name, x in batch.items()})


@pytest.mark.parametrize("prefetch", [0, 1, 7])
@pytest.mark.parametrize("kind", ["text", "array_record"])
def test_resume_is_bitwise(tmp_path, prefetch, kind):
    settings = data(tmp_path, prefetch=prefetch)
    if kind == "array_record":
        tokenize_corpus(settings.sources, settings.tokenizer, tmp_path / "tokens", shard_tokens=500)
        settings = data(tmp_path, prefetch=prefetch, sources=[{"kind": kind, "paths": [str(tmp_path / "tokens")]}])
    whole = take(train(settings), 60)  # several epochs
    for step in (1, 13, 47):
        iterator = train(settings)
        take(iterator, step)
        state = iterator.get_state()
        assert state == {"next_index": step}
        resumed = train(settings)
        take(resumed, 3)  # a used iterator too
        resumed.set_state(state)
        for expected in whole[step : step + 10]:
            assert_same(next(resumed), expected)
        # On another number of processes.
        part = train(settings, rows=range(1, 3))
        part.set_state(state)
        assert_same(next(part), {name: x[1:3] for name, x in whole[step].items()})
        assert_same(next(iterator), whole[step])


def test_prefetching_changes_nothing(tmp_path):
    a, b = train(data(tmp_path, prefetch=0)), train(data(tmp_path, prefetch=5))
    for _ in range(30):
        assert_same(next(a), next(b))


def test_mixtures_have_exactly_their_proportions(tmp_path):
    (tmp_path / "a").mkdir()
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 100)
    sources = [
        {"kind": "text", "paths": [str(tmp_path / f"{name}.txt")], "weight": weight}
        for name, weight in zip("abc", (0.1, 0.3, 0.6), strict=True)
    ]
    settings = DataSettings.model_validate({"sources": sources, "held_out_fraction": 0})
    batches = take(train(settings, rows=range(5), batch_size=5, length=10), 40)
    origin = [Counter(row.tolist()) for batch in batches for row in batch["tokens"]]
    letters = [max("abc", key=lambda name: found[ord(name)]) for found in origin]
    for start in range(0, 200, 10):
        assert Counter(letters[start : start + 10]) == {"a": 1, "b": 3, "c": 6}
    assert all(len({ord("a"), ord("b"), ord("c")} & set(found)) == 1 for found in origin)


@pytest.mark.parametrize("weights", [[1], [1, 1], [1, 2, 3], [5, 1, 1, 7], [100, 299], [3, 3, 1]])
def test_mixture_index_takes_every_element_once_evenly(weights):
    period = sum(weights)
    found = [mixture_index(k, weights) for k in range(3 * period)]
    for i, weight in enumerate(weights):
        assert [number for source, number in found if source == i] == list(range(3 * weight))
        # Evenly: never further from the exact share than there are sources.
        taken = np.cumsum([source == i for source, _ in found])
        share = np.arange(1, 3 * period + 1) * weight / period
        assert np.abs(taken - share).max() < len(weights)
    source, number = found[-1]
    large = 10**15
    assert mixture_index(large * period + len(found) - 1, weights) == (source, number + large * weights[source])


def test_integer_weights():
    assert integer_weights([0.1, 0.3]) == [1, 3]
    assert integer_weights([1.0]) == [1]
    assert integer_weights([4.0, 6.0]) == [2, 3]
    assert integer_weights([2.0, 4.0, 1e-3]) == [2000, 4000, 1]
    assert integer_weights([1 / 3, 1.0]) == [3333333333333333, 10000000000000000]


def test_held_out_rows_cover_the_held_out_text_once(tmp_path):
    settings = data(tmp_path)
    documents = part_documents(settings, "held_out")
    stream = [token for document in documents for token in document]
    batches = held_out(settings)
    assert len(batches) == -(-(len(stream) - 1) // 64)
    assert batches.tokens == len(stream) - 1
    rows = [{name: x[r] for name, x in batch.items()} for batch in batches for r in range(4)]
    targets = np.concatenate([row["targets"][row["weights"] == 1] for row in rows])
    assert targets.tolist() == stream[1:]
    tokens = np.concatenate([row["tokens"][row["segment_ids"] > 0] for row in rows])
    assert tokens.tolist() == stream[:-1]
    full = (len(stream) - 1) // 16
    for row, expected in zip(rows, pack_slowly(documents, 16, full), strict=False):
        for name, values in expected.items():
            assert row[name].tolist() == values
    assert (np.concatenate([row["weights"] for row in rows]) == 0).sum() == len(batches) * 64 - batches.tokens
    # It can be read again, and gives the same.
    for a, b in zip(batches, batches, strict=True):
        assert_same(a, b)
    with pytest.raises(IndexError):
        batches[len(batches)]


def test_held_out_text_may_be_shorter_than_a_row(tmp_path):
    (tmp_path / "other.txt").write_text("abc")
    settings = data(tmp_path, held_out=[{"kind": "text", "paths": [str(tmp_path / "other.txt")]}])
    [batch] = held_out(settings)
    assert batch["tokens"][0, :4].tolist() == [256, 97, 98, 0]
    assert batch["targets"][0, :4].tolist() == [97, 98, 99, 0]
    assert batch["weights"].sum() == 3
    assert batch["segment_ids"].sum() == 3


@pytest.mark.parametrize("max_tokens", [1, 16, 17, 100, 160, 10**9])
def test_max_tokens_is_kept_and_spread_over_the_text(tmp_path, max_tokens):
    # Random letters, so that no row is like another.
    letters = np.random.default_rng(0).integers(65, 91, 600, dtype=np.uint8)
    (tmp_path / "other.txt").write_bytes(letters.tobytes())
    settings = data(tmp_path, held_out=[{"kind": "text", "paths": [str(tmp_path / "other.txt")]}])
    everything = held_out(settings)
    rows = [tuple(row) for batch in everything for row in batch["tokens"]]
    batches = held_out(settings, max_tokens=max_tokens)
    expected = min(max_tokens, everything.tokens)
    assert sum(batch["weights"].sum() for batch in batches) == batches.tokens == expected
    taken = [tuple(row) for batch in batches for row in batch["tokens"]][: -(-expected // 16)]
    assert len(batches) == -(-len(taken) // 4)
    numbers = [rows.index(row) for row in taken[:-1]]
    assert numbers == sorted(set(numbers))
    if max_tokens == 160:
        assert numbers == [0, 3, 7, 11, 15, 19, 22, 26, 30]  # of 38 rows


def test_nothing_held_out_is_trained_on(tmp_path):
    settings = data(tmp_path)
    # Every document of the corpus has a number of its own in it.
    numbers = {}
    for part, batches in (("train", take(train(settings), 60)), ("held_out", held_out(settings))):
        stream = bytes(int(t) for batch in batches for t in batch["tokens"].ravel() if t < 256).decode()
        numbers[part] = {n.strip("<>") for n in stream.split("><") if n.strip("<>").isdigit()}
    assert len(numbers["train"] | numbers["held_out"]) >= 40
    assert len(numbers["held_out"]) >= 4
    assert not numbers["train"] & {d for d in numbers["held_out"] if len(d) == 2}


def test_a_file_of_both_sides_is_refused(tmp_path):
    settings = data(tmp_path)
    text = settings.sources[0]
    one = {"kind": "text", "paths": [str(tmp_path / "text" / "0007.txt")]}
    with pytest.raises(UserError, match=r"data\.sources\.0 and data\.held_out\.0 both read .*0007\.txt"):
        train(data(tmp_path, held_out=[one]))
    (tmp_path / "text" / "deep").mkdir()
    (tmp_path / "text" / "deep" / "x.txt").write_text("<1000>" * 9)
    one = {"kind": "text", "paths": [str(tmp_path / "text" / "deep" / "x.txt")]}
    with pytest.raises(
        UserError, match=r"data\.sources\.0 and data\.sources\.1 both read .*named deep/x\.txt and x\.txt"
    ):
        train(data(tmp_path, sources=[text, one]))
    # The same name is on the same side, and without a split there are no sides.
    batch = next(train(data(tmp_path, sources=[text, text])))
    assert not np.array_equal(batch["tokens"][0], batch["tokens"][1])  # each source has an order of its own
    next(train(data(tmp_path, sources=[text, one], held_out_fraction=0)))


def test_separate_held_out_sources_are_read_whole(tmp_path):
    write_texts(tmp_path / "other", 10)
    settings = data(tmp_path, held_out=[{"kind": "text", "paths": [str(tmp_path / "other")]}])
    size = sum(len(path.read_bytes()) + 1 for path in (tmp_path / "other").iterdir())
    assert held_out(settings).tokens == size - 1
    documents = part_documents(settings, "all")
    stream = np.concatenate(
        [batch["tokens"].ravel() for batch in take(train(settings), 1 + sum(map(len, documents)) // 64)]
    )
    assert (stream[: sum(map(len, documents))] == 256).sum() == len(documents)


def test_bad_corpora_are_named(tmp_path):
    with pytest.raises(
        UserError, match=r"data\.sequence_length=100000 is longer than the corpus data\.sources\.0 \(text\), .* tokens"
    ):
        train(data(tmp_path), length=100_000)
    (tmp_path / "one.txt").write_text("one document only")
    (tmp_path / "empty.txt").write_text("")
    one = {"kind": "text", "paths": [str(tmp_path / "one.txt")]}
    settings = data(tmp_path, sources=[one], held_out_fraction=0.01)
    next(train(settings))
    with pytest.raises(UserError, match=r"held-out split is empty: data\.held_out_fraction=0\.01 .* data\.held_out"):
        held_out(settings)
    with pytest.raises(UserError, match=r"held-out split is empty: data\.held_out_fraction=0\.0 "):
        held_out(data(tmp_path, held_out_fraction=0))
    with pytest.raises(UserError, match=r"data\.sources\.0 \(text\): empty corpus: no document holds any text besides"):
        train(data(tmp_path, sources=[one], held_out_fraction=0.999))
    empty = {"kind": "text", "paths": [str(tmp_path / "empty.txt")]}
    with pytest.raises(UserError, match=r"data\.sources\.0 \(text\): empty corpus: no document holds any text"):
        train(data(tmp_path, sources=[empty]))
    with pytest.raises(UserError, match=r"data\.held_out\.0 \(text\): empty corpus"):
        held_out(data(tmp_path, held_out=[empty]))
    with pytest.raises(UserError, match=r"data\.sources\.1\.paths: nowhere"):
        train(data(tmp_path, sources=[one, {"kind": "text", "paths": ["nowhere"]}]))


def test_settings_name_what_is_wrong_and_say_what_they_mean():
    for values, match in (
        ({"sources": []}, "sources"),
        ({"sources": [{"kind": "python_stdlib", "weight": 0}]}, r"sources\.0\.python_stdlib\.weight"),
        ({"sources": [{"kind": "python_stdlib"}], "held_out_fraction": 1}, "held_out_fraction"),
        ({"sources": [{"kind": "python_stdlib"}], "sequence_length": 0}, "sequence_length"),
        ({"sources": [{"kind": "python_stdlib"}], "batch_size": 0}, "batch_size"),
        ({"sources": [{"kind": "python_stdlib"}], "held_out": []}, "held_out"),
        ({"sources": [{"kind": "python_stdlib"}], "tokenizer": {"kind": "words"}}, "kind 'words' .known: bytes, json"),
    ):
        with pytest.raises(ValidationError, match=match):
            DataSettings.model_validate(values)
    schema = DataSettings.model_json_schema()
    for settings in (schema, *schema["$defs"].values()):
        for name, field in settings["properties"].items():
            assert name == "kind" or field.get("description"), (settings["title"], name)
    settings = DataSettings.model_validate({"sources": [{"kind": "python_stdlib"}]})
    assert DataSettings.model_validate(settings.model_dump(mode="json")) == settings
    assert hash(settings) == hash(settings.model_copy())
