"""Reranker: score and rank documents with a zerank checkpoint."""

from __future__ import annotations

import asyncio
import math
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Self, TypedDict, TypeVar

from zerank_integrations.checkpoints import DEFAULT, Checkpoint, Source, known
from zerank_integrations.engine import shared
from zerank_integrations.errors import NonFiniteLogits, ZerankWarning
from zerank_integrations.passages import spans
from zerank_integrations.prompt import ControlTokens, Prompt, PromptEncoder, readable, with_instruction
from zerank_integrations.ranked import Ranked, RankedDocument, checked_threshold, checked_top_k
from zerank_integrations.relevance import relevance_of

if TYPE_CHECKING:
    import torch
    from tqdm.std import tqdm


T = TypeVar("T")

# Sorting this many takes about 20 ms, longer than an event loop should be held.
MANY = 1_000


class LoadOptions(TypedDict, total=False):
    """The options of `Reranker` beside the model; they mean here what they mean there."""

    revision: str | None
    base: str | os.PathLike[str] | None
    device: str | torch.device | None
    dtype: str | torch.dtype
    attn_implementation: str | None
    cache_folder: str | os.PathLike[str] | None
    local_files_only: bool
    token: str | bool | None
    max_length: int | None
    max_passage_tokens: int | None
    token_budget: int | None
    control_tokens: ControlTokens
    instruction: str | None
    deterministic: bool


class Reranker:
    """A zerank reranker.

    Nothing is loaded until the first call that has something to score. Rerankers with equal loading options share one loaded
    model: the last one closed frees it, and a later call loads it again. All methods may be called from any thread, from any
    event loop, and after a fork.

    Args:
        model: a Hub id, a folder of any zerank layout, or "zelo-mini", the embedded demonstration model.
        revision: a Hub commit, branch or tag; the published checkpoints have a pinned default.
        base: the model a LoRA adapter lies over, when it is not where the adapter says.
        device: "cpu", "cuda", "cuda:1", "mps"; by default CUDA, else MPS, else CPU.
        dtype: "auto" (bfloat16 where the device computes in it natively, else float32), "float32", "bfloat16" or "float16".
        attn_implementation: transformers' name of the attention, by default "sdpa".
        cache_folder: where downloads are kept, by default Hugging Face's cache.
        local_files_only: never ask the Hub.
        token: access token of a private Hub repository.
        max_length: tokens of a whole prompt, by default the checkpoint's context. Longer documents are cut at their end.
        max_passage_tokens: read longer documents as overlapping passages of this size; the best passage counts.
        token_budget: tokens in one step at most; bounds the memory. By default what suits the device: 4,096 on a CPU, by free
            memory on a GPU.
        control_tokens: "text" reads `<|im_end|>` and the like inside queries and documents as plain characters, so that no
            document can close its own turn; "parse" matches them as the published files do.
        instruction: put into every query's text, as zerank-2 was trained to follow.
        deterministic: score every document in a step of its own, so that its score is the same to the last bit whatever else is
            scored beside it, before it or by whom. Measured on a CPU, 100 documents took 1.4 times as long (75 kB, a query of
            50 tokens), 2.8 times (12 kB, 50 tokens) or 10 times (12 kB, 300 tokens: the query is read anew for each document).

    Example:
        >>> with Reranker("zelo-mini") as reranker:
        ...     reranker.rank("read a csv file", ["csv.reader reads rows", "how to boil an egg"])[0].index
        0
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = DEFAULT,
        *,
        revision: str | None = None,
        base: str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        attn_implementation: str | None = None,
        cache_folder: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        max_length: int | None = None,
        max_passage_tokens: int | None = None,
        token_budget: int | None = None,
        control_tokens: ControlTokens = "text",
        instruction: str | None = None,
        deterministic: bool = False,
    ) -> None:
        for name, value in (
            ("max_length", max_length),
            ("max_passage_tokens", max_passage_tokens),
            ("token_budget", token_budget),
        ):
            if value is not None and (isinstance(value, bool) or not hasattr(value, "__index__") or value < 1):
                msg = f"{name} is {value!r}; expected a number of tokens, at least 1"
                raise ValueError(msg)
        if control_tokens not in ("text", "parse"):
            msg = f'control_tokens is {control_tokens!r}; expected "text" (safe) or "parse" (as the published files)'
            raise ValueError(msg)
        if not isinstance(model, str | os.PathLike) or not str(model):
            msg = f'model is {model!r}; expected a Hub id, a folder, or "zelo-mini"'
            raise TypeError(msg)
        if instruction is not None and not isinstance(instruction, str):
            msg = f"instruction is {type(instruction).__name__}; expected a str"
            raise TypeError(msg)
        self.model = str(model)
        self.base = None if base is None else str(base)
        self.max_length = max_length
        self.max_passage_tokens = max_passage_tokens
        self.token_budget = token_budget
        self.control_tokens: ControlTokens = control_tokens
        self.instruction = instruction
        self.deterministic = deterministic
        source = Source(
            model=_place(self.model),
            revision=revision,
            base=None if self.base is None else _place(self.base),
            device=None if device is None else str(device),
            dtype=str(dtype).removeprefix("torch."),
            attn_implementation=attn_implementation,
            cache_folder=None if cache_folder is None else str(cache_folder),
            local_files_only=local_files_only,
            token=token,
        )
        self._handle = shared.Handle(source)
        # The collector closes a forgotten reranker; the callback holds no reference to it.
        weakref.finalize(self, self._handle.release)
        self._warned = False

    # Ranking

    def rank(
        self,
        query: str,
        documents: Iterable[str],
        top_k: int | None = None,
        threshold: float | None = None,
        *,
        progress: bool = False,
    ) -> Ranked:
        """Sort documents by relevance to the query.

        Args:
            query: what is looked for.
            documents: texts; empty ones are allowed.
            top_k: how many to return at most; all by default.
            threshold: the least relevance, in [0, 1]; judge it on your own data, a checkpoint's scale differs between domains.
            progress: show a bar on standard error.

        Returns:
            The documents from most to least relevant; equal logits keep their order. No document: nothing is loaded.

        Raises:
            TypeError: the query or a document is not a text; the message names its index.
            QueryTooLong: the query leaves no room for a document.
            CheckpointRefused, ModelUnreachable: on the first call, when the model cannot be loaded.
            NonFiniteLogits: the model answered NaN or infinity.
            Busy: too many calls wait for the model already.
            DocumentTooLarge: a document alone does not fit into the device's memory.
        """
        return self.rank_many([(query, documents)], top_k, threshold, progress=progress)[0]

    def rank_many(
        self,
        requests: Iterable[tuple[str, Iterable[str]]],
        top_k: int | None = None,
        threshold: float | None = None,
        *,
        progress: bool = False,
    ) -> list[Ranked]:
        """Rank the documents of several queries at once; steps are filled across queries. One ranking per request, in order."""
        call = _Call.of(requests, top_k, threshold)
        if not call.work:
            return call.empty()
        with _bar() if progress else nullcontext() as bar:
            started = self._start(call, bar)
            try:
                logits = started.future.result()
            except BaseException:
                # Ctrl-C, say: the worker stops before its next step.
                started.future.cancel()
                raise
        return started.rankings(logits)

    def score(self, query: str, documents: Iterable[str], *, progress: bool = False) -> list[float]:
        """Relevances in [0, 1] of the documents, in their own order. Raises as `rank` does."""
        return _in_order(self.rank(query, documents, progress=progress))

    async def arank(
        self,
        query: str,
        documents: Iterable[str],
        top_k: int | None = None,
        threshold: float | None = None,
    ) -> Ranked:
        """`rank` without holding the event loop. A cancelled task's waiting work is not done."""
        return (await self.arank_many([(query, documents)], top_k, threshold))[0]

    async def arank_many(
        self,
        requests: Iterable[tuple[str, Iterable[str]]],
        top_k: int | None = None,
        threshold: float | None = None,
    ) -> list[Ranked]:
        """`rank_many` without holding the event loop."""
        call = _Call.of(requests, top_k, threshold)
        if not call.work:
            return call.empty()
        started = await self._in_thread(lambda: self._start(call), abandon=lambda started: started.future.cancel())
        logits = await asyncio.wrap_future(started.future)
        if call.work < MANY:
            return started.rankings(logits)
        return await self._in_thread(lambda: started.rankings(logits))

    async def ascore(self, query: str, documents: Iterable[str]) -> list[float]:
        """`score` without holding the event loop."""
        return _in_order(await self.arank(query, documents))

    # Life

    def warm_up(self) -> Self:
        """Load the model now and score one pair, so that the first real call is as quick as the next."""
        self.rank("warm", ["up"])
        return self

    async def awarm_up(self) -> Self:
        """`warm_up` without holding the event loop."""
        await self.arank("warm", ["up"])
        return self

    def close(self) -> None:
        """Let go of the model; the last of those that share it frees it. Closing twice is fine, a later call loads again."""
        self._handle.release()

    async def aclose(self) -> None:
        """`close` without holding the event loop."""
        if self._handle.open:
            await self._in_thread(self.close)

    def __enter__(self) -> Self:
        """The reranker itself; leaving the block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    async def __aenter__(self) -> Self:
        """The reranker itself; leaving the block closes it."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close."""
        await self.aclose()

    def __repr__(self) -> str:
        """Name and state, never the token."""
        return f"Reranker({self.model!r}, {'loaded' if self.loaded else 'not loaded'})"

    def __reduce__(self) -> tuple[Callable[..., Reranker], tuple[type[Reranker], dict[str, object]]]:
        """Pickled as its options: the copy loads, or shares, the model itself. The token is a secret and stays behind."""
        return _reranker, (type(self), self.options)

    def __copy__(self) -> Reranker:
        """Another handle with the same options."""
        return type(self)(**self.options | {"token": self._handle.source.token})  # type: ignore[arg-type]

    def __deepcopy__(self, _: object) -> Reranker:
        """Another handle with the same options; the weights are shared, not copied."""
        return self.__copy__()

    @property
    def options(self) -> dict[str, object]:
        """The constructor's arguments as basic types, without the token: `Reranker(**options)` is an equal one."""
        source = {f.name: getattr(self._handle.source, f.name) for f in fields(Source) if f.name != "token"}
        own = (
            "model",
            "base",
            "max_length",
            "max_passage_tokens",
            "token_budget",
            "control_tokens",
            "instruction",
            "deterministic",
        )
        return source | {name: getattr(self, name) for name in own}

    @property
    def loaded(self) -> bool:
        """Whether this reranker holds the model in memory now."""
        return self._handle.open

    @property
    def checkpoint(self) -> Checkpoint | None:
        """What is known of the model by its name: licence, base, context. None for a folder or another Hub id."""
        return known(self.model)

    def engine(self) -> shared.Engine:
        """The loaded engine this reranker shares, loading it if need be: decoder, tokenizer and device are in its `.loaded`."""
        self._handle.acquire()
        call = shared.running_call(self._handle.source)
        try:
            return call.engine()
        except BaseException:
            # What did not load is held by nobody, so that the next call tries again.
            self._handle.release()
            raise
        finally:
            call.release_call()

    def _start(self, call: _Call, bar: tqdm | None = None) -> _Started:
        """Load if need be, encode, and queue for the worker. The model is held until the future is done."""
        held = shared.running_call(self._handle.source)
        try:
            engine = self.engine()
            # Brings torch, as loading just did. Before it, a fork could fall into the middle of the import.
            from zerank_integrations.engine.worker import Request

            encoder = engine.encoder(self.control_tokens)
            max_length = engine.loaded.context if self.max_length is None else self.max_length
            pieces = [
                piece
                for query, texts in zip(call.queries, call.texts(), strict=True)
                for piece in self._pieces(encoder, with_instruction(readable(query)[0], self.instruction), texts, max_length)
            ]
            self._warn_of_cuts(pieces, max_length)
            prompts = [prompt for _, passages in pieces for _, prompt in passages]
            if bar is not None:
                bar.reset(total=len(prompts))
            budget = self.token_budget or engine.token_budget
            advance = None if bar is None else bar.update
            request = Request(prompts, budget, advance, deterministic=self.deterministic)
            engine.submit(request)
        except BaseException:
            held.release_call()
            raise
        request.future.add_done_callback(lambda _: held.release_call())
        return _Started(call, pieces, request.future)

    def _pieces(self, encoder: PromptEncoder, query: str, texts: Sequence[_Text], max_length: int) -> list[_Piece]:
        """For each document its prompts: one, or one per passage."""
        if not texts:
            return []
        documents = [text.readable for text in texts]
        if self.max_passage_tokens is None:
            prompts = encoder.encode(query, documents, max_length)
            return [(text, [(None, prompt)]) for text, prompt in zip(texts, prompts, strict=True)]
        size = min(self.max_passage_tokens, encoder.room(query, max_length))
        offsets = zip(texts, encoder.offsets(documents), strict=True)
        return [(text, _passages(encoder, query, text.readable, tokens, size, max_length)) for text, tokens in offsets]

    def _warn_of_cuts(self, pieces: list[_Piece], max_length: int) -> None:
        cut = sum(any(prompt.truncated for _, prompt in prompts) for _, prompts in pieces)
        if cut and not self._warned:
            self._warned = True
            warnings.warn(
                f"{cut} of {len(pieces)} documents were longer than a prompt of {max_length} tokens allows and were cut at "
                "their end. Each says so (.truncated); max_passage_tokens= reads them whole. Said once",
                ZerankWarning,
                stacklevel=2,
            )

    async def _in_thread(self, work: Callable[[], T], abandon: Callable[[T], object] = lambda _: None) -> T:
        """Run on a thread of the engine's own; if the task is cancelled meanwhile, the result is handed to `abandon`."""
        held = shared.running_call(self._handle.source)
        running: Future[T] = held.threads.submit(work)
        running.add_done_callback(lambda _: held.release_call())
        try:
            return await asyncio.wrap_future(running)
        except asyncio.CancelledError:
            running.add_done_callback(lambda done: done.cancelled() or done.exception() or abandon(done.result()))
            raise


@dataclass(frozen=True, slots=True)
class _Text:
    """A document as it came and as it can be read."""

    text: str
    readable: str
    replaced: int


# A document and its prompts, each with the span of its passage (None: the whole document).
_Piece = tuple[_Text, list[tuple[tuple[int, int] | None, Prompt]]]


@dataclass(frozen=True, slots=True)
class _Call:
    """The arguments of one call, each iterable read once."""

    queries: list[str]
    documents: list[list[object]]
    top_k: int | None
    threshold: float | None

    @classmethod
    def of(cls, requests: Iterable[tuple[str, Iterable[str]]], top_k: int | None, threshold: float | None) -> _Call:
        top_k, threshold = checked_top_k(top_k), checked_threshold(threshold)
        queries: list[str] = []
        listed: list[list[object]] = []
        for request in requests:
            if not isinstance(request, tuple | list) or len(request) != 2:
                msg = f"request {len(queries)} is {type(request).__name__}; expected a pair (query, documents)"
                raise TypeError(msg)
            query, documents = request
            if not isinstance(query, str):
                msg = f"the query is {type(query).__name__}; expected a str"
                raise TypeError(msg)
            if isinstance(documents, str | bytes):
                msg = f"documents is one {type(documents).__name__}; expected a list of str: [document]"
                raise TypeError(msg)
            if not isinstance(documents, Iterable):
                msg = f"documents is {type(documents).__name__}; expected a list of str"
                raise TypeError(msg)
            queries.append(query)
            listed.append(list(documents))
        return cls(queries, listed, top_k, threshold)

    @property
    def work(self) -> int:
        """Documents to score; none when nothing of the ranking would be returned."""
        return 0 if self.top_k == 0 else sum(map(len, self.documents))

    def texts(self) -> list[list[_Text]]:
        """The documents as texts, per query."""
        where = "" if len(self.queries) == 1 else " of request {}"
        return [
            [_text(f"{index}{where.format(request)}", document) for index, document in enumerate(documents)]
            for request, documents in enumerate(self.documents)
        ]

    def rankings(self, scored: Sequence[Sequence[RankedDocument]]) -> list[Ranked]:
        """One ranking per query, from its scored documents in input order."""
        return [Ranked.of(q, d, self.top_k, self.threshold) for q, d in zip(self.queries, scored, strict=True)]

    def empty(self) -> list[Ranked]:
        """The rankings of a call that has nothing to score."""
        self.texts()
        return self.rankings([[]] * len(self.queries))


@dataclass(frozen=True, slots=True)
class _Started:
    """A call whose prompts wait for, or have, their logits."""

    call: _Call
    pieces: list[_Piece]
    future: Future[list[float]]

    def rankings(self, logits: list[float]) -> list[Ranked]:
        each, pieces = iter(logits), iter(self.pieces)
        return self.call.rankings(
            [[_document(i, *next(pieces), each) for i in range(len(documents))] for documents in self.call.documents]
        )


def _text(place: str, document: object) -> _Text:
    if not isinstance(document, str):
        msg = f"document {place} is {type(document).__name__}; expected a str. Leave it out or pass its text"
        raise TypeError(msg)
    # A plain str: subclasses (numpy's, a markup class's) carry behaviour that has no place in a result.
    text = str(document)
    return _Text(text, *readable(text))


def _passages(
    encoder: PromptEncoder, query: str, text: str, tokens: list[tuple[int, int]], size: int, max_length: int
) -> list[tuple[tuple[int, int] | None, Prompt]]:
    """The prompts of a text's passages, none of them cut.

    A passage encoded by itself can have more tokens than it had inside its document, where no space separates words.
    """
    while True:
        found = spans(text, tokens, size)
        prompts = encoder.encode(query, [text[slice(*span)] for span in found], max_length)
        if size == 1 or not any(prompt.truncated for prompt in prompts):
            return list(zip(found, prompts, strict=True))
        size = max(1, size * 3 // 4)


def _document(
    index: int, text: _Text, prompts: list[tuple[tuple[int, int] | None, Prompt]], logits: Iterator[float]
) -> RankedDocument:
    scored = [(next(logits), span, prompt) for span, prompt in prompts]
    strange = next((value for value, _, _ in scored if not math.isfinite(value)), None)
    if strange is not None:
        msg = (
            f"the model answered {strange} for document {index}; expected a finite number. float16 overflows in these models: "
            'use dtype="bfloat16" or "float32"; with those, the weights are damaged (`zerank check` tells)'
        )
        raise NonFiniteLogits(msg)
    logit, span, _ = max(scored, key=lambda passage: passage[0])
    return RankedDocument(
        index=index,
        text=text.text,
        logit=logit,
        relevance=relevance_of(logit),
        tokens=sum(len(prompt) for _, _, prompt in scored),
        truncated=any(prompt.truncated for _, _, prompt in scored),
        replaced=text.replaced,
        span=span,
    )


def _in_order(ranked: Ranked) -> list[float]:
    return [document.relevance for document in sorted(ranked, key=lambda document: document.index)]


def chosen(reranker: Reranker | None, model: str | os.PathLike[str] | None, options: LoadOptions) -> Reranker:
    """The reranker that was passed to an integration, or one made of a model and options.

    Raises:
        ValueError: both were given.
    """
    if reranker is None:
        return Reranker(DEFAULT if model is None else model, **options)
    if model is not None or options:
        given = [*(["model"] if model is not None else []), *options]
        msg = f"both a reranker and {', '.join(given)} are given; expected one or the other. Give the options to the Reranker"
        raise ValueError(msg)
    return reranker


def _bar() -> tqdm:
    from tqdm.auto import tqdm

    return tqdm(desc="ranking", unit="prompt")


def _place(model: str) -> str:
    """A folder by its absolute path, so that it stays the same wherever the process goes; anything else as it is."""
    # A checkpoint's own name wins over a folder that happens to have it, as it does in loading.
    return os.path.abspath(model) if known(model) is None and os.path.isdir(model) else model


def _reranker(kind: type[Reranker], options: dict[str, object]) -> Reranker:
    return kind(**options)  # type: ignore[arg-type]
