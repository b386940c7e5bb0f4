"""Lightning callbacks."""

from etflight.callbacks.averaging import ExponentialMovingAverage, StochasticWeightAverage
from etflight.callbacks.balance import DeferredBalance
from etflight.callbacks.checkpoint import LastCheckpoint, StepSeed
from etflight.callbacks.collapse import NeuralCollapseMonitor
from etflight.callbacks.defaults import default_callbacks
from etflight.callbacks.figures import CollapseFigures
from etflight.callbacks.fine_tuning import FineTuning
from etflight.callbacks.post_hoc import NearestClassMean, PostHoc, TauNormalization
from etflight.callbacks.predictions import PredictionTable
from etflight.callbacks.progress import Speed
from etflight.callbacks.stop_signals import StopSignals
from etflight.callbacks.temperature import FitTemperature

__all__ = [
    "CollapseFigures",
    "DeferredBalance",
    "ExponentialMovingAverage",
    "FineTuning",
    "FitTemperature",
    "LastCheckpoint",
    "NearestClassMean",
    "NeuralCollapseMonitor",
    "PostHoc",
    "PredictionTable",
    "Speed",
    "StepSeed",
    "StochasticWeightAverage",
    "StopSignals",
    "TauNormalization",
    "default_callbacks",
]
