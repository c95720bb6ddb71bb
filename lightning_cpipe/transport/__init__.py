"""Messages between ranks, and what becomes of them when one is gone.

wiring        connects each stage with its neighbours, and hands out the ends
edge          one end of a lane for tensors
records       one end of a lane for small records
counterparts  connects the ranks that hold the same stages of pipelines side by side
within        lanes between two stages of one process
parcels       large things from all ranks to rank 0, in the background
connections   the sockets under the records and the parcels
control       all ranks together, before and after training streams
settling      brings the lanes of a run to rest
liveness      watches that all ranks are alive, and agrees on the first cause when one is not
first_cause   why a pipeline ended, in one sentence
launched      who launched this process, and what to do when that one is gone
last_words    what a rank would say if it were killed this moment
machine       what two processes of one machine can know of each other
"""
