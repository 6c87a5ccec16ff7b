"""What can go wrong, as one tree.

ZerankError
├── ModelUnreachable      no such folder, or the Hub could not be asked         (also an OSError)
├── CheckpointRefused     it was read and would score wrongly                   (also a ValueError)
├── QueryTooLong          the query leaves no room for a document               (also a ValueError)
├── NonFiniteLogits       the model answered NaN or infinity                    (also an ArithmeticError)
├── Busy                  too many calls wait already                           (also a RuntimeError)
├── DocumentTooLarge      one document alone does not fit into the memory       (also a MemoryError)
├── ForkedDevice          a GPU was in use before this process was forked       (also a RuntimeError)
└── MissingPackage        an optional package is not installed                  (also an ImportError)

A wrong argument is a plain TypeError or ValueError. Each message says what was found, what was expected and what to do.
"""


class ZerankError(Exception):
    """The root: catch it to catch everything this package raises on purpose, wrong arguments aside."""


class ModelUnreachable(ZerankError, OSError):
    """The model is neither a folder here, nor in the cache, nor to be had from the Hub."""


class CheckpointRefused(ZerankError, ValueError):
    """The checkpoint is here, but its scores would be wrong."""


class QueryTooLong(ZerankError, ValueError):
    """The query and the template fill the whole prompt; documents are cut to fit, queries never."""


class NonFiniteLogits(ZerankError, ArithmeticError):
    """The model answered NaN or infinity, which has no place in a ranking."""


class Busy(ZerankError, RuntimeError):
    """As many calls as the queue holds wait for the model already; the call was refused before any work was done."""


class DocumentTooLarge(ZerankError, MemoryError):
    """One document, scored alone, needs more memory than the device has left."""


class ForkedDevice(ZerankError, RuntimeError):
    """A GPU context cannot be used in a process forked after it was made."""


class MissingPackage(ZerankError, ImportError):
    """An optional package is needed for what was asked."""


class ZerankWarning(UserWarning):
    """Something was done for the caller that the caller should know: a cut document, a slower path."""
