"""The embedded collection: docstrings of the standard library, with queries and graded qrels of our own.

The documents are read from the interpreter's own library, so nothing is downloaded and nothing is copied into the
package: about 5,000 real documents on every machine, each the docstring of one module, class, function, method
or property. The queries (``queries.jsonl``) and their graded documents (``qrels.tsv``) lie beside this file.

    >>> from zerank_integrations.embedded import load
    >>> collection = load("test")
    >>> print(collection.documents["calendar.isleap"].text)
    calendar.isleap(year)
    Return True for leap years, False for non-leap years.

``python -m zerank_integrations.embedded.collection`` prints the numbers.
"""

import functools
import json
import math
import re
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

Split = Literal["train", "test"]

GRADES: Final[Mapping[int, str]] = types.MappingProxyType({3: "the answer", 2: "also a full answer", 1: "related and useful"})


@dataclass(frozen=True, slots=True)
class Document:
    """One docstring: ``id`` is its qualified name, ``text`` that name with parameters and the docstring."""

    id: str
    text: str


@dataclass(frozen=True, slots=True)
class Query:
    """One query as a person would type it; ``split`` says which half it belongs to."""

    id: str
    text: str
    split: Split


@dataclass(frozen=True, slots=True)
class Collection:
    """Documents by id, queries by id, and for each query the grades (1 to 3) of its relevant documents.

    A document that is not in a query's qrels is not relevant to it. ``missing`` names the relevant documents
    that this interpreter does not have (a module left out of its build, another platform or version); they are
    in no query's qrels.
    """

    documents: Mapping[str, Document]
    queries: Mapping[str, Query]
    qrels: Mapping[str, Mapping[str, int]]
    missing: tuple[str, ...]

    def ndcg(self, run: Mapping[str, Sequence[str]], k: int = 10) -> dict[str, float]:
        """NDCG@k of every query that has a relevant document here, between 0 and 1.

        A document of grade g at rank r (from 1) adds ``(2**g - 1) / log2(1 + r)``; the sum is divided by that
        of the best possible order. Discount: Järvelin and Kekäläinen, Cumulated gain-based evaluation of IR
        techniques, 2002. Gain: Burges et al., Learning to rank using gradient descent, 2005.

        Args:
            run: query id to document ids, best first; a query that is not in it gets 0.
            k: how many ranks count, at least 1.

        Returns:
            Query id to NDCG@k, in the order of ``queries``.

        Raises:
            ValueError: ``k`` is below 1, or a ranking names a document twice.
        """
        if k < 1:
            raise ValueError(f"k is {k}, expected at least 1: the number of ranks that count.")
        measured = {}
        for query_id in self.queries:
            grades = self.qrels[query_id]
            if not grades:
                continue
            ranked = run.get(query_id, ())
            if len(set(ranked)) < len(ranked):
                raise ValueError(
                    f"The ranking of query {query_id!r} names a document twice, expected each once: keep the first of each."
                )
            best = sorted(grades.values(), reverse=True)
            measured[query_id] = _dcg([grades.get(id_, 0) for id_ in ranked[:k]]) / _dcg(best[:k])
        return measured

    def without_shared_word(self) -> tuple[str, ...]:
        """Ids of the queries that share no content word with any of their documents of grade 3.

        Words are compared as ``content_words`` reads them; matching words alone cannot find these answers.
        """
        return tuple(
            query.id
            for query in self.queries.values()
            if (answers := [id_ for id_, grade in self.qrels[query.id].items() if grade == 3])
            and all(content_words(query.text).isdisjoint(content_words(self.documents[id_].text)) for id_ in answers)
        )


def load(split: Split | None = None) -> Collection:
    """The collection: all documents, and the queries of one half (``"train"``, ``"test"``) or of both (None).

    The documents are read once per process, by another one (about a second); every call shares them. They are the same
    whatever this process has imported before.

    Raises:
        ValueError: ``split`` is another word.
        RuntimeError: ``sys.executable`` is no Python that can be started.
    """
    if split not in ("train", "test", None):
        raise ValueError(f"split is {split!r}, expected 'train', 'test', or None for both halves.")
    return _load(split)


@functools.cache
def _load(split: Split | None) -> Collection:
    documents = _documents()
    queries = {query.id: query for query in _queries() if split in (query.split, None)}
    qrels: dict[str, dict[str, int]] = {query_id: {} for query_id in queries}
    missing = set[str]()
    for query_id, document_id, grade in _judgments():
        if query_id not in queries:
            continue
        if document_id in documents:
            qrels[query_id][document_id] = grade
        else:
            missing.add(document_id)
    return Collection(
        documents=documents,
        queries=types.MappingProxyType(queries),
        qrels=types.MappingProxyType({id_: types.MappingProxyType(grades) for id_, grades in qrels.items()}),
        missing=tuple(sorted(missing)),
    )


def _dcg(grades: Sequence[int]) -> float:
    return sum((2**grade - 1) / math.log2(1 + rank) for rank, grade in enumerate(grades, start=1))


def _queries() -> Iterator[Query]:
    for line in _lines("queries.jsonl"):
        yield Query(**json.loads(line))


def _judgments() -> Iterator[tuple[str, str, int]]:
    for line in _lines("qrels.tsv")[1:]:
        query_id, document_id, grade = line.split("\t")
        yield query_id, document_id, int(grade)


def _lines(name: str) -> list[str]:
    return Path(__file__).with_name(name).read_text(encoding="utf-8").splitlines()


# The documents ----------------------------------------------------------------------------------------------


@functools.cache
def _documents() -> Mapping[str, Document]:
    reader = Path(__file__).with_name("docstrings.py")
    # -I and -S: what the user's environment and site-packages bring in must not change a document.
    command = [sys.executable, "-I", "-S", str(reader)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=True, timeout=120)
        rows = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        said = (getattr(error, "stderr", None) or b"")[-500:].decode(errors="replace")
        raise RuntimeError(
            f"{sys.executable!r} did not read the standard library's docstrings ({error} {said}); expected"
            " sys.executable to be a Python that can be started."
        ) from error
    return types.MappingProxyType({id_: Document(id_, text) for id_, text in rows})


# Words ------------------------------------------------------------------------------------------------------

_STOP_WORDS: Final = frozenset(
    """
    a about above after again against all also am an and any are as at be because been before being
    below between both but by can cannot could did do does doing done down during each either else few
    for from further had has have having he her here hers him his how however i if in into is it its
    itself just may me might more most must my myself neither no nor not of off on once one ones only
    onto or other others our ours out over own per same shall she should so some such than that the
    their theirs them then there these they this those through thus to too under until up upon us very
    via was we were what when where whether which while who whom whose why will with within without
    would you your yours
    """.split()  # noqa: SIM905
)
_SUFFIX: Final = re.compile(r"(?<=...)(ations?|ings?|ingly|ions?|ies|ied|[eo]rs?|ed|es|ly|s|e|y)$")


def content_words(text: str) -> frozenset[str]:
    """The words of a text that carry its content: lower case, lightly stemmed, without stop words.

    An identifier gives its parts and itself (``ZipFile``: zip, file, zipfile). It is made to find too many
    equal words rather than too few: whatever looks like an ending goes.
    """
    parts = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", text)
    found = re.findall(r"[^\W_]+", f"{text} {parts}".lower())
    return frozenset(_stem(word) for word in found if len(word) > 1 and word not in _STOP_WORDS)


def _stem(word: str) -> str:
    shorter = _SUFFIX.sub("", word)
    if shorter != word:
        return _stem(shorter)  # copy(ing), cop(y)
    return word[:-1] if len(word) > 3 and word[-1] == word[-2] and word[-1] not in "aeiou" else word  # stopp(ed)


def main() -> None:
    """Prints how large the collection is."""
    lines = [f"{len(load().documents)} documents"]
    for split in ("train", "test"):
        half = load(split)
        grades = [grade for graded in half.qrels.values() for grade in graded.values()]
        share = len(half.without_shared_word()) / len(half.queries)
        by_grade = ", ".join(f"{grades.count(grade)} of grade {grade}" for grade in GRADES)
        lines += [
            f"{split}: {len(half.queries)} queries, {share:.0%} share no content word with their answers",
            f"       {len(grades)} relevant documents ({by_grade}), {len(half.missing)} missing here",
        ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
