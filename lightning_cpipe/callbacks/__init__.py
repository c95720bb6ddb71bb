"""Callbacks that log what the pipeline does."""

from lightning_cpipe.callbacks.idle_monitor import IdleMonitor
from lightning_cpipe.callbacks.throughput_monitor import ThroughputMonitor

__all__ = ["IdleMonitor", "ThroughputMonitor"]
