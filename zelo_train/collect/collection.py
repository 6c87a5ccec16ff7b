"""Documents, queries and qrels from where they are: BEIR folders, JSON Lines, Parquet, `datasets`, folders of text files.

Readers take what they find and refuse what they cannot read, with file and line. They drop nothing: what is empty, doubled or
does not fit together is for `checks` to tell.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, TypeVar, cast, get_args

from zelo_train.errors import CollectionError, MissingPackage
from zelo_train.records import Document, Query, Split

Qrels = Mapping[str, Mapping[str, int]]

Record = TypeVar("Record", Document, Query)

ID_FIELDS, TEXT_FIELDS = (
    ("_id", "id", "docid", "query_id", "corpus_id"),
    ("text", "contents", "content", "body", "query", "passage"),
)

SPLITS: tuple[Split, ...] = get_args(Split)

# What people call them, and what they are called here.
SPLIT_NAMES: Mapping[str, Split] = {
    "train": "train", "training": "train",
    "dev": "dev", "valid": "dev", "validation": "dev", "val": "dev",
    "test": "test",
}  # fmt: skip


@dataclass(frozen=True)
class Collection:
    """Documents, queries, and the grades of documents for queries.

    Attributes:
        documents: by id.
        queries: by id, each with its split where the source names one.
        qrels: query id → document id → grade; 0 is "judged, not relevant". Empty when nobody judged anything.
        splits: every split a query is graded in; more than one is a leak that `checks` tells, and the query's own split is then
            the most guarded of them: test, else dev.
    """

    documents: Mapping[str, Document]
    queries: Mapping[str, Query]
    qrels: Qrels = field(default_factory=dict)
    splits: Mapping[str, tuple[Split, ...]] = field(default_factory=dict)

    def of_split(self, split: Split) -> dict[str, Query]:
        """The queries of one split."""
        return {id: query for id, query in self.queries.items() if query.split == split}

    def relevant(self, query: str) -> dict[str, int]:
        """The documents with a grade above 0, and their grades."""
        return {document: grade for document, grade in self.qrels.get(query, {}).items() if grade > 0}

    def with_queries(self, more: Iterable[Query]) -> Collection:
        """The same with further queries.

        Raises:
            CollectionError: an id is taken.
        """
        return replace(self, queries=_by_id((*self.queries.values(), *more), "queries"))

    def with_split(self, test_share: float, seed: int = 0) -> Collection:
        """Queries put aside for evaluation, if the source names no split at all; else the same.

        Queries of equal text stay together. Which are put aside depends on the text alone: more queries move none of them.
        """
        if not test_share or any(query.split for query in self.queries.values()):
            return self

        def split(query: Query) -> Split:
            words = normalised(query.text).encode("utf-8", "surrogatepass")
            drawn = hashlib.blake2b(words, digest_size=8, salt=seed.to_bytes(8, "little")).digest()
            return "test" if int.from_bytes(drawn, "little") < test_share * 2**64 else "train"

        return replace(self, queries={id: replace(query, split=split(query)) for id, query in self.queries.items()})

    def write(self, folder: Path | str) -> None:
        """Write it in BEIR layout: corpus.jsonl.gz, queries.jsonl.gz, qrels/*.tsv. Equal collections give equal bytes."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write_lines(folder / "corpus.jsonl.gz", (_document_row(document) for document in self.documents.values()))
        _write_lines(folder / "queries.jsonl.gz", (_query_row(query) for query in self.queries.values()))
        for old in (folder / "qrels").glob("*.tsv"):
            old.unlink()
        by_split: dict[str, list[str]] = {}
        for id, grades in self.qrels.items():
            query = self.queries.get(id)
            name: str = (query.split if query else None) or "all"
            lines = by_split.setdefault(name, ["query-id\tcorpus-id\tscore"])
            lines.extend(f"{id}\t{document}\t{grade}" for document, grade in grades.items())
        # Without grades there is no folder: an empty one would be refused as such.
        if by_split:
            (folder / "qrels").mkdir(exist_ok=True)
        elif (folder / "qrels").is_dir():
            (folder / "qrels").rmdir()
        for name, lines in by_split.items():
            (folder / "qrels" / f"{name}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def normalised(text: str) -> str:
    """A text as duplicates are found: lower case, single spaces."""
    return " ".join(text.lower().split())


def _document_row(document: Document) -> dict[str, object]:
    row: dict[str, object] = {"_id": document.id, "title": document.title, "text": document.text}
    if document.source:
        row["source"] = document.source
    if document.span:
        row["span"] = document.span
    return row


def _query_row(query: Query) -> dict[str, object]:
    row: dict[str, object] = {"_id": query.id, "text": query.text}
    if query.domain:
        row["domain"] = query.domain
    if query.split:
        row["split"] = query.split
    if query.synthetic:
        row["synthetic"] = True
    return row


def _write_lines(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    # No name and no time in the header: equal collections are equal files, which fingerprints rely on.
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 6, raw, mtime=0) as zipped, io.TextIOWrapper(zipped, "utf-8") as lines:
        for row in rows:
            # A lone surrogate cannot be written as UTF-8; as an escape it survives.
            text = json.dumps(row, ensure_ascii=False)
            lines.write((text if text.isprintable() or _encodes(text) else json.dumps(row)) + "\n")


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# BEIR


def read_beir(folder: Path, domain: str = "") -> Collection:
    """A folder with corpus.jsonl, queries.jsonl (each plain or .gz) and qrels/*.tsv, which may be absent.

    Raises:
        CollectionError: a file is missing or cannot be read.
    """
    documents = read_documents(_plain_or_gz(folder, "corpus.jsonl"))
    queries = read_queries(_plain_or_gz(folder, "queries.jsonl"), domain)
    return assemble(documents, queries, folder / "qrels" if (folder / "qrels").is_dir() else None)


def is_beir(folder: Path) -> bool:
    """Whether a folder has a corpus in BEIR layout."""
    return any((folder / f"corpus.jsonl{end}").is_file() for end in ("", ".gz"))


def _plain_or_gz(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
    raise CollectionError(f"{folder} has no {name} or {name}.gz ({there}); expected a folder in BEIR layout")


def assemble(documents: Iterable[Document], queries: Iterable[Query], qrels: Path | None = None) -> Collection:
    """Put together what was read apart.

    Args:
        documents: all of them.
        queries: all of them.
        qrels: a file, or a folder whose files are named by split.

    Raises:
        CollectionError: an id occurs twice, or the qrels cannot be read.
    """
    by_id = _by_id(queries, "queries")
    grades: dict[str, dict[str, int]] = {}
    splits: dict[str, list[Split]] = {}
    for split, path in qrels_files(qrels):
        for query, row in read_qrels(path).items():
            merged = grades.setdefault(query, {})
            for document, grade in row.items():
                if merged.get(document, grade) != grade:
                    raise CollectionError(
                        f"{path} grades document {document!r} for query {query!r} {grade}, another file {merged[document]};"
                        " expected one grade. Remove one"
                    )
                merged[document] = grade
            if split is not None:
                splits.setdefault(query, []).append(split)
    for id, found in splits.items():
        guarded = max(found, key=SPLITS.index)
        if id in by_id:
            by_id[id] = replace(by_id[id], split=guarded)
    return Collection(_by_id(documents, "documents"), by_id, grades, {id: tuple(found) for id, found in splits.items()})


def _by_id(records: Iterable[Record], what: str) -> dict[str, Record]:
    found: dict[str, Record] = {}
    for record in records:
        if found.setdefault(record.id, record) is not record:
            raise CollectionError(
                f"two {what} have the id {record.id!r} ({_start(found[record.id].text)} and {_start(record.text)});"
                " expected each once. Rename or remove one"
            )
    return found


def _start(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:39] + "…")


# Files


def read_documents(path: Path) -> Iterator[Document]:
    """Documents of a .jsonl, .jsonl.gz or .parquet file with `_id` or `id`, `text`, and if there `title`, `source`, `span`.

    Raises:
        CollectionError: it cannot be read; the message names the line.
    """
    for place, row in read_rows(path):
        yield _document(row, place)


def read_queries(path: Path, domain: str = "") -> Iterator[Query]:
    """Queries of a .jsonl, .jsonl.gz, .parquet, .tsv (id, text) or .txt (one a line) file.

    Args:
        path: the file.
        domain: of queries that name none themselves.

    Raises:
        CollectionError: it cannot be read; the message names the line.
    """
    if path.suffix in (".tsv", ".txt"):
        for number, line in enumerate(_lines(path), start=1):
            if not line.strip():
                continue
            id, tab, text = line.partition("\t") if path.suffix == ".tsv" else (f"{path.stem}-{number}", "\t", line)
            if not tab:
                raise CollectionError(f"{path}:{number}: no tab in {_start(line)}; expected an id, a tab and the query")
            yield Query(id, text.strip(), domain)
        return
    for place, row in read_rows(path):
        yield _query(row, place, domain)


def read_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each row of a .jsonl, .jsonl.gz or .parquet file, and where it is.

    Raises:
        CollectionError: it cannot be read, or has another ending.
        MissingPackage: pyarrow is not installed.
    """
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    if path.is_dir():
        raise CollectionError(f"{path} is a folder; expected a file. A folder of texts, or in BEIR layout, is collect.source")
    if not path.name.endswith((".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".json")):
        raise CollectionError(f"{path} ends in {path.suffix or 'nothing'}; expected .jsonl, .jsonl.gz or .parquet. Rename it")
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise CollectionError(f"{path}:{number}: no JSON ({error}); expected one object per line") from None
        if not isinstance(row, dict):
            raise CollectionError(f"{path}:{number}: {type(row).__name__}; expected an object with _id and text")
        yield f"{path}:{number}", row


def _parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingPackage("pyarrow is not installed; it reads Parquet files: pip install pyarrow") from error
    number = 0
    try:
        for batch in pq.ParquetFile(path).iter_batches(batch_size=10_000):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}: row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise CollectionError(f"{path} cannot be read: {error}; expected a Parquet file") from None


def _lines(path: Path) -> Iterator[str]:
    """Lines by line feeds alone, for JSON texts may hold other separators."""
    try:
        with cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb") as content:
            for number, line in enumerate(content, start=1):
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                except UnicodeDecodeError as error:
                    raise CollectionError(
                        f"{path}:{number}: byte 0x{line[error.start]:02x} is not UTF-8; expected UTF-8."
                        " Convert it: iconv -t utf-8"
                    ) from None
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CollectionError(f"{path} cannot be read: {reason}; expected a file, plain or .gz") from None


def _document(row: Mapping[str, Any], place: str) -> Document:
    span = row.get("span")
    return Document(
        id=_id(row, place),
        text=_text(row, place),
        title=str(row.get("title") or ""),
        source=str(row.get("source") or ""),
        span=(int(span[0]), int(span[1])) if span is not None else None,
    )


def _query(row: Mapping[str, Any], place: str, domain: str) -> Query:
    split = row.get("split")
    if split is not None and split not in SPLIT_NAMES:
        raise CollectionError(f"{place}: split is {split!r}; expected {', '.join(SPLITS)}")
    return Query(
        id=_id(row, place),
        text=_text(row, place),
        domain=str(row.get("domain") or domain),
        split=SPLIT_NAMES[split] if split is not None else None,
        synthetic=bool(row.get("synthetic", False)),
    )


def _id(row: Mapping[str, Any], place: str) -> str:
    for name in ID_FIELDS:
        value = row.get(name)
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
            id = str(value)
            if "\t" in id or "\n" in id:
                raise CollectionError(
                    f"{place}: the id {id!r} has a tab or line feed; expected none, for qrels are tab-separated"
                )
            return id
    raise CollectionError(f"{place}: no id among {', '.join(map(repr, row))}; expected one in '_id' or 'id'")


def _text(row: Mapping[str, Any], place: str) -> str:
    for name in TEXT_FIELDS:
        if isinstance(row.get(name), str):
            return str(row[name])
    if any(name in row and row[name] is None for name in TEXT_FIELDS):
        return ""
    raise CollectionError(f"{place}: no text among {', '.join(map(repr, row))}; expected one in 'text'")


# Qrels


def qrels_files(path: Path | None) -> list[tuple[Split | None, Path]]:
    """The files of grades at a place, each with the split its name tells.

    Raises:
        CollectionError: there is nothing.
    """
    if path is None:
        return []
    if path.is_file():
        return [(SPLIT_NAMES.get(path.name.split(".")[0]), path)]
    files = sorted({*path.glob("*.tsv"), *path.glob("*.tsv.gz"), *path.glob("*.txt")}) if path.is_dir() else []
    if not files:
        raise CollectionError(f"{path} has no grades; expected a .tsv file, or a folder with train.tsv, dev.tsv or test.tsv")
    return [(SPLIT_NAMES.get(file.name.split(".")[0]), file) for file in files]


def read_qrels(path: Path) -> dict[str, dict[str, int]]:
    """Grades: query, document, grade separated by tabs (BEIR, with or without header), or TREC's four columns.

    A negative grade, TREC's mark for spam, is read as 0.

    Raises:
        CollectionError: a line has another number of columns, a grade that is no whole number, or contradicts another.
    """
    found: dict[str, dict[str, int]] = {}
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        columns = line.split("\t") if "\t" in line else line.split()
        if len(columns) not in (3, 4):
            raise CollectionError(f"{path}:{number}: {len(columns)} columns; expected query, document, grade separated by tabs")
        query, document, grade = columns[0], columns[-2], columns[-1].strip()
        try:
            value = float(grade)
        except ValueError:
            if number == 1:  # the header
                continue
            raise CollectionError(f"{path}:{number}: the grade is {grade!r}; expected a whole number") from None
        if not value.is_integer():
            raise CollectionError(f"{path}:{number}: the grade is {grade}; expected a whole number")
        row = found.setdefault(query, {})
        if row.setdefault(document, max(0, int(value))) != max(0, int(value)):
            raise CollectionError(
                f"{path}:{number}: document {document!r} has grade {grade} for query {query!r}, before it had {row[document]};"
                " expected one grade. Remove one line"
            )
    return found


# datasets


def from_datasets(
    corpus: Iterable[Mapping[str, Any]],
    queries: Iterable[Mapping[str, Any]],
    qrels: Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Mapping[str, Any]]] = (),
    domain: str = "",
) -> Collection:
    """A collection from `datasets` objects, or anything else that gives rows as mappings.

    Args:
        corpus: rows with `_id` or `id`, `text`, and if there `title`.
        queries: rows with `_id` or `id`, `text`.
        qrels: rows with `query-id`, `corpus-id`, `score` (BEIR's names on the Hub), or such rows by split.
        domain: of the queries.

    Raises:
        CollectionError: a row lacks what it needs.
    """
    documents = _by_id((_document(row, f"corpus, row {n}") for n, row in enumerate(corpus)), "documents")
    by_id = _by_id((_query(row, f"queries, row {n}", domain) for n, row in enumerate(queries)), "queries")
    grades: dict[str, dict[str, int]] = {}
    splits: dict[str, list[Split]] = {}
    parts = qrels.items() if isinstance(qrels, Mapping) else [("", qrels)]
    for name, rows in parts:
        for number, row in enumerate(rows):
            try:
                query, document, grade = str(row["query-id"]), str(row["corpus-id"]), max(0, int(row["score"]))
            except (KeyError, TypeError, ValueError) as error:
                raise CollectionError(
                    f"qrels {name}, row {number}: {type(error).__name__} {error};"
                    " expected query-id, corpus-id and a whole score"
                ) from None
            grades.setdefault(query, {})[document] = grade
            split = SPLIT_NAMES.get(name)
            if split is not None and split not in splits.setdefault(query, []):
                splits[query].append(split)
    for id, found in splits.items():
        if id in by_id:
            by_id[id] = replace(by_id[id], split=max(found, key=SPLITS.index))
    return Collection(documents, by_id, grades, {id: tuple(found) for id, found in splits.items()})


# The collection inside the package


def embedded() -> Collection:
    """The docstrings of the standard library, with graded queries: what runs without a download."""
    from zerank_integrations.embedded import load

    loaded = load()
    return Collection(
        documents={id: Document(id, document.text) for id, document in loaded.documents.items()},
        queries={id: Query(id, query.text, "python", query.split) for id, query in loaded.queries.items()},
        qrels={id: dict(grades) for id, grades in loaded.qrels.items() if grades},
        splits={id: (query.split,) for id, query in loaded.queries.items()},
    )


# A folder of text files

TEXT_FILES = (".txt", ".md", ".markdown", ".rst")

_PARAGRAPH = re.compile(r"\n[ \t]*\n\s*")
_SENTENCE = re.compile(r"(?<=[.!?\u3002\uff01\uff1f])\s+|\n+")
# Chinese and Japanese have no spaces: each of their characters counts as a word.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+")
_HEADING = re.compile(r"^(#{1,6})[ \t]+(.+?)[ \t#\r]*$", re.MULTILINE)
_FENCE = re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.MULTILINE | re.DOTALL)


def read_texts(folder: Path, words: int = 200, overlap: int = 0) -> Iterator[Document]:
    """Documents cut from the .txt, .md and .rst files under a folder, hidden ones apart.

    A document ends where a paragraph ends, if the next would make it too long; a longer paragraph is cut at sentences, a
    longer sentence at words. A Markdown heading begins a new document and, with those above it, is its title. The id is the
    file's path under the folder and the number in it; `span` are the characters in the file, so that
    `text == file[start:end]`.

    Args:
        folder: searched to the bottom.
        words: in a document at most.
        overlap: words of a document's end that begin the next.

    Raises:
        CollectionError: there is no such file, or one is not UTF-8.
    """
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in TEXT_FILES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    if not files:
        raise CollectionError(f"{folder} holds no {', '.join(TEXT_FILES)} file; expected a BEIR folder or texts")
    for path in files:
        name = path.relative_to(folder).as_posix()
        try:
            # Line ends as they are, so that spans count what is in the file.
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise CollectionError(
                f"{path}: byte {error.start} is not UTF-8; expected UTF-8. Convert it: iconv -t utf-8"
            ) from None
        markdown = path.suffix.lower() in (".md", ".markdown")
        pieces = list(cut(text, words, overlap, markdown=markdown))
        for number, (start, end, title) in enumerate(pieces):
            yield Document(f"{name}#{number}", text[start:end], title, source=name, span=(start, end))
        if not pieces:
            # An empty file is a document that the checks report, not nothing.
            yield Document(f"{name}#0", "", source=name, span=(0, 0))


def cut(text: str, words: int, overlap: int = 0, *, markdown: bool = False) -> Iterator[tuple[int, int, str]]:
    """Where a text is cut: (start, end, title) of each piece, in order. Every word is in at least one piece."""
    for start, end, title in _sections(text) if markdown else [(0, len(text), "")]:
        spans = list(_units(text, start, end, words))
        first = 0
        while first < len(spans):
            last, count = first, spans[first][2]
            while last + 1 < len(spans) and count + spans[last + 1][2] <= words:
                last += 1
                count += spans[last][2]
            begin = spans[first][0]
            if overlap and first:
                before = [word.start() for word in _WORD.finditer(text, start, begin)][-overlap:]
                # The words that are repeated count, too.
                room = max(0, words - count)
                begin = before[-min(room, len(before)) :][0] if before and room else begin
            yield begin, spans[last][1], title
            first = last + 1


def _sections(text: str) -> Iterator[tuple[int, int, str]]:
    """Each Markdown heading's own text; its title names the headings above it, too. Inside a fence there are none."""
    fences = [match.span() for match in _FENCE.finditer(text)]
    headings = [match for match in _HEADING.finditer(text) if not any(a <= match.start() < b for a, b in fences)]
    yield 0, headings[0].start() if headings else len(text), ""
    above: list[tuple[int, str]] = []
    for place, heading in enumerate(headings):
        level = len(heading[1])
        above = [*(one for one in above if one[0] < level), (level, heading[2].strip())]
        end = headings[place + 1].start() if place + 1 < len(headings) else len(text)
        yield heading.end(), end, " > ".join(title for _, title in above)


def _units(text: str, start: int, end: int, words: int) -> Iterator[tuple[int, int, int]]:
    """Paragraphs; of longer ones sentences; of longer ones runs of words: (start, end, words), none longer than `words`."""
    for a, b in _split(text, start, end, _PARAGRAPH):
        count = _count(text, a, b)
        if count <= words:
            yield a, b, count
            continue
        for c, d in _split(text, a, b, _SENTENCE):
            found = [word.span() for word in _WORD.finditer(text, c, d)]
            for at in range(0, len(found), words):
                some = found[at : at + words]
                yield some[0][0], some[-1][1], len(some)


def _split(text: str, start: int, end: int, border: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    """The parts between borders, without the white space around them."""
    at = start
    for match in [*border.finditer(text, start, end), None]:
        stop = match.start() if match else end
        while at < stop and text[at].isspace():
            at += 1
        last = stop
        while last > at and text[last - 1].isspace():
            last -= 1
        if at < last:
            yield at, last
        at = match.end() if match else end


def _count(text: str, start: int, end: int) -> int:
    return sum(1 for _ in _WORD.finditer(text, start, end))


def graded_only(qrels: Qrels, queries: Iterable[str]) -> dict[str, Sequence[str]]:
    """For each query the documents that have a grade, zeros included, in the order of their ids."""
    return {query: sorted(qrels[query]) for query in queries if qrels.get(query)}
