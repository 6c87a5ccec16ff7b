"""What runs without a download: a collection of documents and queries, and a small checkpoint.

The names are loaded on first use; importing this package is cheap.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from .collection import GRADES, Collection, Document, Query, Split, content_words, load

ZELO_MINI: Final[Path] = Path(__file__).with_name("zelo-mini")
"""The folder of the demonstration checkpoint."""

__all__ = [
    "GRADES",
    "ZELO_MINI",
    "Collection",
    "Document",
    "Query",
    "Split",
    "content_words",
    "load",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import collection

    return getattr(collection, name)


def __dir__() -> list[str]:
    return sorted(__all__)
