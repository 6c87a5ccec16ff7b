"""How much better: from preferences to ratings, and from ratings to targets that mean the same for all queries."""

from zelo_train.rate.across import Audit, audit, calibrate_across
from zelo_train.rate.answers import Answers, grades, preferences
from zelo_train.rate.calibration import Calibration, Offset, calibrate, grade_questions, graded_ranks
from zelo_train.rate.connectivity import Connectivity
from zelo_train.rate.fit import JudgeTerms
from zelo_train.rate.link import Link
from zelo_train.rate.rating import Ratings, rate

__all__ = [
    "Answers",
    "Audit",
    "Calibration",
    "Connectivity",
    "JudgeTerms",
    "Link",
    "Offset",
    "Ratings",
    "audit",
    "calibrate",
    "calibrate_across",
    "grade_questions",
    "graded_ranks",
    "grades",
    "preferences",
    "rate",
]
