"""One stage, or several, of a module that nobody changed.

cut            how a module is cut, as data
replay         runs one stage of a step
describing     what a stage tells later ones of its outputs
weights        takes the weights of other stages out, and puts them back
building       builds a module of which only some weights are kept
pages          lets go of the memory of what is not
absent         stands in for a weight of another stage
versions       keeps the weights that mini-batches in flight, or to come, use
randomness     seeded scopes
isolation      random numbers of their own for modules
own_state      what a step writes on the module, for each of several stages
stage_module   all of that on one module
"""
