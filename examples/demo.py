"""Rank the embedded collection with the embedded checkpoint, then do the same inside three frameworks.

No download: the documents are the docstrings of the Python that runs this. `make demo` calls it.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")

import bm25s
import Stemmer

from zerank_integrations import Ranked, Reranker
from zerank_integrations.checkpoints import DEFAULT, ZELO_MINI_NOTICE
from zerank_integrations.embedded import Collection, Document, load

CANDIDATES = 30
SHOWN = 3


class BM25:
    """A first stage over the collection: k1 = 1.2, b = .75, English stemmer and stop words."""

    def __init__(self, documents: Mapping[str, Document]) -> None:
        self._ids = list(documents)
        self._stemmer = Stemmer.Stemmer("english")
        self._index = bm25s.BM25(k1=1.2, b=0.75)
        self._index.index(self._tokens([document.text for document in documents.values()]), show_progress=False)

    def retrieve(self, query: str) -> list[str]:
        """Ids of the candidates, best first."""
        places, _ = self._index.retrieve(self._tokens([query]), k=CANDIDATES, show_progress=False)
        return [self._ids[place] for place in places[0]]

    def _tokens(self, texts: list[str]) -> object:
        return bm25s.tokenize(texts, stopwords="en", stemmer=self._stemmer, show_progress=False)


def fused(*runs: Sequence[str]) -> list[str]:
    """Reciprocal rank fusion: a document scores Σ 1 / (60 + rank). Cormack, Clarke and Büttcher, 2009."""
    scores: dict[str, float] = {}
    for run in runs:
        for rank, document in enumerate(run, start=1):
            scores[document] = scores.get(document, 0.0) + 1 / (60 + rank)
    return sorted(scores, key=lambda document: -scores[document])


def main() -> None:
    """Print the figures, whatever they are."""
    collection = load("test")
    print(f"{len(collection.documents):,} documents (docstrings of this Python), {len(collection.queries)} test queries")
    print(f"candidates: BM25's first {CANDIDATES}\n{ZELO_MINI_NOTICE}\n")
    bm25 = BM25(collection.documents)
    candidates = {query.id: bm25.retrieve(query.text) for query in collection.queries.values()}
    with Reranker("zelo-mini") as reranker:
        reranker.warm_up()
        reranked = figures(collection, candidates, reranker)
        in_frameworks(collection, candidates, examples(collection, candidates, reranked), reranker)
        print("\nall three frameworks ranked these three queries as the core does")
    print(f'\nFor real use, one line changes:  Reranker("zelo-mini")  →  Reranker("{DEFAULT}")')


def figures(collection: Collection, candidates: Mapping[str, list[str]], reranker: Reranker) -> dict[str, list[str]]:
    """NDCG@10 of BM25, of the reranked list and of both fused, over all test queries at once; returns the reranked lists."""
    requests = [(collection.queries[q].text, [collection.documents[d].text for d in ids]) for q, ids in candidates.items()]
    before = time.perf_counter()
    rankings = reranker.rank_many(requests, progress=sys.stderr.isatty())
    seconds = time.perf_counter() - before
    reranked = {q: [candidates[q][i] for i in ranked.indices] for q, ranked in zip(candidates, rankings, strict=True)}
    runs = {
        "BM25": candidates,
        "reranked": reranked,
        "both fused": {q: fused(candidates[q], reranked[q]) for q in candidates},
    }
    apart = set(collection.without_shared_word())
    print(f"\n{'NDCG@10':12}{'all queries':>14}{'a word shared':>16}{'no word shared':>16}")
    for name, run in runs.items():
        ndcg = collection.ndcg(run)
        shared, unshared = ([v for q, v in ndcg.items() if (q in apart) is is_apart] for is_apart in (False, True))
        print(f"{name:12}{mean([*ndcg.values()]):14.3f}{mean(shared):16.3f}{mean(unshared):16.3f}")
    print("(where query and answer share no word, BM25 brings no answer to rerank: a dense first stage would)")
    tokens = sum(ranked.tokens for ranked in rankings)
    print(f"\n{1000 * seconds / len(requests):.0f} ms a query of {CANDIDATES} candidates, {tokens / seconds:,.0f} tokens/s")
    return reranked


def examples(collection: Collection, candidates: Mapping[str, list[str]], reranked: Mapping[str, list[str]]) -> list[str]:
    """Ids of three test queries: one that reranking helps most, one that it harms most, and one in the middle."""
    before, after = collection.ndcg(candidates), collection.ndcg(reranked)
    by_gain = sorted((q for q in before if before[q] or after[q]), key=lambda q: after[q] - before[q])
    return [by_gain[-1], by_gain[len(by_gain) // 2], by_gain[0]]


def mean(values: Sequence[float]) -> float:
    """Their mean, 0 for none."""
    return sum(values) / len(values) if values else 0.0


@dataclass(frozen=True)
class Example:
    """One query with its candidates, best first."""

    query: str
    ids: list[str]
    texts: list[str]


def in_frameworks(
    collection: Collection, candidates: Mapping[str, list[str]], queries: Sequence[str], reranker: Reranker
) -> None:
    """The queries through the core and through each framework's own pipeline.

    Raises:
        SystemExit: a framework ranks otherwise than the core.
    """
    print("\nmost helped, middling and most harmed by reranking (grade of each document in brackets):")
    for query in queries:
        ids, grades = candidates[query], collection.qrels[query]
        example = Example(collection.queries[query].text, ids, [collection.documents[d].text for d in ids])
        ranked = reranker.rank(example.query, example.texts, top_k=SHOWN)
        print(f"\n“{example.query}”")
        print(f"  {'BM25':48}reranked")
        for before, after in zip(ids, ranked, strict=False):
            left, right = (f"{d:.42} [{grades.get(d, 0)}]" for d in (before, ids[after.index]))
            print(f"  {left:48}{right:48}{after.relevance:.3f}")
        for name, pipeline in (("LlamaIndex", llama_index), ("LangChain", langchain), ("Haystack", haystack)):
            check(name, pipeline(example), ranked, ids)


def check(name: str, found: list[tuple[str, float]], ranked: Ranked, ids: list[str]) -> None:
    """Stop with both rankings when they differ."""
    expected = [(ids[document.index], document.relevance) for document in ranked]
    equal = [d for d, _ in found] == [d for d, _ in expected] and all(
        abs(a - b) < 1e-6 for (_, a), (_, b) in zip(found, expected, strict=True)
    )
    if not equal:
        raise SystemExit(f"{name} ranks otherwise than the core.\nfound:    {found}\nexpected: {expected}")
    print(f"  {name}: the same ranking and relevances")


def llama_index(example: Example) -> list[tuple[str, float]]:
    """A query engine with LlamaIndex's own mock LLM."""
    from llama_index.core.base.base_retriever import BaseRetriever
    from llama_index.core.llms import MockLLM
    from llama_index.core.query_engine import RetrieverQueryEngine
    from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode

    from zerank_integrations.llama_index import ZerankRerank

    class Candidates(BaseRetriever):
        def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
            return [NodeWithScore(node=TextNode(id_=d, text=t)) for d, t in zip(example.ids, example.texts, strict=True)]

    engine = RetrieverQueryEngine.from_args(
        Candidates(), llm=MockLLM(), node_postprocessors=[ZerankRerank("zelo-mini", top_n=SHOWN)]
    )
    return [(found.node.node_id, found.score) for found in engine.query(example.query).source_nodes]


def langchain(example: Example) -> list[tuple[str, float]]:
    """A retriever that compresses what another one found."""
    from langchain_classic.retrievers import ContextualCompressionRetriever
    from langchain_core.callbacks import CallbackManagerForRetrieverRun
    from langchain_core.documents import Document
    from langchain_core.retrievers import BaseRetriever

    from zerank_integrations.langchain import ZerankCompressor

    class Candidates(BaseRetriever):
        def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
            return [Document(id=d, page_content=t) for d, t in zip(example.ids, example.texts, strict=True)]

    retriever = ContextualCompressionRetriever(
        base_retriever=Candidates(), base_compressor=ZerankCompressor("zelo-mini", top_n=SHOWN)
    )
    return [(document.id, document.metadata["relevance_score"]) for document in retriever.invoke(example.query)]


PIPELINE = f"""
components:
  ranker:
    type: haystack_integrations.components.rankers.zerank.ZerankRanker
    init_parameters:
      model: zelo-mini
      top_k: {SHOWN}
connections: []
"""


def haystack(example: Example) -> list[tuple[str, float]]:
    """A pipeline loaded from YAML."""
    from haystack import Document, Pipeline

    documents = [Document(id=d, content=t) for d, t in zip(example.ids, example.texts, strict=True)]
    answer = Pipeline.loads(PIPELINE).run({"ranker": {"query": example.query, "documents": documents}})
    return [(document.id, document.score) for document in answer["ranker"]["documents"]]


if __name__ == "__main__":
    # What the frameworks and their dependencies deprecate among themselves is no news of ours.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    main()
