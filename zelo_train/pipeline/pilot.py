"""A pilot: pairs whose order is known, from the collection's grades or from a person's sheet."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from zelo_train.config import Config
from zelo_train.errors import WorkspaceError
from zelo_train.pipeline.collect import collected
from zelo_train.pipeline.judge import Judging
from zelo_train.pipeline.judges import Confirm
from zelo_train.store import Workspace, digest

if TYPE_CHECKING:
    from zelo_train.judge.pilot import Pilot

# Pairs of known order that a pilot asks.
PILOT = 200


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
    judged = material.judged(config.judge.splits)
    each = -(-count // max(1, len(judged)))
    pairs = []
    for query, found in judged.items():
        # Of near and far ranks first: what is next to each other is hard even for people.
        ids = [one.document for one in found]
        steps = [(0, len(ids) // 2), (1, len(ids) - 1), (len(ids) // 4, len(ids) // 2)]
        if each > len(steps):
            further = [(a, b) for b in range(len(ids)) for a in range(b)]
            steps += sorted(further, key=lambda step: digest("sheet", query, ids[step[0]], ids[step[1]]))
        chosen = [(ids[a], ids[b]) for a, b in dict.fromkeys(steps) if a < b < len(ids)][: max(each, 3)]
        for turn, (one, other) in enumerate(chosen):
            # Blind: which side the better ranked one is on tells nothing.
            left, right = (one, other) if digest(query, one, other)[0] % 2 else (other, one)
            pairs.append((turn, digest("sheet", query), Comparison(query, left, right)))
    pairs.sort(key=lambda row: row[:2])
    return write((pair for _, _, pair in pairs[:count]), path, material.query_text, material.document_text)
