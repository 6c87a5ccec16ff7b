"""From the judges that zelo.yaml names to judges that can be asked, and the budget they spend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from zelo_train import config as settings
from zelo_train.config import Config
from zelo_train.cost import Budget, Price, millionths
from zelo_train.errors import ConfigError
from zelo_train.pipeline.stages import model_at, place
from zelo_train.records import Candidate, Kind, Question
from zelo_train.store import Store, Workspace

if TYPE_CHECKING:
    from zelo_train.collect.collection import Qrels
    from zelo_train.judge.ask import Departure
    from zelo_train.judge.judges import Judge
    from zelo_train.llm import Endpoint

Confirm = Callable[[Sequence["Departure"]], bool]


def judges(workspace: Workspace, config: Config, candidates: Mapping[str, Sequence[Candidate]], qrels: Qrels) -> list[Judge]:
    """The ensemble that zelo.yaml names.

    Args:
        workspace: where its paths start.
        config: its settings.
        candidates: of every query; with the grades, what simulated judges know.
        qrels: grades by query and document.

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
                        endpoint(judge),
                        answer_form=Form(judge.answer),
                        prompts=prompts,
                        parameters=judge.parameters,
                        document_tokens=section.document_tokens,
                        max_tokens=judge.max_tokens,
                        price=price(judge),
                        concurrency=judge.concurrency,
                        per_minute=judge.per_minute,
                    )
                )
            case "reranker":
                from zerank_integrations import Reranker

                made.append(TeacherJudge(judge.name, Reranker(model_at(workspace, judge.model)) if judge.model else Reranker()))
            case "simulated":
                if not qrels:
                    raise ConfigError(
                        f"judge {judge.name!r} is simulated from qrels, and the collection has none; expected grades."
                        " Take another kind of judge"
                    )
                if judge.seed not in truths:
                    listed = [one for found in candidates.values() for one in found]
                    truths[judge.seed] = truth(listed, qrels, judge.seed)
                made.append(SimulatedJudge(judge.name, truths[judge.seed], judge.accuracy, judge.seed, Form(judge.answer)))
            case "replay":
                if judge.path is None:
                    raise ConfigError(f"judge {judge.name!r} has no path; expected the file of its recorded answers")
                made.append(ReplayJudge(judge.name, place(workspace, judge.path)))
    probe = Question(Kind.COMPARE, ("",), ("", ""))
    if not any(judge.takes(probe) for judge in made):
        raise ConfigError(
            f"{', '.join(judge.name for judge in made)}: no judge compares documents, for all answer grades only; expected at"
            " least one with answer: soft or vote"
        )
    return made


def endpoint(judge: settings.Judge) -> Endpoint:
    """Where a judge is asked."""
    from zelo_train.llm import Endpoint

    base_url = judge.base_url or "https://api.openai.com/v1"
    key = judge.api_key_env or ("" if judge.base_url else "OPENAI_API_KEY")
    return Endpoint(base_url, api_key_env=key, in_flight=judge.concurrency)


def price(judge: settings.Judge) -> Price:
    """What a judge's tokens cost."""
    return Price.per_million(judge.price.input, judge.price.output, judge.price.cached)


def budget(store: Store, config: Config, run: str) -> Budget:
    """What a run that begins now may spend."""
    cap = None if config.judge.cap is None else millionths(config.judge.cap)
    began = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
    return Budget(store, f"{run} {began}", cap, config.judge.currency)
