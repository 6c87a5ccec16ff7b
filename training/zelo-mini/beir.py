"""Collections in BEIR layout, the docstrings as one more of them, and their BM25 candidates."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import Stemmer

TRAINED_ON = ("scifact", "medquad", "acord", "tatqa", "cosqa")
# Kept out of every stage of the making: texts, tokenizer, document frequencies. Only ever evaluated on.
NEVER_SEEN = ("cranfield", "legalbench-rag-mini")
DOCSTRINGS = "docstrings"


@dataclass(frozen=True)
class Split:
    """Query texts by id and, for each, the grades of the judged documents (by position in the collection)."""

    queries: Mapping[str, str]
    qrels: Mapping[str, Mapping[int, int]]


@dataclass(frozen=True)
class Collection:
    """Documents in a fixed order, and the splits that were asked for.

    ``judged_only``: unjudged documents may be relevant, so a query ranks its judged documents alone.
    """

    name: str
    documents: Sequence[str]
    splits: Mapping[str, Split]
    judged_only: bool = False
    _index: list[bm25s.BM25] = field(default_factory=list, repr=False)

    def bm25(self, split: str, k: int) -> dict[str, np.ndarray]:
        """For each query of the split the positions of BM25's best ``k`` documents, best first."""
        chosen = self.splits[split]
        if not self._index:
            index = bm25s.BM25(k1=1.2, b=0.75)
            words = bm25s.tokenize(list(self.documents), stemmer=Stemmer.Stemmer("english"), show_progress=False)
            index.index(words, show_progress=False)
            self._index.append(index)
        scores_of = self._index[0].get_scores
        query_words = bm25s.tokenize(
            list(chosen.queries.values()), stemmer=Stemmer.Stemmer("english"), return_ids=False, show_progress=False
        )
        run = {}
        for id_, query in zip(chosen.queries, query_words, strict=True):
            scores = scores_of(query) if query else np.zeros(len(self.documents))
            pool = np.array(sorted(chosen.qrels[id_])) if self.judged_only else np.arange(len(self.documents))
            run[id_] = pool[np.argsort(-scores[pool], kind="stable")[:k]]
        return run


def read(folder: Path, splits: Sequence[str]) -> Collection:
    """Read one collection's documents and the named splits of its queries.

    Raises:
        FileNotFoundError: a file of the layout is absent; the message names the layout.
    """
    corpus, queries = folder / "corpus.jsonl.gz", folder / "queries.jsonl.gz"
    for path in (corpus, queries, *(folder / "qrels" / f"{split}.tsv" for split in splits)):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is absent, expected a collection in BEIR layout (corpus.jsonl.gz, queries.jsonl.gz, qrels/*.tsv):"
                " pass --collections the folder that holds the collections, or leave it out to use the docstrings alone."
            )
    positions: dict[str, int] = {}
    documents = []
    for row in _rows(corpus):
        positions[row["_id"]] = len(documents)
        documents.append(f"{row.get('title') or ''}\n{row['text']}".strip())
    texts = {row["_id"]: row["text"] for row in _rows(queries)}
    read_splits = {}
    for split in splits:
        qrels: dict[str, dict[int, int]] = {}
        with (folder / "qrels" / f"{split}.tsv").open(encoding="utf-8") as lines:
            for query, document, grade in list(csv.reader(lines, delimiter="\t"))[1:]:
                if document in positions:
                    qrels.setdefault(query, {})[positions[document]] = max(int(grade), 0)
        qrels = {query: grades for query, grades in qrels.items() if max(grades.values()) > 0}
        read_splits[split] = Split({query: texts[query] for query in qrels}, qrels)
    return Collection(folder.name, documents, read_splits, judged_only=folder.name == "acord")


def read_docstrings(half: str) -> Collection:
    """The embedded collection: all its documents, and the queries of one half (``train`` or ``test``)."""
    from zerank_integrations.embedded import collection as embedded

    loaded = embedded.load("train" if half == "train" else "test")
    positions = {id_: place for place, id_ in enumerate(loaded.documents)}
    qrels = {
        query: {positions[document]: grade for document, grade in grades.items()}
        for query, grades in loaded.qrels.items()
        if grades
    }
    queries = {query: loaded.queries[query].text for query in qrels}
    return Collection(DOCSTRINGS, [d.text for d in loaded.documents.values()], {half: Split(queries, qrels)})


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)
