"""Lightning callbacks."""

from etflight.callbacks.figures import CollapseFigures
from etflight.callbacks.monitor import NeuralCollapseMonitor

__all__ = ["CollapseFigures", "NeuralCollapseMonitor"]
