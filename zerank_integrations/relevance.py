"""Logit and relevance, and the way between them.

The checkpoints answer one logit per (query, document). Its relevance is sigmoid(logit / 5), as on the model cards:
the training targets were sharper than a plain sigmoid can express without saturating.
"""

import math

TEMPERATURE = 5.0


def relevance_of(logit: float) -> float:
    """The relevance in [0, 1] of a logit: sigmoid(logit / 5)."""
    x = logit / TEMPERATURE
    # exp() of a large positive number overflows, so each sign has the form that cannot.
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x))


def logit_of(relevance: float) -> float | None:
    """The logit of a relevance: 5 · ln(p / (1 - p)). None at 0 and 1, where rounding has lost it.

    Raises:
        ValueError: the relevance lies outside [0, 1].
    """
    if not 0.0 <= relevance <= 1.0:
        msg = f"relevance is {relevance}; expected a number in [0, 1]"
        raise ValueError(msg)
    if relevance in (0.0, 1.0):
        return None
    return TEMPERATURE * (math.log(relevance) - math.log1p(-relevance))
