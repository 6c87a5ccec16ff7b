"""Tokens and money: estimate before, count during, stop at the cap.

Amounts are integers in millionths of the currency, so that sums over a hundred million calls are exact. Before a question is
sent, the most it can cost is reserved on disk; afterwards what it did cost takes that place. A process that dies leaves its
reservations behind, and they stay counted, for nobody can say whether the provider counted them: a program that dies and
starts over for ever cannot pass the cap.

"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import ROUND_CEILING, Decimal
from typing import Protocol

from zelo_train.errors import CapReached

MILLION = 1_000_000


def millionths(amount: Decimal) -> int:
    """An amount in the currency's units as millionths, rounded up."""
    return int((amount * MILLION).to_integral_value(rounding=ROUND_CEILING))


def money(amount: int, currency: str = "") -> str:
    """Millionths as people write them: two digits, more where two would say nothing."""
    units = Decimal(amount) / MILLION
    digits = 2 if amount == 0 or abs(amount) >= 10_000 else 6
    return f"{units:,.{digits}f} {currency}".rstrip()


@dataclass(frozen=True, slots=True)
class Price:
    """What tokens cost, in millionths of the currency per million tokens.

    Attributes:
        tokens_in: read.
        tokens_out: written, reasoning included.
        tokens_cached: read from the provider's cache; None: as `tokens_in`.
    """

    tokens_in: int = 0
    tokens_out: int = 0
    tokens_cached: int | None = None

    @classmethod
    def per_million(cls, tokens_in: Decimal, tokens_out: Decimal, tokens_cached: Decimal | None = None) -> Price:
        """From currency units per million tokens, as price lists give them."""
        cached = None if tokens_cached is None else millionths(tokens_cached)
        return cls(millionths(tokens_in), millionths(tokens_out), cached)

    @property
    def free(self) -> bool:
        """Whether nothing costs anything."""
        return not (self.tokens_in or self.tokens_out or self.tokens_cached)

    def of(self, tokens_in: int, tokens_cached: int, tokens_out: int) -> int:
        """The cost of a call in millionths, rounded up.

        Args:
            tokens_in: all that were read.
            tokens_cached: those of them that came from the provider's cache.
            tokens_out: written.
        """
        cached = self.tokens_in if self.tokens_cached is None else self.tokens_cached
        scaled = (tokens_in - tokens_cached) * self.tokens_in + tokens_cached * cached + tokens_out * self.tokens_out
        return -(-scaled // MILLION)


class Ledger(Protocol):
    """Where money is written down so that it survives the process: the workspace's store."""

    def outlay(self) -> int:
        """All that was ever reserved or settled, in millionths."""
        ...

    def move(self, run: str, judge: str, reserved: int, settled: int) -> None:
        """Add to what a run has reserved and settled with a judge; on disk when it returns."""
        ...


class Budget:
    """What may still be spent. Safe to use from several threads; only one process at a time (the workspace's lock sees to it).

    Args:
        ledger: where it is written down.
        run: this run's name.
        cap: millionths that the whole workspace may cost, all runs together; None for no cap.
        currency: for messages.
    """

    def __init__(self, ledger: Ledger, run: str, cap: int | None = None, currency: str = "") -> None:
        self.run, self.cap, self.currency = run, cap, currency
        self._ledger = ledger
        self._outlay = ledger.outlay()
        self._tickets: dict[int, tuple[str, int]] = {}
        self._last = 0
        self._lock = threading.Lock()

    @property
    def outlay(self) -> int:
        """Spent and reserved by all runs so far, in millionths."""
        return self._outlay

    @property
    def left(self) -> int | None:
        """Millionths that may still be reserved; None without a cap."""
        return None if self.cap is None else max(0, self.cap - self._outlay)

    def reserve(self, judge: str, millionths: int) -> int:
        """Set aside the most that one try can cost, on disk before it is sent.

        Returns:
            A ticket for `settle`.

        Raises:
            CapReached: the cap does not allow it.
        """
        with self._lock:
            if self.cap is not None and self._outlay + millionths > self.cap:
                raise CapReached(
                    f"{money(self._outlay, self.currency)} of {money(self.cap, self.currency)} are spent or reserved, and the"
                    f" next question to {judge!r} may cost {money(millionths, self.currency)}. Every answer so far is kept:"
                    " raise judge.cap and run the same command again, or go on with what there is"
                )
            if millionths:
                self._ledger.move(self.run, judge, millionths, 0)
            self._outlay += millionths
            self._last += 1
            self._tickets[self._last] = (judge, millionths)
            return self._last

    def settle(self, ticket: int, millionths: int) -> None:
        """Put what was spent in the place of what was set aside.

        Raises:
            KeyError: the ticket is unknown, or was settled before.
        """
        with self._lock:
            judge, reserved = self._tickets.pop(ticket)
            if reserved or millionths:
                self._ledger.move(self.run, judge, -reserved, millionths)
            self._outlay += millionths - reserved


@dataclass(frozen=True, slots=True)
class Estimate:
    """What asking a judge will take, as far as can be told before.

    Attributes:
        judge: its name.
        calls: questions that have no answer yet.
        tokens_in: of all of them, likely.
        tokens_out: of all of them, likely.
        cost: in millionths.
        seconds: at its concurrency, if a call takes `latency` seconds.
    """

    judge: str
    calls: int
    tokens_in: int
    tokens_out: int
    cost: int
    seconds: float


def estimate(
    judge: str, calls: int, tokens_in: float, tokens_out: float, price: Price, concurrency: int, latency: float = 1.0
) -> Estimate:
    """What `calls` questions of so many tokens each will take.

    Args:
        judge: its name.
        calls: how many.
        tokens_in: read per call, on average.
        tokens_out: written per call, on average.
        price: of its tokens.
        concurrency: how many are under way at once.
        latency: seconds one call takes.
    """
    inward, outward = round(calls * tokens_in), round(calls * tokens_out)
    return Estimate(judge, calls, inward, outward, price.of(inward, 0, outward), calls * latency / concurrency)


def table(estimates: Iterable[Estimate], currency: str = "") -> list[str]:
    """Estimates as lines of text, with their sum when there are several."""
    rows = list(estimates)
    if len(rows) > 1:
        total = Estimate(
            "together",
            sum(row.calls for row in rows),
            sum(row.tokens_in for row in rows),
            sum(row.tokens_out for row in rows),
            sum(row.cost for row in rows),
            # Judges are asked side by side.
            max(row.seconds for row in rows),
        )
        rows.append(total)
    wide = max((len(row.judge) for row in rows), default=0)
    return [
        f"{row.judge:{wide}}  {row.calls:>12,} calls  {row.tokens_in + row.tokens_out:>15,} tokens"
        f"  {money(row.cost, currency):>14}  {duration(row.seconds):>9}"
        for row in rows
    ]


def duration(seconds: float) -> str:
    """A time as people say it: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
