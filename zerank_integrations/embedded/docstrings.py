"""The docstrings of the standard library, read in a process of their own: `python -I -S docstrings.py` writes them as JSON.

In a process that has imported other things they differ: torch replaces `inspect.getfile`, typer `sys.excepthook`, transformers
adds methods to `logging.Logger`, `-OO` drops them all. And whoever wants the documents does not want these 170 modules.
"""

import builtins
import functools
import importlib
import inspect
import json
import re
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Final, cast

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


def documents() -> list[tuple[str, str]]:
    """Id and text of every document, in the order of `MODULES`, those of one module by id."""
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
        found = list[tuple[int, str, str]]()
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
                found.append((place, id_, f"{id_}{_parameters(value)}\n{docstring}"))
    return [(id_, text) for _, id_, text in sorted(found)]


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


if __name__ == "__main__":
    json.dump(documents(), sys.stdout)
