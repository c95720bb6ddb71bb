"""From the Trainer's start to the first mini-batch: what the module is like, where it is cut, what can't run.

scheduling   the schedule that is asked for
refusals     what can't run, with a way out
probing      prepares the probe; blueprint: of a module that has no weights yet
as_if_begun  steps that need what a run makes before them
cutting      rank 0 chooses the cuts, all keep their part
parity       whether a module gives the same in stages, asked in one process
whole_loss   whether the losses of micro-batches make up that of their mini-batch
looks        looks again, while training runs, at what crosses the cuts
"""
