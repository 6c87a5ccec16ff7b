"""zelo.yaml as typed, frozen sections, one per stage.

Every setting has its meaning beside it here; `template()` writes the commented zelo.yaml of `zelo init` from them, so that the
two cannot differ. A key that does not exist is refused with the nearest one that does, a wrong value with its line. Keys of
services are never written here, only the names of environment variables that hold them.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from zelo_train.errors import ConfigError

Share = Annotated[float, Field(ge=0, le=1)]


# YAML reads 0.15 as a float; through its shortest decimal form no cent is lost.
def _exact(value: object) -> object:
    return Decimal(str(value)) if isinstance(value, float | int) and not isinstance(value, bool) else value


Money = Annotated[Decimal, BeforeValidator(_exact), Field(ge=0)]


class Section(BaseModel):
    """A part of zelo.yaml: frozen, nothing beside what is declared, nothing converted in silence."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=False)


# collect


class Bm25(Section):
    """Lexical first stage."""

    k1: float = Field(default=1.2, ge=0, description="how soon a repeated word stops counting")
    b: Share = Field(default=0.75, description="how much longer documents are held back")


class Dense(Section):
    """Embedding first stage (pip install "zerank-integrations[train]")."""

    model: str = Field(default="Qwen/Qwen3-Embedding-0.6B", description="any sentence-transformers model: Hub id or folder")
    batch: int = Field(default=32, ge=1, description="texts per step")
    device: str | None = Field(default=None, description="cpu, cuda, cuda:1, mps; empty: the best there is")
    query_prompt: str | None = Field(
        default=None, description="name of the model's prompt for queries; empty: the model's default"
    )


class Passages(Section):
    """How a folder of files is cut into documents."""

    words: int = Field(default=200, ge=20, description="at most so many words in a document; cut at paragraphs, then sentences")
    overlap: int = Field(default=0, ge=0, description="words of the end of one document repeated at the start of the next")

    @model_validator(mode="after")
    def _overlap_is_shorter(self) -> Passages:
        if self.overlap >= self.words:
            raise ValueError(f"overlap is {self.overlap}, expected less than words ({self.words})")
        return self


class Checks(Section):
    """What is looked for before money is spent. Nothing is dropped; the report tells."""

    long_words: int = Field(default=1000, ge=1, description="a document with more words is reported as over-long")
    long_query_words: int = Field(default=64, ge=1, description="a query with more words is reported as over-long")
    near_duplicate: Share = Field(
        default=0.8, description="share of common word triples from which documents are near-duplicates"
    )


class Synthetic(Section):
    """Queries written by a model from documents, marked synthetic."""

    queries: int = Field(default=0, ge=0, description="how many to write; 0: none")
    styles: tuple[Literal["question", "keywords", "sentence"], ...] = Field(
        default=("question", "keywords", "sentence"), description="in turn: a question, search words, a claim or request"
    )
    writer: str = Field(default="", description="the name of the judge (below) whose model writes them")
    round_trip: int = Field(default=10, ge=0, description="kept if BM25 finds the document among so many; 0: keep all")
    seed: int = Field(default=0, description="which documents are drawn")


class Collect(Section):
    """What will be compared: documents, queries, candidates."""

    source: str | None = Field(
        default="embedded",
        description="a BEIR folder, a folder of .txt/.md files, or embedded (the collection inside the package)",
    )
    documents: str | None = Field(default=None, description="or a .jsonl[.gz] or .parquet file of documents (_id, title, text)")
    queries: str | None = Field(
        default=None, description="a file of queries (_id, text), .jsonl[.gz], .parquet, .tsv or one a line"
    )
    qrels: str | None = Field(default=None, description="a .tsv file of grades, or a folder with train.tsv, dev.tsv, test.tsv")
    domain: str = Field(default="", description="one word (health, legal); figures are given by domain")
    language: str = Field(default="english", description="whose endings BM25 takes off; none: take off nothing")
    candidates: Literal["bm25", "dense", "hybrid", "file", "judged"] = Field(
        default="bm25",
        description="which documents are judged: a first stage's best (hybrid fuses both), a run file, or those with grades",
    )
    run: str | None = Field(default=None, description="the run file (TREC or query, document, score), for candidates: file")
    top: int = Field(default=100, ge=1, description="candidates per query; candidates: judged takes all that have grades")
    rrf_k: int = Field(default=60, ge=1, description="constant of reciprocal rank fusion, for hybrid")
    test_share: Share = Field(default=0.2, description="of queries put aside for evaluation, where the source names no splits")
    bm25: Bm25 = Field(default=Bm25(), description="lexical first stage")
    dense: Dense = Field(default=Dense(), description="embedding first stage; needs sentence-transformers")
    passages: Passages = Field(default=Passages(), description="how files become documents")
    checks: Checks = Field(default=Checks(), description="looked for before money is spent; told, never dropped")
    synthetic: Synthetic = Field(default=Synthetic(), description="queries written by a model")

    @field_validator("domain")
    @classmethod
    def _one_word(cls, domain: str) -> str:
        if domain.split() != ([domain] if domain else []):
            raise ValueError(f"{domain!r}; expected one word")
        return domain

    @model_validator(mode="after")
    def _run_goes_with_file(self) -> Collect:
        if self.candidates == "file" and self.run is None:
            raise ValueError("candidates is file and there is no run; expected run: PATH")
        if self.source is None and self.documents is None:
            raise ValueError("there is neither source nor documents; expected one of them")
        return self


# judge


class Price(Section):
    """What a model costs: currency units per million tokens."""

    input: Money = Field(default=Decimal(0), description="per million tokens read")
    cached: Money | None = Field(default=None, description="per million tokens read from the provider's cache; empty: as input")
    output: Money = Field(default=Decimal(0), description="per million tokens written, reasoning included")


class Judge(Section):
    """One judge of the ensemble."""

    name: str = Field(description="yours to choose; stored with every answer", min_length=1)
    kind: Literal["openai", "reranker", "simulated", "replay"] = Field(
        default="openai",
        description="an OpenAI-compatible endpoint, a local reranker, simulated from qrels, or recorded answers",
    )
    model: str = Field(default="", description="what the endpoint calls it; for reranker a Hub id or folder")
    base_url: str | None = Field(default=None, description="the endpoint; empty: OpenAI's own")
    api_key_env: str | None = Field(
        default=None, description="the environment variable that holds the key; never the key itself"
    )
    answer: Literal["soft", "vote", "grade"] = Field(
        default="soft", description="soft reads log-probabilities of one token and is worth most; vote reads a text"
    )
    parameters: dict[str, str | int | float | bool | None] = Field(
        default={}, description="passed on with every request (temperature, seed, …); part of what makes an answer its own"
    )
    concurrency: int = Field(default=32, ge=1, description="questions under way at once, at most; adapts below that")
    max_tokens: int = Field(default=16, ge=1, description="a vote's answer may have; reasoning models need thousands")
    price: Price = Field(default=Price(), description="per million tokens; no price: the cap counts nothing")
    per_minute: int | None = Field(default=None, ge=1, description="requests a minute, at most; empty: no such limit")
    accuracy: float = Field(default=90, gt=50, lt=100, description="simulated only: per cent of pairs it gets right")
    seed: int = Field(default=0, description="simulated only")
    path: str | None = Field(
        default=None, description="replay only: the recorded answers, .jsonl, or .parquet as zelo answers writes it"
    )

    @field_validator("api_key_env")
    @classmethod
    def _a_name_not_a_key(cls, name: str | None) -> str | None:
        # What was given is not repeated: it may be the key.
        if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
            raise ValueError("it is no name of an environment variable; expected one like OPENAI_API_KEY, never the key itself")
        return name


class Pairs(Section):
    """Which pairs are asked."""

    design: Literal["neighbours", "cycles", "information"] = Field(
        default="neighbours", description="cycle then neighbours; random cycles as in the paper; top-weighted information gain"
    )
    rounds: int = Field(default=3, ge=1, description="a round asks as many pairs as there are candidates")
    degree: int = Field(default=8, ge=2, multiple_of=2, description="pairs per document, for cycles, which have one round")
    documents: int = Field(default=2, ge=2, le=20, description="documents shown in one question: 2 for pairs, more for lists")
    seed: int = Field(default=0, description="equal seeds ask equal pairs")


class Judging(Section):
    """Who wins: the ensemble and what it is asked."""

    criterion: str = Field(default="", description="what relevant means in this domain, in a sentence; part of the prompt")
    judges: tuple[Judge, ...] = Field(default=(), description="the ensemble; each answers every question")
    cap: Money | None = Field(
        default=None, description="spend no more than this in this workspace, all runs together; empty: no cap"
    )
    currency: str = Field(default="USD", description="of cap and prices")
    pairs: Pairs = Field(default=Pairs(), description="which pairs are asked")
    splits: tuple[Literal["train", "dev", "test"], ...] = Field(
        default=("train", "dev"), description="whose queries are judged; queries without a split always are"
    )
    document_tokens: int = Field(
        default=512, ge=16, description="of each document a judge reads; the rest is cut, and reported"
    )
    keep_replies: bool = Field(default=False, description="keep whole replies in raw.db")

    @field_validator("judges")
    @classmethod
    def _names_differ(cls, judges: tuple[Judge, ...]) -> tuple[Judge, ...]:
        names = [judge.name for judge in judges]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two judges are called {twice[0]!r}; expected different names")
        return judges


# rate, train, evaluate, export


class Rate(Section):
    """How much better: ratings, calibration, targets."""

    link: Literal["logistic", "erf"] = Field(
        default="logistic", description="Bradley-Terry; erf is Thurstone, the paper's final run"
    )
    prior: float = Field(default=0.3, gt=0, description="precision of the prior on ratings, in logit units")
    judge_terms: bool = Field(default=True, description="each judge's discrimination, position and flip rate, by cross-fitting")
    calibration: Literal["grades", "cross", "none"] = Field(default="grades", description="what makes queries comparable")
    weights: Literal["equal", "precision"] = Field(
        default="equal", description="of examples; precision, 1 / SE², was measured: no gain"
    )
    seed: int = Field(default=0, description="which pairs form which fold")


class Train(Section):
    """Teach it: the student."""

    base: str = Field(default="Qwen/Qwen3-1.7B", description="a base model or a zerank checkpoint: Hub id or folder")
    seed: int = Field(default=0, description="equal seeds give equal runs on equal machines")


class Evaluate(Section):
    """Did it help."""

    split: Literal["test", "dev"] = Field(default="test", description="which queries count")
    top: int = Field(default=10, ge=1, description="ranks that NDCG counts")


class Export(Section):
    """Hand it over."""

    folder: str = Field(default="export/checkpoint", description="where the merged checkpoint goes")


class Config(Section):
    """The whole of zelo.yaml."""

    collect: Collect = Field(default=Collect(), description="what will be compared")
    judge: Judging = Field(default=Judging(), description="who wins")
    rate: Rate = Field(default=Rate(), description="how much better")
    train: Train = Field(default=Train(), description="teach it")
    evaluate: Evaluate = Field(default=Evaluate(), description="did it help")
    export: Export = Field(default=Export(), description="hand it over")


STAGES = tuple(Config.model_fields)


# Reading


def read(path: Path) -> Config:
    """The settings of a zelo.yaml.

    Raises:
        ConfigError: it cannot be read, or holds something that cannot be used; the message names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Make one: zelo init {path.parent}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); expected UTF-8") from None
    return parse(text, name=str(path))


def parse(text: str, name: str = "zelo.yaml") -> Config:
    """The settings of a text.

    Raises:
        ConfigError: it holds something that cannot be used; the message names `name` and the line.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        _refuse_repeated_keys(root, name)
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{name}{where}: no YAML ({problem}); expected lines like `key: value`") from None
    value = {} if value is None else value
    if not isinstance(value, dict):
        raise ConfigError(f"{name}: it holds {_kind(value)}; expected the sections {', '.join(STAGES)}")
    # A section with nothing but comments under it.
    value = {key: {} if part is None and key in STAGES else part for key, part in value.items()}
    try:
        return Config.model_validate(_as_tuples(value))
    except ValidationError as error:
        told = [_told(one, root, name) for one in error.errors(include_url=False)]
        raise ConfigError("\n".join(dict.fromkeys(told))) from None


def _as_tuples(value: object) -> Any:  # noqa: ANN401 - a YAML value
    """Lists become tuples, which are what a frozen section holds; strict validation would refuse a list."""
    if isinstance(value, dict):
        return {key: _as_tuples(part) for key, part in value.items()}
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def _refuse_repeated_keys(node: yaml.Node | None, name: str) -> None:
    """YAML lets the last of equal keys win, and the first would be lost in silence."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_repeated_keys(item, name)
    elif isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                raise ConfigError(
                    f"{name}:{line}: {key.value!r} is here and in line {lines[key.value]}; expected once. Remove one"
                )
            lines[key.value] = line
            _refuse_repeated_keys(value, name)


def _told(error: ErrorDetails, root: yaml.Node | None, name: str) -> str:
    """One mistake in words: where, what was found, what was expected."""
    path = [part for part in error["loc"] if not (isinstance(part, str) and part in _TAGS)]
    where = f"{name}:{_line(root, path)}"
    label = ".".join(str(part) for part in path) or "zelo.yaml"
    found = error["input"]
    match error["type"]:
        case "extra_forbidden":
            return f"{where}: {_unknown(path)}"
        case "missing":
            return f"{where}: {label} is missing; expected {_expected(path)}"
        case "value_error":
            # The validators above say themselves what was found.
            return f"{where}: {label}: {error['ctx']['error']}"
        case kind if kind.endswith(("_type", "_parsing")) or kind in ("is_instance_of", "int_from_float"):
            return f"{where}: {label} is {_kind(found)}; expected {_expected(path)}"
        case _:
            return f"{where}: {label} is {_kind(found)}; {_sentence(error['msg'])}"


# What pydantic puts into a location for the member of a union that it tried.
_TAGS = frozenset({"str", "int", "float", "bool", "none", "decimal", "function-before[_exact(), decimal]"})


def _sentence(message: str) -> str:
    """Pydantic's "Input should be greater than 0" as the end of our sentence."""
    return re.sub(r"^(Input|Value|Decimal input|\w+) should (be|have)", r"expected", message).replace(
        "expected ", "expected ", 1
    )


def _line(node: yaml.Node | None, path: Sequence[str | int]) -> int:
    """The line (from 1) of the nearest thing on the way to `path` that is written down."""
    line = 1
    for part in path:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == str(part):
                    line, node = key.start_mark.line + 1, value
                    break
            else:
                break
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            break
    return line


def _unknown(path: Sequence[str | int]) -> str:
    """That a key does not exist, and the nearest that does: beside it, else anywhere."""
    *above, key = path
    section = _section(above)
    here = list(section.model_fields) if section else []
    place = ".".join(map(str, above))
    if str(key).lower().replace("-", "_") in ("api_key", "apikey", "key", "token", "secret") and "api_key_env" in here:
        return (
            f"{'.'.join(map(str, path))} is not a setting; keys are not written into files. Put it into an environment variable"
            " and give its name: api_key_env: OPENAI_API_KEY"
        )
    everywhere = {full.rpartition(".")[2]: full for full, _ in reversed(list(_settings(Config)))}
    near = difflib.get_close_matches(str(key), here, n=1)
    far = difflib.get_close_matches(str(key), list(everywhere), n=1, cutoff=0.8)
    if str(key) in everywhere or (far and not near):
        # The right word in the wrong section.
        advice = f"did you mean {everywhere[far[0]]}?"
    elif near:
        advice = f"did you mean {near[0]}?"
    else:
        advice = f"known here: {', '.join(here)}"
    return f"{key!r} is not a setting{f' of {place}' if place else ''}; {advice}"


def _settings(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting by its full name, the sections before what is in them."""
    for name, field in section.model_fields.items():
        yield prefix + name, field
        inner = _inner(field.annotation)
        if inner is not None:
            yield from _settings(inner, f"{prefix}{name}.")


def _inner(annotation: object) -> type[Section] | None:
    """The section that an annotation is, or is a tuple of."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for part in typing.get_args(annotation):
        if isinstance(part, type) and issubclass(part, Section):
            return part
    return None


def _section(path: Sequence[str | int]) -> type[Section] | None:
    section: type[Section] | None = Config
    for part in path:
        if isinstance(part, str):
            field = section.model_fields.get(part) if section else None
            section = _inner(field.annotation) if field else None
    return section


def _expected(path: Sequence[str | int]) -> str:
    """What a setting takes, in words."""
    names = [part for part in path if isinstance(part, str)]
    section = _section(names[:-1])
    field = section.model_fields.get(names[-1]) if section and names else None
    if field is None:
        return "another value"
    words = _in_words(field.annotation)
    return f"{words} ({field.description})" if field.description else words


def _in_words(annotation: object) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _in_words(arguments[0])
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_in_words(part) for part in arguments))
    if origin is tuple:
        return f"a list of {_in_words(arguments[0])}"
    if origin is dict or _inner(annotation) is not None:
        return "settings, one a line"
    words: dict[object, str] = {
        str: "a text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        Decimal: "an amount",
        type(None): "nothing",
    }
    return words.get(annotation, str(annotation))


def _kind(value: object) -> str:
    """A value as it is told in a message."""
    match value:
        case None:
            return "empty"
        case bool():
            return f"{str(value).lower()} (true or false)"
        case str():
            return f"{value!r} (a text)"
        case int() | float() | Decimal():
            return f"{value} (a number)"
        case Mapping():
            return "settings"
        case list() | tuple():
            return "a list"
        case _:
            return f"{value} ({type(value).__name__})"


# Writing


def template(values: Mapping[str, Any] | None = None) -> str:
    """A whole zelo.yaml with every setting, its meaning and its default.

    Args:
        values: settings by full name (`collect.source`) that differ from the default.

    Raises:
        ConfigError: a value cannot be used.
    """
    values = dict(values or {})
    lines = [
        "# Settings of this workspace. Everything may be left out; what is here beside your own values are the defaults.",
        "# Relative paths start from this file.",
    ]
    for stage, field in Config.model_fields.items():
        section = _inner(field.annotation)
        assert section is not None, f"{stage} is a section"
        lines += ["", f"{stage}:  # {field.description}", *_lines(section, f"{stage}.", values, indent=1)]
    if values:
        raise ConfigError(f"there is no setting {sorted(values)[0]!r}; expected one that `zelo init` writes")
    text = "\n".join(lines) + "\n"
    parse(text)
    return text


def _lines(section: type[Section], prefix: str, values: dict[str, Any], indent: int) -> Iterator[str]:
    space = "  " * indent
    for name, field in section.model_fields.items():
        full = prefix + name
        inner = _inner(field.annotation)
        if isinstance(field.annotation, type) and inner is not None:
            yield f"{space}{name}:  # {field.description}"
            yield from _lines(inner, f"{full}.", values, indent + 1)
            continue
        value = values.pop(full, field.get_default(call_default_factory=True))
        expected = f" [{_in_words(field.annotation)}]" if typing.get_origin(field.annotation) is Literal else ""
        if inner is not None and value:
            yield f"{space}{name}:  # {field.description}"
            for item in value:
                yield from _item(inner, item, space + "  ")
        else:
            yield f"{space}{name}: {_scalar(value)}  # {field.description}{expected}".replace(":   #", ":  #")
        if inner is not None and not value:
            yield f"{space}  # - name: …  one entry looks like this; what is left out has these values"
            yield from (f"{space}  #   {line}" for line in _lines(inner, "", {"name": ""}, 0) if not line.startswith("name:"))


def _item(section: type[Section], item: Mapping[str, Any], space: str) -> Iterator[str]:
    """One entry of a list, with what is set in it."""
    mark = "- "
    for name, value in item.items():
        yield f"{space}{mark}{name}: {_scalar(value)}  # {section.model_fields[name].description}"
        mark = "  "


def _scalar(value: object) -> str:
    """A value in one line of YAML."""
    if value is None:
        return ""
    if isinstance(value, Decimal):
        return str(value)
    plain = list(value) if isinstance(value, tuple) else value
    text: str = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=1_000_000)
    return text.removesuffix("...\n").strip()
