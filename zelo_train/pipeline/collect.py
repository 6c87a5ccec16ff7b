"""The collect stage: the collection that zelo.yaml names, checked, with candidates for every query."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from zelo_train import config as settings
from zelo_train.config import Config
from zelo_train.cost import Budget
from zelo_train.errors import ConfigError, WorkspaceError
from zelo_train.interrupt import run
from zelo_train.pipeline.judges import Confirm, budget, endpoint, price
from zelo_train.pipeline.stages import EMBEDDED, collect_inputs, model_at, place, state
from zelo_train.records import Candidate
from zelo_train.store import Stage, Texts, Workspace, write_whole

if TYPE_CHECKING:
    from zelo_train.collect.collection import Collection as Documents
    from zelo_train.judge.ask import Departure


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
    queries_path = place(workspace, section.queries) if section.queries else None
    qrels_path = place(workspace, section.qrels) if section.qrels else None
    queries = list(reading.read_queries(queries_path, section.domain)) if queries_path else []
    if section.documents is not None:
        return reading.assemble(reading.read_documents(place(workspace, section.documents)), queries, qrels_path)
    assert section.source is not None, "the section's own check"
    source = place(workspace, section.source)
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
        return first_stage.read_run(place(workspace, section.run), section.top)
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
                model=model_at(workspace, section.dense.model),
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
        writer = ModelWriter(chosen[0], budget(store, config, "collect"))
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
            found = run(write())
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
        where = endpoint(judge)
        self.host = "" if where.local else where.host
        self._price = price(judge)
        self._client = Client(where, Gate(judge.name, judge.concurrency, judge.per_minute), self._price)

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


def names(workspace: Workspace) -> dict[bytes, str]:
    """Ids by text hash, for exports of answers; the first id where texts are equal."""
    material = collected(workspace)
    found: dict[bytes, str] = {}
    for query in material.collection.queries:
        found.setdefault(material.texts.query(query), query)
    for document in material.collection.documents:
        found.setdefault(material.texts.document(document), document)
    return found
