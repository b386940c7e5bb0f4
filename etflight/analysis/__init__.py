"""What a trained model shows over a split of the data, computed without the command line."""

from importlib import import_module

_SUBMODULES = ("collapse", "describe", "features", "incremental", "learners", "ood", "outputs", "retrieval", "store")


def __getattr__(name: str) -> object:
    if name in _SUBMODULES:  # when they are asked for, since each imports much of the package
        return import_module(f"etflight.analysis.{name}")
    raise AttributeError(f"module 'etflight.analysis' has no attribute {name!r}")
