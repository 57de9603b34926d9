"""Diagnostic tasks against definitions written out."""

import itertools

import numpy as np
import pytest

from jaxlm.data import tasks
from jaxlm.data.tasks import TASKS
from jaxlm.schema import UserError


def make(name, count=20, size=None, seed=0):
    task = TASKS[name]
    return task.generate(np.random.default_rng(seed), count, size or task.test[0])


@pytest.mark.parametrize("name", TASKS)
def test_examples_fit_the_task_and_follow_from_the_seed(name):
    task = TASKS[name]
    for size in task.test:
        tokens, targets, mask, accepted = make(name, size=size)
        assert tokens.shape == targets.shape == mask.shape
        assert tokens.min() >= 0
        assert max(tokens.max(), targets.max()) < task.vocab
        assert mask.any(axis=1).all()
        assert accepted is None or accepted.shape == (*tokens.shape, task.vocab)
    again, other = make(name, size=size), make(name, size=size, seed=1)
    assert all(np.array_equal(x, y) for x, y in zip((tokens, targets, mask), again[:3], strict=True))
    assert not np.array_equal(tokens[:, :8], other.tokens[:, :8])


def test_running_sums():
    tokens, targets, *_ = make("modular_addition")
    assert [sum(tokens[3, : t + 1]) % 5 for t in range(24)] == list(targets[3])
    assert set(np.unique(tokens)) == set(range(5))
    tokens, targets, *_ = make("parity")
    assert [np.bitwise_xor.reduce(tokens[1, : t + 1]) for t in range(24)] == list(targets[1])


def test_word_problem_multiplies_on_the_right():
    elements = [tuple(p) for p in tasks.permutations(3)]
    assert elements[0] == (0, 1, 2)
    tokens, targets, *_ = make("s3")
    for row in range(5):
        product = (0, 1, 2)
        for token, target in zip(tokens[row], targets[row], strict=True):
            product = tuple(product[i] for i in elements[token])
            assert elements[target] == product
    # S_3 does not commute, so the order matters.
    tokens, targets, *_ = make("s5")
    assert len(np.unique(targets)) > 115


def test_word_problem_of_swaps_exchanges_two_places_or_none():
    elements = list(itertools.permutations(range(5)))
    moved = [sum(i != x for i, x in enumerate(p)) for p in elements]
    swaps = [p for p, n in zip(elements, moved, strict=True) if n <= 2]
    tokens, targets, *_ = make("s5_swaps")
    assert len(swaps) == 11 == len(np.unique(tokens))
    for row in range(5):
        product = (0, 1, 2, 3, 4)
        for token, target in zip(tokens[row], targets[row], strict=True):
            product = tuple(product[i] for i in swaps[token])
            assert elements[target] == product


def test_cycle():
    tokens, targets, *_ = make("cycle")
    place = 0
    for token, target in zip(tokens[0], targets[0], strict=True):
        place = (place + {0: 0, 1: 1, 2: -1}[token]) % 5
        assert target == place


def test_copying():
    tokens, targets, mask, _ = make("copying", size=6)
    word = tokens[0, :6]
    np.testing.assert_array_equal(tokens[0], [*word, 0, *word[:-1]])
    np.testing.assert_array_equal(targets[0][mask[0]], word)
    assert mask[0].tolist() == [False] * 6 + [True] * 6
    tokens, targets, mask, _ = make("selective_copying", size=20)
    np.testing.assert_array_equal(targets[2][mask[2]], [t for t in tokens[2, :20] if t != 1])
    assert mask.sum() == 20 * 8
    with pytest.raises(UserError, match="8 words do not fit into size=5"):
        make("selective_copying", size=5)


def test_mqar_asks_for_the_value_of_every_key_once():
    tokens, targets, mask, _ = make("mqar", count=200, size=8)
    for row in range(10):
        pairs = dict(zip(tokens[row, 0:16:2], tokens[row, 1:16:2], strict=True))
        assert len(pairs) == 8
        assert max(pairs) < 32 <= min(pairs.values())
        asked = np.flatnonzero(mask[row])
        assert sorted(tokens[row, asked]) == sorted(pairs)
        assert all(targets[row, t] == pairs[tokens[row, t]] for t in asked)
        assert all(t >= 16 and t % 2 == 0 for t in asked)
    # Slots near the pairs are the likeliest.
    assert mask[:, 16].mean() > 2 * mask[:, 62].mean()
    with pytest.raises(UserError, match="200 pairs need as many keys, but vocab=64 has 31"):
        make("mqar", size=200)


def test_k_hop():
    tokens, targets, mask, _ = make("k_hop", count=100, size=30)
    assert set(tokens[:, 0]) == {4, 5, 6, 7, 8}
    for row in range(100):
        word = tokens[row, 1:]
        assert (word[1:] != word[:-1]).all()
        for i in range(30):
            j = i
            for _ in range(tokens[row, 0] - 4):
                earlier = [p for p in range(j) if word[p] == word[j]] if j is not None else []
                j = earlier[-1] + 1 if earlier else None
            assert targets[row, 1 + i] == (4 if j is None else word[j])
    assert not mask[:, 0].any()


def test_words_of_a_language_are_accepted_by_its_automaton():
    rng = np.random.default_rng(0)
    automaton = tasks.random_automaton(rng)
    assert (automaton.allowed.sum(axis=1) >= 1).all()
    assert all(automaton.next[s, letter] != s for s, letter in zip(*np.nonzero(automaton.allowed), strict=True))
    tokens, targets, mask, accepted = make("in_context_language", count=8)
    assert np.take_along_axis(accepted, targets[..., None], axis=-1)[..., 0][mask].all()
    assert {1, 2, 3} == set(accepted.sum(axis=-1)[mask])
    np.testing.assert_array_equal(tokens[:, 1:], targets[:, :-1])
    np.testing.assert_array_equal(mask, targets != 0)
    # The automaton is deterministic: after one beginning of a word, the same letters lead on in every word of the row.
    for row in tokens:
        words = [w for w in "".join(chr(97 + t) if t else " " for t in row).split(" ") if w]
        after = {}
        for word in words:
            for i, letter in enumerate(word):
                after.setdefault(word[:i], set()).add(letter)
        assert len(after[""]) <= 3
        assert len(words) > 4


@pytest.mark.parametrize(
    ("style", "question", "answer"),
    [
        ("plain", "$128+367=", "495$"),
        ("reverse", "$128+367=", "594$"),
        ("simplified", "Input:\n128+367\nTarget:\n", "A->5 , C->1\nA->9 , C->0\nA->4 , C->0.\n495\n"),
        (
            "detailed",
            "Input:\n128+367\nTarget:\n",
            "<scratch>\n[1,2,8] has 3 digits.\n[3,6,7] has 3 digits.\n"
            "[1,2,8] + [3,6,7] , A=[] , C=0 , 8+7+0=15 , A->5 , C->1\n"
            "[1,2] + [3,6] , A=[5] , C=1 , 2+6+1=9 , A->9 , C->0\n"
            "[1] + [3] , A=[9,5] , C=0 , 1+3+0=4 , A->4 , C->0\n"
            "[] + [] , A=[4,9,5] C=0 , END\n</scratch>\n4 9 5\n",
        ),
    ],
)
def test_addition_formats_are_the_published_ones(style, question, answer):
    assert tasks.addition_text(128, 367, style) == (question, answer)
    assert tasks.check_addition(question, answer, style)
    assert not tasks.check_addition(question, answer.replace("9", "8", 1), style)


def test_addition_carries_into_a_new_digit_and_takes_operands_of_different_lengths():
    assert tasks.addition_text(99, 1, "simplified")[1] == "A->0 , C->1\nA->0 , C->1.\n100\n"
    assert tasks.addition_text(99, 1, "detailed")[1].endswith("[] + [] , A=[0,0] C=1 , END\n</scratch>\n1 0 0\n")
    with pytest.raises(UserError, match="'plan' is not there; did you mean 'plain'"):
        tasks.addition_text(1, 2, "plan")


def test_addition_asks_for_the_answer_alone():
    tokens, targets, mask, _ = make("addition_reverse", count=50)
    text = {i: c for c, i in tasks._CHARACTERS.items()}
    for row in range(50):
        line = "".join(text[t] for t in tokens[row] if t)
        question, _, shown = line.partition("=")
        answer = "".join(text[t] for t in targets[row][mask[row]])
        a, b = question.strip("$").split("+")
        assert answer == str(int(a) + int(b))[::-1] + "$"
        assert shown == answer[:-1]
