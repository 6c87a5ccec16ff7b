"""What the circuit is told about each token of the vocabulary: its stem, how rare it is, and what it goes with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse
import scipy.sparse.linalg
import Stemmer
from tokenizer import CONTINUES
from tokenizers import Tokenizer

WINDOW = 8  # words to either side that count as company


@dataclass(frozen=True)
class Lexicon:
    """Arrays over the vocabulary.

    ``stem``: int, tokens with the same number count as the same word; ``rarity``: inverse document frequency scaled to
    [0, 1], 0 for what is no word; ``meaning``: unit vectors of co-occurrence, zero rows where there was too little text.
    """

    stem: np.ndarray
    rarity: np.ndarray
    meaning: np.ndarray


def read_lexicon(tokenizer: Tokenizer, corpora: Sequence[Sequence[str]], dimensions: int) -> Lexicon:
    """Count the corpora once.

    Document frequencies are shares of a corpus, averaged over the corpora, so that a large one does not decide alone.
    """
    stem, keys = _stems(tokenizer)
    encoded = [[np.array(e.ids) for e in tokenizer.encode_batch_fast(list(texts))] for texts in corpora]
    share = np.zeros(len(keys))
    for documents in encoded:
        seen = np.zeros(len(keys))
        for ids in documents:
            seen[np.unique(stem[ids])] += 1
        share += seen / len(documents) / len(encoded)
    fewest = 1 / max(sum(map(len, encoded)), 2)
    rarity = np.log(1 / (share + fewest)) / math.log(1 / fewest)
    rarity = np.clip((rarity - 0.12) / 0.75, 0, 1)
    for place, key in enumerate(keys):
        if not any(c.isalnum() for c in key):
            rarity[place] = 0
        elif key.startswith(CONTINUES):
            # A word of several pieces should not count once per piece.
            rarity[place] *= 0.5
    meaning = _meaning(encoded, stem, rarity, dimensions)
    return Lexicon(stem, rarity[stem], meaning[stem])


def _stems(tokenizer: Tokenizer) -> tuple[np.ndarray, list[str]]:
    stemmer = Stemmer.Stemmer("english")
    pieces = [tokenizer.id_to_token(i) or "" for i in range(tokenizer.get_vocab_size())]
    words = {piece for piece in pieces if piece.isalpha() and piece.isascii()}
    keys: dict[str, int] = {}
    stem = np.zeros(len(pieces), dtype=np.int64)
    for i, piece in enumerate(pieces):
        rest = piece.removeprefix(CONTINUES)
        if piece in words:
            key = stemmer.stemWord(piece)
        elif rest in words and len(rest) >= 4:
            # The end of a compound ("dictreader") is the word it ends with.
            key = stemmer.stemWord(rest)
        else:
            key = piece
        stem[i] = keys.setdefault(key, len(keys))
    return stem, list(keys)


def _meaning(encoded: list[list[np.ndarray]], stem: np.ndarray, rarity: np.ndarray, dimensions: int) -> np.ndarray:
    """Unit vectors per stem: the left singular vectors of positive pointwise mutual information within ``WINDOW``.

    Levy and Goldberg, Neural word embedding as implicit matrix factorization, 2014. The context counts are smoothed by
    the power ¾, and all directions count alike (power 0 of the singular values).
    """
    left, right, weight = [], [], []
    for documents in encoded:
        for ids in documents:
            words = stem[ids]
            words = words[rarity[words] > 0.08]
            for distance in range(1, min(WINDOW, len(words) - 1) + 1):
                left.append(words[:-distance])
                right.append(words[distance:])
                weight.append(np.full(len(words) - distance, distance**-0.5))
    shape = (len(rarity), len(rarity))
    counts = scipy.sparse.coo_matrix((np.concatenate(weight), (np.concatenate(left), np.concatenate(right))), shape)
    counts = counts.tocsr()
    counts = (counts + counts.T).tocoo()
    word = np.bincount(counts.row, counts.data, len(rarity))
    context = word**0.75
    context /= context.sum()
    information = np.log(counts.data / (word[counts.row] * context[counts.col]))
    positive = information > 0
    table = scipy.sparse.csr_matrix((information[positive], (counts.row[positive], counts.col[positive])), shape)
    found = min(dimensions, shape[0] - 2)
    u, s, _ = scipy.sparse.linalg.svds(table, k=found, random_state=np.random.default_rng(0), tol=1e-2)
    vectors = np.zeros((len(rarity), dimensions))
    vectors[:, :found] = u[:, np.argsort(-s)]
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.where(length > 1e-9, vectors / np.maximum(length, 1e-9), 0)
