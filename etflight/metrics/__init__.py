"""Streaming statistics and measures."""
