"""The pages' examples run, and their links lead somewhere."""

from __future__ import annotations

import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from llama_index.core.instrumentation import get_dispatcher

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#]+)(?:#[^)]*)?\)")

MODULES = (
    "zerank_integrations",
    "zerank_integrations.reranker",
    "zerank_integrations.llama_index",
    "zerank_integrations.langchain",
    "zerank_integrations.embedded.collection",
)


@pytest.fixture
def no_handler_stays() -> Iterator[None]:
    """A page may register a handler of LlamaIndex's events, which are the process's."""
    handlers = get_dispatcher().event_handlers
    before = list(handlers)
    yield
    handlers[:] = before


@pytest.mark.usefixtures("no_handler_stays")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page's blocks, in order, as one program in an empty folder."""
    text = page.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    for block in BLOCK.finditer(text):
        # Empty lines in front, so that a traceback names the line of the page.
        line = text.count("\n", 0, block.start()) + 1
        exec(compile("\n" * line + block[1], str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), f"{page.name} links to {link}"


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name: str) -> None:
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert results.attempted > 0
    assert results.failed == 0


def test_readme_names_every_file_of_the_packages() -> None:
    """The file map: a reader finds the place by the word."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for folder in ("zerank_integrations", "zerank_integrations/engine"):
        for path in (ROOT / folder).glob("*.py"):
            assert path.name.startswith("__") or path.name in text, f"the README's file map lacks {folder}/{path.name}"
