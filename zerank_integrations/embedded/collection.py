"""The embedded collection: docstrings of the standard library, with queries and graded qrels of our own.

The documents are read from the running interpreter, so nothing is downloaded and nothing is copied into the
package: about 5,000 real documents on every machine, each the docstring of one module, class, function, method
or property. The queries (``queries.jsonl``) and their graded documents (``qrels.tsv``) lie beside this file.

    >>> from zerank_integrations.embedded import load
    >>> collection = load("test")
    >>> print(collection.documents["calendar.isleap"].text)
    calendar.isleap(year)
    Return True for leap years, False for non-leap years.

``python -m zerank_integrations.embedded.collection`` prints the numbers.
"""

import builtins
import functools
import importlib
import inspect
import json
import math
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, cast

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

    The documents are read once per process (under a second); every call shares them.

    Raises:
        ValueError: ``split`` is another word.
        RuntimeError: Python runs with ``-OO`` and has dropped the docstrings.
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

# What is in 3.11 to 3.14, imports in silence and opens nothing. Earlier modules own what later ones re-export
# (`open` before `io.open`). Importing readline changes the terminal, so what imports it (pdb, doctest,
# rlcompleter) is left out.
MODULES: Final = tuple(
    """
    builtins
    os os.path pathlib shutil tempfile glob fnmatch stat filecmp fileinput linecache io mmap
    string re textwrap difflib unicodedata stringprep codecs struct
    datetime zoneinfo calendar time sched
    math cmath decimal fractions random statistics numbers colorsys
    collections collections.abc heapq bisect array weakref copy pprint reprlib enum graphlib
    itertools functools operator
    contextlib contextvars abc dataclasses typing types atexit
    csv json configparser tomllib netrc plistlib
    pickle copyreg shelve marshal dbm dbm.dumb sqlite3
    zlib gzip bz2 lzma zipfile tarfile
    hashlib hmac secrets uuid base64 binascii quopri
    threading multiprocessing multiprocessing.pool multiprocessing.shared_memory multiprocessing.connection
    concurrent.futures subprocess queue asyncio signal select selectors
    socket ssl socketserver ipaddress
    urllib.request urllib.parse urllib.error urllib.robotparser urllib.response
    http http.client http.server http.cookies http.cookiejar
    ftplib poplib imaplib smtplib xmlrpc.client xmlrpc.server wsgiref.simple_server wsgiref.util
    wsgiref.headers wsgiref.handlers wsgiref.validate webbrowser
    email email.message email.parser email.policy email.generator email.header email.headerregistry
    email.charset email.encoders email.errors email.utils email.contentmanager email.mime.text email.mime.multipart
    email.mime.image email.mime.audio email.mime.application email.mime.base mailbox mimetypes
    html html.parser html.entities xml xml.etree.ElementTree xml.dom xml.dom.minidom xml.dom.pulldom xml.sax
    xml.sax.handler xml.sax.saxutils xml.sax.xmlreader
    logging logging.config logging.handlers argparse optparse getopt getpass shlex cmd gettext locale wave
    platform errno ctypes ctypes.util sys sysconfig gc
    inspect traceback warnings faulthandler tracemalloc timeit trace profile cProfile pstats bdb
    unittest unittest.mock
    importlib importlib.util importlib.abc importlib.machinery importlib.metadata importlib.resources
    pkgutil modulefinder runpy zipimport zipapp venv ensurepip
    ast symtable token tokenize keyword tabnanny pyclbr py_compile compileall dis pickletools code codeop
    pydoc pwd grp fcntl resource termios tty pty syslog
    """.split()  # noqa: SIM905 - a page of quotation marks reads worse
)

# The base in C of socket.socket: as the base it would own `bind`, `connect` and the rest.
_LEFT_OUT: Final = frozenset({"socket.SocketType"})

# Their methods repeat those of set and str word for word; the better known class owns the words.
_REPEATERS: Final[Mapping[type, int]] = {frozenset: 1, bytes: 2, bytearray: 3}

# What namedtuple, dataclass, ast and enum write by themselves: `Point(x, y)`, `Alias for field number 0`.
_GENERATED_CLASS: Final = re.compile(r"\w+\(.*\)|An enumeration\.")
_GENERATED_MEMBER: Final = re.compile(r"Alias for field number \d+")


@functools.cache
def _documents() -> Mapping[str, Document]:
    if sys.flags.optimize >= 2:
        raise RuntimeError(
            "Python runs with -OO (or PYTHONOPTIMIZE=2), which drops the docstrings that this collection "
            "consists of; expected -O at most: start Python without it."
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a deprecated name is read like any other
        modules = [(place, name, _import(name)) for place, name in enumerate(MODULES)]
        objects = [
            (place, name if module == "builtins" else f"{module}.{name}", value)
            for place, module, imported in modules
            for name, value in _names(imported)
        ]
        classes = [(place, id_, value) for place, id_, value in objects if inspect.isclass(value)]
        # A base before what derives from it, so that an inherited member belongs to the base.
        classes.sort(key=lambda entry: (_REPEATERS.get(entry[2], 0), len(entry[2].__mro__)))
        members = [(place, f"{owner}.{name}", member) for place, owner, class_ in classes for name, member in _members(class_)]
        documents = list[tuple[int, Document]]()
        ids, seen = set[str](), set[object]()
        # Members last: `random.randint` owns what `random.Random.randint` repeats.
        for place, id_, value in (*modules, *objects, *members):
            value = _bare(value)
            if id_ in ids or id(value) in seen:
                continue
            seen.add(id(value))
            docstring = _docstring(value)
            # The same words under the same name (`str.upper`, `bytes.upper`) are one document, too.
            words = (id_.rpartition(".")[2], docstring)
            if docstring and words not in seen:
                seen.add(words)
                ids.add(id_)
                documents.append((place, Document(id_, f"{id_}{_parameters(value)}\n{docstring}")))
    documents.sort(key=lambda placed: (placed[0], placed[1].id))
    return types.MappingProxyType({document.id: document for _, document in documents})


def _import(name: str) -> types.ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:  # not on this platform, or not in this build
        return None


def _names(module: types.ModuleType | None) -> list[tuple[str, object]]:
    """A module's public names; of several for one object the one that the object itself bears comes first."""
    if module is None:
        return []
    declared = getattr(module, "__all__", None)
    own = (module.__name__, f"_{module.__name__}")
    found = list[tuple[str, object]]()
    for name in sorted(set(declared or vars(module))):
        value = getattr(module, name, None)
        if name.startswith("_") or inspect.ismodule(value) or f"{module.__name__}.{name}" in _LEFT_OUT:
            continue
        # Without __all__, what a module imported for its own use is not its own.
        if declared is None and module is not builtins and getattr(value, "__module__", None) not in own:
            continue
        found.append((name, value))
    return sorted(found, key=lambda pair: getattr(pair[1], "__name__", None) != pair[0])


def _members(class_: type) -> list[tuple[str, object]]:
    """Public methods and properties of a class and of its bases, each the nearest that has a docstring."""
    found = dict[str, object]()
    for base in class_.__mro__:
        for name, member in vars(base).items():
            if name.startswith("_") or (name in found and found[name].__doc__):
                continue
            is_property = inspect.isdatadescriptor(member) or isinstance(member, functools.cached_property)
            if is_property or inspect.isroutine(member):
                found[name] = member
    return sorted(found.items())


def _bare(value: object) -> object:
    """The function inside a bound method, class method or static method."""
    return value.__func__ if isinstance(value, types.MethodType | classmethod | staticmethod) else value


def _docstring(value: object) -> str:
    docstring = value.__doc__
    if inspect.isclass(value):
        generated = _GENERATED_CLASS
    else:
        generated = _GENERATED_MEMBER
        if docstring == type(value).__doc__:  # of its type (a constant), not its own (typing.Optional)
            docstring = None
    docstring = inspect.cleandoc(docstring).strip() if isinstance(docstring, str) else ""
    return "" if generated.fullmatch(docstring) else docstring


def _parameters(value: object) -> str:
    if not inspect.isclass(value) and not inspect.isroutine(value):
        return ""
    try:
        parameters = inspect.signature(cast(Callable[..., object], value)).parameters.values()
    except (ValueError, TypeError, NameError, AttributeError):
        return ""  # written in C without a readable signature: the docstring's first line has it
    stars: dict[object, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    # Names only: a default may be an object whose repr is its address.
    names = [stars.get(parameter.kind, "") + parameter.name for parameter in parameters]
    return f"({', '.join(name for name in names if name not in ('self', 'cls'))})"


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
