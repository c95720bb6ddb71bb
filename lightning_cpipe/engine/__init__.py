"""Runs one stage: the plan's actions, on the stage's module, with the messages between them.

training     the stream of training
evaluation   the stream of an evaluation, forward only
neighbours   a stage's ends of the lanes to the stages beside it
choice       the version that each mini-batch uses
decisions    what the last stage says to all others
ties         parameters that several stages train
shapes       what is known of the shapes of a batch
mini_batch   what the engine knows of a mini-batch
rehearsal    all stages in one process, to look at
timeline     what the stage did when
figures      sums of that, and the delay that was measured
"""
