"""Backbones: every timm model by its name, and the field's own networks, which are registered in timm here."""

import difflib
import math
import re
from collections.abc import Sequence
from pickle import UnpicklingError
from textwrap import shorten
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import get_pretrained_cfg
from torch import nn

# these register their models
from etflight.backbones import densenet_cifar as densenet_cifar
from etflight.backbones import resnet_cifar as resnet_cifar
from etflight.backbones import resnet_wide as resnet_wide
from etflight.backbones.batch_norm import SyncBatchNorm
from etflight.backbones.weights import load_weights
from etflight.utils.errors import UserError

__all__ = ["SyncBatchNorm", "arguments_for_size", "build_backbone", "load_weights"]

# Arguments of `timm.create_model` that would break the promise of pooled features, or that have their own name here.
_OURS = {
    "model_name": "it is the backbone's name",
    "pretrained": "it is an argument of its own",
    "in_chans": "it is an argument of its own",
    "num_classes": "a backbone has no classifier; the head follows it",
    "features_only": "a backbone gives pooled features",
}
# What timm, the hub and torch.load raise; a file that is no checkpoint can end in any of the last four.
_FAILURES = (OSError, RuntimeError, ValueError, SafetensorError, UnpicklingError, EOFError, LookupError)


def build_backbone(
    name: str, *, in_chans: int = 3, pretrained: bool = False, model_kwargs: dict[str, Any] | None = None
) -> tuple[nn.Module, int]:
    """Build a timm model without its classifier.

    >>> backbone, width = build_backbone("resnet20_cifar", in_chans=1)
    >>> width
    64

    Args:
        name: A name from `timm.list_models()`, with a tag of weights or not, or timm's `hf-hub:…` or `local-dir:…`.
        in_chans: Channels of the images.
        pretrained: Load the weights that timm publishes; `load_weights` puts those of a file into the model.
        model_kwargs: More arguments of `timm.create_model`.

    Returns:
        The model, which takes images `[B, in_chans, H, W]` to pooled features `[B, d]`, and d.

    Raises:
        UserError: When no such model exists, it does not take an argument, or its weights cannot be had.
    """
    kwargs = model_kwargs or {}
    for key in kwargs.keys() & _OURS:
        raise UserError(f"model_kwargs cannot set {key!r}: {_OURS[key]}")
    if kwargs.get("global_pool") == "":
        raise UserError("model_kwargs cannot set global_pool to '': a backbone gives pooled features")
    elsewhere = any(mark in name for mark in ":/\\")  # timm's sources, and what it takes for a mistaken one
    if not elsewhere:
        _check_registered(name)
    try:
        backbone = timm.create_model(name, pretrained=pretrained, in_chans=in_chans, num_classes=0, **kwargs)
    except TypeError as error:
        refused = re.search(r"(?:unexpected|multiple values for) keyword argument '(\w+)'", str(error))
        if refused is None or refused[1] not in {*kwargs, "in_chans"}:
            raise
        mend = "; take it out of model_kwargs" if refused[1] in kwargs else ""
        raise UserError(f"timm model {name!r} does not take {refused[1]!r}{mend}") from error
    except _FAILURES as error:
        file = (kwargs.get("pretrained_cfg_overlay") or {}).get("file") or kwargs.get("checkpoint_path")
        reason = f"{file}: " * bool(file) + (str(error) or type(error).__name__)
        reason = shorten(reason, 300, placeholder=" …")  # also joins its lines
        if pretrained and not isinstance(error, ValueError):
            raise UserError(
                f"no pretrained weights for {name!r} ({reason}); give `pretrained: false`, and a local file by "
                "`fine_tuning: {weights: PATH}`"
            ) from error
        if elsewhere or "checkpoint_path" in kwargs:
            raise UserError(f"backbone {name!r} cannot be built: {reason}") from error
        raise
    width: Any = getattr(backbone, "head_hidden_size", None) or backbone.num_features
    return backbone, int(width)


def arguments_for_size(name: str, shape: Sequence[int], model_kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
    """What else timm has to be given for a model that refuses images of a size to take them, as many vision transformers do.

    Args:
        name: The model's.
        shape: C, H and W of the images.
        model_kwargs: What it was built with.

    Returns:
        Arguments that have been tried, or None where none were found.
    """
    channels, height, width = shape
    size = {"img_size": height if height == width else [height, width]}
    side = math.gcd(height, width)
    patch = max((part for part in range(1, side // 4 + 1) if side % part == 0), default=1)
    for arguments in (size, {**size, "patch_size": patch}):
        try:
            with torch.device("meta"):
                model = timm.create_model(
                    name, in_chans=channels, num_classes=0, **{**(model_kwargs or {}), **arguments}
                )
                model.eval()(torch.zeros(1, *shape))
        except Exception:  # of all kinds, from whichever of timm's thousand models
            continue
        if all(side % part == 0 for part in getattr(getattr(model, "patch_embed", None), "patch_size", ())):
            return arguments
    return None


def _check_registered(name: str) -> None:
    """Raise `UserError` unless `name` is a model of timm's, with a tag that it knows."""
    if timm.is_model(name):
        try:
            get_pretrained_cfg(name)
        except RuntimeError:
            what, names = f"timm has no weights called {name!r}", "timm.list_models(pretrained=True)"
            candidates = timm.list_models(pretrained=True)
        else:
            return
    else:
        what, names = f"no timm model is called {name!r}", "timm.list_models()"
        candidates = timm.list_models()
    near = difflib.get_close_matches(name, candidates, n=5)
    hint = f"near matches: {', '.join(near)}; " if near else ""
    raise UserError(f"{what}; {hint}`{names}` has them all")
