"""Hashes that decide data order and splits: the same on every machine and with every version of anything."""

from __future__ import annotations

import hashlib

import numpy as np
from jaxtyping import Bool, Int, UInt64

_STEP = np.uint64(0x9E3779B97F4A7C15)


def hash64(text: str) -> int:
    """64-bit hash of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=8).digest(), "little")


def random64(key: str, start: int, stop: int) -> UInt64[np.ndarray, " n"]:
    """Elements start..stop-1 of the pseudo-random sequence named `key`.

    SplitMix64 (Steele, Lea and Flood, 2014, "Fast splittable pseudorandom number generators"), whose element i needs no
    other element.
    """
    x = np.arange(start + 1, stop + 1, dtype=np.uint64) * _STEP + np.uint64(hash64(key))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permutation(key: str, n: int) -> Int[np.ndarray, " n"]:
    """The permutation of 0..n-1 named `key`."""
    return np.argsort(random64(key, 0, n), kind="stable")


def bernoulli(key: str, start: int, stop: int, probability: float) -> Bool[np.ndarray, " n"]:
    """Elements start..stop-1 of the coin tosses named `key`: true with the given probability."""
    # 53 bits fit a float64 exactly.
    return (random64(key, start, stop) >> np.uint64(11)) < probability * 2.0**53
