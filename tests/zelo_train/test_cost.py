"""Money: exact, reserved before it is spent, and never past the cap."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zelo_train.cost import Budget, Price, duration, estimate, millionths, money, table
from zelo_train.errors import CapReached
from zelo_train.store import Store

counts = st.integers(0, 10**7)


@given(tokens_in=counts, cached=counts, out=counts, price=st.integers(0, 10**9))
def test_price_is_rounded_up_once(tokens_in: int, cached: int, out: int, price: int) -> None:
    cached = min(cached, tokens_in)
    cost = Price(price, 2 * price, price // 2).of(tokens_in, cached, out)
    exact = Decimal((tokens_in - cached) * price + cached * (price // 2) + out * 2 * price) / 10**6
    assert cost - 1 < exact <= cost


def test_prices_per_million() -> None:
    price = Price.per_million(Decimal("0.15"), Decimal("0.60"))
    assert price.of(1_000_000, 0, 0) == 150_000
    assert price.of(0, 0, 1_000_000) == 600_000
    # Without a price of their own, cached tokens cost what others do.
    assert price.of(100, 40, 0) == price.of(100, 0, 0) == 15
    assert Price().free
    assert not price.free


def test_words() -> None:
    assert millionths(Decimal("0.0000001")) == 1
    assert [money(0), money(7, "USD"), money(1_234_567_890, "EUR")] == ["0.00", "0.000007 USD", "1,234.57 EUR"]
    assert [duration(40), duration(720), duration(12_600)] == ["40 s", "12 min", "3.5 h"]
    rows = table([estimate("a", 10, 100, 1, Price(10**6), 2), estimate("b", 20, 100, 1, Price(), 2)], "USD")
    assert len(rows) == 3
    assert "30 calls" in rows[-1]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "answers.db", write=True)


def test_the_cap_holds_for_reservations(store: Store) -> None:
    budget = Budget(store, "run", cap=100, currency="USD")
    first, second = budget.reserve("a", 40), budget.reserve("a", 40)
    with pytest.raises(CapReached, match=r"0\.000080 USD of 0\.000100 USD"):
        budget.reserve("a", 40)
    budget.settle(first, 10)
    third = budget.reserve("b", 40)
    budget.settle(second, 40)
    budget.settle(third, 0)
    assert budget.outlay == 50
    assert budget.left == 50
    assert [(one.judge, one.reserved, one.settled) for one in store.spent()] == [("a", 0, 50), ("b", 0, 0)]
    with pytest.raises(KeyError):
        budget.settle(first, 10)


def test_a_crash_loop_cannot_pass_the_cap(store: Store) -> None:
    """Each run dies between reserving and settling, and starts over."""
    sent = 0
    for run in range(100):
        budget = Budget(store, f"run {run}", cap=100)
        try:
            budget.reserve("a", 30)
        except CapReached:
            break
        sent += 30
    assert sent == 90
    assert store.outlay() == 90


def test_what_costs_nothing_is_not_written(store: Store) -> None:
    budget = Budget(store, "run", cap=0)
    budget.settle(budget.reserve("free", 0), 0)
    assert store.spent() == []


@given(st.lists(st.tuples(st.integers(0, 50), st.floats(0, 1)), max_size=40))
def test_spent_and_reserved_never_exceed_the_cap(calls: list[tuple[int, float]]) -> None:
    class Book:
        total = 0

        def outlay(self) -> int:
            return self.total

        def move(self, run: str, judge: str, reserved: int, settled: int) -> None:
            self.total += reserved + settled
            assert 0 <= self.total <= 200

    book = Book()
    budget = Budget(book, "run", cap=200)
    open_tickets = []
    for worst, share in calls:
        try:
            open_tickets.append((budget.reserve("a", worst), int(worst * share)))
        except CapReached:
            assert book.total + worst > 200
        if len(open_tickets) > 3:
            budget.settle(*open_tickets.pop(0))
        assert budget.outlay == book.total
