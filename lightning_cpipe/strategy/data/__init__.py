"""Mini-batches, drawn ahead of Lightning's loop, and cut into micro-batches where the schedule has some.

fetcher        draws them; epoch_reader: through epochs; update_count: to the run's last step
drawn          one of them, on its way through the loop
data_place     where a run is in its data, as a checkpoint keeps it
hearsay        what a rank hears of batches that it does not load; alike: loaders that draw the same on every rank
micro_batches  the slices of a mini-batch; slicing: of nested ones; samples: how many a batch holds
loss_weights   what each counts for in the loss
"""
