"""Diagnostic tasks: small synthetic sequences that tell mixers apart by what they can recall and what they can track.

A generator is a pure function `(rng, count, size) -> Examples` of a numpy Generator; `size` is what grows when a model is
tested beyond its training (tokens, pairs or digits). The model reads `tokens` and is asked for `targets` where `mask` holds;
targets are aligned with the tokens that they are predicted at, not shifted.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jaxlm.schema import UserError, did_you_mean


class Examples(NamedTuple):
    """Sequences of one length; unused tokens at the end are 0 and unmasked.

    `accepted`, where a task has it, holds for every answer that counts as right beside the target itself.
    """

    tokens: Int[np.ndarray, "n T"]
    targets: Int[np.ndarray, "n T"]
    mask: Bool[np.ndarray, "n T"]
    accepted: Bool[np.ndarray, "n T vocab"] | None = None


class Task(NamedTuple):
    """A task with the sizes that its models are trained and tested on.

    generate: (rng, count, size) -> Examples.
    vocab: number of tokens, the largest that `generate` makes plus one.
    train: smallest and largest size in training.
    test: sizes to test on; the first is within training, the others beyond it.
    chance: accuracy of guessing among the answers that the task allows.
    effort: training steps it needs, relative to the others.
    """

    generate: Callable[[np.random.Generator, int, int], Examples]
    vocab: int
    train: tuple[int, int]
    test: tuple[int, ...]
    chance: float
    effort: float = 1.0


def running_parity(rng: np.random.Generator, count: int, size: int) -> Examples:
    """Bits; at every one, the parity of all so far."""
    return running_sum(rng, count, size, 2)


def running_sum(rng: np.random.Generator, count: int, size: int, modulus: int) -> Examples:
    """Numbers below the modulus; at every one, the sum of all so far modulo it (the word problem of a cyclic group)."""
    tokens = rng.integers(modulus, size=(count, size))
    return Examples(tokens, np.cumsum(tokens, axis=1) % modulus, np.ones_like(tokens, bool))


def permutations(n: int) -> Int[np.ndarray, "n! n"]:
    """The elements of S_n in lexicographic order."""
    return np.array(list(itertools.permutations(range(n))))


def word_problem(rng: np.random.Generator, count: int, size: int, n: int, *, swaps: bool = False) -> Examples:
    """Elements g_1, g_2, .. of the symmetric group S_n; at each, the product so far, numbered lexicographically.

    The product p q is the permutation i -> p[q[i]], and the prefix at t is g_1 g_2 .. g_t: the newest element is on the
    right (Merrill et al. 2024, arXiv 2404.08819). Tokens number the elements likewise; with `swaps` they number those that
    exchange two places or none, each of which one generalised Householder step of eigenvalue -1 can be (Grazzi et al. 2024,
    arXiv 2411.12537).
    """
    elements = permutations(n)
    letters = elements[(elements != np.arange(n)).sum(axis=1) <= 2] if swaps else elements
    # A permutation as a number in base n, to look its index up.
    place = n ** np.arange(n)
    index = np.full(n**n, -1)
    index[elements @ place] = np.arange(len(elements))
    tokens = rng.integers(len(letters), size=(count, size))
    targets = np.empty_like(tokens)
    product = np.tile(np.arange(n), (count, 1))
    for t in range(size):
        product = np.take_along_axis(product, letters[tokens[:, t]], axis=1)
        targets[:, t] = index[product @ place]
    return Examples(tokens, targets, np.ones_like(tokens, bool))


def cycle_navigation(rng: np.random.Generator, count: int, size: int, length: int = 5) -> Examples:
    """Steps 0, +1, -1 (tokens 0, 1, 2) on a cycle; at each, where one stands (Deletang et al. 2022, arXiv 2207.02098)."""
    tokens = rng.integers(3, size=(count, size))
    step = np.array([0, 1, -1])[tokens]
    return Examples(tokens, np.cumsum(step, axis=1) % length, np.ones_like(tokens, bool))


def copying(rng: np.random.Generator, count: int, size: int, symbols: int = 16) -> Examples:
    """`size` symbols (1 and up), a separator (0), and the symbols again: predict them from the separator on."""
    word = 1 + rng.integers(symbols, size=(count, size))
    separator = np.zeros((count, 1), word.dtype)
    tokens = np.concatenate([word, separator, word[:, :-1]], axis=1)
    targets = np.concatenate([np.zeros_like(word), word], axis=1)
    mask = np.zeros_like(tokens, bool)
    mask[:, size:] = True
    return Examples(tokens, targets, mask)


def selective_copying(rng: np.random.Generator, count: int, size: int, words: int = 8, symbols: int = 16) -> Examples:
    """`words` symbols (2 and up) scattered among `size` blanks (1), a separator (0), and the symbols again (Mamba, 4.1.1)."""
    if size < words:
        raise UserError(f"selective copying: {words} words do not fit into size={size}")
    word = 2 + rng.integers(symbols, size=(count, words))
    places = np.sort(np.argsort(rng.random((count, size)), axis=1)[:, :words], axis=1)
    line = np.ones((count, size), word.dtype)
    np.put_along_axis(line, places, word, axis=1)
    tokens = np.concatenate([line, np.zeros((count, 1), word.dtype), word[:, :-1]], axis=1)
    targets = np.concatenate([np.zeros_like(line), word], axis=1)
    mask = np.zeros_like(tokens, bool)
    mask[:, size:] = True
    return Examples(tokens, targets, mask)


def mqar(
    rng: np.random.Generator, count: int, size: int, *, tokens_a_pair: int = 8, vocab: int = 256, power: float = 0.01
) -> Examples:
    """Multi-query associative recall (Arora et al. 2023, arXiv 2312.04927) of `size` pairs.

    k_1 v_1 k_2 v_2 .., then every key once more in a slot of two tokens, its value asked for at the key; slot i from the end
    of the pairs is drawn with a weight of i^(power - 1), so that most queries come early. Keys are 1..vocab/2-1, values the
    upper half, the other tokens random. The row has `tokens_a_pair` tokens for every pair.
    """
    length, half = size * tokens_a_pair, vocab // 2
    if size > half - 1:
        raise UserError(f"mqar: {size} pairs need as many keys, but vocab={vocab} has {half - 1}; raise vocab")
    keys = 1 + np.argsort(rng.random((count, half - 1)), axis=1)[:, :size]
    values = half + rng.integers(half, size=(count, size))
    tokens = rng.integers(1, vocab, size=(count, length))
    tokens[:, 0 : 2 * size : 2], tokens[:, 1 : 2 * size : 2] = keys, values
    slots = (length - 2 * size) // 2
    # The largest of weight-scaled exponential races are a draw without replacement.
    weights = np.arange(1, slots + 1) ** (power - 1)
    chosen = np.argsort(rng.exponential(size=(count, slots)) / weights, axis=1)[:, :size]
    places = 2 * size + 2 * chosen
    np.put_along_axis(tokens, places, keys, axis=1)
    targets, mask = np.zeros_like(tokens), np.zeros_like(tokens, bool)
    np.put_along_axis(targets, places, values, axis=1)
    np.put_along_axis(mask, places, True, axis=1)
    return Examples(tokens, targets, mask)


def k_hop(rng: np.random.Generator, count: int, size: int, hops: int = 4, letters: int = 4) -> Examples:
    """k-hop induction (Sanford et al. 2024, arXiv 2402.09268): the first token says k, then `size` letters without repeats.

    One hop from position j goes to the letter after the last earlier occurrence of the letter at j; the target at each
    position is the letter k hops away, or `letters` if a hop finds nothing. Tokens: letters, then numbers of hops.
    """
    k = rng.integers(hops + 1, size=count)
    steps = rng.integers(1, letters, size=(count, size))
    steps[:, 0] = rng.integers(letters, size=count)
    word = np.cumsum(steps, axis=1) % letters
    # One hop from every position, -1 for none; the position -1 stays.
    last = np.full((count, letters), -1)
    hop = np.full((count, size + 1), -1)
    rows = np.arange(count)
    for j in range(size):
        before = last[rows, word[:, j]]
        hop[:, j] = np.where(before >= 0, before + 1, -1)
        last[rows, word[:, j]] = j
    place = np.tile(np.arange(size), (count, 1))
    for i in range(hops):
        place = np.where((i < k)[:, None], np.take_along_axis(hop, place, axis=1), place)
    found = np.take_along_axis(word, np.maximum(place, 0), axis=1)
    targets = np.where(place >= 0, found, letters)
    tokens = np.concatenate([letters + k[:, None], word], axis=1)
    targets = np.concatenate([np.zeros((count, 1), targets.dtype), targets], axis=1)
    mask = np.ones_like(tokens, bool)
    mask[:, 0] = False
    return Examples(tokens, targets, mask)


class Automaton(NamedTuple):
    """A deterministic automaton whose states all accept: `next[state, letter]`, -1 where the letter is not allowed."""

    next: Int[np.ndarray, "S L"]

    @property
    def allowed(self) -> Bool[np.ndarray, "S L"]:
        return self.next >= 0


STATES = 12


def random_automaton(rng: np.random.Generator, *, letters: int = 18, states: int = STATES, edges: int = 4) -> Automaton:
    """As RegBench draws them (Akyurek et al. 2024, arXiv 2401.12973): edges..states states, an alphabet of edges..letters
    letters, of each state 1..edges-1 edges with distinct letters to distinct other states. State 0 starts."""
    size = int(rng.integers(edges, states + 1))
    alphabet = rng.permutation(letters)[: rng.integers(edges, letters + 1)]
    table = np.full((size, letters), -1)
    for state in range(size):
        degree = int(rng.integers(1, edges))
        targets = rng.permutation(np.delete(np.arange(size), state))[:degree]
        table[state, rng.permutation(alphabet)[:degree]] = targets
    return Automaton(table)


def in_context_language(rng: np.random.Generator, count: int, size: int, letters: int = 18, word: int = 12) -> Examples:
    """In-context language learning: every row has an automaton of its own and `size` tokens of words that it accepts.

    Words of 1..`word` letters (tokens 1 and up) end with a separator (0). The target at each token is the next letter, and
    every letter that the automaton allows there is accepted. Targets at a word's last letter, whose next token is the
    separator, are not asked for.
    """
    tables = np.full((count, STATES, letters), -1)
    for table in tables:
        automaton = random_automaton(rng, letters=letters, states=STATES)
        table[: len(automaton.next)] = automaton.next
    tokens = np.zeros((count, size + 1), int)
    accepted = np.zeros((count, size + 1, letters + 1), bool)
    rows, state = np.arange(count), np.zeros(count, int)
    left = rng.integers(1, word + 1, size=count)
    for t in range(size + 1):
        edges = tables[rows, state]
        # The largest of random numbers is one of the allowed letters, each as likely.
        letter = np.argmax(rng.random(edges.shape) * (edges >= 0), axis=1)
        inside = left > 0
        tokens[:, t] = np.where(inside, 1 + letter, 0)
        accepted[:, t, 1:] = (edges >= 0) & inside[:, None]
        state = np.where(inside, edges[rows, letter], 0)
        left = np.where(inside, left - 1, rng.integers(1, word + 1, size=count))
    targets = tokens[:, 1:]
    return Examples(tokens[:, :-1], targets, targets != 0, accepted[:, 1:])


ARITHMETIC = "0123456789+=$\n ,.->[]ABCDEINPT:abcdefghijklmnopqrstuvwxyz<>/"
_CHARACTERS = {c: i + 1 for i, c in enumerate(dict.fromkeys(ARITHMETIC))}


def addition_text(a: int, b: int, style: str) -> tuple[str, str]:
    """The question and the answer of a + b, as texts (Lee et al. 2023, arXiv 2307.03381).

    plain: `128+367=495`; reverse: `128+367=594`, least significant digit first; simplified: the digit and carry of every
    column; detailed: a scratchpad with the operands that are left, the column's sum, and the answer so far.

    Raises:
      UserError: for another style.
    """
    total = str(a + b)
    if style == "plain":
        return f"${a}+{b}=", f"{total}$"
    if style == "reverse":
        return f"${a}+{b}=", f"{total[::-1]}$"
    question = f"Input:\n{a}+{b}\nTarget:\n"
    x, y = [int(c) for c in str(a)], [int(c) for c in str(b)]
    width = max(len(x), len(y))
    if style == "simplified":
        lines, carry = [], 0
        for i in range(width):
            column = (x[-1 - i] if i < len(x) else 0) + (y[-1 - i] if i < len(y) else 0) + carry
            digit, carry = column % 10, column // 10
            lines.append(f"A->{digit} , C->{carry}")
        return question, "\n".join(lines) + f".\n{total}\n"
    if style != "detailed":
        known = ("plain", "reverse", "simplified", "detailed")
        raise UserError(f"addition style {style!r} is not there{did_you_mean(style, known)}; choose one of {', '.join(known)}")

    def show(digits):
        return "[" + ",".join(map(str, digits)) + "]"

    lines = ["<scratch>", f"{show(x)} has {len(x)} digits.", f"{show(y)} has {len(y)} digits."]
    answer, carry = [], 0
    for i in range(width):
        left, right = x[: len(x) - i], y[: len(y) - i]
        p, r = (left[-1] if left else 0), (right[-1] if right else 0)
        column = p + r + carry
        head = f"{show(left)} + {show(right)} , A={show(answer)} , C={carry} , {p}+{r}+{carry}={column}"
        carry, answer = column // 10, [column % 10, *answer]
        lines.append(f"{head} , A->{answer[0]} , C->{carry}")
    lines.append(f"[] + [] , A={show(answer)} C={carry} , END")
    digits = [carry, *answer] if carry else answer
    return question, "\n".join([*lines, "</scratch>", " ".join(map(str, digits))]) + "\n"


def check_addition(question: str, answer: str, style: str) -> bool:
    """Whether a model's answer is right in every line: each is executed again."""
    body = question.split("\n")[1] if "\n" in question else question.strip("$=")
    a, b = (int(n) for n in body.split("+"))
    return addition_text(a, b, style)[1] == answer


def encode_text(text: str) -> list[int]:
    """Character tokens, 1 and up; 0 pads."""
    return [_CHARACTERS[c] for c in text]


def addition(rng: np.random.Generator, count: int, size: int, style: str = "reverse") -> Examples:
    """a + b of up to `size` digits (each number of digits alike) as characters; the answer is asked for, not the question."""
    texts = []
    for digits in rng.integers(1, size + 1, size=(count, 2)):
        a, b = (int(rng.integers(10 ** (d - 1) if d > 1 else 0, 10**d)) for d in digits)
        texts.append(addition_text(a, b, style))
    length = max(len(q) + len(s) for q, s in texts) - 1
    tokens, targets = np.zeros((count, length), int), np.zeros((count, length), int)
    mask = np.zeros((count, length), bool)
    for row, (question, answer) in enumerate(texts):
        ids = encode_text(question + answer)
        tokens[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
        mask[row, len(question) - 1 : len(ids) - 1] = True
    return Examples(tokens, targets, mask)


def _with(generate: Callable, **settings) -> Callable:
    def bound(rng: np.random.Generator, count: int, size: int) -> Examples:
        return generate(rng, count, size, **settings)

    return bound


# Sizes at which models of a hundred thousand parameters learn in minutes; beyond them is what they were not shown.
TASKS = {
    "parity": Task(running_parity, 2, (1, 24), (24, 64, 128), 0.5),
    "modular_addition": Task(_with(running_sum, modulus=5), 5, (1, 24), (24, 64, 128), 0.2),
    "cycle": Task(cycle_navigation, 5, (1, 24), (24, 64, 128), 0.2),
    "s3": Task(_with(word_problem, n=3), 6, (1, 24), (24, 64, 128), 1 / 6),
    "s5": Task(_with(word_problem, n=5), 120, (1, 24), (24, 64, 128), 1 / 120),
    # The state shows itself in a hundred and twenty answers: learnt late, and then whole.
    "s5_swaps": Task(_with(word_problem, n=5, swaps=True), 120, (1, 24), (24, 64, 128), 1 / 120, effort=3),
    "copying": Task(copying, 17, (1, 24), (24, 48), 1 / 16),
    "selective_copying": Task(selective_copying, 18, (32, 32), (32, 64), 1 / 16),
    # Attention finds recall late, and then at once; the fewer pairs, the earlier.
    "mqar_few": Task(_with(mqar, vocab=32), 32, (2, 4), (4, 8), 1 / 16, effort=4),
    "mqar": Task(_with(mqar, vocab=64), 64, (4, 16), (16, 24), 1 / 32, effort=3),
    # As many pairs as a head has key channels, or more: what a state of fixed size can hold shows here.
    "mqar_many": Task(_with(mqar, vocab=256, tokens_a_pair=4), 256, (8, 64), (64, 96), 1 / 128, effort=3),
    "k_hop": Task(k_hop, 9, (48, 48), (48, 96), 0.25),
    "in_context_language": Task(in_context_language, 19, (128, 128), (128, 256), 1 / 18),
    "addition_plain": Task(_with(addition, style="plain"), len(_CHARACTERS) + 1, (3, 3), (3, 4), 0.1),
    "addition_reverse": Task(_with(addition, style="reverse"), len(_CHARACTERS) + 1, (3, 3), (3, 4), 0.1),
    "addition_simplified": Task(_with(addition, style="simplified"), len(_CHARACTERS) + 1, (3, 3), (3, 4), 0.1),
    "addition_detailed": Task(_with(addition, style="detailed"), len(_CHARACTERS) + 1, (2, 2), (2, 3), 0.1),
}
