"""Lightning callbacks."""

from etflight.callbacks.checkpoint import LastCheckpoint
from etflight.callbacks.deferred import DeferredBalance
from etflight.callbacks.figures import CollapseFigures
from etflight.callbacks.fine_tuning import FineTuning
from etflight.callbacks.monitor import NeuralCollapseMonitor
from etflight.callbacks.post_hoc import NearestClassMean, PostHoc, TauNormalization
from etflight.callbacks.speed import Speed
from etflight.callbacks.step_seed import StepSeed
from etflight.callbacks.stop_signals import StopSignals

__all__ = [
    "CollapseFigures",
    "DeferredBalance",
    "FineTuning",
    "LastCheckpoint",
    "NearestClassMean",
    "NeuralCollapseMonitor",
    "PostHoc",
    "Speed",
    "StepSeed",
    "StopSignals",
    "TauNormalization",
]
