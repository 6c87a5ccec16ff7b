"""Chance as a function of names: whatever is drawn depends on a seed and on what it is drawn for, never on when.

A resumed run, another order of calls or one more judge therefore changes no draw. `key` turns words into 64 bits, `mix` folds
arrays of keys together, `uniform` and `normal` read a draw off a key.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

Keys = NDArray[np.uint64]
Floats = NDArray[np.float64]


def key(*words: object) -> int:
    """64 bits that stand for these words in this order."""
    digest = blake2b(digest_size=8)
    for word in words:
        text = str(word).encode()
        # The length in front keeps ("ab", "c") and ("a", "bc") apart.
        digest.update(len(text).to_bytes(8, "little") + text)
    return int.from_bytes(digest.digest(), "little")


def mix(*keys: Keys | int) -> Keys:
    """One key for each row of keys, order counting; arrays broadcast.

    Source of the mixing steps: splitmix64 (Steele, Lea and Flood 2014).
    """
    state: Any = np.uint64(0)
    with np.errstate(over="ignore"):
        for part in keys:
            state = (np.asarray(part, np.uint64) ^ state) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def uniform(keys: Keys) -> Floats:
    """Draws from (0, 1), one per key."""
    return ((keys >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53


def normal(keys: Keys) -> Floats:
    """Draws from N(0, 1), one per key."""
    return ndtri(uniform(keys))
