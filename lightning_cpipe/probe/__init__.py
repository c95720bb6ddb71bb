"""Finds out how a module can be cut, on its first batch, and changes nothing of it.

survey      a first run: which modules are called, and what they compute
blocks      the places where a stage may begin
probe       finds what crosses the cuts, by trying
step        a step of the module, as the probe runs it
recording   one watched run of it
trial       one stage alone, with whatever is wanted in its stubs
fills       what is wanted there
look        the same question again, in a later step
lent        weights for a module that has none yet
uncut       the stages in a row, compared with the whole module
homes       where each weight and buffer lives
gradients   gradients for a look at them
touched     the parameters that code uses
untouched   puts a module back as it was
contents    what hangs on its attributes
"""
