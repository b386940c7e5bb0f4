"""Streaming statistics and the measures computed from them."""

from etflight.metrics.statistics import ClassStatistics, Moments

__all__ = ["ClassStatistics", "Moments"]
