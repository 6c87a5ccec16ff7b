"""Judges whose errors are known: a model of how a judge of stated quality would answer.

    x = a (s_l + t_l − s_r − t_r) + b + N(0, noise²)         s the truth, t ~ N(0, taste²) what this judge likes in a document
    P = F(x),  with probability ε turned round to 1 − P      F logistic

A SOFT judge says P; a VOTE judge says 1 with probability P, else 0. Everything is drawn by (seed, judge, query, documents), so
an answer depends neither on when it is asked nor on what else is. Such judges support claims about estimators under stated
noise, never about LLM judges.
"""

# Formulas are written as the paper writes them.
# ruff: noqa: RUF002

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from zelo_train import chance
from zelo_train.records import Form

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class NoisyJudge:
    """A simulated judge.

    Attributes:
        name: part of the key of everything drawn.
        discrimination: a.
        position: b, added when a document is shown first, in logit units.
        flip: ε.
        taste: standard deviation of t, in the truth's units; the same document is always liked the same.
        noise: standard deviation of what one question adds; the other order is another question.
        form: SOFT or VOTE.
    """

    name: str
    discrimination: float = 1.0
    position: float = 0.0
    flip: float = 0.0
    taste: float = 0.0
    noise: float = 0.0
    form: Form = Form.VOTE

    def compare(self, seed: int, left: chance.Keys, right: chance.Keys, left_truth: Floats, right_truth: Floats) -> Floats:
        """P(left more relevant) as this judge answers; left is shown first.

        Args:
            seed: of the simulation.
            left: keys of (query, document), see `document_keys`; any shape.
            right: likewise.
            left_truth: s of the left documents, same shape.
            right_truth: s of the right ones.
        """
        x = self._liked(seed, left, left_truth) - self._liked(seed, right, right_truth)
        question = chance.mix(self._key(seed, "compare"), left, right)
        x = self.discrimination * x + self.position + self.noise * chance.normal(chance.mix(question, 1))
        p = expit(x)
        p = np.where(chance.uniform(chance.mix(question, 2)) < self.flip, 1 - p, p)
        if self.form is Form.SOFT:
            return p
        return (chance.uniform(chance.mix(question, 3)) < p).astype(np.float64)

    def order(self, seed: int, documents: chance.Keys, truth: Floats) -> tuple[int, ...]:
        """Places from best to worst as this judge orders a list (Plackett-Luce); turned round with probability ε.

        Args:
            seed: of the simulation.
            documents: (k) keys of (query, document), in the order shown.
            truth: (k) s.
        """
        question = chance.mix(self._key(seed, "order"), chance.key(*documents.tolist()))
        draw = chance.uniform(chance.mix(question, documents))
        # The order of x + Gumbel noise is Plackett-Luce's, whose pairs are logistic.
        x = self.discrimination * self._liked(seed, documents, truth) - np.log(-np.log(draw))
        x = x + self.noise * chance.normal(chance.mix(question, documents, 1))
        places = np.argsort(-x, kind="stable")
        turned = chance.uniform(chance.mix(question, 2)) < self.flip
        return tuple(places[::-1].tolist() if turned else places.tolist())

    def grade(self, seed: int, document: chance.Keys, truth: Floats, *, zero: float, width: float, noise: float) -> Floats:
        """A grade from 0 to 10: 10·σ((s + t − zero)/width + N(0, noise²)), whole for a VOTE judge.

        Args:
            seed: of the simulation.
            document: keys of (query, document).
            truth: s.
            zero: the truth that this judge grades 5.
            width: how slowly grades rise with s.
            noise: standard deviation of what one question adds, in units of the logit of a grade.
        """
        x = (self._liked(seed, document, truth) - zero) / width
        draw = chance.normal(chance.mix(self._key(seed, "grade"), document))
        grade = 10 * expit(x + noise * draw)
        return np.round(grade) if self.form is Form.VOTE else grade

    def with_accuracy(self, accuracy: float, differences: Floats) -> NoisyJudge:
        """The same judge as sharp as needed to answer this share of pairs as the truth does.

        Args:
            accuracy: .7, .8, .9, .97 …: over votes on `differences`, with taste, noise and flips.
            differences: s_i − s_j of the pairs that will be asked.

        Raises:
            ValueError: taste, noise and flips alone keep the judge below that.
        """
        differences = np.abs(differences[differences != 0])
        draw = np.random.default_rng(0)
        taste = self.taste * np.sqrt(2) * draw.normal(size=differences.shape)
        noise = self.noise * draw.normal(size=differences.shape)

        def share(log_a: float) -> float:
            right = float(np.mean(expit(np.exp(log_a) * (differences + taste) + noise)))
            return self.flip + (1 - 2 * self.flip) * right

        low, high = -6.0, 6.0
        if not share(low) < accuracy < share(high):
            raise ValueError(
                f"accuracy {accuracy}: this judge's taste, noise and flips allow between {share(low):.2f} and {share(high):.2f}"
            )
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if share(middle) < accuracy else (low, middle)
        return replace(self, discrimination=float(np.exp(low)))

    def _key(self, seed: int, kind: str) -> int:
        return chance.key(seed, self.name, kind)

    def _liked(self, seed: int, document: chance.Keys, truth: Floats) -> Floats:
        if not self.taste:
            return truth
        return truth + self.taste * chance.normal(chance.mix(self._key(seed, "taste"), document))


def document_keys(query: str, documents: list[str] | tuple[str, ...]) -> chance.Keys:
    """(n) a key for each document of a query."""
    own = np.array([chance.key(document) for document in documents], np.uint64)
    return chance.mix(chance.key(query), own)


def truth_from_qrels(grades: Floats, scores: Floats, keys: chance.Keys, seed: int = 0) -> Floats:
    """What simulated judges of real texts go by: s = level(grade) + .5·z(score) + N(0, .4²).

    Args:
        grades: (n) a query's relevance grades, 0 where qrels say nothing.
        scores: (n) first-stage scores of the same documents; z is their standard score within the query.
        keys: (n) from `document_keys`.
        seed: of the simulation.

    Returns:
        (n) in logit units; grade 0 stands at 0, grade 1 at 2.5 and each further grade .8 higher.
    """
    level = np.where(grades > 0, 2.5 + 0.8 * (grades - 1), 0.0)
    deviation = scores.std()
    z = (scores - scores.mean()) / deviation if deviation > 0 else np.zeros_like(scores)
    return level + 0.5 * z + 0.4 * chance.normal(chance.mix(chance.key(seed, "truth"), keys))
