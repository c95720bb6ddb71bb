"""What the last stage of the first pipeline logs and decides, on every rank.

sharing   within a pipeline; relaying: from pipeline to pipeline
signals   what signals ask for, after the same step on every rank
"""
