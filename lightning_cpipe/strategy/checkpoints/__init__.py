"""The module in parts and whole again, and files out of the parts, while training streams.

whole             the module and its optimizers, taken apart and put together; averages: of the weights
optimizer_states  one optimizer's state out of the stages' parts, and back
gathering         numbers from all ranks; promised: stands for what has not come yet
reader, writer    one rank's
saves             what rank 0 still has to write; unhurried: who does not wait for it
one_file          a file that is always whole; mapped_file: of which only what is used is read
sharded           a folder into which each rank writes
exact_resume      what is in flight
"""
