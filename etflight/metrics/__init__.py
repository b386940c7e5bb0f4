"""Streaming statistics, the measures computed from them, accuracies, and calibration."""

from etflight.metrics import measures
from etflight.metrics.calibration import Reliability, TemperatureFit
from etflight.metrics.confusion import Confusion
from etflight.metrics.shots import ShotAccuracy
from etflight.metrics.statistics import ClassStatistics, Moments

__all__ = ["ClassStatistics", "Confusion", "Moments", "Reliability", "ShotAccuracy", "TemperatureFit", "measures"]
