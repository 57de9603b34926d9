import numpy as np

from jaxlm.data.hashing import bernoulli, hash64, permutation, random64


def test_random64_is_splitmix64():
    # The published generator, one step at a time, in Python's integers.
    mask = 2**64 - 1
    state, expected = hash64("key"), []
    for _ in range(5):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        expected.append(z ^ (z >> 31))
    assert random64("key", 0, 5).tolist() == expected
    assert random64("key", 3, 5).tolist() == expected[3:]


def test_orders_and_splits_stay_what_they_are():
    # A run that is continued with a newer jaxlm must find the same order and the same held-out documents.
    assert permutation("seed 0 source 0 epoch 0", 8).tolist() == [4, 0, 6, 5, 1, 2, 7, 3]
    assert np.flatnonzero(bernoulli("held out a.jsonl", 0, 100, 0.05)).tolist() == [25, 31, 34, 83, 87]


def test_permutation_is_one_and_depends_on_its_name():
    a, b = permutation("a", 1000), permutation("b", 1000)
    assert sorted(a.tolist()) == list(range(1000))
    assert not np.array_equal(a, b)
    assert abs(np.corrcoef(a, np.arange(1000))[0, 1]) < 0.1


def test_bernoulli_has_its_probability_and_edges():
    assert abs(bernoulli("x", 0, 200_000, 0.3).mean() - 0.3) < 0.005
    assert not bernoulli("x", 0, 1000, 0.0).any()
    np.testing.assert_array_equal(bernoulli("x", 0, 100, 0.3)[40:60], bernoulli("x", 40, 60, 0.3))
