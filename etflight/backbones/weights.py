"""Weights from a file for a backbone that timm built."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from timm.models import adapt_input_conv
from torch import Tensor, nn

from etflight.checkpoint.files import misfit, read_weights
from etflight.utils.errors import UserError, argument


def load_weights(backbone: nn.Module, path: str | Path) -> list[str]:
    """Put the weights of a file into a timm model without a classifier.

    Everything must fit except the file's classifier, which is left out, whether it has one layer or several. Weights for colour images are
    converted to another number of channels as timm does it (grey: their sum).

    Args:
        backbone: The model, as `build_backbone` returns it.
        path: The file: `.safetensors`, or written by `torch.save`.

    Returns:
        The names of the weights that were left out.

    Raises:
        UserError: The file cannot be read, or holds the weights of another model.
    """
    state, own = read_weights(path), backbone.state_dict()
    config: dict[str, Any] = getattr(backbone, "pretrained_cfg", None) or {}
    classifiers = tuple(f"{_outermost_classifier(name, own)}." for name in _as_tuple(config.get("classifier")))
    left_out = sorted(name for name in state if name.startswith(classifiers))
    fitting = {name: value for name, value in state.items() if name not in left_out}
    for name in (f"{part}.weight" for part in _as_tuple(config.get("first_conv"))):
        if name in own and name in fitting and fitting[name].ndim == 4 and fitting[name].shape[1] == 3:
            fitting[name] = adapt_input_conv(own[name].shape[1], fitting[name])
    for name, value in own.items():
        if name.endswith(".num_batches_tracked"):  # not a weight: converters leave it out
            fitting.setdefault(name, value)
    if problem := misfit(fitting, own):
        mend = f"give the {argument('model.backbone')} they were made for, with the names that timm gives them"
        raise UserError(f"weights {path} do not fit the backbone: {problem}: {mend}")
    backbone.load_state_dict(fitting)
    return left_out


def _as_tuple(value: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The names as a tuple: most models have one classifier and one first convolution, some several."""
    return (value,) if isinstance(value, str) else tuple(value or ())


def _outermost_classifier(classifier: str, own: Mapping[str, Tensor]) -> str:
    """The outermost module around a classifier's last layer of which a network without a classifier has no part."""
    parent = classifier.rpartition(".")[0]
    while parent and not any(name.startswith(f"{parent}.") for name in own):
        classifier, parent = parent, parent.rpartition(".")[0]
    return classifier
