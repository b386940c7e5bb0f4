"""Image classifiers whose last layer is a fixed simplex equiangular tight frame (ETF)."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from etflight.classifier import Classifier
    from etflight.geometry import class_code, largest_cosine, nearest_etf, simplex_etf
    from etflight.heads import CosineHead, ETFHead, Head, LinearHead, ScaledLinearHead
    from etflight.loading import load
    from etflight.losses import (
        BinaryCrossEntropyLoss,
        CrossEntropyLoss,
        DotRegressionLoss,
        FocalLoss,
        LabelAwareSmoothingLoss,
        LDAMLoss,
        LogitAdjustedLoss,
        Loss,
        NONLLoss,
        NTCELoss,
    )

__version__ = "0.1.0"

# lazy, because torch and Lightning take seconds to import and `etflight --version` should not
_HOMES = (
    "geometry",
    "heads",
    "losses",
    "classifier",
    "loading",
)  # modules of these names, the quickest to import first
_SUBMODULES = {
    "analysis", "backbones", "callbacks", "checkpoint", "classifier", "cli", "closed_form", "data", "decision",
    "divergence", "embedder", "export", "geometry", "heads", "loading", "losses", "metrics", "network",
    "objective", "optim", "penalties", "plotting", "prediction", "reporting", "runs", "sam", "sharded", "utils",
}  # fmt: skip

__all__ = [
    "BinaryCrossEntropyLoss",
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
    "NONLLoss",
    "NTCELoss",
    "ScaledLinearHead",
    "__version__",
    "class_code",
    "largest_cosine",
    "load",
    "nearest_etf",
    "simplex_etf",
]


def __getattr__(name: str) -> object:
    if name in _SUBMODULES:
        return import_module(f"etflight.{name}")
    if name in __all__:
        modules = (import_module(f"etflight.{home}") for home in _HOMES)
        return next(getattr(module, name) for module in modules if hasattr(module, name))
    raise AttributeError(f"module 'etflight' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_SUBMODULES})
