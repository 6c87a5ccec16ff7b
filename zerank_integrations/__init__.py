"""An open home for the zerank rerankers: load every layout, score correctly, rank inside your framework.

>>> from zerank_integrations import Reranker
>>> ranked = Reranker("zelo-mini").rank("read a csv file", ["how to boil an egg", "csv.reader reads rows"])
>>> ranked[0].index
1

Nothing is imported until it is used: `import zerank_integrations` brings neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zerank_integrations.checkpoints import CHECKPOINTS, Checkpoint, known
    from zerank_integrations.errors import (
        Busy,
        CheckpointRefused,
        DocumentTooLarge,
        ForkedDevice,
        MissingPackage,
        ModelUnreachable,
        NonFiniteLogits,
        QueryTooLong,
        ZerankError,
        ZerankWarning,
    )
    from zerank_integrations.ranked import Ranked, RankedDocument
    from zerank_integrations.relevance import logit_of, relevance_of
    from zerank_integrations.reranker import Reranker

_HOMES = {
    "checkpoints": ("CHECKPOINTS", "Checkpoint", "known"),
    "errors": (
        "Busy",
        "CheckpointRefused",
        "DocumentTooLarge",
        "ForkedDevice",
        "MissingPackage",
        "ModelUnreachable",
        "NonFiniteLogits",
        "QueryTooLong",
        "ZerankError",
        "ZerankWarning",
    ),
    "ranked": ("Ranked", "RankedDocument"),
    "relevance": ("logit_of", "relevance_of"),
    "reranker": ("Reranker",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "CHECKPOINTS",
    "Busy",
    "Checkpoint",
    "CheckpointRefused",
    "DocumentTooLarge",
    "ForkedDevice",
    "MissingPackage",
    "ModelUnreachable",
    "NonFiniteLogits",
    "QueryTooLong",
    "Ranked",
    "RankedDocument",
    "Reranker",
    "ZerankError",
    "ZerankWarning",
    "known",
    "logit_of",
    "relevance_of",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
