"""The Lightning strategy: what translates between Lightning's hooks and the engine.

strategy           the door: one method per hook
options            its arguments
loops              the few methods of Lightning's loops that differ
fetcher            data, drawn ahead of the loop; epoch_reader, update_count, drawn: through epochs, to the run's end
parity             whether a module gives the same in stages, asked in one process
cutting, probing   set-up: look at the module, choose the cuts, agree on them
run_at_hand        this rank's part of one run: steps, on a stage_run; sharing; hooks
steps              the steps, of mini-batches ahead of the loop's; elsewhere: for a stage that is not the last
micro_batches      those of flush schedules; slicing: of a nested batch; one_step: they are one step for Lightning
loss_weights       what each micro-batch counts for; whole_loss: whether that makes the loss of the mini-batch
looks              later looks at whether what crosses the cuts is all that counts
sharing, hooks     what the last stage logs and decides; which hooks run where
clipping           by norm: of all stages, or of each
step_names         the names that Lightning makes of a step's
whole, checkpoint  the module in parts and whole again; one plain file out of the parts
processes, launchers, ending    the ranks, and how they end
refusals           what can't run, with a way out
lightning_private  every private name of Lightning, in one place
"""

from lightning_cpipe.strategy.strategy import ContinuousPipeStrategy

__all__ = ["ContinuousPipeStrategy"]
