"""The Lightning strategy: what translates between Lightning's hooks and the engine.

strategy           the door: one method per hook
options            its arguments
loops              the few methods of Lightning's loops that differ
run_at_hand        this rank's part of one run
hooks, summaries   which hooks run where; which weights are where
finetuning         weights that are frozen first, and unfrozen later
planning           what `cpipe plan` looks at, without a run
step_names         the names that Lightning makes of a step's
lightning_private  every private name of Lightning, in one place

Rooms, from the ground up:

ranks        the processes, how they start and how they end
data         mini-batches, drawn ahead of the loop, and the micro-batches of each
setup        look at the module, choose the cuts, agree on them; refuse what can't run
steps        the steps, of mini-batches ahead of the loop's
sharing      what the last stage logs and decides, and what signals ask for
checkpoints  the module in parts and whole again; files out of the parts
updates      what stages tell each other before they update: norms to clip by, the loss scale
"""

from lightning_cpipe.strategy.strategy import ContinuousPipeStrategy

__all__ = ["ContinuousPipeStrategy"]
