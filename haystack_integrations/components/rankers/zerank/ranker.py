"""A Haystack component over the one core: documents in, the most relevant first out."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Self

from haystack import Document, component, default_from_dict, default_to_dict
from haystack.utils.auth import Secret, SecretType
from haystack.utils.device import ComponentDevice

from zerank_integrations.checkpoints import DEFAULT
from zerank_integrations.errors import ZerankWarning
from zerank_integrations.reranker import Reranker

if TYPE_CHECKING:
    import os

    import torch

    from zerank_integrations.prompt import ControlTokens
    from zerank_integrations.ranked import RankedDocument

# The path in users' YAML files, so it never changes.
PATH = "haystack_integrations.components.rankers.zerank.ZerankRanker"
# Other names of the same class that a YAML may hold; the second needs Haystack's `allowed_modules`.
OTHER_PATHS = (
    "haystack_integrations.components.rankers.zerank.ranker.ZerankRanker",
    "zerank_integrations.haystack.ZerankRanker",
)

# A batch of 16 pairs, Haystack's default, is then the core's default of 8,192 tokens.
TOKENS_OF_A_PAIR = 512

# What the keyword dictionaries of Haystack's own ranker may hold, and which option of ours each entry sets.
HONOURED: Mapping[str, Mapping[str, str | None]] = {
    "model_kwargs": {"dtype": "dtype", "torch_dtype": "dtype", "attn_implementation": "attn_implementation"},
    # Scores do not depend on the padding, so either side is honoured.
    "tokenizer_kwargs": {"model_max_length": "max_length", "padding_side": None},
    "config_kwargs": {},
}

TRUNCATED = "relevance_truncated"
"""Meta key: True where the end of the text was cut to fit the prompt; else absent."""
SPAN = "relevance_span"
"""Meta key: [start, end] of the passage that counted in the content, under `max_passage_tokens`; else absent."""

# The options that decide how a Reranker is made; with a ready one they come from it.
LOADING = (
    "model",
    "revision",
    "base",
    "device",
    "dtype",
    "attn_implementation",
    "cache_folder",
    "local_files_only",
    "max_length",
    "max_passage_tokens",
    "token_budget",
    "control_tokens",
    "instruction",
    "deterministic",
)


@component
class ZerankRanker:
    """Ranks documents by their relevance to a query with a zerank reranker.

    Takes the arguments of Haystack's SentenceTransformersSimilarityRanker with the same meaning, and those of
    `zerank_integrations.Reranker`. Nothing is loaded before `warm_up` or the first `run`. Rankers with equal loading options
    share one loaded model, as do the other integrations.

    Args:
        model: a Hub id, a folder of any zerank layout, or "zelo-mini", the embedded demonstration model.
        device: a ComponentDevice or its text ("cpu", "cuda:1"); by default CUDA, else MPS, else CPU, chosen when loading.
        token: the Hub's access token, read from the environment when loading.
        top_k: how many documents to return at most.
        query_prefix: put before every query.
        query_suffix: put after every query.
        document_prefix: put before every document's text.
        document_suffix: put after every document's text.
        meta_fields_to_embed: names of meta fields whose values are read before the content.
        embedding_separator: between those values and the content.
        scale_score: scores are relevances in [0, 1]; if False, the model's logits.
        score_threshold: the least score to return: a relevance, or with `scale_score=False` a logit.
        trust_remote_code: has no effect but a warning: code in a checkpoint never runs.
        model_kwargs: "dtype" (or "torch_dtype") and "attn_implementation", as in Haystack's ranker.
        tokenizer_kwargs: "model_max_length", which sets `max_length`; "padding_side", on which no score depends.
        config_kwargs: nothing can be set by it.
        backend: "torch".
        batch_size: a step holds `512 * batch_size` tokens: that many short pairs, or fewer long ones; by default what suits the
            device. No score depends on it.
        revision: a Hub commit, branch or tag; the published checkpoints have a pinned default.
        base: the model a LoRA adapter lies over, when it is not where the adapter says.
        dtype: "auto" (bfloat16 where the device computes in it natively, else float32), "float32", "bfloat16" or "float16".
        attn_implementation: transformers' name of the attention.
        cache_folder: where downloads are kept, by default Hugging Face's cache.
        local_files_only: never ask the Hub.
        max_length: tokens of a whole prompt, by default the checkpoint's context. Longer documents are cut at their end.
        max_passage_tokens: read longer documents as overlapping passages of this size; the best passage counts.
        token_budget: tokens in one step, instead of `batch_size`.
        control_tokens: "text" reads `<|im_end|>` and the like in queries and documents as characters; "parse" matches them.
        instruction: put into every query's text, as zerank-2 was trained to follow.
        deterministic: the same score to the last bit whatever is scored beside it; slower.
        reranker: a ready Reranker instead of the loading options. `to_dict` writes its options. Its owner closes it.

    Raises:
        ValueError: an argument that cannot be honoured; the message names what can.

    Example:
        >>> from haystack import Document
        >>> ranker = ZerankRanker(model="zelo-mini")
        >>> documents = [Document(content="how to boil an egg"), Document(content="csv.reader reads rows")]
        >>> ranker.run("read a csv file", documents, top_k=1)["documents"][0].content
        'csv.reader reads rows'
    """

    __module__ = PATH.rpartition(".")[0]

    def __init__(
        self,
        *,
        model: str | os.PathLike[str] = DEFAULT,
        device: str | torch.device | ComponentDevice | None = None,
        token: Secret | None = Secret.from_env_var(["HF_API_TOKEN", "HF_TOKEN"], strict=False),  # noqa: B008 - immutable
        top_k: int = 10,
        query_prefix: str = "",
        query_suffix: str = "",
        document_prefix: str = "",
        document_suffix: str = "",
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
        scale_score: bool = True,
        score_threshold: float | None = None,
        trust_remote_code: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        tokenizer_kwargs: dict[str, Any] | None = None,
        config_kwargs: dict[str, Any] | None = None,
        backend: str = "torch",
        batch_size: int = 16,
        revision: str | None = None,
        base: str | os.PathLike[str] | None = None,
        dtype: str | torch.dtype = "auto",
        attn_implementation: str | None = None,
        cache_folder: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        max_length: int | None = None,
        max_passage_tokens: int | None = None,
        token_budget: int | None = None,
        control_tokens: ControlTokens = "text",
        instruction: str | None = None,
        deterministic: bool = False,
        reranker: Reranker | None = None,
    ) -> None:
        _check_top_k(top_k)
        _check_threshold(score_threshold, scale_score=scale_score)
        if backend != "torch":
            msg = f'backend is {backend!r}; expected "torch", the only one zerank checkpoints are computed with here'
            raise ValueError(msg)
        if not isinstance(batch_size, int) or batch_size < 1:
            msg = f"batch_size is {batch_size!r}; expected a number of pairs, at least 1"
            raise ValueError(msg)
        if isinstance(token, str):
            msg = 'token is a str; expected a Secret, which is never written: Secret.from_env_var("HF_TOKEN")'
            raise TypeError(msg)
        if isinstance(device, ComponentDevice) and device.has_multiple_devices:
            msg = f"device is a map of several devices ({device.to_dict()}); expected one: the model is held on one device"
            raise ValueError(msg)
        if trust_remote_code:
            warnings.warn(
                "trust_remote_code=True has no effect: zerank checkpoints are loaded by transformers' own classes, and code in "
                "a checkpoint never runs. Leave it out",
                ZerankWarning,
                stacklevel=2,
            )

        self.model = str(model)
        self.device = device if device is None or isinstance(device, ComponentDevice) else str(device)
        self.token = token
        self.top_k = top_k
        self.query_prefix = query_prefix
        self.query_suffix = query_suffix
        self.document_prefix = document_prefix
        self.document_suffix = document_suffix
        self.meta_fields_to_embed = list(meta_fields_to_embed or [])
        self.embedding_separator = embedding_separator
        self.scale_score = scale_score
        self.score_threshold = score_threshold
        self.trust_remote_code = trust_remote_code
        self.model_kwargs = _basic(model_kwargs)
        self.tokenizer_kwargs = _basic(tokenizer_kwargs)
        self.config_kwargs = _basic(config_kwargs)
        self.backend = backend
        self.batch_size = batch_size
        self.revision = revision
        self.base = None if base is None else str(base)
        self.dtype = _name(dtype)
        self.attn_implementation = attn_implementation
        self.cache_folder = None if cache_folder is None else str(cache_folder)
        self.local_files_only = local_files_only
        self.max_length = max_length
        self.max_passage_tokens = max_passage_tokens
        self.token_budget = token_budget
        self.control_tokens: ControlTokens = control_tokens
        self.instruction = instruction
        self.deterministic = deterministic

        self._options = self._reranker_options()
        # Only to check the options now; the one that scores is made when the token may be read.
        Reranker(**self._options)
        self._reranker = reranker
        self._is_ours = reranker is None
        if reranker is not None:
            self._take_options_of(reranker)
        self._warned = False

    # Ranking

    @component.output_types(documents=list[Document])
    def run(
        self,
        query: str,
        documents: list[Document],
        top_k: int | None = None,
        scale_score: bool | None = None,
        score_threshold: float | None = None,
    ) -> dict[str, list[Document]]:
        """Sort documents by their relevance to the query.

        Args:
            query: what is looked for.
            documents: the candidates. Of those with the same id, the one with the highest score is kept. A document without
                text (content None and none of the meta fields) is read as an empty text, with one warning.
            top_k: how many to return at most, instead of the ranker's.
            scale_score: relevances or logits, instead of the ranker's.
            score_threshold: the least score to return, instead of the ranker's; 0.0 counts.

        Returns:
            {"documents": [...]}, from most to least relevant, each a copy with its new score; ids and all else are kept. Equal
            logits keep the order of the input. `meta["relevance_truncated"]` is True where a text was cut, and
            `meta["relevance_span"]` says where in the content the passage lies that counted, if passages were read. No
            document: an empty list, and nothing is loaded.

        Raises:
            TypeError: the query is not a text or an entry of `documents` not a Document.
            ValueError: `top_k` is not a positive number, or `score_threshold` can be no score.
            ZerankError: what the core raises, from a model that cannot be loaded to a query that fills the whole prompt.
        """
        call = self._call(query, documents, top_k, scale_score, score_threshold)
        return call.answer(self.reranker.rank(call.query, call.texts) if call.texts else ())

    @component.output_types(documents=list[Document])
    async def run_async(
        self,
        query: str,
        documents: list[Document],
        top_k: int | None = None,
        scale_score: bool | None = None,
        score_threshold: float | None = None,
    ) -> dict[str, list[Document]]:
        """`run` without holding the event loop: same arguments, answer, errors. A cancelled task's waiting work is not done."""
        call = self._call(query, documents, top_k, scale_score, score_threshold)
        return call.answer(await self.reranker.arank(call.query, call.texts) if call.texts else ())

    # Life

    @property
    def reranker(self) -> Reranker:
        """The Reranker that scores: the one passed in, or one made on first use. Making it loads nothing."""
        if self._reranker is None:
            token = None if self.token is None else self.token.resolve_value()
            self._reranker = Reranker(**self._options, token=token)
        return self._reranker

    def warm_up(self) -> None:
        """Load the model, unless it is loaded. Haystack calls this before every run of a pipeline."""
        if not self.reranker.loaded:
            self.reranker.warm_up()

    async def warm_up_async(self) -> None:
        """`warm_up` without holding the event loop. Haystack calls this before every asynchronous run of a pipeline."""
        if not self.reranker.loaded:
            await self.reranker.awarm_up()

    def close(self) -> None:
        """Let go of the model; a later call loads it again. A Reranker that was passed in is its owner's to close."""
        if self._is_ours and self._reranker is not None:
            self._reranker.close()

    async def close_async(self) -> None:
        """`close` without holding the event loop."""
        if self._is_ours and self._reranker is not None:
            await self._reranker.aclose()

    # Copies

    def to_dict(self) -> dict[str, Any]:
        """The component as basic types, for `Pipeline.dumps`.

        Raises:
            ValueError: the token was given as itself (`Secret.from_token`); only the name of a variable is ever written.
        """
        return default_to_dict(self, **self._parameters())

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The component of such a dictionary, which is left as it is."""
        return default_from_dict(cls, data | {"type": PATH} if data.get("type") in OTHER_PATHS else data)

    def __reduce__(self) -> tuple[partial[Self], tuple[()]]:
        """Pickled as its arguments: the copy loads, or shares, the model. A token given as itself stays behind."""
        parameters = self._parameters()
        if self.token is not None and self.token.type is SecretType.TOKEN:
            parameters["token"] = None
        return partial(type(self), **parameters), ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Another ranker with the same arguments, in no pipeline; the weights are shared, not copied."""
        twin = type(self)(**self._parameters())
        if not self._is_ours:
            # With the token that the options do not tell.
            twin._reranker = copy.deepcopy(self._reranker, memo)
        return twin

    def __copy__(self) -> Self:
        """As `copy.deepcopy`: two components cannot share their sockets."""
        return copy.deepcopy(self)

    def _parameters(self) -> dict[str, Any]:
        """The constructor's arguments; a ready Reranker is told by its options."""
        return {name: copy.deepcopy(getattr(self, name)) for name in _defaults() if name != "reranker"}

    def _reranker_options(self) -> dict[str, Any]:
        """What the Reranker is made with, from our own arguments and those of Haystack's ranker."""
        options = {name: getattr(self, name) for name in LOADING}
        if isinstance(self.device, ComponentDevice):
            options["device"] = self.device.to_torch_str()
        if self.token_budget is None and self.batch_size != _defaults()["batch_size"]:
            options["token_budget"] = TOKENS_OF_A_PAIR * self.batch_size
        for argument, honoured in HONOURED.items():
            for key, value in (getattr(self, argument) or {}).items():
                if key not in honoured:
                    known = f"expected only {', '.join(honoured)}" if honoured else "expected none: nothing can be set by it"
                    msg = f"{argument} has {key!r}, which cannot be honoured; {known}. Leave it out"
                    raise ValueError(msg)
                option = honoured[key]
                if option is None or value is None:
                    continue
                if options[option] not in (_defaults()[option], value):
                    msg = f"{option} is {options[option]!r}, and {argument}[{key!r}] {value!r}; expected one of the two"
                    raise ValueError(msg)
                options[option] = value
        return options

    def _take_options_of(self, reranker: Reranker) -> None:
        """Refuse options beside a ready Reranker, and hold its own for `to_dict`."""
        if not isinstance(reranker, Reranker):
            msg = f"reranker is {type(reranker).__name__}; expected a zerank_integrations.Reranker. A name goes to model="
            raise TypeError(msg)
        names = ("token", *HONOURED, "batch_size", *LOADING)
        beside = [name for name in names if getattr(self, name) not in (_defaults()[name], None)]
        if beside:
            msg = f"reranker= came together with {', '.join(beside)}; expected one or the other: give them to the Reranker"
            raise ValueError(msg)
        for name, value in reranker.options.items():
            setattr(self, name, value)

    def _call(
        self,
        query: str,
        documents: Iterable[Document],
        top_k: int | None,
        scale_score: bool | None,
        score_threshold: float | None,
    ) -> _Call:
        """The checked arguments of one run, with the texts that will be scored."""
        # "or" would take a 0, a 0.0 or a False for "not given".
        top_k = self.top_k if top_k is None else top_k
        scale_score = self.scale_score if scale_score is None else scale_score
        score_threshold = self.score_threshold if score_threshold is None else score_threshold
        _check_top_k(top_k)
        _check_threshold(score_threshold, scale_score=scale_score)
        if not isinstance(query, str):
            msg = f"the query is {type(query).__name__}; expected a str"
            raise TypeError(msg)
        candidates = _one_per_id(documents)
        self._warn_of_no_text(candidates)
        before = [self._before_content(document) for document in candidates]
        return _Call(
            query=self.query_prefix + query + self.query_suffix,
            texts=[
                start + (document.content or "") + self.document_suffix
                for start, document in zip(before, candidates, strict=True)
            ],
            candidates=candidates,
            starts=[len(start) for start in before],
            top_k=top_k,
            scale_score=scale_score,
            score_threshold=score_threshold,
        )

    def _before_content(self, document: Document) -> str:
        """What is read before the content: the prefix and the meta fields, each with its separator."""
        meta = [str(document.meta[name]) for name in self._fields_of(document)]
        return self.document_prefix + "".join(value + self.embedding_separator for value in meta)

    def _fields_of(self, document: Document) -> list[str]:
        return [name for name in self.meta_fields_to_embed if document.meta.get(name) is not None]

    def _warn_of_no_text(self, candidates: list[Document]) -> None:
        textless = [document.id for document in candidates if document.content is None and not self._fields_of(document)]
        if textless and not self._warned:
            self._warned = True
            warnings.warn(
                f"{len(textless)} of {len(candidates)} documents have no text (content is None), the first with id "
                f"{textless[0]!r}; they are scored as empty texts. Keep them out, or name meta fields that describe them in "
                "meta_fields_to_embed=. Said once per ranker",
                ZerankWarning,
                stacklevel=2,
            )


# Where else `Pipeline.loads` may look for the class.
component.registry.update(dict.fromkeys(OTHER_PATHS, ZerankRanker))


@dataclass(frozen=True, slots=True)
class _Call:
    """The checked arguments of one run."""

    query: str
    texts: list[str]
    candidates: list[Document]
    starts: list[int]
    top_k: int
    scale_score: bool
    score_threshold: float | None

    def answer(self, ranked: Iterable[RankedDocument]) -> dict[str, list[Document]]:
        """What `run` returns."""
        least = -math.inf if self.score_threshold is None else self.score_threshold
        kept = [found for found in ranked if self._score(found) >= least]
        return {"documents": [self._document(found) for found in kept[: self.top_k]]}

    def _score(self, found: RankedDocument) -> float:
        return found.relevance if self.scale_score else found.logit

    def _document(self, found: RankedDocument) -> Document:
        document, start = self.candidates[found.index], self.starts[found.index]
        # An earlier ranker may have told of its own reading.
        meta = {key: value for key, value in document.meta.items() if key not in (TRUNCATED, SPAN)}
        if found.truncated:
            meta[TRUNCATED] = True
        if found.span is not None:
            end = len(document.content or "")
            # A passage may begin in the meta fields before the content, or end in the suffix after it.
            meta[SPAN] = [min(max(place - start, 0), end) for place in found.span]
        return replace(document, score=self._score(found), meta=meta)


@cache
def _defaults() -> dict[str, Any]:
    """The constructor's arguments and their defaults."""
    arguments = inspect.signature(ZerankRanker.__init__).parameters.values()
    return {argument.name: argument.default for argument in arguments if argument.name != "self"}


def _basic(keywords: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The keywords with a torch.dtype as its name, also as Haystack writes it: "torch.bfloat16"."""
    if keywords is None:
        return None
    return {key: value if value is None or "dtype" not in key else _name(value) for key, value in keywords.items()}


def _name(dtype: str | torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _one_per_id(documents: Iterable[Document]) -> list[Document]:
    """The documents, of those with the same id the first among the highest scored, at the place of the first."""
    best: dict[str, Document] = {}
    for index, document in enumerate(documents):
        if not isinstance(document, Document):
            msg = f"documents[{index}] is {type(document).__name__}; expected a haystack Document"
            raise TypeError(msg)
        if document.id not in best or _score(document) > _score(best[document.id]):
            best[document.id] = document
    return list(best.values())


def _score(document: Document) -> float:
    return -math.inf if document.score is None else document.score


def _check_top_k(top_k: int) -> None:
    if not isinstance(top_k, Integral) or top_k <= 0:
        msg = f"top_k is {top_k!r}; expected a number of documents, at least 1"
        raise ValueError(msg)


def _check_threshold(score_threshold: float | None, *, scale_score: bool) -> None:
    if score_threshold is None:
        return
    if not isinstance(score_threshold, Real) or math.isnan(score_threshold):
        msg = f"score_threshold is {score_threshold!r}; expected a number, or None for no threshold"
        raise ValueError(msg)
    if scale_score and not 0.0 <= score_threshold <= 1.0:
        msg = (
            f"score_threshold is {score_threshold!r} with scale_score=True; expected a relevance in [0, 1]. "
            "For a threshold on logits pass scale_score=False"
        )
        raise ValueError(msg)
