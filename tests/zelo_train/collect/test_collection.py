"""Readers: what is there is read, what cannot be read is told with file and line, nothing is dropped."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zelo_train.collect.collection import (
    Collection,
    assemble,
    cut,
    embedded,
    from_datasets,
    is_beir,
    read_beir,
    read_documents,
    read_qrels,
    read_queries,
    read_texts,
)
from zelo_train.errors import CollectionError
from zelo_train.records import Document, Query

DOCUMENTS = [{"_id": "d1", "title": "One", "text": "first\u2028text"}, {"_id": "d2", "title": "", "text": "second"}]
QUERIES = [{"_id": "q1", "text": "which?"}, {"_id": "q2", "text": "what?"}]


def lines(path: Path, rows: list[dict[str, object]]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8", newline="\n")
    return path


@pytest.fixture(params=["", ".gz"])
def beir(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    lines(folder / f"corpus.jsonl{request.param}", DOCUMENTS)
    lines(folder / f"queries.jsonl{request.param}", QUERIES)
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\n")
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq2\td2\t1\n")
    return folder


def test_beir(beir: Path) -> None:
    assert is_beir(beir)
    found = read_beir(beir, "health")
    assert found.documents["d1"] == Document("d1", "first\u2028text", "One")
    assert found.queries["q1"] == Query("q1", "which?", "health", "train")
    assert found.queries["q2"].split == "test"
    assert found.qrels == {"q1": {"d1": 2, "d2": 0}, "q2": {"d2": 1}}
    assert found.relevant("q1") == {"d1": 2}
    assert list(found.of_split("test")) == ["q2"]


def test_what_is_written_is_read(beir: Path, tmp_path: Path) -> None:
    found = read_beir(beir).with_queries([Query("s", "made\ud800up", "", None, synthetic=True)])
    found.write(tmp_path / "out")
    again = read_beir(tmp_path / "out")
    assert (again.documents, again.queries, again.qrels) == (found.documents, found.queries, found.qrels)
    before = (tmp_path / "out" / "corpus.jsonl.gz").read_bytes()
    found.write(tmp_path / "out")
    assert (tmp_path / "out" / "corpus.jsonl.gz").read_bytes() == before, "equal collections are equal files"


def test_a_query_in_two_splits_is_guarded(beir: Path) -> None:
    with (beir / "qrels" / "dev.tsv").open("w") as qrels:
        qrels.write("query-id\tcorpus-id\tscore\nq1\td2\t0\nq2\td1\t1\n")
    found = read_beir(beir)
    assert found.queries["q1"].split == "dev"
    assert found.queries["q2"].split == "test"
    assert set(found.splits["q2"]) == {"dev", "test"}


def test_contradicting_grades_are_refused(beir: Path) -> None:
    (beir / "qrels" / "dev.tsv").write_text("q1\td1\t1\n")
    with pytest.raises(CollectionError, match="expected one grade"):
        read_beir(beir)


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(DOCUMENTS), tmp_path / "corpus.parquet")
    assert [document.id for document in read_documents(tmp_path / "corpus.parquet")] == ["d1", "d2"]
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(CollectionError, match="expected a Parquet file"):
        list(read_documents(tmp_path / "broken.parquet"))


def test_datasets_are_rows() -> None:
    """BEIR's names on the Hub; a `datasets` object iterates as dictionaries."""
    qrels = [{"query-id": "q1", "corpus-id": "d1", "score": 1}]
    found = from_datasets(DOCUMENTS, QUERIES, {"validation": qrels, "test": iter(())}, "law")
    assert found.queries["q1"].split == "dev"
    assert found.queries["q2"].split is None
    assert found.qrels == {"q1": {"d1": 1}}
    assert from_datasets(DOCUMENTS, QUERIES, qrels).qrels == found.qrels
    with pytest.raises(CollectionError, match="row 0: KeyError"):
        from_datasets(DOCUMENTS, QUERIES, [{"query": "q1"}])


def test_queries_one_a_line_and_tab_separated(tmp_path: Path) -> None:
    (tmp_path / "asked.txt").write_text("one\n\n two \n")
    assert [(query.id, query.text) for query in read_queries(tmp_path / "asked.txt")] == [
        ("asked-1", "one"),
        ("asked-3", "two"),
    ]
    (tmp_path / "asked.tsv").write_text("a\tone\nb\ttwo\n")
    assert [query.id for query in read_queries(tmp_path / "asked.tsv", "x")] == ["a", "b"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b'{"_id": "a", "text": "x"}\n{"_id"\n', r"corpus.jsonl:2: no JSON"),
        (b"[1]\n", r"corpus.jsonl:1: list; expected an object"),
        (b'{"text": "x"}\n', r"corpus.jsonl:1: no id among 'text'"),
        (b'{"_id": "a"}\n', r"corpus.jsonl:1: no text among '_id'"),
        (b'{"_id": "a", "text": "\xff"}\n', r"corpus.jsonl:1: byte 0xff is not UTF-8"),
        (b'{"_id": "a\\tb", "text": "x"}\n', "tab or line feed"),
    ],
)
def test_broken_lines_are_told(content: bytes, told: str, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(content)
    with pytest.raises(CollectionError, match=told):
        list(read_documents(path))


def test_files_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(CollectionError, match="No such file"):
        list(read_documents(tmp_path / "none.jsonl"))
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"_id": "a", "text": "x"}' * 99)[:-9])
    with pytest.raises(CollectionError, match=r"cut.jsonl.gz cannot be read"):
        list(read_documents(tmp_path / "cut.jsonl.gz"))
    with pytest.raises(CollectionError, match=r"is a folder; expected a file\. A folder of texts, .* is collect\.source"):
        list(read_documents(tmp_path))
    with pytest.raises(CollectionError, match=r"ends in .csv; expected .jsonl"):
        list(read_documents(tmp_path / "corpus.csv"))
    with pytest.raises(CollectionError, match="expected a folder in BEIR layout"):
        read_beir(tmp_path)


def test_an_id_that_occurs_twice_is_refused() -> None:
    twice = [Document("d", "one"), Document("d", "two")]
    with pytest.raises(CollectionError, match="two documents have the id 'd' \\('one' and 'two'\\)"):
        assemble(twice, [])


def test_null_texts_are_empty_not_dropped(tmp_path: Path) -> None:
    path = lines(tmp_path / "corpus.jsonl", [{"_id": 7, "text": None, "title": None}])
    assert list(read_documents(path)) == [Document("7", "")]


def test_qrels_in_several_forms(tmp_path: Path) -> None:
    path = tmp_path / "qrels.tsv"
    path.write_text("query-id\tcorpus-id\tscore\nq 1\td\t1.0\n")
    assert read_qrels(path) == {"q 1": {"d": 1}}
    path.write_text("q1 0 d1 2\nq1 0 d2 -2\n")
    assert read_qrels(path) == {"q1": {"d1": 2, "d2": 0}}
    for content, told in [
        ("q1\td1\n", ":1: 2 columns"),
        ("q\td\t1\nq\te\tx\n", ":2: the grade is 'x'"),
        ("q\td\t.5\n", "expected a whole number"),
        ("q\td\t1\nq\td\t2\n", ":2: document 'd' has grade 2"),
    ]:
        path.write_text(content)
        with pytest.raises(CollectionError, match=told):
            read_qrels(path)


def test_the_embedded_collection() -> None:
    found = embedded()
    assert len(found.documents) > 3000
    assert {query.split for query in found.queries.values()} == {"train", "test"}
    assert all(document in found.documents for grades in found.qrels.values() for document in grades)


def test_queries_are_put_aside_by_their_text() -> None:
    queries = {str(n): Query(str(n), f"query {n // 2}") for n in range(2000)}
    found = Collection({}, queries).with_split(0.2)
    tested = set(found.of_split("test"))
    assert 300 < len(tested) < 500
    assert all((str(n) in tested) == (str(n + 1) in tested) for n in range(0, 2000, 2)), "equal texts stay together"
    more = Collection({}, {**queries, "new": Query("new", "another")}).with_split(0.2)
    assert set(more.of_split("test")) - {"new"} == tested
    named = Collection({}, {"a": Query("a", "x", split="train"), "b": Query("b", "y")})
    assert named.with_split(0.2) is named


# Folders of texts


def test_a_folder_of_texts(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "sub" / "b.txt").write_text("One two.\r\n\r\nThree four.\r\n", newline="")
    guide = "lost?\n\n# Guide\n\n## Install\n\nRun it.\n\n```\n# no heading\n```\n\n## Use\n\nUse it.\n"
    (tmp_path / "a.md").write_text(guide)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "picture.png").write_bytes(b"\x00")
    found = {document.id: document for document in read_texts(tmp_path, words=20)}
    assert list(found) == ["a.md#0", "a.md#1", "a.md#2", "empty.txt#0", "sub/b.txt#0"]
    assert [found[f"a.md#{n}"].title for n in range(3)] == ["", "Guide > Install", "Guide > Use"]
    assert "# no heading" in found["a.md#1"].text
    for document in found.values():
        assert document.span is not None
        start, end = document.span
        assert (tmp_path / document.source).read_bytes().decode()[start:end] == document.text
    assert found["empty.txt#0"].text == "", "an empty file is for the checks to tell"


def test_folders_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    with pytest.raises(CollectionError, match="expected a BEIR folder or texts"):
        list(read_texts(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(CollectionError, match="byte 2 is not UTF-8"):
        list(read_texts(tmp_path))


@given(
    text=st.text(alphabet="ab .\n!\u3042\u4e2d", max_size=300),
    words=st.integers(1, 12),
    overlap=st.integers(0, 11),
)
def test_every_word_is_in_a_document_and_none_is_too_long(text: str, words: int, overlap: int) -> None:
    from zelo_train.collect.collection import _WORD

    overlap = min(overlap, words - 1)
    spans = list(cut(text, words, overlap))
    covered = set()
    for start, end, _ in spans:
        assert text[start:end].strip() == text[start:end] != ""
        assert len(_WORD.findall(text[start:end])) <= words
        covered.update(range(start, end))
    assert {at for at, letter in enumerate(text) if not letter.isspace()} <= covered
    assert [span[1] for span in spans] == sorted(span[1] for span in spans)


def test_documents_end_where_paragraphs_and_sentences_end() -> None:
    text = "a b c.\n\nd e. f g h. i j.\n\nk l"
    assert [text[start:end] for start, end, _ in cut(text, 5)] == [
        "a b c.\n\nd e.",
        "f g h. i j.",
        "k l",
    ]


def test_overlap_repeats_the_end() -> None:
    text = " ".join(f"w{n}." for n in range(9))
    assert [text[start:end] for start, end, _ in cut(text, 3)] == ["w0. w1. w2.", "w3. w4. w5.", "w6. w7. w8."]
    text = "a b.\n\nc d.\n\ne f."
    assert [text[start:end] for start, end, _ in cut(text, 3, 1)] == ["a b.", "b.\n\nc d.", "d.\n\ne f."]
