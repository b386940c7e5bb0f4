"""Backbones: every timm model by its name, and the field's own networks, which are registered in timm here."""

import difflib
import math
from collections.abc import Sequence
from typing import Any

import timm
import torch
from torch import nn

# these register their models
from etflight.backbones import densenet_cifar as densenet_cifar
from etflight.backbones import resnet_cifar as resnet_cifar
from etflight.backbones import resnet_wide as resnet_wide
from etflight.backbones.batch_norm import SyncBatchNorm
from etflight.backbones.weights import load_weights
from etflight.utils.errors import UserError, argument, brief, let_through

__all__ = ["SyncBatchNorm", "arguments_for_size", "build_backbone", "describe_refused_size", "load_weights"]

_LARGEST_TRIED = 1024  # the side in pixels of the largest images that a model is tried on


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
        pretrained: Load the weights that timm publishes; `load_weights` loads weights from a file.
        model_kwargs: More arguments of `timm.create_model`.

    Returns:
        The model, which takes images `[B, in_chans, H, W]` to pooled features `[B, d]`, and d.

    Raises:
        UserError: There is no such model, it does not take an argument, or its weights cannot be had.
    """
    kwargs = model_kwargs or {}
    if kwargs.get("features_only") or kwargs.get("global_pool") == "":
        raise UserError(
            "model_kwargs cannot set 'features_only', or 'global_pool' to '': a backbone gives pooled features"
        )
    try:
        backbone = timm.create_model(name, pretrained=pretrained, in_chans=in_chans, num_classes=0, **kwargs)
    except UserError:
        raise
    except Exception as error:  # errors of timm, the hub, torch.load and the network's own code
        let_through(error)
        file = (kwargs.get("pretrained_cfg_overlay") or {}).get("file") or kwargs.get("checkpoint_path")
        reason = f"{file}: " * bool(file) + brief(error, 300).rstrip(".")
        raise UserError(f"backbone {name!r} cannot be built: {reason}; {_way_to_build(name, pretrained)}") from error
    width: Any = getattr(backbone, "head_hidden_size", None) or backbone.num_features
    return backbone, int(width)


def _way_to_build(name: str, pretrained: bool) -> str:
    """What to try instead, as the end of a message."""
    names = [*timm.list_models(), *timm.list_models(pretrained=True)]  # the latter with their tags
    if name not in names and (near := difflib.get_close_matches(name, names, n=5)):
        return f"near matches: {', '.join(near)}"
    if pretrained:
        return "give `pretrained: false`, and a local file of weights by `fine_tuning: {weights: PATH}`"
    return "check the name (`timm.list_models()` has all) and `model_kwargs`"


def arguments_for_size(name: str, shape: Sequence[int], model_kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
    """Further arguments for timm with which a model takes images of this size; many vision transformers refuse other sizes without them.

    Args:
        name: The model's name.
        shape: C, H and W of the images.
        model_kwargs: The arguments that it was built with.

    Returns:
        The arguments, which have been tried, empty if the model needs none; or None if none were found.
    """
    _, height, width = shape
    size = {"img_size": height if height == width else [height, width]}
    side = math.gcd(height, width)
    patch = max((part for part in range(1, side // 4 + 1) if side % part == 0), default=1)
    for arguments in ({}, size, {**size, "patch_size": patch}):
        model = _model_for_images(name, shape, {**(model_kwargs or {}), **arguments})
        patches = getattr(getattr(model, "patch_embed", None), "patch_size", ())
        if model is not None and all(side % part == 0 for part in ([patches] if isinstance(patches, int) else patches)):
            return arguments
    return None


def describe_refused_size(name: str, shape: Sequence[int], model_kwargs: dict[str, Any] | None) -> str | None:
    """Find out whether a model refuses images for their size.

    Args:
        name: The model's name.
        shape: C, H and W of the images.
        model_kwargs: The arguments that it was built with.

    Returns:
        What to do about it, with arguments or sizes that have been tried; None if the model takes images of this size, or none of any size
        that was tried, so that something else is wrong.
    """
    if _model_for_images(name, shape, model_kwargs or {}) is not None:
        return None
    if arguments := arguments_for_size(name, shape, model_kwargs):
        text = ", ".join(f"{key}: {value}" for key, value in arguments.items())
        return f"give {argument('model.model_kwargs')} '{{{text}}}'"
    channels, height, width = shape
    known: Any = timm.get_pretrained_cfg(name, allow_unregistered=True)
    own = tuple(known.input_size[1:]) if known and known.input_size else (height, width)
    doubled = [
        (height * factor, width * factor)
        for factor in (2, 4, 8, 16, 32)
        if factor * max(height, width) <= _LARGEST_TRIED
    ]
    for tried in (*doubled, own):
        if _model_for_images(name, (channels, *tried), model_kwargs or {}) is not None:
            which = "larger" if tried > (height, width) else "smaller"
            return f"give {which} ones, such as {tried[0]} x {tried[1]}, or another backbone"
    return None


def _model_for_images(name: str, shape: Sequence[int], model_kwargs: dict[str, Any]) -> nn.Module | None:
    """A model without numbers, if it takes images `[C, H, W]` of this shape; else None."""
    try:
        with torch.device("meta"):
            model: nn.Module = timm.create_model(name, in_chans=shape[0], num_classes=0, **model_kwargs)
            model.eval()(torch.zeros(1, *shape))
    except Exception as error:  # timm's thousand models raise errors of all kinds
        let_through(error)
        return None
    return model
