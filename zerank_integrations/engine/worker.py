"""One thread per model: it alone touches the device, and hands logits back through futures."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from zerank_integrations.engine.forward import Forward, steps
from zerank_integrations.engine.gate import gate

if TYPE_CHECKING:
    from zerank_integrations.prompt import Prompt

# A step on a CPU can take seconds. An idle thread ends within microseconds; a busy one is left to finish its step alone.
PATIENCE = 0.2


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """Prompts waiting for logits.

    Attributes:
        prompts: what to score.
        token_budget: tokens of a step at most.
        advance: called on the worker's thread with the number of prompts a step has finished.
        future: where the logits arrive, in the order of the prompts. Cancelling it ends the work before the next step.
    """

    prompts: Sequence[Prompt]
    token_budget: int
    advance: Callable[[int], object] | None = None
    future: Future[list[float]] = field(default_factory=Future)


class Worker:
    """A queue and the thread that empties it, first come first served. The thread starts with the first request."""

    def __init__(self, forward: Forward) -> None:
        self._forward = forward
        self._queue: queue.SimpleQueue[Request | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()

    def submit(self, request: Request) -> None:
        """Queue a request; its future answers."""
        self._queue.put(request)
        with self._starting:
            if self._thread is None:
                # A daemon, so that a step under way never keeps the interpreter from its exit handlers, which close us.
                self._thread = threading.Thread(target=self._run, name="zerank-worker", daemon=True)
                self._thread.start()

    def close(self, patience: float | None = PATIENCE) -> None:
        """End the thread after the queued requests, waiting up to `patience` seconds for it (None: as long as it takes)."""
        self._queue.put(None)
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(patience)

    def _run(self) -> None:
        while (request := self._queue.get()) is not None:
            self._serve(request)
            # Else the loop's variable keeps the last request's texts alive while the thread waits for the next.
            del request

    def _serve(self, request: Request) -> None:
        logits = [0.0] * len(request.prompts)
        try:
            for step in steps(request.prompts, request.token_budget):
                if request.future.cancelled():
                    return
                with gate.step():
                    scored = self._forward([request.prompts[i] for i in step])
                for index, logit in zip(step, scored, strict=True):
                    logits[index] = logit
                if request.advance is not None:
                    request.advance(len(step))
        except BaseException as error:
            outcome: BaseException | None = error
        else:
            outcome = None
        if not request.future.set_running_or_notify_cancel():
            return
        if outcome is None:
            request.future.set_result(logits)
        else:
            request.future.set_exception(outcome)
