"""Pictures: pure functions that return matplotlib figures.

Each returns a `matplotlib.figure.Figure` of its own, never registered with pyplot: safe in threads, and freed like any object. Tensors may
be on any device, arrays are taken as well. `render` makes its pixels, `save` writes it to a file.
"""

from etflight.plotting.canvas import render, save
from etflight.plotting.collapse import cosine_heatmap, portrait, spectrum, variability_by_size
from etflight.plotting.curves import collapse_curves
from etflight.plotting.evaluation import accuracy_by_size, confusion_matrix, reliability_diagram
from etflight.plotting.images import class_histogram, contact_sheet
from etflight.plotting.scores import score_histograms
from etflight.plotting.sessions import session_curves
from etflight.plotting.three_classes import triangle, triangle_film

__all__ = [
    "accuracy_by_size",
    "class_histogram",
    "collapse_curves",
    "confusion_matrix",
    "contact_sheet",
    "cosine_heatmap",
    "portrait",
    "reliability_diagram",
    "render",
    "save",
    "score_histograms",
    "session_curves",
    "spectrum",
    "triangle",
    "triangle_film",
    "variability_by_size",
]
