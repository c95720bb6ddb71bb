"""Chooses where stages begin, by what the blocks cost.

measure    what the blocks cost, as kept in a cache or looked at
holdings   what they keep in memory
stopwatch  what time they take
costs      all of that, as data
cache      keeps it between runs
split      where stages begin so that the slowest is fastest
memory     what a stage keeps, and the limit of it
forecast   what a pipeline will do
"""
