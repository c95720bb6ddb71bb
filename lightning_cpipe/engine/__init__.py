"""Runs the stages of a rank: the plan's actions, on the stages' module, with the messages between them.

training     a rank's actions, and where the loop waits for them
stage_stream what one stage does for each action
evaluation   the stream of an evaluation, forward only
neighbours   a stage's ends of the lanes to the stages beside it
choice       the version that each mini-batch uses
news         what the stages tell each other beside the activations
decisions    what the last stage says to all others
ties         parameters that several stages train
partial_sums what a stage learns of the others' gradients in time
shapes       what is known of the shapes of a batch
mini_batch   what the engine knows of a mini-batch
rehearsal    all stages once, one after the other, to look at
timeline     what the stage did when
figures      sums of that, and the delay that was measured
"""
