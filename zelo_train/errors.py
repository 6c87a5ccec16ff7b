"""What can go wrong, as one tree.

ZeloError
├── ConfigError        zelo.yaml holds something that cannot be used            (also a ValueError)
├── CollectionError    documents, queries or qrels that cannot be read           (also a ValueError)
├── WorkspaceError     the workspace is locked, newer than this version, damaged
├── CapReached         the next question could exceed the spending cap
├── JudgeError         a judge cannot be asked: no key, unknown model, breaker open
├── TooFewAnswers      what is left after failures does not determine a rating   (also a ValueError)
└── MissingPackage     an optional package is not installed                      (also an ImportError)

Each message says what was found, what was expected and what to do.
"""


class ZeloError(Exception):
    """The root: catch it to catch everything this package raises on purpose."""


class ConfigError(ZeloError, ValueError):
    """zelo.yaml holds something that cannot be used."""


class CollectionError(ZeloError, ValueError):
    """Documents, queries or qrels cannot be read."""


class WorkspaceError(ZeloError):
    """The workspace is locked by another process, newer than this version, or damaged."""


class CapReached(ZeloError):
    """The next question could exceed the spending cap; everything answered so far is kept."""


class JudgeError(ZeloError):
    """A judge cannot be asked: no key, an unknown model, too many failures in a row."""


class TooFewAnswers(ZeloError, ValueError):
    """What is left after failures does not determine a rating."""


class MissingPackage(ZeloError, ImportError):
    """An optional package is needed for what was asked."""
