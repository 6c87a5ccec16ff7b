"""One thread per model: it alone touches the device, shares each step between the calls that wait, and answers by futures."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from zerank_integrations.engine.gate import gate
from zerank_integrations.errors import Busy, DocumentTooLarge

if TYPE_CHECKING:
    from zerank_integrations.engine.forward import Batch, Forward
    from zerank_integrations.prompt import Prompt

# Seconds. An idle thread ends within microseconds. One in a step, which can take seconds on a CPU, is not waited for: closing
# may happen on an event loop.
PATIENCE = 0.02

# Calls that may wait at once. Beyond, a caller learns at once that it comes too late, rather than after minutes.
WAITING = 1_024

# What a budget that was halved for want of memory regains with each step that fits: doubled again after 23.
REGAIN = 1.03


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """Prompts waiting for logits.

    Attributes:
        prompts: what to score. Those that share prefix and document objects are scored once.
        token_budget: tokens of a step at most, in every step this request takes part in.
        advance: called on the worker's thread with the number of prompts a step has finished.
        future: where the logits arrive, in the order of the prompts. Cancelling it ends the work before the next step.
        deterministic: score each prompt in a step of its own, so that nothing else can move its last bits.
    """

    prompts: Sequence[Prompt]
    token_budget: int
    advance: Callable[[int], object] | None = None
    future: Future[list[float]] = field(default_factory=Future)
    deterministic: bool = False


class _Job:
    """A request under way: which of its prompts wait, and the logits so far."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.logits = [0.0] * len(request.prompts)
        self.left = len(request.prompts)
        copies: dict[tuple[int, int], list[int]] = {}
        for index, prompt in enumerate(request.prompts):
            copies.setdefault((id(prompt.prefix), id(prompt.document)), []).append(index)
        # Taken from the end, longest first: what does not fit into the memory shows at once.
        self.waiting = sorted(copies.values(), key=lambda indices: len(request.prompts[indices[0]]))

    @property
    def next(self) -> Prompt:
        return self.request.prompts[self.waiting[-1][0]]

    def finish(self, indices: list[int], logit: float) -> None:
        for index in indices:
            self.logits[index] = logit
        self.left -= len(indices)

    def succeed(self) -> None:
        if self._unanswered():
            self.request.future.set_result(self.logits)

    def fail(self, error: BaseException) -> None:
        if self._unanswered():
            self.request.future.set_exception(error)

    def _unanswered(self) -> bool:
        """Whether an answer may be set: the future is neither answered nor cancelled, and from now on cannot be cancelled."""
        return not self.request.future.done() and self.request.future.set_running_or_notify_cancel()


# Equal prompts of a job, by their indices: one document of a step.
_Item = tuple[_Job, list[int]]


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    """Documents to be scored together."""

    items: list[_Item]
    tokens: int
    packed: bool = True

    @property
    def prompts(self) -> list[Prompt]:
        return [job.request.prompts[indices[0]] for job, indices in self.items]

    @property
    def jobs(self) -> list[_Job]:
        return list(dict.fromkeys(job for job, _ in self.items))

    def split(self) -> Iterator[_Step]:
        """One step for each request."""
        for job in self.jobs:
            yield _Step([item for item in self.items if item[0] is job], self.tokens, self.packed)


class Worker:
    """The calls that wait and the thread that serves them. The thread starts with the first request.

    A step takes one document of each waiting request in turn until the token budget is full, and the next step begins with the
    next request: a large one delays a small one by a step, not by its whole length. Nothing waits for a step to fill.
    """

    def __init__(self, forward: Forward, waiting: int = WAITING) -> None:
        self._forward = forward
        self._limit = waiting
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread: threading.Thread | None = None
        # A step made ready while the device works on the one before.
        self._ahead: tuple[_Step, Batch | None] | None = None
        # Tokens of a step while memory is short, None while it is not; and how many were too many.
        self._ceiling: float | None = None
        self._too_many = 0

    def submit(self, request: Request) -> None:
        """Queue a request; its future answers.

        Raises:
            Busy: as many requests wait as may.
        """
        if not request.prompts:
            request.future.set_result([])
            return
        job = _Job(request)
        with self._changed:
            if len(self._jobs) >= self._limit:
                self._drop_ended()
            if len(self._jobs) >= self._limit:
                msg = (
                    f"{len(self._jobs)} calls wait for the model already; expected fewer than {self._limit}. Call again later, "
                    "send several queries in one rank_many, or serve more replicas"
                )
                raise Busy(msg)
            self._jobs.append(job)
            self._changed.notify()
            if self._thread is None:
                # A daemon, so that a step under way never keeps the interpreter from its exit handlers, which close us.
                self._thread = threading.Thread(target=self._run, name="zerank-worker", daemon=True)
                self._thread.start()
                _started.add(self)

    def close(self) -> None:
        """End the thread after the queued requests. An idle one has ended on return; one in a step is left to finish it."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self.join(PATIENCE)

    def abandon(self) -> None:
        """End the thread after its step; what waits is cancelled."""
        with self._changed:
            self._closing = True
            for job in self._jobs:
                job.request.future.cancel()
            self._changed.notify()

    def join(self, patience: float | None = None) -> None:
        """Wait for the thread to end, for so many seconds or as long as it takes."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(patience)

    def _run(self) -> None:
        while self._wait():
            self._turn()

    def _wait(self) -> bool:
        """Sleep until there is work; False when there will be none."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._closing)
            return bool(self._jobs)

    def _turn(self) -> None:
        """Serve one step. Its own frame: what it held, texts included, is let go before the thread waits for the next."""
        (step, batch), self._ahead = self._ahead or (self._plan(), None), None
        if step is not None:
            self._serve(step, batch)

    def _serve(self, step: _Step, batch: Batch | None = None) -> None:
        outcome = self._attempt(step, batch)
        if outcome is None:
            self._back_off(step)
        elif isinstance(outcome, list):
            self._deliver(step, outcome)
        elif len(step.jobs) == 1:
            step.jobs[0].fail(outcome)
        else:
            # Whose fault it was is found out by serving them apart; the others get their answers. The error's traceback holds
            # the tensors of the step: it goes first.
            del outcome
            for part in step.split():
                self._serve(part)

    def _attempt(self, step: _Step, batch: Batch | None) -> list[float] | BaseException | None:
        """The logits; or what was raised; or None if memory ran out, by which time everything of the step is free again."""
        try:
            with gate.step():
                running = self._forward.launch(batch or self._forward.prepare(step.prompts, packed=step.packed))
                if self._forward.asynchronous:
                    self._look_ahead()
                logits: list[float] = running.tolist()
                return logits
        except torch.OutOfMemoryError:
            # Its traceback holds every tensor of the step: nothing more is done inside this block.
            return None
        except BaseException as error:
            return error

    def _look_ahead(self) -> None:
        """Make the next step ready while the device works on this one."""
        step = self._plan()
        if step is not None:
            try:
                self._ahead = step, self._forward.prepare(step.prompts, packed=step.packed)
            except Exception:
                # It fails again in its own turn, and then only its own requests.
                self._ahead = step, None

    def _deliver(self, step: _Step, logits: list[float]) -> None:
        if self._ceiling is not None:
            self._ceiling *= REGAIN
            if self._ceiling >= self._too_many:
                self._ceiling = None
        for (job, indices), logit in zip(step.items, logits, strict=True):
            job.finish(indices, logit)
        for job in step.jobs:
            try:
                if job.request.advance is not None:
                    job.request.advance(sum(len(indices) for owner, indices in step.items if owner is job))
            except BaseException as error:
                job.fail(error)
            if not job.left:
                job.succeed()

    def _back_off(self, step: _Step) -> None:
        """After running out of memory: free what is cached, take half as much at once, and put the documents back."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(step.items) == 1:
            job, _ = step.items[0]
            msg = (
                f"a document of {len(step.prompts[0])} tokens (with query and template) does not fit into the memory that is "
                "left, even alone; expected a shorter one. Lower max_length, use max_passage_tokens=, or take a device with "
                "more memory"
            )
            job.fail(DocumentTooLarge(msg))
            return
        self._too_many, self._ceiling = step.tokens, step.tokens / 2
        for job, indices in reversed(step.items):
            job.waiting.append(indices)

    def _plan(self) -> _Step | None:
        """Take the documents of the next step from their requests, in turn."""
        with self._changed:
            self._drop_ended()
            if not self._jobs:
                return None
            in_turn = [job for job in self._jobs if job.waiting]
            self._jobs.rotate(-1)
        items: list[_Item] = []
        prefixes: set[int] = set()
        tokens, limit = 0, float("inf")
        while in_turn:
            for job in list(in_turn):
                prompt, request = job.next, job.request
                if request.deterministic:
                    if not items:
                        return _Step([(job, job.waiting.pop())], len(prompt), packed=False)
                    in_turn.remove(job)
                    continue
                shared = self._forward.packs(prompt) and id(prompt.prefix) in prefixes
                more = len(prompt) - (len(prompt.prefix) if shared else 0)
                bound = min(limit, request.token_budget, self._ceiling or limit)
                # A document above the budget goes alone.
                if items and tokens + more > bound:
                    in_turn.remove(job)
                    continue
                items.append((job, job.waiting.pop()))
                prefixes.add(id(prompt.prefix))
                tokens, limit = tokens + more, bound
                if not job.waiting:
                    in_turn.remove(job)
        return _Step(items, tokens) if items else None

    def _drop_ended(self) -> None:
        """Forget requests that are answered, failed or cancelled. The lock is held."""
        if any(job.request.future.done() for job in self._jobs):
            self._jobs = deque(job for job in self._jobs if not job.request.future.done())


_started: weakref.WeakSet[Worker] = weakref.WeakSet()


def _at_exit() -> None:
    """A thread inside a matrix product while the interpreter is torn down aborts the process, whoever closed it before."""
    workers = list(_started)
    for worker in workers:
        worker.abandon()
    for worker in workers:
        worker.join()


def _forget_in_child() -> None:
    # Their threads are the parent's.
    _started.clear()


atexit.register(_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
