"""The exceptions of `lightning_cpipe`.

    CPipeError
    ├── PlanError              a schedule's text or plan is not a legal one
    ├── CutError               the module can't be cut as asked, or a step passes a cut otherwise than the first
    │   ├── AbsentWeightError  code of one stage used, or saved, a weight that lives on another stage
    │   └── LostNumbersError   a module can't be built in parts: one weight is made from another
    ├── WeightWrittenError     a weight changed while mini-batches in flight needed it as it was
    ├── SaveError              a checkpoint could not be written
    ├── DataMismatchError      two ranks drew different mini-batches, or a shape changed unannounced
    └── RankLostError          another rank ended; carries the first cause

What Lightning itself would refuse as a wrong combination of flags is raised as Lightning's own
`MisconfigurationException`, so that code which catches that keeps working.
"""

from __future__ import annotations


class CPipeError(Exception):
    """The root of every exception that this package raises on its own account."""


class PlanError(CPipeError, ValueError):
    """A schedule's text can't be read, or its plan breaks a rule. The message lists every fault."""


class CutError(CPipeError):
    """The module can't be cut into the stages that were asked for, or a later step passes a cut otherwise."""


class AbsentWeightError(CutError):
    """Code that runs on one stage used, or was to save, a parameter whose weights live on another stage."""


class LostNumbersError(CutError):
    """Code that builds a module needs the numbers of a weight that is built on another rank only."""


class WeightWrittenError(CPipeError, RuntimeError):
    """A weight was written to outside the optimizer's step while mini-batches in flight needed it as it was."""


class SaveError(CPipeError, RuntimeError):
    """A checkpoint could not be written, or was not to be saved on all ranks. The message names the path."""


class DataMismatchError(CPipeError):
    """Two ranks drew different mini-batches, or a tensor differs from what was announced."""


class RankLostError(CPipeError):
    """Another rank of the pipeline ended before its work was done.

    Attributes:
        lost: the rank at the other end of the broken connection; None where it is not known.
    """

    def __init__(self, message: str, lost: int | None = None) -> None:
        super().__init__(message)
        self.lost = lost
