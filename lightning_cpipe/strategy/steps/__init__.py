"""One rank's steps: what the mini-batches that Lightning's loops hand over mean to the engine.

steps       the steps
stage_run   the stages, lanes and streams that they run on
one_step    a mini-batch in micro-batches is one step for Lightning
not_finite  which mini-batch had a loss that is not finite
"""
