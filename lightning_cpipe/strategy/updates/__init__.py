"""What stages tell each other of their gradients before they update.

agreeing    puts together who hears what
clipping    the norm of all stages, as far as it is known
loss_scale  of `16-mixed`
by_stage    which parameters belong to which stage
"""
