"""NDCG@10 of the first stages on the test queries of every collection beside the repository.

    ZELO_SHARED=/path/to/shared python benchmarks/first_stage.py [--dense MODEL] [NAME ...]

BM25 with k1 = 1.2, b = .75 and the English stemmer; with a dense model also its own figure and that of reciprocal rank fusion.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from zelo_train.collect import candidates, checks
from zelo_train.collect.collection import Collection, graded_only, read_beir
from zelo_train.records import Candidate

# Unjudged documents of these may be relevant: a query ranks what was judged for it.
JUDGED_ONLY = ("acord",)


def shared() -> Path:
    """The folder beside the repository, or what ZELO_SHARED names."""
    return Path(os.environ.get("ZELO_SHARED") or Path(__file__).parents[2] / "shared") / "data"


def ndcg(run: Iterable[Candidate], collection: Collection, queries: Iterable[str], k: int = 10) -> float:
    """The mean over queries with a relevant document; the gain is the grade, as trec_eval has it."""
    ranked: dict[str, list[str]] = {}
    for candidate in run:
        ranked.setdefault(candidate.query, []).append(candidate.document)

    def dcg(grades: Sequence[int]) -> float:
        return sum(grade / math.log2(1 + rank) for rank, grade in enumerate(grades[:k], start=1))

    found = []
    for query in queries:
        grades: Mapping[str, int] = collection.relevant(query)
        if grades:
            best = dcg(sorted(grades.values(), reverse=True))
            found.append(dcg([grades.get(document, 0) for document in ranked.get(query, [])]) / best)
    return sum(found) / len(found)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="collections; none: all there are")
    parser.add_argument("--dense", metavar="MODEL", help="a sentence-transformers model")
    options = parser.parse_args()
    folders = [shared() / name for name in options.names] or sorted(path for path in shared().iterdir() if path.is_dir())
    print(f"{'collection':22} {'documents':>9} {'queries':>8} {'BM25':>6} {'dense':>6} {'RRF':>6} {'leak':>5} {'seconds':>8}")
    for folder in folders:
        begin = time.perf_counter()
        collection = read_beir(folder)
        test = {id: query for id, query in collection.of_split("test").items() if collection.relevant(id)}
        documents = list(collection.documents.values())
        pool = graded_only(collection.qrels, test) if folder.name in JUDGED_ONLY else None
        lexical = candidates.bm25(documents, test.values(), pool=pool)
        figures = [f"{ndcg(lexical, collection, test):.3f}", "", ""]
        if options.dense:
            near = candidates.dense(documents, test.values(), model=options.dense, pool=pool)
            both = candidates.fuse(lexical, near)
            figures[1:] = [f"{ndcg(near, collection, test):.3f}", f"{ndcg(both, collection, test):.3f}"]
        leak = f"{checks.leakage(collection):.0%}"
        line = f"{folder.name:22} {len(documents):9,} {len(collection.queries):8,} " + " ".join(f"{f:>6}" for f in figures)
        print(f"{line} {leak:>5} {time.perf_counter() - begin:8.1f}", flush=True)


if __name__ == "__main__":
    main()
