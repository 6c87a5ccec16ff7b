"""One loaded model for all who ask for the same source: counted, loaded on first use, freed by the last, fork-safe."""

from __future__ import annotations

import os
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from zerank_integrations.engine.gate import gate
from zerank_integrations.errors import ZerankWarning

if TYPE_CHECKING:
    from zerank_integrations.checkpoints import Source
    from zerank_integrations.engine.worker import Request, Worker
    from zerank_integrations.loading import Loaded
    from zerank_integrations.prompt import ControlTokens, PromptEncoder


class Engine:
    """A loaded checkpoint with its worker, and one prompt encoder per way of reading control tokens.

    Attributes:
        loaded: the checkpoint in memory.
        forward: its forward pass.
        token_budget: tokens of a step for those who name none.
    """

    def __init__(self, loaded: Loaded, attn_implementation: str | None) -> None:
        from zerank_integrations.engine.budget import default_budget
        from zerank_integrations.engine.forward import Forward

        self.loaded = loaded
        self._encoders: dict[str, PromptEncoder] = {loaded.encoder.control_tokens: loaded.encoder}
        self.forward = Forward(loaded, attn_implementation)
        self.token_budget = default_budget(self.forward, loaded.device)
        if self.forward.reason is not None:
            warnings.warn(
                f"prompts of {loaded.recognised.folder} are padded rather than packed, since {self.forward.reason}: the scores "
                "are right, but take several times as long. Said once per load",
                ZerankWarning,
                stacklevel=2,
            )
        self._worker = self._new_worker()

    def encoder(self, control_tokens: ControlTokens) -> PromptEncoder:
        """The prompt encoder that reads control tokens as asked."""
        from zerank_integrations.prompt import PromptEncoder

        if control_tokens not in self._encoders:
            self._encoders[control_tokens] = PromptEncoder(self.loaded.tokenizer, control_tokens)
        return self._encoders[control_tokens]

    def submit(self, request: Request) -> None:
        """Queue a request; its future answers. Raises Busy when too many wait."""
        self._worker.submit(request)

    def close(self) -> None:
        """End the worker after its queued requests."""
        self._worker.close()

    def renew_worker(self) -> None:
        """Replace the worker: a thread does not live on in a forked process."""
        self._worker = self._new_worker()

    def _new_worker(self) -> Worker:
        from zerank_integrations.engine.worker import Worker

        return Worker(self.forward)


class Shared:
    """The one engine of a source, counted by open handles and running calls."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._handles = 0
        self._calls = 0
        self._engine: Engine | None = None
        self._loading = threading.Lock()
        self._threads: ThreadPoolExecutor | None = None

    @property
    def loaded(self) -> Loaded | None:
        """What is in memory now; None before the first use."""
        return None if self._engine is None else self._engine.loaded

    def engine(self) -> Engine:
        """The engine, loaded by whoever asks first; the others wait for it."""
        with self._loading:
            if self._engine is None:
                # A child forked in the middle of an import or of a load would inherit both half done.
                with gate.step():
                    from zerank_integrations import loading
                # May download for minutes, for which no fork has to wait.
                folder = loading.locate(self._source.model, self._source)
                with gate.step(), _one_load:
                    self._engine = Engine(loading.load(self._source, folder), self._source.attn_implementation)
            return self._engine

    @property
    def threads(self) -> ThreadPoolExecutor:
        """Threads for what must not hold an event loop: loading and encoding. Ours, so that asyncio's own are never starved."""
        with _lock:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="zerank-encode")
            return self._threads

    def release_handle(self) -> None:
        """One handle less."""
        self._release(handles=1)

    def release_call(self) -> None:
        """One running call less."""
        self._release(calls=1)

    def _release(self, handles: int = 0, calls: int = 0) -> None:
        with _lock:
            self._handles -= handles
            self._calls -= calls
            if self._handles + self._calls > 0:
                return
            if _shared.get(self._source) is self:
                del _shared[self._source]
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()
        if self._threads is not None:
            self._threads.shutdown(wait=False)

    def after_fork(self) -> None:
        """In the child: locks may be held, and calls may be counted, by threads that exist only in the parent."""
        self._calls = 0
        self._loading = threading.Lock()
        self._threads = None
        if self._engine is not None:
            if self._engine.loaded.device.type == "cpu":
                self._engine.renew_worker()
            else:
                # A GPU context does not survive a fork: loading again raises the error that explains it.
                self._engine = None


# transformers patches the whole process while it loads (default float type, tied weights): two loads at once spoil each other.
# Held only inside the gate, so that no fork inherits it locked.
_one_load = threading.Lock()

# Re-entrant: the collector may release a forgotten handle on the very thread that holds the lock.
_lock = threading.RLock()
_shared: dict[Source, Shared] = {}


def running_call(source: Source) -> Shared:
    """Count one running call on the source's engine; nothing is loaded yet. Pair with `release_call`."""
    with _lock:
        shared = _shared.setdefault(source, Shared(source))
        shared._calls += 1
        return shared


class Handle:
    """One holder of a source's engine: open or not."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._shared: Shared | None = None

    @property
    def open(self) -> bool:
        """Whether it is counted now."""
        return self._shared is not None

    def acquire(self) -> None:
        """Be counted, once however often it is called."""
        with _lock:
            if self._shared is None:
                self._shared = _shared.setdefault(self.source, Shared(self.source))
                self._shared._handles += 1

    def release(self) -> None:
        """No longer be counted; the last holder frees the engine."""
        with _lock:
            shared, self._shared = self._shared, None
        if shared is not None:
            shared.release_handle()


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.RLock()
    # The threads that tokenizers encodes batches with are the parent's: asked for in a child, they are waited for in vain.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    for shared in _shared.values():
        shared.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
