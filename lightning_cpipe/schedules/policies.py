"""Which version of the weights a mini-batch uses on a stage.

Under every policy it is the one that was the newest when some stage forwarded some mini-batch. Which, is all that the
policies differ in, and whether the backward uses it, too.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class VersionPolicy:
    """A rule for all stages and mini-batches.

    Attributes:
        name: what users call it.
        of_first_stage: whether stage 0 chooses the version for all stages; if not, each stage for itself.
        of_window: whether the first mini-batch of an update chooses for all mini-batches of it.
        keeps: whether the backward uses what the forward used, so that older versions must be kept; if not, it uses
            what is the newest by then, and the gradient is that of no one set of weights.
    """

    name: str
    of_first_stage: bool = field(default=False, repr=False)
    of_window: bool = field(default=False, repr=False)
    keeps: bool = field(default=True, repr=False)

    def chosen_by(self, stage: int, batch: int, window_start: int) -> tuple[int, int]:
        """The stage and the mini-batch at whose forward the version was the newest.

        Args:
            stage: that uses it.
            batch: that uses it.
            window_start: the first mini-batch that shares the update of `batch`.
        """
        return 0 if self.of_first_stage else stage, window_start if self.of_window else batch


STASH = VersionPolicy("stash")
"""PipeDream's weight stashing: what is the newest on the stage. The least delay there is without a bubble."""

LATEST = VersionPolicy("latest", keeps=False)
"""One version, updated in place while mini-batches are in flight."""

VERTICAL = VersionPolicy("vertical", of_first_stage=True)
"""PipeDream's vertical sync: what was the newest on stage 0 when the mini-batch entered the pipeline."""

TWO_BUFFERED = VersionPolicy("2bw", of_first_stage=True, of_window=True)
"""PipeDream-2BW: all mini-batches of an update use the same version.

It is the one before the newest, where at least `lag` of stage 0 mini-batches make an update; so two are enough. After
an update of fewer, as an epoch's end may cut it short, it is the one before that, and three live for a while.
"""

POLICIES = {policy.name: policy for policy in (STASH, LATEST, VERTICAL, TWO_BUFFERED)}
"""Every policy by its name."""
