"""The judge stage: rounds of pairs, then grades, each planned and stored before its first question."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from zelo_train.config import Config
from zelo_train.cost import Estimate
from zelo_train.errors import TooFewAnswers, WorkspaceError
from zelo_train.pipeline.collect import Collected, collected
from zelo_train.pipeline.judges import Confirm, budget, judges
from zelo_train.pipeline.stages import SIMULATED, Say, judge_inputs, silent
from zelo_train.records import Judgment, Kind, Question, Status
from zelo_train.store import Stage, Store, Workspace, canonical, digest, write_whole

if TYPE_CHECKING:
    from zelo_train.judge.ask import Departure, Ensemble
    from zelo_train.judge.judges import Judge
    from zelo_train.judge.pairs import Plan
    from zelo_train.rate import Ratings

# Plans of a query are numbered by round; these are not rounds.
GRADES, CROSS = 0, -1

# Queries whose judgments are read at once.
AT_ONCE = 256

# Of the queries the other calibration is asked too, so that each audits the other; correlations of fewer mean nothing.
AUDITED_SHARE, AUDITED_LEAST = 0.02, 8


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
        self.budget = budget(store, config, run)
        self.judges = judges(workspace, config, material.candidates, material.collection.qrels)
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
        # By judge and query, a byte a pair: whether it is shown as planned. Questions would be most of the memory.
        self._as_planned: dict[tuple[str, str], bytes] = {}
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

    def _as_shown(self, judge: str, query: str, last: int) -> Iterator[tuple[int, Question]]:
        """(round, question) of a query's pairs as a judge is shown them, up to a round."""
        from zelo_train.judge.pairs import shown

        plans = self._earlier(query, last + 1)
        pairs = [(plan.round, pair) for plan in plans for pair in plan.pairs]
        as_planned = self._as_planned.get((judge, query), b"")
        if len(as_planned) < len(pairs):
            asked = shown(judge, plans, self.config.judge.pairs.seed)
            as_planned = bytes(one.left == pair[0] for (_, pair), (_, one) in zip(pairs, asked, strict=True))
            self._as_planned[judge, query] = as_planned
        # One for all: millions of them are many bytes.
        queries = (query,)
        for (number, pair), straight in zip(pairs, as_planned, strict=False):
            yield number, Question(Kind.COMPARE, queries, pair if straight else pair[::-1])

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
        known = preferences(self.judgments(range(1, round), queries))
        try:
            rated = rating(known, candidates=among, judges={judge.name: JudgeTerms() for judge in self.judges})
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
        listed = list(self.candidates if queries is None else queries)
        for start in range(0, len(listed), AT_ONCE):
            asked = self.questions(rounds, listed[start : start + AT_ONCE])
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

    def cross_plan(self, ratings: Ratings) -> tuple[Question, ...]:
        """The questions across queries; stored before any is asked."""
        from zelo_train.judge.pairs import cross_pairs

        known = self.cross_stored(ratings)
        if known is None:
            ranked = [(query, [one.document for one in ratings.of(query)]) for query in self._crossed(ratings)]
            known = tuple(cross_pairs(ranked, seed=self.config.judge.pairs.seed))
            self.store.put_plans(CROSS, {"": known}, {"": self._cross_inputs(ratings)})
        return known

    def cross_stored(self, ratings: Ratings) -> tuple[Question, ...] | None:
        """The questions across the queries that are rated now, if they were planned."""
        return self.store.plan("", CROSS, self._cross_inputs(ratings))

    def _cross_inputs(self, ratings: Ratings) -> str:
        return digest("cross", *(self.inputs[query] for query in sorted(self._crossed(ratings)))).hex()

    def _crossed(self, ratings: Ratings) -> list[str]:
        """All queries where pairs across them calibrate, else the few that audit the grades."""
        return list(ratings.answers.queries) if self.config.rate.calibration == "cross" else self.audited(ratings)

    def audited(self, ratings: Ratings) -> list[str]:
        """The few queries that are calibrated both ways."""
        queries = list(ratings.answers.queries)
        count = max(AUDITED_LEAST, round(AUDITED_SHARE * len(queries)))
        return sorted(sorted(queries, key=lambda query: digest("audited", query))[:count])


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
    say: Say = silent,
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
                " Go on with them (zelo judge --batches, or --read-batches FILE), or give them up (zelo judge --drop-batches)"
            )
        if judging.simulated:
            say(SIMULATED)
        ensemble = judging.ensemble
        if retry:
            ensemble.again = frozenset({Status.GAVE_UP})
        confirmed = judging.confirmed(judging.outlook(), confirm)
        folder = workspace.begin("judge")
        to_each = f" to each of {len(judging.judges)} judges" if len(judging.judges) > 1 else ""
        for number in range(1, judging.rounds + 1):
            planned = sum(map(len, judging.plan(number).values()))
            say(f"round {number} of {judging.rounds}: {planned:,} questions{to_each}")
            ensemble.ask(judging.questions([number]), confirmed=confirmed, progress=progress)
        rounds = range(1, judging.rounds + 1)
        last: list[Question] = []
        if config.rate.calibration != "none":
            ratings = rating(
                preferences(judging.judgments(rounds)),
                candidates=judging.candidates,
                link=config.rate.link,
                prior=config.rate.prior,
                seed=config.rate.seed,
            )
            graded = judging.grade_plan(ratings)
            wanted = graded if config.rate.calibration == "grades" else judging.audited(ratings)
            grades = [one for query in wanted for one in graded.get(query, ())]
            across = judging.cross_plan(ratings)
            last = [*grades, *across]
            say(f"grades: {len(grades):,} questions; across queries: {len(across):,}{to_each}")
            ensemble.ask(last, confirmed=confirmed, progress=progress)
        # Read once more rather than kept: beside the ratings they would be half of the memory.
        asked = {name: [*own, *last] for name, own in judging.questions(rounds).items()}
        found = report(ensemble.known(asked), material.length, cut=ensemble.cut, reasons=ensemble.reasons)
        text = "\n".join(found.lines(config.judge.currency)) + "\n"
        write_whole(folder / "report.txt", text)
        counts: Counter[str] = Counter()
        for (_, _, status), count in store.counts().items():
            counts[status.value] += count
        figures = {"queries": len(judging.candidates), "judges": len(judging.judges), **counts}
        return workspace.finish("judge", inputs, figures, simulated=judging.simulated), text
