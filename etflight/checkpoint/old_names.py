"""The names that version 0.1 had for what checkpoints and configuration files hold, and today's."""

from collections.abc import Mapping
from typing import Any

_HEAD_OPTIONS = {
    "etflight.heads.LinearHead": {"feature_batch_norm": "batch_norm", "feature_normalize": "normalize"},
    "etflight.heads.CosineHead": {"feature_batch_norm": "batch_norm", "cosine_scale": "scale"},
}
_PARTS = {f"head.{part}": f"head.embedder.{part}" for part in ("projection", "batch_norm", "rotation")}


def part(name: str) -> str:
    """Today's name of a part of a model, or of a tensor in it.

    Example:
        >>> part("head.batch_norm.weight"), part("head.weight")
        ('head.embedder.batch_norm.weight', 'head.weight')
    """
    for old, new in _PARTS.items():
        if name == old or name.startswith(f"{old}."):
            return new + name.removeprefix(old)
    return name


def with_todays_names(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint with today's names of the options and parts of our own heads."""
    arguments = checkpoint["hyper_parameters"]
    head = arguments.get("head")
    path = head.get("class_path") if isinstance(head, Mapping) else head
    if path is not None and not str(path).startswith("etflight."):
        return checkpoint
    states = {
        key: value for key in ("state_dict", "current_model_state") if isinstance(value := checkpoint.get(key), Mapping)
    }
    renamed = {key: {part(str(name)): tensor for name, tensor in state.items()} for key, state in states.items()}
    if isinstance(head, Mapping) and isinstance(options := head.get("init_args"), Mapping):
        names = _HEAD_OPTIONS.get(str(path), {})
        head = {**head, "init_args": {names.get(name, name): value for name, value in options.items()}}
        renamed["hyper_parameters"] = {**arguments, "head": head}
    return {**checkpoint, **renamed}
