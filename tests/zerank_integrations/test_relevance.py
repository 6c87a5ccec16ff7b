import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zerank_integrations import logit_of, relevance_of


@given(st.floats(-100, 100))
def test_relevance_is_sigmoid_of_a_fifth(logit: float) -> None:
    assert math.isclose(relevance_of(logit), 1 / (1 + math.exp(-logit / 5)), rel_tol=1e-12)


@given(st.floats(-100, 100))
def test_logit_inverts_relevance(logit: float) -> None:
    assert math.isclose(logit_of(relevance_of(logit)), logit, rel_tol=1e-6, abs_tol=1e-9)


def test_extremes() -> None:
    assert relevance_of(1e6) == 1.0
    assert relevance_of(-1e6) == 0.0
    assert logit_of(0.0) is None
    assert logit_of(1.0) is None
    with pytest.raises(ValueError, match=r"1\.5"):
        logit_of(1.5)
