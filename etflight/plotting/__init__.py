"""Pictures: pure functions that return matplotlib figures.

Each returns a `matplotlib.figure.Figure` of its own, never registered with pyplot: safe in threads, and freed like any object. Tensors may
be on any device, arrays are taken as well. `render` makes its pixels, `save` writes it to a file.
"""

from etflight.plotting.canvas import render, save
from etflight.plotting.collapse import (
    collapse_curves,
    cosine_heatmap,
    portrait,
    spectrum,
    triangle,
    triangle_film,
    variability_by_size,
)

__all__ = [
    "collapse_curves",
    "cosine_heatmap",
    "portrait",
    "render",
    "save",
    "spectrum",
    "triangle",
    "triangle_film",
    "variability_by_size",
]
