"""The stages in order: what each takes from the workspace, and what it leaves there.

    collect/   corpus.jsonl.gz, queries.jsonl.gz, qrels/, candidates.tsv, report.txt
    judge/     report.txt; the answers themselves are in answers.db
    rate/      ratings.tsv, targets.tsv, report.txt

Stages pass records and know nothing of files; only this module knows where things lie.
"""

from __future__ import annotations

import asyncio
import json
import platform
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zelo_train import config as settings
from zelo_train.config import Config
from zelo_train.cost import Budget, Estimate, Price, millionths
from zelo_train.errors import CapReached, ConfigError, JudgeError, TooFewAnswers, WorkspaceError
from zelo_train.records import Candidate, Judgment, Kind, Question, Status
from zelo_train.store import Stage, Store, Texts, Workspace, canonical, digest, fingerprint, write_whole

if TYPE_CHECKING:
    from zelo_train.collect.collection import Collection as Documents
    from zelo_train.judge.ask import Departure, Ensemble
    from zelo_train.judge.batch import BatchFile
    from zelo_train.judge.judges import Judge
    from zelo_train.judge.pairs import Plan
    from zelo_train.judge.pilot import Pilot
    from zelo_train.rate import Calibration, Ratings

EMBEDDED = "embedded"

# Plans of a query are numbered by round; these are not rounds.
GRADES, CROSS = 0, -1

# Of the queries the other calibration is asked too, so that each audits the other; correlations of fewer mean nothing.
AUDITED_SHARE, AUDITED_LEAST = 0.02, 8

# Pairs of known order that a pilot asks.
PILOT = 200

SIMULATED = "Judges are simulated from qrels: these figures say nothing about LLM judges or about what training will bring."

# What can change without changing an answer.
_NOT_AN_INPUT = ("judge.cap", "judge.currency", "judge.keep_replies")

Say = Callable[[str], None]


def _silent(_: str) -> None:
    """Say nothing."""


# What a stage depends on


def _flat(section: settings.Section, prefix: str) -> dict[str, Any]:
    """Settings by full name, as basic types."""
    return {f"{prefix}.{name}": value for name, value in section.model_dump(mode="json").items()}


def _place(workspace: Workspace, path: str) -> Path:
    """A path of zelo.yaml, relative to it."""
    return workspace.folder / Path(path).expanduser()


def collect_inputs(workspace: Workspace, config: Config) -> dict[str, Any]:
    """What the collect stage depends on.

    Raises:
        ConfigError: a file that zelo.yaml names does not exist.
    """
    section = config.collect
    inputs = _flat(section, "collect")
    for name in ("source", "documents", "queries", "qrels", "run"):
        value = getattr(section, name)
        if value is None or (name == "source" and section.documents is not None):
            continue
        if name == "source" and value == EMBEDDED:
            # The documents are those of the interpreter.
            inputs["the embedded collection"] = f"Python {platform.python_version()}"
            continue
        path = _place(workspace, value)
        if not path.exists():
            raise ConfigError(f"collect.{name} is {value!r} and {path} does not exist; expected a file or folder")
        inputs[f"the content of collect.{name}"] = fingerprint(path)
    return inputs


def judge_inputs(workspace: Workspace, config: Config) -> dict[str, Any]:
    """What the judge stage depends on; `collect` is None before that has been run."""
    collected = workspace.stage("collect")
    section = {name: value for name, value in _flat(config.judge, "judge").items() if name not in _NOT_AN_INPUT}
    for judge in section["judge.judges"]:
        for name in ("price", "concurrency", "per_minute", "api_key_env"):
            judge.pop(name)
    return {
        "the output of collect": collected.fingerprint if collected else None,
        **section,
        "rate.calibration": config.rate.calibration,
    }


def rate_inputs(workspace: Workspace, config: Config) -> dict[str, Any]:
    """What the rate stage depends on; `judge` is None before that is finished."""
    judged = workspace.stage("judge")
    return {"the output of judge": judged.fingerprint if judged else None, **_flat(config.rate, "rate")}


_INPUTS: Mapping[str, Callable[[Workspace, Config], dict[str, Any]]] = {
    "collect": collect_inputs,
    "judge": judge_inputs,
    "rate": rate_inputs,
}

BUILT = tuple(_INPUTS)


@dataclass(frozen=True, slots=True)
class State:
    """Where a stage stands.

    Attributes:
        stage: its name.
        state: "not run", "done", or "stale": made from something else than what is there now.
        reasons: what changed.
        note: what it left when it finished.
    """

    stage: str
    state: Literal["not run", "done", "stale"]
    reasons: tuple[str, ...]
    note: Stage | None


def state(workspace: Workspace, config: Config, stage: str) -> State:
    """Where a stage stands."""
    note = workspace.stage(stage)
    if note is None:
        return State(stage, "not run", (), None)
    try:
        reasons = note.differences(_INPUTS[stage](workspace, config))
    except ConfigError as error:
        reasons = (str(error),)
    before = BUILT[: BUILT.index(stage)]
    stale = [name for name in before if state(workspace, config, name).state == "stale"]
    reasons = (*(f"{name} is stale" for name in stale), *reasons)
    return State(stage, "stale" if reasons else "done", reasons, note)


def status(workspace: Workspace, config: Config) -> list[State]:
    """Where every stage stands, in order."""
    return [state(workspace, config, stage) for stage in BUILT]


# collect


def collect(
    workspace: Workspace, config: Config, *, again: bool = False, progress: bool = False, confirm: Confirm | None = None
) -> tuple[Stage, str]:
    """Read the collection, check it, find candidates. Needs the lock.

    Args:
        workspace: where it goes.
        config: its settings.
        again: even if nothing has changed.
        progress: show bars.
        confirm: asked before a text leaves this machine (only queries written by a model make any leave).

    Returns:
        What it left, and the report for people. If nothing has changed since the last time, that of the last time.
    """
    from zelo_train.collect import candidates as first_stage
    from zelo_train.collect import checks

    now = state(workspace, config, "collect")
    report_path = workspace.stage_folder("collect") / "report.txt"
    if now.state == "done" and now.note is not None and report_path.is_file() and not again:
        return now.note, report_path.read_text(encoding="utf-8")

    section = config.collect
    inputs = collect_inputs(workspace, config)
    collection = read(workspace, config)
    written: list[str] = []
    if section.synthetic.queries:
        collection, written = _written(workspace, config, collection, confirm)
    collection = collection.with_split(section.test_share)
    found = _found(workspace, config, collection, progress=progress)
    report = checks.check(
        collection,
        found,
        long_words=section.checks.long_words,
        long_query_words=section.checks.long_query_words,
        near_duplicate=section.checks.near_duplicate,
    )
    # What cannot be shown to a judge is left out of the run, and told in the report.
    usable = [one for one in found if one.query in collection.queries and one.document in collection.documents]
    text = "\n".join([*written, str(report)]) + "\n"
    folder = workspace.begin("collect")
    collection.write(folder)
    first_stage.write_run(folder / "candidates.tsv", _ranked_anew(usable))
    write_whole(folder / "report.txt", text)
    return workspace.finish("collect", inputs, report.counts), text


def _ranked_anew(candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    ranks: Counter[str] = Counter()
    for one in candidates:
        ranks[one.query] += 1
        yield replace(one, rank=ranks[one.query])


def read(workspace: Workspace, config: Config) -> Documents:
    """The collection that zelo.yaml names, as it is.

    Raises:
        CollectionError: it cannot be read.
    """
    from zelo_train.collect import collection as reading

    section = config.collect
    if section.documents is None and section.source == EMBEDDED:
        return reading.embedded()
    queries_path = _place(workspace, section.queries) if section.queries else None
    qrels_path = _place(workspace, section.qrels) if section.qrels else None
    queries = list(reading.read_queries(queries_path, section.domain)) if queries_path else []
    if section.documents is not None:
        return reading.assemble(reading.read_documents(_place(workspace, section.documents)), queries, qrels_path)
    assert section.source is not None, "the section's own check"
    source = _place(workspace, section.source)
    if reading.is_beir(source):
        if queries_path is None and qrels_path is None:
            return reading.read_beir(source, section.domain)
        whole = reading.read_beir(source, section.domain)
        return reading.assemble(
            whole.documents.values(),
            queries or whole.queries.values(),
            qrels_path or (source / "qrels" if (source / "qrels").is_dir() else None),
        )
    cut = section.passages
    return reading.assemble(reading.read_texts(source, cut.words, cut.overlap), queries, qrels_path)


def _found(workspace: Workspace, config: Config, collection: Documents, *, progress: bool) -> list[Candidate]:
    """The candidates of every query."""
    from zelo_train.collect import candidates as first_stage
    from zelo_train.collect.collection import graded_only

    section = config.collect
    documents, queries = list(collection.documents.values()), list(collection.queries.values())
    if section.candidates == "file":
        assert section.run is not None, "the section's own check"
        return first_stage.read_run(_place(workspace, section.run), section.top)
    pool = graded_only(collection.qrels, collection.queries) if section.candidates == "judged" else None
    runs = []
    if section.candidates in ("bm25", "hybrid", "judged"):
        try:
            lexical = first_stage.bm25(
                documents,
                queries,
                top=section.top,
                language=section.language,
                k1=section.bm25.k1,
                b=section.bm25.b,
                pool=pool,
            )
        except ValueError as error:
            raise ConfigError(f"collect: {error}") from None
        runs.append(lexical)
    if section.candidates in ("dense", "hybrid"):
        runs.append(
            first_stage.dense(
                documents,
                queries,
                model=section.dense.model,
                top=section.top,
                batch=section.dense.batch,
                device=section.dense.device,
                query_prompt=section.dense.query_prompt,
                progress=progress,
            )
        )
    return first_stage.fuse(*runs, k=section.rrf_k, top=section.top) if len(runs) > 1 else runs[0]


def _written(
    workspace: Workspace, config: Config, collection: Documents, confirm: Confirm | None
) -> tuple[Documents, list[str]]:
    """The collection with queries written by a model, and what the report says of them. What was paid for is kept."""
    from zelo_train.collect import queries as writing

    section = config.collect.synthetic
    documents = list(collection.documents.values())
    chosen = [judge for judge in config.judge.judges if judge.name == section.writer and judge.kind == "openai"]
    if not chosen:
        names = ", ".join(judge.name for judge in config.judge.judges if judge.kind == "openai") or "there is none"
        raise ConfigError(
            f"collect.synthetic.writer is {section.writer!r}; expected the name of a judge of kind openai ({names})"
        )
    path = workspace.stage_folder("collect") / "synthetic.jsonl"
    path.parent.mkdir(exist_ok=True)
    known = {}
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            known[row["_id"]] = row["text"]

    with workspace.store(write=True) as store, path.open("a", encoding="utf-8") as lines:
        writer = ModelWriter(chosen[0], _budget(store, config, "collect"))
        wanted = writing.drawn(documents, section.queries, section.styles, section.seed)
        missing = [writing.prompt(*one) for one in wanted if writing.query_id(*one) not in known]
        if missing and writer.host and not (confirm and confirm([writer.departure(missing)])):
            raise WorkspaceError(
                f"texts would go to {writer.host}, which was not confirmed; expected a yes, or --yes in scripts"
            )

        def keep(id: str, text: str) -> None:
            lines.write(json.dumps({"_id": id, "text": text}) + "\n")
            lines.flush()

        async def write() -> list[writing.Written]:
            try:
                return await writing.write_queries(
                    documents,
                    writer,
                    count=section.queries,
                    styles=section.styles,
                    seed=section.seed,
                    domain=config.collect.domain,
                    round_trip=section.round_trip,
                    language=config.collect.language,
                    taken=list(collection.queries.values()),
                    known=known,
                    keep=keep,
                    in_flight=chosen[0].concurrency,
                )
            finally:
                await writer.aclose()

        try:
            found = asyncio.run(write())
        except ExceptionGroup as group:
            # One of many that failed alike: its words are the user's.
            raise _first(group) from None
    reasons = Counter(one.rejected or "used" for one in found)
    told = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())
    return collection.with_queries(one.query for one in found if not one.rejected), [
        f"{len(found)} queries written by {chosen[0].model or chosen[0].name}, marked synthetic: {told}",
        "",
    ]


def _first(group: ExceptionGroup[Exception]) -> Exception:
    first = group.exceptions[0]
    return _first(first) if isinstance(first, ExceptionGroup) else first


class ModelWriter:
    """A judge's model as a writer of queries.

    Args:
        judge: its settings.
        purse: where its money is counted.
    """

    def __init__(self, judge: settings.Judge, purse: Budget) -> None:
        from zelo_train.llm import Client, Gate

        self._model, self._purse = judge.model, purse
        self._most = max(64, judge.max_tokens)
        endpoint = _endpoint(judge)
        self.host = "" if endpoint.local else endpoint.host
        self._price = _price(judge)
        self._client = Client(endpoint, Gate(judge.name, judge.concurrency, judge.per_minute), self._price)

    def _body(self, prompt: str) -> dict[str, Any]:
        return {"model": self._model, "messages": [{"role": "user", "content": prompt}], "max_tokens": self._most}

    def departure(self, prompts: Sequence[str]) -> Departure:
        """What would leave this machine."""
        from zelo_train.judge.ask import Departure
        from zelo_train.llm import likely_tokens

        inward = sum(likely_tokens(self._body(prompt)) for prompt in prompts)
        cost = self._price.of(inward, 0, 24 * len(prompts))
        size = sum(len(prompt.encode()) for prompt in prompts)
        return Departure(self.host, ("the writer of queries",), len(prompts), size, cost, self._purse.left)

    async def write(self, prompt: str) -> str:
        """The model's answer; empty when it gave none."""
        outcome = await self._client.complete(self._body(prompt), lambda reply: reply.text, self._purse, self._most)
        return outcome.answer or ""

    async def aclose(self) -> None:
        """Close its connections."""
        await self._client.chat.aclose()


@dataclass(frozen=True)
class Collected:
    """What the collect stage left."""

    collection: Documents
    candidates: Mapping[str, Sequence[Candidate]]

    def judged(self, splits: Collection[str]) -> dict[str, Sequence[Candidate]]:
        """The candidates of queries of these splits or of none."""
        queries = self.collection.queries
        return {
            query: found
            for query, found in self.candidates.items()
            if query in queries and (queries[query].split is None or queries[query].split in splits)
        }

    def query_text(self, id: str) -> str:
        """A query's text."""
        return self.collection.queries[id].text

    def document_text(self, id: str) -> str:
        """A document's title and text."""
        return self.collection.documents[id].full_text

    def length(self, id: str) -> int:
        """Characters of a document's title and text."""
        return len(self.document_text(id))

    @cached_property
    def texts(self) -> Texts:
        """Hashes of the texts."""
        return Texts(self.query_text, self.document_text)


def collected(workspace: Workspace) -> Collected:
    """Read what the collect stage left.

    Raises:
        WorkspaceError: it has not been run.
    """
    from zelo_train.collect.candidates import read_run
    from zelo_train.collect.collection import read_beir

    if workspace.stage("collect") is None:
        raise WorkspaceError(f"{workspace.folder} has no collection yet; expected `zelo collect` to have been run. Run it")
    folder = workspace.stage_folder("collect")
    by_query: dict[str, list[Candidate]] = {}
    for candidate in read_run(folder / "candidates.tsv"):
        by_query.setdefault(candidate.query, []).append(candidate)
    return Collected(read_beir(folder), by_query)


# judge


Confirm = Callable[[Sequence["Departure"]], bool]


def judges(workspace: Workspace, config: Config, material: Collected) -> list[Judge]:
    """The ensemble that zelo.yaml names.

    Raises:
        ConfigError: there is none, or one lacks what it needs.
    """
    from zelo_train.judge.judges import ChatJudge, ReplayJudge, TeacherJudge
    from zelo_train.judge.prompt import Prompts
    from zelo_train.judge.simulated import SimulatedJudge, truth
    from zelo_train.records import Form

    section = config.judge
    if not section.judges:
        raise ConfigError(
            f"{workspace.settings} names no judges; expected at least one under judge.judges, for example:\n"
            "  judges:\n    - name: local\n      model: Qwen/Qwen3-8B\n      base_url: http://localhost:8000/v1"
        )
    prompts = Prompts.read(section.criterion)
    made: list[Judge] = []
    # One truth for all simulated judges: they differ by their errors.
    truths: dict[int, Mapping[str, Mapping[str, float]]] = {}
    for judge in section.judges:
        match judge.kind:
            case "openai":
                if not judge.model:
                    raise ConfigError(f"judge {judge.name!r} has no model; expected what its endpoint calls it")
                made.append(
                    ChatJudge(
                        judge.name,
                        judge.model,
                        _endpoint(judge),
                        answer_form=Form(judge.answer),
                        prompts=prompts,
                        parameters=judge.parameters,
                        document_tokens=section.document_tokens,
                        max_tokens=judge.max_tokens,
                        price=_price(judge),
                        concurrency=judge.concurrency,
                        per_minute=judge.per_minute,
                    )
                )
            case "reranker":
                from zerank_integrations import Reranker

                made.append(TeacherJudge(judge.name, Reranker(judge.model) if judge.model else Reranker()))
            case "simulated":
                if not material.collection.qrels:
                    raise ConfigError(
                        f"judge {judge.name!r} is simulated from qrels, and the collection has none; expected grades."
                        " Take another kind of judge"
                    )
                if judge.seed not in truths:
                    listed = [one for found in material.candidates.values() for one in found]
                    truths[judge.seed] = truth(listed, material.collection.qrels, judge.seed)
                made.append(SimulatedJudge(judge.name, truths[judge.seed], judge.accuracy, judge.seed, Form(judge.answer)))
            case "replay":
                if judge.path is None:
                    raise ConfigError(f"judge {judge.name!r} has no path; expected the file of its recorded answers")
                made.append(ReplayJudge(judge.name, _place(workspace, judge.path)))
    return made


def _endpoint(judge: settings.Judge) -> Any:  # noqa: ANN401 - llm.Endpoint, imported where it is needed
    from zelo_train.llm import Endpoint

    base_url = judge.base_url or "https://api.openai.com/v1"
    key = judge.api_key_env or ("" if judge.base_url else "OPENAI_API_KEY")
    return Endpoint(base_url, api_key_env=key, in_flight=judge.concurrency)


def _price(judge: settings.Judge) -> Price:
    return Price.per_million(judge.price.input, judge.price.output, judge.price.cached)


def _budget(store: Store, config: Config, run: str) -> Budget:
    cap = None if config.judge.cap is None else millionths(config.judge.cap)
    began = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
    return Budget(store, f"{run} {began}", cap, config.judge.currency)


class Judging:
    """One run of the judge stage: what is asked, in rounds.

    Args:
        workspace: its answers are open for writing.
        config: its settings.
        store: where answers go.
        material: what collect left.
        run: what the run is for; its time is added.
    """

    def __init__(self, workspace: Workspace, config: Config, store: Store, material: Collected, run: str = "judge") -> None:
        from zelo_train.judge.ask import Ensemble
        from zelo_train.judge.pairs import Design

        self.config, self.store, self.material = config, store, material
        self.budget = _budget(store, config, run)
        self.judges = judges(workspace, config, material)
        self.ensemble: Ensemble = Ensemble(
            self.judges,
            material.query_text,
            material.document_text,
            store,
            self.budget,
            run=self.budget.run,
            keep_raw=config.judge.keep_replies,
        )
        self.candidates = {
            query: tuple(one.document for one in found)
            for query, found in material.judged(config.judge.splits).items()
            if len(found) > 1
        }
        self.design = {
            "neighbours": Design.NEIGHBOURS,
            "cycles": Design.CYCLES,
            "information": Design.INFORMATION,
        }[config.judge.pairs.design]
        self.inputs = {query: self._inputs(query) for query in self.candidates}
        self._plans: dict[tuple[str, int], Plan] = {}
        self._shown: dict[tuple[str, str], tuple[int, list[tuple[int, Question]]]] = {}
        self._audits: dict[tuple[str, str], tuple[tuple[Question, ...], tuple[Question, ...]]] = {}

    @property
    def rounds(self) -> int:
        """How many rounds of pairs there are."""
        return 1 if self.config.judge.pairs.design == "cycles" else self.config.judge.pairs.rounds

    @property
    def simulated(self) -> bool:
        """Whether any judge is."""
        probe = Question(Kind.GRADE, ("",), ("",))
        return any(judge.identity(probe).simulated for judge in self.judges)

    def confirmed(self, asked: Sequence[Question] | Mapping[str, Sequence[Question]], confirm: Confirm | None) -> list[str]:
        """The hosts that texts may go to, after whoever decides was told all that would leave."""
        leaving = self.ensemble.departures(asked, self.budget.left)
        return [one.host for one in leaving] if leaving and confirm is not None and confirm(leaving) else []

    def _inputs(self, query: str) -> str:
        """What a query's plan depends on: its texts and the design. The judges are none: another one is asked the same."""
        texts = self.material.texts
        pairs = canonical(self.config.judge.pairs.model_dump(exclude={"rounds"}))
        return digest(pairs, texts.query(query), *map(texts.document, self.candidates[query])).hex()

    # Plans

    def stored(self, round: int) -> dict[str, tuple[Question, ...]]:
        """The plans of a round that were made from what is there now."""
        found = {query: self.store.plan(query, round, self.inputs[query]) for query in self.candidates}
        return {query: plan for query, plan in found.items() if plan is not None}

    def plan(self, round: int) -> dict[str, tuple[Question, ...]]:
        """A round's questions by query; planned now where they were not before, and stored before any is asked."""
        known = self.stored(round)
        missing = [query for query in self.candidates if query not in known]
        if missing:
            made = self._planned(round, missing)
            self.store.put_plans(round, made, self.inputs)
            known.update(made)
        return known

    def _planned(self, round: int, queries: Sequence[str]) -> dict[str, tuple[Question, ...]]:
        from zelo_train.judge.pairs import plan_round, windows

        pairs = self.config.judge.pairs
        ratings = self._first_ratings(round, queries) if round > 1 else {}
        made: dict[str, tuple[Question, ...]] = {}
        for query in queries:
            documents = self.candidates[query]
            values, covariance = ratings.get(query, (None, None))
            if round > 1 and values is None:
                # Too few answers to say who stands near whom; the report tells it.
                made[query] = ()
            elif pairs.documents > 2:
                made[query] = tuple(windows(query, documents, pairs.documents, round, values, pairs.seed))
            else:
                plan = plan_round(
                    self.design,
                    query,
                    documents,
                    self._earlier(query, round),
                    ratings=values,
                    covariance=covariance,
                    rounds=self.rounds,
                    degree=pairs.degree,
                    seed=pairs.seed,
                )
                made[query] = tuple(Question(Kind.COMPARE, (query,), pair) for pair in plan.pairs) if plan else ()
        return made

    def _earlier(self, query: str, round: int) -> list[Plan]:
        """The plans of a query's rounds before this one."""
        from zelo_train.judge.pairs import Plan

        earlier = []
        for number in range(1, round):
            if (query, number) not in self._plans:
                questions = self.store.plan(query, number, self.inputs[query])
                if questions is None:
                    # Not yet planned, nor is any after it.
                    break
                pairs = tuple((one.documents[0], one.documents[1]) for one in questions)
                self._plans[query, number] = Plan(query, number, pairs)
            earlier.append(self._plans[query, number])
        return earlier

    def _as_shown(self, judge: str, query: str, last: int) -> list[tuple[int, Question]]:
        """(round, question) of a query's pairs as a judge is shown them, up to a round or further."""
        from zelo_train.judge.pairs import shown

        known, found = self._shown.get((judge, query), (0, []))
        if known < last:
            plans = self._earlier(query, last + 1)
            found = [(number, pair.question) for number, pair in shown(judge, plans, self.config.judge.pairs.seed)]
            self._shown[judge, query] = len(plans), found
        return found

    def swaps(self, judge: str, query: str) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
        """What a judge is asked of a query's first round beyond the plan: in the other order, and once more."""
        from zelo_train.judge.pairs import audits

        if self.config.judge.pairs.documents > 2:
            return (), ()
        if (judge, query) not in self._audits:
            found = audits(judge, self._earlier(query, 2), self.config.judge.pairs.seed)
            self._audits[judge, query] = (
                tuple(pair.question for pair in found.swapped),
                tuple(pair.question for pair in found.repeated),
            )
        return self._audits[judge, query]

    def _first_ratings(self, round: int, queries: Sequence[str]) -> dict[str, tuple[Any, Any]]:
        """Per query its ratings at a = 1, b = ε = 0 in the order of its candidates, nan where unrated, and their covariance."""
        import numpy as np

        from zelo_train.rate import JudgeTerms, preferences
        from zelo_train.rate import rate as rating
        from zelo_train.rate.fit import covariance

        among = {query: self.candidates[query] for query in queries}
        judgments = [one for one in self.judgments(range(1, round), queries)]
        try:
            rated = rating(preferences(judgments), candidates=among, judges={judge.name: JudgeTerms() for judge in self.judges})
        except TooFewAnswers:
            return {}
        spread = covariance(rated.answers, rated.values) if self.config.judge.pairs.design == "information" else None
        found = {}
        for index, query in enumerate(rated.answers.queries):
            documents = among[query]
            values = {one.document: one.rating for one in rated.of(query)}
            square = None
            if spread is not None:
                first, last = rated.answers.start[index], rated.answers.start[index + 1]
                place = {document: at for at, document in enumerate(rated.answers.documents[first:last])}
                # An unrated document is as uncertain as the prior.
                square = np.eye(len(documents)) / self.config.rate.prior
                at = [here for here, document in enumerate(documents) if document in place]
                of = [place[documents[here]] for here in at]
                square[np.ix_(at, at)] = spread[index][np.ix_(of, of)]
            found[query] = (np.array([values.get(document, np.nan) for document in documents]), square)
        return found

    # Questions

    def questions(
        self, rounds: Collection[int], queries: Iterable[str] | None = None, *, audits: bool = True
    ) -> dict[str, list[Question]]:
        """What each judge is asked in these rounds, in its own order of showing."""
        wanted, last = set(rounds), max(rounds, default=0)
        asked: dict[str, list[Question]] = {judge.name: [] for judge in self.judges}
        for query in self.candidates if queries is None else queries:
            if self.config.judge.pairs.documents > 2:
                listed = [self.store.plan(query, number, self.inputs[query]) or () for number in sorted(wanted)]
                for own in asked.values():
                    own.extend(question for some in listed for question in some)
                continue
            for name, own in asked.items():
                own.extend(question for number, question in self._as_shown(name, query, last) if number in wanted)
                if audits and 1 in wanted:
                    swapped, repeated = self.swaps(name, query)
                    own.extend((*swapped, *repeated))
        return asked

    def judgments(self, rounds: Collection[int], queries: Iterable[str] | None = None) -> Iterator[Judgment]:
        """What is known of these rounds' pairs, each once, and their swapped audits; failures included."""
        asked = self.questions(rounds, queries)
        for judge in self.judges:
            yield from self.answers(judge, asked[judge.name])

    def answers(self, judge: Judge, questions: Iterable[Question]) -> Iterator[Judgment]:
        """A judge's stored answers to these questions, each once."""
        by_identity: dict[bytes, tuple[Any, list[Question]]] = {}
        for question in dict.fromkeys(questions):
            if judge.takes(question):
                identity = judge.identity(question)
                by_identity.setdefault(identity.hash, (identity, []))[1].append(question)
        for identity, listed in by_identity.values():
            yield from self.store.find(identity, listed, self.material.texts).values()

    def outlook(self) -> dict[str, list[Question]]:
        """All that will be asked: what is planned, and for what is not yet as much again as the first round has."""
        self.plan(1)
        open_rounds = [number for number in range(1, self.rounds + 1) if self.stored(number)]
        found = self.questions(open_rounds)
        first = self.questions([1], audits=False)
        for name, own in found.items():
            # A question that is listed again counts as another one.
            own.extend(first[name] * (self.rounds - len(open_rounds)))
        if self.config.rate.calibration != "none":
            planned = self.stored(GRADES)
            for query, documents in self.candidates.items():
                likely = [Question(Kind.GRADE, (query,), (documents[rank - 1],)) for rank in _ranks(len(documents))]
                for own in found.values():
                    own.extend(planned.get(query, likely))
        return found

    # Grades

    def grade_plan(self, ratings: Ratings) -> dict[str, tuple[Question, ...]]:
        """The questions for grades, by query; stored before any is asked."""
        from zelo_train.rate import grade_questions

        known = self.stored(GRADES)
        made: dict[str, list[Question]] = {}
        for question in grade_questions(ratings):
            if question.query not in known:
                made.setdefault(question.query, []).append(question)
        self.store.put_plans(GRADES, made, self.inputs)
        return {**known, **{query: tuple(questions) for query, questions in made.items()}}

    def cross_plan(self, ratings: Ratings, queries: Sequence[str]) -> tuple[Question, ...]:
        """The questions across these queries; stored before any is asked."""
        from zelo_train.judge.pairs import cross_pairs

        inputs = digest("cross", *(self.inputs[query] for query in sorted(queries))).hex()
        known = self.store.plan("", CROSS, inputs)
        if known is None:
            ranked = [(query, [one.document for one in ratings.of(query)]) for query in queries]
            known = tuple(cross_pairs(ranked, seed=self.config.judge.pairs.seed))
            self.store.put_plans(CROSS, {"": known}, {"": inputs})
        return known

    def audited(self, ratings: Ratings) -> list[str]:
        """The few queries that are calibrated both ways."""
        queries = list(ratings.answers.queries)
        count = max(AUDITED_LEAST, round(AUDITED_SHARE * len(queries)))
        return sorted(queries, key=lambda query: digest("audited", query))[:count]


def _ranks(n: int) -> tuple[int, ...]:
    from zelo_train.rate import graded_ranks

    return graded_ranks(n)


def outlook(workspace: Workspace, config: Config) -> tuple[list[Estimate], list[Departure]]:
    """What judging will take, by judge, and what would leave this machine, by host. Needs the lock; asks nothing."""
    with workspace.store(write=True) as store:
        judging = Judging(workspace, config, store, collected(workspace))
        asked = judging.outlook()
        # What is simulated or recorded is there at once, whatever a call takes elsewhere.
        instant = {judge.name for judge in config.judge.judges if judge.kind in ("simulated", "replay")}
        estimates = [replace(one, seconds=0.0) if one.judge in instant else one for one in judging.ensemble.estimates(asked)]
        return estimates, judging.ensemble.departures(asked, judging.budget.left)


def judge(
    workspace: Workspace,
    config: Config,
    *,
    confirm: Confirm | None = None,
    retry: bool = False,
    progress: bool = False,
    say: Say = _silent,
) -> tuple[Stage, str]:
    """Ask the judges, round after round, then for grades. Needs the lock. What was answered before is not asked again.

    Args:
        workspace: where answers go.
        config: its settings.
        confirm: asked once, with all that would leave this machine, before the first text does.
        retry: ask again what a judge gave up on.
        progress: show bars.
        say: told what happens.

    Returns:
        What it left, and the report for people.

    Raises:
        CapReached: the next question could exceed the cap.
        JudgeError: a judge cannot be asked, or a host was not confirmed.
        TooFewAnswers: nothing can be rated.
    """
    from zelo_train.judge.report import report
    from zelo_train.rate import preferences
    from zelo_train.rate import rate as rating

    material = collected(workspace)
    inputs = judge_inputs(workspace, config)
    with workspace.store(write=True, raw=config.judge.keep_replies) as store:
        judging = Judging(workspace, config, store, material)
        if not judging.candidates:
            raise TooFewAnswers(
                f"no query of {', '.join(config.judge.splits)} has two candidates; expected some to judge. See"
                f" {workspace.stage_folder('collect') / 'report.txt'}"
            )
        under_way = sum(len(one.keys) for one in store.batches() if one.state != "read")
        if under_way:
            raise WorkspaceError(
                f"{under_way:,} questions are in batch files that were not read back; asked now they would be paid for twice."
                " Read their output (zelo judge --read-batches FILE), or give them up (zelo judge --drop-batches)"
            )
        if judging.simulated:
            say(SIMULATED)
        ensemble = judging.ensemble
        if retry:
            ensemble.again = frozenset({Status.GAVE_UP})
        confirmed = judging.confirmed(judging.outlook(), confirm)
        folder = workspace.begin("judge")
        judgments: list[Judgment] = []
        for number in range(1, judging.rounds + 1):
            planned = sum(map(len, judging.plan(number).values()))
            say(f"round {number} of {judging.rounds}: {planned:,} questions to each of {len(judging.judges)} judges")
            judgments += ensemble.ask(judging.questions([number]), confirmed=confirmed, progress=progress)
        rounds = range(1, judging.rounds + 1)
        if config.rate.calibration != "none":
            ratings = rating(
                preferences(judging.judgments(rounds)),
                candidates=judging.candidates,
                link=config.rate.link,
                prior=config.rate.prior,
                seed=config.rate.seed,
            )
            graded = judging.grade_plan(ratings)
            few = set(judging.audited(ratings))
            by_cross = config.rate.calibration == "cross"
            grades = [one for query, listed in graded.items() if not by_cross or query in few for one in listed]
            across = judging.cross_plan(ratings, list(ratings.answers.queries) if by_cross else sorted(few))
            say(f"grades: {len(grades):,} questions; across queries: {len(across):,}, to each judge")
            judgments += ensemble.ask([*grades, *across], confirmed=confirmed, progress=progress)
        found = report(judgments, material.length, cut=ensemble.cut, reasons=ensemble.reasons)
        text = "\n".join(found.lines(config.judge.currency)) + "\n"
        write_whole(folder / "report.txt", text)
        counts = Counter(status.value for (_, _, status), count in store.counts().items() for _ in range(count))
        figures = {"queries": len(judging.candidates), "judges": len(judging.judges), **counts}
        return workspace.finish("judge", inputs, figures, simulated=judging.simulated), text


def pilot(
    workspace: Workspace,
    config: Config,
    *,
    sheet: Path | None = None,
    count: int = PILOT,
    confirm: Confirm | None = None,
    progress: bool = False,
) -> Pilot:
    """Ask every judge pairs whose order is known, in both orders. Needs the lock; the answers are kept as any others.

    Args:
        workspace: where answers go.
        config: its settings.
        sheet: what a person filled in; without it the collection's grades are taken.
        count: pairs from grades at most.
        confirm: asked before a text leaves this machine.
        progress: show bars.

    Raises:
        CollectionError: fewer than a hundred pairs are known.
    """
    from zelo_train.judge import pilot as piloting

    material = collected(workspace)
    with workspace.store(write=True, raw=config.judge.keep_replies) as store:
        judging = Judging(workspace, config, store, material, run="pilot")
        if sheet is None:
            known = piloting.from_qrels(judging.candidates, material.collection.qrels, count, config.judge.pairs.seed)
        else:
            known = piloting.from_sheet(sheet)
            gone = [one.query for one in known if one.query not in material.collection.queries]
            gone += [id for one in known for id in (one.better, one.worse) if id not in material.collection.documents]
            if gone:
                raise WorkspaceError(
                    f"{sheet} names {gone[0]!r}, which the collection lacks; expected a sheet of this workspace"
                )
        asked = piloting.questions(known)
        confirmed = judging.confirmed(asked, confirm)
        judgments = judging.ensemble.ask(asked, confirmed=confirmed, progress=progress)
        return piloting.pilot(known, judgments, material.length)


def write_sheet(workspace: Workspace, config: Config, path: Path, count: int = PILOT) -> int:
    """Write a sheet of pairs for a person, best candidates first, one query after another in turn. Returns how many.

    Args:
        workspace: after collect.
        config: its settings.
        path: a .csv file; replaced.
        count: pairs at most.
    """
    from zelo_train.judge.pilot import write_sheet as write
    from zelo_train.records import Comparison

    material = collected(workspace)
    pairs = []
    for query, found in material.judged(config.judge.splits).items():
        # Of near and far ranks: what is next to each other is hard even for people.
        ids = [one.document for one in found]
        steps = [(0, len(ids) // 2), (1, len(ids) - 1), (len(ids) // 4, len(ids) // 2)]
        chosen = [(ids[a], ids[b]) for a, b in dict.fromkeys(steps) if a < b < len(ids)]
        for turn, (one, other) in enumerate(chosen):
            # Blind: which side the better ranked one is on tells nothing.
            left, right = (one, other) if digest(query, one, other)[0] % 2 else (other, one)
            pairs.append((turn, digest("sheet", query), Comparison(query, left, right)))
    pairs.sort(key=lambda row: row[:2])
    return write((pair for _, _, pair in pairs[:count]), path, material.query_text, material.document_text)


# Batches


def _open_questions(judging: Judging, confirmed: Collection[str]) -> tuple[str, dict[str, list[Question]]]:
    """The first round that endpoints have not answered, and its questions; the other judges answer it at once."""
    from zelo_train.judge.judges import ChatJudge
    from zelo_train.rate import preferences
    from zelo_train.rate import rate as rating

    def left(asked: Mapping[str, Sequence[Question]]) -> dict[str, list[Question]]:
        ask_now = {judge.name: asked[judge.name] for judge in judging.judges if not isinstance(judge, ChatJudge)}
        judging.ensemble.ask(ask_now, confirmed=confirmed)
        # Each once: asking again on purpose, to audit a judge, is for `zelo judge`.
        return {
            judge.name: judging.ensemble.unanswered(judge, list(dict.fromkeys(asked[judge.name])))
            for judge in judging.judges
            if isinstance(judge, ChatJudge)
        }

    rounds = range(1, judging.rounds + 1)
    for number in rounds:
        judging.plan(number)
        found = left(judging.questions([number]))
        if any(found.values()):
            return f"round {number} of {judging.rounds}", found
    if judging.config.rate.calibration == "grades":
        ratings = rating(preferences(judging.judgments(rounds)), candidates=judging.candidates)
        grades = [question for listed in judging.grade_plan(ratings).values() for question in listed]
        return "grades", left({judge.name: grades for judge in judging.judges})
    return "the rest", {}


def write_batches(workspace: Workspace, config: Config, folder: Path) -> tuple[str, list[BatchFile]]:
    """Write the next round as files for a provider's batch API (OpenAI's JSONL). Needs the lock; sends nothing.

    What a file can cost is reserved. Questions of a file that was written and not read back are in no second one.

    Returns:
        Which round, and the files; none when all of it is answered or under way.

    Raises:
        CapReached: a file could exceed the cap; those before it are written.
    """
    from zelo_train.judge import batch as batching
    from zelo_train.judge.judges import ChatJudge

    with workspace.store(write=True) as store:
        judging = Judging(workspace, config, store, collected(workspace), run="batch")
        what, left = _open_questions(judging, ())
        written = []
        for judge in judging.judges:
            if not isinstance(judge, ChatJudge):
                continue
            for file in batching.write(judging.ensemble, judge, left.get(judge.name, []), folder, store):
                try:
                    # Never settled by this process: it stays reserved until the answers are read.
                    judging.budget.reserve(judge.name, file.worst)
                except CapReached:
                    store.put_batch(replace(file.batch, state=batching.READ))
                    file.path.unlink()
                    raise
                written.append(file)
        return what, written


def read_batches(workspace: Workspace, config: Config, paths: Sequence[Path]) -> tuple[int, int]:
    """Keep the answers in a provider's output and error files. Needs the lock.

    Returns:
        How many questions are final now, and how many of these files' batches must be asked again.

    Raises:
        JudgeError: a line answers nothing that was asked.
    """
    from zelo_train.judge import batch as batching
    from zelo_train.judge.judges import ChatJudge

    lines = [line for path in paths for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    with workspace.store(write=True) as store:
        judging = Judging(workspace, config, store, collected(workspace), run="batch")
        ensemble = judging.ensemble
        rounds = [number for number in range(1, judging.rounds + 1) if judging.stored(number)]
        asked = judging.questions(rounds)
        grades = [question for listed in judging.stored(GRADES).values() for question in listed]
        answered = {bytes.fromhex(name) for line in lines if (name := _custom_id(line))}
        batches = [one for one in store.batches() if one.state != batching.READ and not answered.isdisjoint(one.keys)]
        final = again = 0
        taken: set[bytes] = set()
        for judge in judging.judges:
            if not isinstance(judge, ChatJudge):
                continue
            questions = dict.fromkeys([*asked[judge.name], *grades])
            by_key = {ensemble.texts.key(judge.identity(question), question): question for question in questions}
            own = [key for one in batches for key in one.keys if key in by_key]
            if not own:
                continue
            mine = [line for line in lines if bytes.fromhex(_custom_id(line)) in by_key]
            found = batching.read(ensemble, judge, [by_key[key] for key in own], mine)
            batching.keep(ensemble, judge, found)
            worst = sum(round(judge.worst(judge.body(ensemble.asked(by_key[key]))) * batching.SHARE) for key in own)
            store.move(judging.budget.run, judge.name, -worst, sum(one.cost for one in found.judgments))
            final, again = final + len(found.judgments), again + len(found.again)
            taken |= set(own)
        if not taken >= answered:
            raise JudgeError(
                f"{len(answered - taken)} lines answer nothing that is under way; expected the output of files that"
                " `zelo judge --write-batches` wrote from these texts and settings"
            )
        for one in batches:
            store.put_batch(replace(one, state=batching.READ))
    return final, again


def drop_batches(workspace: Workspace) -> int:
    """Give up batch files that were not read back. What was reserved for them stays counted. Returns how many files."""
    with workspace.store(write=True) as store:
        dropped = [one for one in store.batches() if one.state != "read"]
        for one in dropped:
            store.put_batch(replace(one, state="read"))
    return len(dropped)


def _custom_id(line: str) -> str:
    """The hexadecimal key that a line answers.

    Raises:
        JudgeError: it is no line of a batch's output.
    """
    try:
        name = json.loads(line)["custom_id"]
        bytes.fromhex(name)
    except (ValueError, KeyError, TypeError):
        raise JudgeError(f"{line[:60]!r} is no line of a batch's output; expected JSON with a custom_id of ours") from None
    return str(name)


# rate


def rate(workspace: Workspace, config: Config) -> tuple[Stage, str]:
    """Ratings, calibration and targets from what the judges answered so far. Needs the lock; asks nothing.

    Returns:
        What it left, and the report for people.

    Raises:
        TooFewAnswers: what there is does not determine a rating.
    """
    from zelo_train.rate import Calibration, JudgeTerms, audit, calibrate, calibrate_across, grades, preferences
    from zelo_train.rate import rate as rating

    inputs = rate_inputs(workspace, config)
    section = config.rate
    with workspace.store() as store:
        judging = Judging(workspace, config, store, collected(workspace))
        rounds = range(1, judging.rounds + 1)
        judgments = list(judging.judgments(rounds))
        ratings = rating(
            preferences(judgments),
            candidates=judging.candidates,
            judges=None if section.judge_terms else {judge.name: JudgeTerms() for judge in judging.judges},
            link=section.link,
            prior=section.prior,
            seed=section.seed,
        )
        graded = [question for listed in judging.stored(GRADES).values() for question in listed]
        found = [one for judge in judging.judges for one in judging.answers(judge, graded)]
        across = _cross_judgments(judging, ratings)
        notes = []
        calibration: Calibration
        if section.calibration == "none":
            # Nothing is known of offsets: each query's mean document counts as half relevant.
            calibration = Calibration({}, 1.0, 0.0, 0.0, {}, 0)
        elif section.calibration == "cross":
            calibration = calibrate_across(ratings, across, grades(found))
        else:
            calibration = calibrate(ratings, grades(found))
        if section.calibration != "none" and across and found:
            other = (
                calibrate(ratings, grades(found))
                if section.calibration == "cross"
                else calibrate_across(ratings, across, grades(found))
            )
            notes.append(f"grades and cross-query pairs: {audit(calibration, other)}")
        # It travels with every target, and nothing after this can take it away.
        simulated = any(one.simulated for one in (*judgments, *found, *across))
    targets = calibration.targets(ratings, weights=section.weights, simulated=simulated)
    if workspace.stage("judge") is None:
        notes.append("judging is not finished: `zelo judge` goes on where it stopped")
    report = "\n".join([*([SIMULATED, ""] if simulated else []), ratings.report(), calibration.report(), *notes]) + "\n"
    folder = workspace.begin("rate")
    mark = ["# " + SIMULATED] if simulated else []
    rows = [f"{one.query}\t{one.document}\t{one.rating:.4f}\t{one.standard_error:.4f}" for one in ratings]
    write_whole(folder / "ratings.tsv", "\n".join([*mark, "query-id\tcorpus-id\trating\tstandard-error", *rows]) + "\n")
    rows = [
        f"{one.query}\t{one.document}\t{one.relevance:.4f}\t{one.weight:.4f}\t{int(one.anchored)}\t{int(one.simulated)}"
        for one in targets
    ]
    header = "query-id\tcorpus-id\trelevance\tweight\tanchored\tsimulated"
    write_whole(folder / "targets.tsv", "\n".join([*mark, header, *rows]) + "\n")
    write_whole(folder / "report.txt", report)
    figures = {"queries": len(ratings.answers.queries), "targets": len(targets)}
    return workspace.finish("rate", inputs, figures, simulated=simulated), report


def _cross_judgments(judging: Judging, ratings: Ratings) -> list[Judgment]:
    """The answers across queries, if they were planned for these ratings' queries."""
    whole = judging.config.rate.calibration == "cross"
    queries = list(ratings.answers.queries) if whole else sorted(judging.audited(ratings))
    inputs = digest("cross", *(judging.inputs[query] for query in sorted(queries))).hex()
    questions = judging.store.plan("", CROSS, inputs) or ()
    return [one for judge in judging.judges for one in judging.answers(judge, questions)]


def names(workspace: Workspace) -> dict[bytes, str]:
    """Ids by text hash, for exports of answers; the first id where texts are equal."""
    material = collected(workspace)
    found: dict[bytes, str] = {}
    for query in material.collection.queries:
        found.setdefault(material.texts.query(query), query)
    for document in material.collection.documents:
        found.setdefault(material.texts.document(document), document)
    return found
