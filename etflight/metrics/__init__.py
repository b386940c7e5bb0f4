"""Streaming statistics, the measures computed from them, and accuracies."""

from etflight.metrics import measures
from etflight.metrics.shots import ShotAccuracy
from etflight.metrics.statistics import ClassStatistics, Moments

__all__ = ["ClassStatistics", "Moments", "ShotAccuracy", "measures"]
