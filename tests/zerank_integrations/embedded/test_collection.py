import doctest
import hashlib
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import Stemmer

import zerank_integrations.embedded.collection as module
from zerank_integrations.embedded import ZELO_MINI, Collection, Document, Query, content_words, load

ROOT = Path(__file__).parents[3]


def run_python(code: str, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", *options, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": "", **environment},
    )


# The documents


def test_thousands_of_documents_under_their_qualified_names() -> None:
    documents = load().documents
    assert 4_500 <= len(documents) <= 6_500
    assert all(id_ == document.id for id_, document in documents.items())
    assert documents["calendar.isleap"].text == "calendar.isleap(year)\nReturn True for leap years, False for non-leap years."
    assert documents["str.casefold"].text.startswith("str.casefold()\nReturn a version of the string")
    assert {"csv", "open", "type", "property", "pathlib.Path.glob", "socket.socket.bind", "typing.Optional"} <= documents.keys()


def test_every_text_is_a_title_line_and_a_docstring_without_addresses() -> None:
    for document in load().documents.values():
        title, _, docstring = document.text.partition("\n")
        assert re.fullmatch(re.escape(document.id) + r"(\([\w, *]*\))?", title), title
        assert docstring == docstring.strip() != ""
        assert not re.search(r" at 0x[0-9a-fA-F]+|<object object", document.text), document.id


def test_no_private_names_no_generated_docstrings() -> None:
    for document in load().documents.values():
        assert not any(part.startswith("_") for part in document.id.split(".")), document.id
        assert "\nAlias for field number" not in document.text


def test_one_document_for_what_is_reexported_or_inherited() -> None:
    documents = load().documents
    # built in, and exported again by io; defined by PurePath and inherited by Path; of RawIOBase and others
    assert "open" in documents and "io.open" not in documents
    assert "pathlib.PurePath.suffix" in documents and "pathlib.Path.suffix" not in documents
    # a method of a hidden instance belongs to the function of the module
    assert "random.randint" in documents and "random.Random.randint" not in documents
    # the same words for str and bytes
    assert "str.replace" in documents and "bytes.replace" not in documents
    words = Counter((id_.rpartition(".")[2], document.text.partition("\n")[2]) for id_, document in documents.items())
    assert max(words.values()) == 1


def test_a_second_load_shares_the_documents() -> None:
    assert load("train").documents is load("test").documents
    assert load() is load()


DIGEST = """
import hashlib; from zerank_integrations.embedded import load
print(hashlib.sha256(repr(list(load().documents.values())).encode()).hexdigest())
"""

# As libraries do it: typer replaces the first, torch the second, transformers adds the third.
PATCHED = """
import inspect, logging, builtins, sys
sys.excepthook = lambda *_: None
inspect.getfile = lambda thing: "x"
logging.Logger.warning_once = lambda self: None
logging.Logger.warning_once.__doc__ = "Warn once."
builtins.display = lambda: None
builtins.display.__doc__ = "Show it."
"""


def test_texts_and_their_order_are_the_same_in_every_process() -> None:
    """Whatever was imported or patched before, and whatever the hash seed is."""
    here = hashlib.sha256(repr(list(load().documents.values())).encode()).hexdigest()
    for before, seed in (("import typer, torch", "1"), (PATCHED, "2")):
        done = subprocess.run(
            [sys.executable, "-c", before + DIGEST],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env={"PATH": "", "PYTHONHASHSEED": seed},
        )
        assert done.stdout.strip() == here
    assert {"sys.excepthook", "inspect.getfile"} <= load().documents.keys()


def test_loading_is_silent_and_leaves_the_warning_filters_alone() -> None:
    done = run_python(
        "import warnings; before = list(warnings.filters)\n"
        "from zerank_integrations.embedded import load; load()\n"
        "assert warnings.filters == before, warnings.filters",
        "-W",
        "error",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_loading_needs_the_standard_library_only_and_keeps_off_the_terminal() -> None:
    done = run_python(
        "import time; begin = time.process_time()\n"
        "from zerank_integrations.embedded import load; load()\n"
        "seconds = time.process_time() - begin\n"
        # What the documents are read from stays in the process that reads it.
        "unwanted = {'torch', 'numpy', 'readline', 'asyncio', 'unittest', 'sqlite3', 'multiprocessing', 'xml.dom'}\n"
        "assert not unwanted & sys.modules.keys(), unwanted & sys.modules.keys()\n"
        "print(seconds)"
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2  # seconds of CPU


def test_the_package_itself_imports_next_to_nothing() -> None:
    done = run_python(
        "import zerank_integrations; before = set(sys.modules)\n"
        "import zerank_integrations.embedded as embedded\n"
        "assert 'zerank_integrations.embedded.collection' not in sys.modules\n"
        "assert not {'torch', 'transformers', 'numpy', 'asyncio', 'unittest'} & (sys.modules.keys() - before)\n"
        "assert set(embedded.__all__) <= set(dir(embedded)) and all(hasattr(embedded, name) for name in embedded.__all__)\n"
        "assert not hasattr(embedded, 'nothing')"
    )
    assert done.returncode == 0, done.stderr


def test_python_without_docstrings_reads_them_all_the_same() -> None:
    done = run_python(DIGEST, "-OO")
    assert done.stdout == run_python(DIGEST).stdout != "", done.stderr


def test_an_interpreter_that_cannot_be_started_is_named() -> None:
    for executable in ("", "/none/python", "/bin/false"):
        done = run_python(f"sys.executable = {executable!r}\nfrom zerank_integrations.embedded import load; load()")
        assert done.returncode == 1
        assert f"RuntimeError: {executable!r} did not read" in done.stderr
        assert "expected sys.executable to be a Python" in done.stderr


def test_zelo_mini_lies_beside_the_collection() -> None:
    assert ZELO_MINI.name == "zelo-mini"
    assert ZELO_MINI.parent == Path(module.__file__).parent


# Queries and qrels


def test_the_halves_are_disjoint_balanced_and_whole() -> None:
    train, test, everything = load("train"), load("test"), load()
    assert not train.queries.keys() & test.queries.keys()
    assert train.queries.keys() | test.queries.keys() == everything.queries.keys()
    assert len(everything.queries) >= 140
    assert abs(len(train.queries) - len(test.queries)) <= 1
    assert {query.split for query in train.queries.values()} == {"train"}
    # as many hard queries in one as in the other (two: wordings differ a little between interpreters)
    assert abs(len(train.without_shared_word()) - len(test.without_shared_word())) <= 2


def test_no_query_is_there_twice() -> None:
    texts = [query.text.lower().strip(" ?") for query in load().queries.values()]
    assert len(set(texts)) == len(texts)


def test_every_graded_document_is_here() -> None:
    everything = load()
    known = sys.platform == "linux" and sys.version_info < (3, 14)
    judged = {document_id for grades in everything.qrels.values() for document_id in grades}
    assert len(everything.missing) <= (0 if known else 0.08 * len(judged)), everything.missing
    assert judged <= everything.documents.keys()
    assert set(everything.missing) == set(load("train").missing) | set(load("test").missing)


def test_every_query_has_its_answer() -> None:
    everything = load()
    assert everything.qrels.keys() == everything.queries.keys()
    for query_id, grades in everything.qrels.items():
        assert set(grades.values()) <= set(module.GRADES)
        assert 3 in grades.values() or everything.missing, everything.queries[query_id]


def test_no_judgment_is_there_twice() -> None:
    lines = Path(module.__file__).with_name("qrels.tsv").read_text(encoding="utf-8").splitlines()
    assert lines[0].split("\t") == ["query-id", "document-id", "grade"]
    pairs = Counter(tuple(line.split("\t")[:2]) for line in lines[1:])
    assert max(pairs.values()) == 1


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_third_of_the_queries_share_no_content_word_with_their_answers(split: module.Split) -> None:
    half = load(split)
    assert len(half.without_shared_word()) >= len(half.queries) / 3


def test_a_known_stemmer_agrees_that_no_content_word_is_shared() -> None:
    everything = load()
    stem = Stemmer.Stemmer("english").stemWord

    def stems(text: str) -> set[str]:
        return {stem(word) for word in re.findall(r"[^\W_]+", text.lower()) if content_words(word)}

    for query_id in everything.without_shared_word():
        query = everything.queries[query_id]
        for document_id, grade in everything.qrels[query_id].items():
            if grade == 3:
                shared = stems(query.text) & stems(everything.documents[document_id].text)
                assert not shared, (query.text, document_id, shared)


def test_content_words() -> None:
    assert content_words("Which of the ZipFile's entries are being copied, copies or copying?") == content_words(
        "zip file zipfile entry copy"
    )
    assert content_words("what is it?") == frozenset()
    assert content_words("stopped") == content_words("stop") != content_words("step")


def test_load_refuses_another_split() -> None:
    with pytest.raises(ValueError, match=r"'dev'.*'train', 'test'"):
        load("dev")  # type: ignore[arg-type]


# NDCG


def tiny(**qrels: dict[str, int]) -> Collection:
    documents = {name: Document(name, name) for name in "abcdef"}
    queries = {id_: Query(id_, id_, "test") for id_ in qrels}
    return Collection(documents=documents, queries=queries, qrels=qrels, missing=())


def test_ndcg_by_hand() -> None:
    collection = tiny(q={"a": 3, "b": 2, "c": 1})
    # gains 7, 3, 1; discounts 1, log2(3), 2
    ideal = 7 + 3 / math.log2(3) + 1 / 2
    assert ideal == pytest.approx(9.392789)
    assert collection.ndcg({"q": ["a", "b", "c"]}) == {"q": pytest.approx(1.0)}
    assert collection.ndcg({"q": ["x", "b", "a"]}) == {"q": pytest.approx((3 / math.log2(3) + 7 / 2) / ideal)}
    assert collection.ndcg({"q": ["x", "b", "a"]}) == {"q": pytest.approx(0.574142, abs=1e-6)}
    assert collection.ndcg({"q": ["c", "d", "e"]}) == {"q": pytest.approx(0.106465, abs=1e-6)}


def test_ndcg_counts_k_ranks_in_the_run_and_in_the_best_order() -> None:
    collection = tiny(q={"a": 3, "b": 2, "c": 1})
    assert collection.ndcg({"q": ["b", "a"]}, k=1) == {"q": pytest.approx(3 / 7)}
    assert collection.ndcg({"q": ["x", "a"]}, k=1) == {"q": 0.0}
    assert collection.ndcg({"q": ["a", "b"]}, k=2) == {"q": pytest.approx(1.0)}


def test_ndcg_of_a_query_outside_the_run_is_nought_and_without_relevant_documents_left_out() -> None:
    collection = tiny(q={"a": 3}, r={"b": 1}, s={})
    assert collection.ndcg({"q": ["a"], "other": ["a"]}) == {"q": 1.0, "r": 0.0}


def test_ndcg_refuses_a_document_ranked_twice_and_k_below_one() -> None:
    collection = tiny(q={"a": 3})
    with pytest.raises(ValueError, match="'q' names a document twice"):
        collection.ndcg({"q": ["a", "a"]})
    with pytest.raises(ValueError, match="k is 0"):
        collection.ndcg({}, k=0)


def test_the_best_order_of_the_collection_scores_one() -> None:
    half = load("test")
    run = {query_id: sorted(grades, key=lambda id_: -grades[id_]) for query_id, grades in half.qrels.items()}
    assert list(half.ndcg(run).values()) == pytest.approx([1.0] * len(half.queries))


# The documentation


def test_the_example_of_the_module_is_true() -> None:
    assert doctest.testmod(module).attempted > 0
    assert doctest.testmod(module).failed == 0


def test_the_snippet_of_the_page_runs_and_its_numbers_are_those_printed(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "collection.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(snippet, "docs/collection.md", "exec"), {})
    assert 0 < float(capsys.readouterr().out) < 1
    module.main()
    printed = capsys.readouterr().out
    if sys.platform == "linux" and sys.version_info[:2] == (3, 11):
        # the count of documents is that of one patch release
        assert printed.partition("\n")[2].strip() in page
    assert f"{len(load('train').queries)} queries" in printed
    assert f"The {len(load().queries)} queries" in page
