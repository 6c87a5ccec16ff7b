"""The two links between a difference of ratings (logit units) and a probability.

They are close to each other: .5 (1 + erf(x / 2.4)) stays within .02 of the logistic function, so ratings, the prior and
position effects keep their units whichever is chosen.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np
from numpy.typing import NDArray
from scipy.special import erf, expit

Floats = NDArray[np.float64]

# The width that brings the error function next to the logistic one.
WIDTH = 2.4


class Link(StrEnum):
    """F in P(i beats j) = F(e_i - e_j).

    LOGISTIC is Bradley-Terry, F(x) = 1 / (1 + exp(-x)); ERF is Thurstone, F(x) = (1 + erf(x / 2.4)) / 2, the link of the
    paper's final run.
    """

    LOGISTIC = "logistic"
    ERF = "erf"

    def probability(self, x: Floats) -> Floats:
        """F(x)."""
        return expit(x) if self is Link.LOGISTIC else (1 + erf(x / WIDTH)) / 2

    def density(self, x: Floats) -> Floats:
        """F'(x)."""
        if self is Link.LOGISTIC:
            return expit(x) * expit(-x)
        return np.exp(-((x / WIDTH) ** 2)) / (WIDTH * np.sqrt(np.pi))

    def bend(self, x: Floats) -> Floats:
        """F''(x)."""
        return self.density(x) * (1 - 2 * expit(x) if self is Link.LOGISTIC else -2 * x / WIDTH**2)

    def attenuation(self, variance: Floats) -> Floats:
        """κ in E[F(x)] = F(κ·mean) for x ~ N(mean, variance): exact for ERF, close for LOGISTIC (MacKay 1992)."""
        return 1 / np.sqrt(1 + (np.pi * variance / 8 if self is Link.LOGISTIC else 2 * variance / WIDTH**2))
