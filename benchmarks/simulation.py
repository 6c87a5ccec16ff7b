"""NDCG@10 of ratings against qrels by judged pairs per query, on the real candidates of collections beside the repository.

    ZELO_SHARED=/path/to/shared python benchmarks/simulation.py [--queries N] [--seed S] [NAME ...]

Judges are simulated from the very qrels that measure them: the figures show how many pairs a design needs under stated noise,
not how well any judge would do. Candidates are BM25's best 100.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import numpy as np

from zelo_train import chance
from zelo_train.collect import candidates
from zelo_train.collect.collection import read_beir
from zelo_train.simulate import FIRST_LINE, real_table

NAMES = ("scifact", "tatqa", "cranfield")


def main() -> None:
    """Print a table per collection."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=NAMES, help=f"collections (default: {', '.join(NAMES)})")
    parser.add_argument("--queries", type=int, default=100, help="test queries per collection, drawn by seed")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn")
    options = parser.parse_args()
    shared = Path(os.environ.get("ZELO_SHARED") or Path(__file__).parents[2] / "shared") / "data"
    print(FIRST_LINE)
    for name in options.names:
        collection = read_beir(shared / name)
        every = [query for id, query in collection.of_split("test").items() if collection.relevant(id)]
        drawn = sorted(every, key=lambda query: chance.key(options.seed, query.id))[: options.queries]
        found: dict[str, dict[str, float]] = {}
        for one in candidates.bm25(list(collection.documents.values()), drawn, top=100):
            found.setdefault(one.query, {})[one.document] = one.score
        full = {query: own for query, own in found.items() if len(own) == 100}
        scores = np.array([list(own.values()) for own in full.values()])
        grades = np.array([[collection.relevant(query).get(document, 0) for document in own] for query, own in full.items()])
        print(f"\n{real_table(scores, grades, name, options.seed)}", flush=True)


if __name__ == "__main__":
    main()
