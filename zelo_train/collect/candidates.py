"""Which documents are judged for a query: a first stage's best, two fused, a run from a file, or those that have grades."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zelo_train.errors import CollectionError, MissingPackage
from zelo_train.records import Candidate, Document, Query

if TYPE_CHECKING:
    import numpy as np

# For each query the only documents that may be its candidates.
Pool = Mapping[str, Sequence[str]]

# Letters and digits; a number keeps its separators, for "1,452.4" is one thing to look for and "452" another. Measured on the
# shared collections against pieces of at least two characters: +.015 NDCG@10 on financial tables, within .006 elsewhere.
WORD = r"(?u)\w+(?:[.,]\d+)+|\w+"

RUN_HEADER = "query-id\tcorpus-id\trank\tscore"


def bm25(
    documents: Sequence[Document],
    queries: Iterable[Query],
    *,
    top: int = 100,
    language: str = "english",
    k1: float = 1.2,
    b: float = 0.75,
    pool: Pool | None = None,
) -> list[Candidate]:
    """The documents that share words with a query, best first.

    Words are compared without their endings and, for English, without stop words. Lucene's BM25, as bm25s computes it. A
    document that shares no word is no candidate, unless `pool` names it. Equal scores are in the order of the documents.

    Args:
        documents: all of them; titles are read.
        queries: all of them.
        top: candidates per query at most; `pool` is not cut.
        language: whose endings are taken off (a Snowball stemmer: english, german, …), or "none".
        k1: how soon a repeated word stops counting.
        b: how much longer documents are held back.
        pool: if given, a query's candidates are exactly its documents here, and queries without any have none.

    Raises:
        ValueError: there is no stemmer of that language.
        MissingPackage: bm25s or PyStemmer is not installed.
    """
    index = Bm25Index(documents, language=language, k1=k1, b=b)
    return list(_ranked(documents, queries, index.scores, top, pool, least=0.0))


class Bm25Index:
    """BM25 over a collection, made once."""

    def __init__(self, documents: Sequence[Document], *, language: str = "english", k1: float = 1.2, b: float = 0.75) -> None:
        try:
            import bm25s
            import Stemmer
        except ImportError as error:
            raise MissingPackage(
                f"{error.name} is not installed; BM25 needs it: pip install bm25s PyStemmer, or take candidates: file"
            ) from error
        if language != "none" and language not in Stemmer.algorithms():
            known = ", ".join(Stemmer.algorithms())
            raise ValueError(f"language is {language!r}; expected none or one of {known}")
        stemmer = None if language == "none" else Stemmer.Stemmer(language)

        def words(texts: list[str]) -> list[list[str]]:
            # bm25s knows stop words of English alone by this name; other languages keep theirs, which weigh little.
            stop = "english" if language == "english" else []
            tokens = bm25s.tokenize(
                texts, token_pattern=WORD, stopwords=stop, stemmer=stemmer, return_ids=False, show_progress=False
            )
            assert isinstance(tokens, list), "with return_ids=False there are words"
            return tokens

        self._words = words
        self._size = len(documents)
        tokens = words([document.full_text for document in documents])
        # bm25s cannot index a collection without any word.
        self._index = bm25s.BM25(k1=k1, b=b) if any(tokens) else None
        if self._index is not None:
            self._index.index(tokens, show_progress=False)

    def scores(self, text: str) -> np.ndarray:
        """One score per document, 0 where no word is shared."""
        import numpy as np

        (tokens,) = self._words([text])
        if self._index is None or not tokens:
            return np.zeros(self._size, dtype=np.float32)
        return np.asarray(self._index.get_scores(tokens))


def dense(
    documents: Sequence[Document],
    queries: Iterable[Query],
    *,
    model: str,
    top: int = 100,
    batch: int = 32,
    device: str | None = None,
    query_prompt: str | None = None,
    pool: Pool | None = None,
    progress: bool = False,
) -> list[Candidate]:
    """The documents nearest to a query in a sentence-transformers model, by cosine, best first.

    Args:
        documents: all of them; titles are read.
        queries: all of them.
        model: Hub id or folder.
        top: candidates per query at most; `pool` is not cut.
        batch: texts per step.
        device: cpu, cuda, mps; None for the best there is.
        query_prompt: the name of the model's prompt for queries; None for the one it has itself, if any.
        pool: if given, a query's candidates are exactly its documents here.
        progress: show a bar.

    Raises:
        MissingPackage: sentence-transformers is not installed.
        CollectionError: the model cannot be loaded, or has no such prompt.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MissingPackage(
            'sentence-transformers is not installed; dense candidates need it: pip install "zerank-integrations[train]",'
            " or take candidates: bm25"
        ) from error
    try:
        encoder = SentenceTransformer(model, device=device)
    except (OSError, ValueError) as error:
        raise CollectionError(
            f"the model {model!r} of collect.dense cannot be loaded ({error}); expected a sentence-transformers model: a Hub id"
            " or a folder"
        ) from error
    if query_prompt is not None and query_prompt not in encoder.prompts:
        known = ", ".join(encoder.prompts) or "none"
        raise CollectionError(f"collect.dense.query_prompt is {query_prompt!r}; the model's prompts are: {known}")
    options: dict[str, Any] = {"batch_size": batch, "normalize_embeddings": True, "show_progress_bar": progress}
    listed = list(queries)
    embedded = encoder.encode_document([document.full_text for document in documents], **options)
    asked = encoder.encode_query([query.text for query in listed], prompt_name=query_prompt, **options)
    by_text = dict(zip((query.text for query in listed), asked, strict=True))
    return list(_ranked(documents, listed, lambda text: embedded @ by_text[text], top, pool, least=None))


def _ranked(
    documents: Sequence[Document],
    queries: Iterable[Query],
    scores: Callable[[str], np.ndarray],
    top: int,
    pool: Pool | None,
    *,
    least: float | None,
) -> Iterator[Candidate]:
    """Each query's best; with `least`, only what scores more than that."""
    import numpy as np

    ids = [document.id for document in documents]
    places = {id: place for place, id in enumerate(ids)}
    for query in queries:
        found = scores(query.text)
        if pool is not None:
            # What the collection lacks cannot be shown; checks tell it.
            among = np.array(sorted(places[id] for id in pool.get(query.id, ()) if id in places), dtype=np.int64)
        elif top < len(ids):
            # All that reach the last place, so that ties there are broken by order, not by the partition.
            border = np.partition(found, len(ids) - top)[len(ids) - top]
            among = np.flatnonzero(found >= border)
        else:
            among = np.arange(len(ids))
        best = among[np.argsort(-found[among], kind="stable")]
        if pool is None:
            best = best[:top] if least is None else best[:top][found[best[:top]] > least]
        for rank, place in enumerate(best, start=1):
            yield Candidate(query.id, ids[place], rank, float(found[place]))


def fuse(*runs: Iterable[Candidate], k: int = 60, top: int = 100) -> list[Candidate]:
    """Reciprocal rank fusion: a document's score is the sum of 1 / (k + rank) over the runs that found it.

    Args:
        runs: the first stages' candidates.
        k: how little the very first ranks stand out (Cormack, Clarke and Büttcher, 2009).
        top: candidates per query at most.

    Returns:
        Queries in the order they are first met; equal scores in the order of the first run.
    """
    scores: dict[str, dict[str, float]] = defaultdict(dict)
    for run in runs:
        for candidate in run:
            row = scores[candidate.query]
            row[candidate.document] = row.get(candidate.document, 0.0) + 1 / (k + candidate.rank)
    return [
        Candidate(query, document, rank, score)
        for query, row in scores.items()
        for rank, (document, score) in enumerate(sorted(row.items(), key=lambda pair: -pair[1])[:top], start=1)
    ]


def write_run(path: Path, candidates: Iterable[Candidate]) -> None:
    """Write candidates as tab-separated query, document, rank and score, with a header."""
    with path.open("w", encoding="utf-8", newline="\n") as lines:
        lines.write(RUN_HEADER + "\n")
        for one in candidates:
            lines.write(f"{one.query}\t{one.document}\t{one.rank}\t{one.score:.6g}\n")


def read_run(path: Path, top: int | None = None) -> list[Candidate]:
    """Candidates of a file.

    Its lines are query, document, rank, score (what `write_run` writes); query, document, score; or TREC's six columns. A first
    line without a number at its end is a header. Ranks are made anew from the scores; equal ones stay in the file's order.

    Args:
        path: the file.
        top: candidates per query at most.

    Raises:
        CollectionError: it cannot be read, or names a document twice for a query; the message names the line.
    """
    rows: dict[str, list[tuple[float, str]]] = defaultdict(list)
    seen: set[tuple[str, str]] = set()
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise CollectionError(f"{path} cannot be read: {error}; expected a run file") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        columns = line.rstrip("\r").split("\t") if "\t" in line else line.split()
        if len(columns) not in (3, 4, 6):
            raise CollectionError(
                f"{path}:{number}: {len(columns)} columns; expected query, document, score, or query, document, rank, score,"
                " or TREC's six"
            )
        query, document = columns[0], columns[2 if len(columns) == 6 else 1]
        score = columns[4 if len(columns) == 6 else -1]
        try:
            value = float(score)
        except ValueError:
            if number == 1:
                continue
            raise CollectionError(f"{path}:{number}: the score is {score!r}; expected a number") from None
        if (query, document) in seen:
            raise CollectionError(f"{path}:{number}: document {document!r} is there twice for query {query!r}; expected once")
        seen.add((query, document))
        rows[query].append((value, document))
    return [
        Candidate(query, document, rank, score)
        for query, row in rows.items()
        for rank, (score, document) in enumerate(sorted(row, key=lambda pair: -pair[0])[:top], start=1)
    ]
