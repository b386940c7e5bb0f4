"""Lightning callbacks."""

from etflight.callbacks.monitor import NeuralCollapseMonitor

__all__ = ["NeuralCollapseMonitor"]
