"""The rate stage: from the answers that are stored to ratings, calibration and targets."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zelo_train.config import Config
from zelo_train.errors import TooFewAnswers
from zelo_train.pipeline.collect import collected
from zelo_train.pipeline.judge import GRADES, Judging
from zelo_train.pipeline.stages import SIMULATED, rate_inputs, state
from zelo_train.store import Stage, Workspace, write_whole

if TYPE_CHECKING:
    from zelo_train.rate import Calibration


def rate(workspace: Workspace, config: Config) -> tuple[Stage, str]:
    """Ratings, calibration and targets from what the judges answered so far. Needs the lock; asks nothing.

    Returns:
        What it left, and the report for people.

    Raises:
        TooFewAnswers: what there is does not determine a rating, or not how queries compare.
    """
    from zelo_train.rate import Calibration, JudgeTerms, audit, calibrate, calibrate_across, grades, preferences
    from zelo_train.rate import rate as rating

    inputs = rate_inputs(workspace, config)
    section = config.rate
    with workspace.store() as store:
        judging = Judging(workspace, config, store, collected(workspace))
        rounds = range(1, judging.rounds + 1)
        ratings = rating(
            # Read one after another: all judgments at once would be most of the memory.
            preferences(judging.judgments(rounds)),
            candidates=judging.candidates,
            judges=None if section.judge_terms else {judge.name: JudgeTerms() for judge in judging.judges},
            link=section.link,
            prior=section.prior,
            seed=section.seed,
        )
        graded = [question for listed in judging.stored(GRADES).values() for question in listed]
        found = [one for judge in judging.judges for one in judging.answers(judge, graded)]
        crossed = judging.cross_stored(ratings) or ()
        across = [one for judge in judging.judges for one in judging.answers(judge, crossed)]
        if section.calibration == "grades" and not found:
            raise TooFewAnswers(
                "judges have graded nothing yet, and grades make queries comparable; expected a finished `zelo judge`:"
                " run it to its end, or set rate.calibration: none"
            )
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
        simulated = judging.simulated
    targets = calibration.targets(ratings, weights=section.weights, simulated=simulated)
    judged = state(workspace, config, "judge")
    if judged.note is None:
        notes.append("judging is not finished: `zelo judge` goes on where it stopped")
    elif judged.state == "stale":
        notes.append(f"judge is stale ({'; '.join(judged.reasons)}): `zelo judge` asks what is missing")
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
