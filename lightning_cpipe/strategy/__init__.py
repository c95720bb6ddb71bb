"""The Lightning strategy: what translates between Lightning's hooks and the engine.

strategy           the door: one method per hook
loops, fetcher     the few methods of Lightning's loops that differ, and the data that is drawn ahead
cutting, probing   set-up: look at the module, choose the cuts, agree on them
stage_run          one rank's share of one run
sharing, hooks     what the last stage logs and decides; which hooks run where
checkpoint         one plain file out of the stages' parts
processes, launchers, ending    the ranks, and how they end
refusals           what can't run, with a way out
lightning_private  every private name of Lightning, in one place
"""

from lightning_cpipe.strategy.strategy import ContinuousPipeStrategy

__all__ = ["ContinuousPipeStrategy"]
