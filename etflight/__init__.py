"""Image classifiers whose last layer is a fixed simplex equiangular tight frame (ETF)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from etflight.classifier import Classifier
    from etflight.geometry import class_code, largest_cosine, nearest_etf, simplex_etf
    from etflight.heads import CosineHead, ETFHead, Head, LinearHead, ScaledLinearHead
    from etflight.losses import (
        CrossEntropyLoss,
        DotRegressionLoss,
        FocalLoss,
        LabelAwareSmoothingLoss,
        LDAMLoss,
        LogitAdjustedLoss,
        Loss,
    )

__version__ = "0.1.0"

# Lazy, because torch and Lightning take seconds to import and `etflight --version` should not.
_HOMES = {
    "Classifier": "classifier",
    "CosineHead": "heads",
    "CrossEntropyLoss": "losses",
    "DotRegressionLoss": "losses",
    "ETFHead": "heads",
    "FocalLoss": "losses",
    "Head": "heads",
    "LDAMLoss": "losses",
    "LabelAwareSmoothingLoss": "losses",
    "LinearHead": "heads",
    "LogitAdjustedLoss": "losses",
    "Loss": "losses",
    "ScaledLinearHead": "heads",
    "class_code": "geometry",
    "largest_cosine": "geometry",
    "nearest_etf": "geometry",
    "simplex_etf": "geometry",
}
_SUBMODULES = {
    "backbones", "callbacks", "classifier", "cli", "data", "export", "geometry", "heads", "losses", "metrics", "optim", "plotting",
    "reporting", "runs", "utils",
}  # fmt: skip

__all__ = [
    "Classifier",
    "CosineHead",
    "CrossEntropyLoss",
    "DotRegressionLoss",
    "ETFHead",
    "FocalLoss",
    "Head",
    "LDAMLoss",
    "LabelAwareSmoothingLoss",
    "LinearHead",
    "LogitAdjustedLoss",
    "Loss",
    "ScaledLinearHead",
    "__version__",
    "class_code",
    "largest_cosine",
    "nearest_etf",
    "simplex_etf",
]


def __getattr__(name: str) -> object:
    if name in _SUBMODULES:
        return import_module(f"etflight.{name}")
    if name in _HOMES:
        return getattr(import_module(f"etflight.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'etflight' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBMODULES})
