"""The stages in order: what each takes from the workspace, and what it leaves there.

    collect/   corpus.jsonl.gz, queries.jsonl.gz, qrels/, candidates.tsv, report.txt
    judge/     report.txt; the answers themselves are in answers.db
    rate/      ratings.tsv, targets.tsv, report.txt

Stages pass records and know nothing of files; only this package knows where things lie. In it, from the ground up:

    stages     what each stage depends on: which is done, which is stale
    judges     the judges that zelo.yaml names
    collect    judge    rate    one file a stage
    pilot      batches          two other ways of asking the judges
"""

from zelo_train.pipeline.batches import Reading, batches, drop_batches, read_batches, write_batches
from zelo_train.pipeline.collect import Collected, collect, collected, names, read
from zelo_train.pipeline.judge import Judging, judge, outlook
from zelo_train.pipeline.judges import Confirm, judges
from zelo_train.pipeline.pilot import PILOT, pilot, write_sheet
from zelo_train.pipeline.rate import rate
from zelo_train.pipeline.stages import BUILT, EMBEDDED, SIMULATED, Say, State, state, status

__all__ = [
    "BUILT",
    "EMBEDDED",
    "PILOT",
    "SIMULATED",
    "Collected",
    "Confirm",
    "Judging",
    "Reading",
    "Say",
    "State",
    "batches",
    "collect",
    "collected",
    "drop_batches",
    "judge",
    "judges",
    "names",
    "outlook",
    "pilot",
    "rate",
    "read",
    "read_batches",
    "state",
    "status",
    "write_batches",
    "write_sheet",
]
