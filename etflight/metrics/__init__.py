"""Streaming statistics, the measures computed from them, accuracies, and calibration."""

from etflight.metrics import measures, ood
from etflight.metrics.accuracy import Confusion, Reliability, ShotAccuracy, TemperatureFit
from etflight.metrics.statistics import ClassStatistics, Moments

__all__ = [
    "ClassStatistics",
    "Confusion",
    "Moments",
    "Reliability",
    "ShotAccuracy",
    "TemperatureFit",
    "measures",
    "ood",
]
