"""A trained classifier as a plain timm model: projection, BatchNorm, rotation and class vectors in one linear layer."""

import copy
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from etflight.classifier import Classifier
from etflight.data.preprocessing import Preprocessing
from etflight.embedder import Embedder
from etflight.heads import Head
from etflight.utils.errors import UserError, argument

# the part of timm's configuration that is about layers; the rest is about other weights and images
_OF_LAYERS = ("architecture", "first_conv", "classifier", "fixed_input_size")


class Linear(NamedTuple):
    """A linear layer that makes the same decisions as a classifier.

    Attributes:
        weight: `[K, d]`, float32.
        bias: `[K]`, float32.
        calibrated: Whether its softmax is the calibrated probabilities, or only the decisions agree.
    """

    weight: Tensor
    bias: Tensor
    calibrated: bool


def save_timm(classifier: Classifier, preprocessing: Preprocessing, folder: Path) -> bool:
    """Write `model.safetensors` and `config.json` as timm's own `save_for_hf` does, and check them.

    Args:
        classifier: The classifier, in evaluation mode, on the CPU.
        preprocessing: The preprocessing of its images.
        folder: The folder to write into.

    Returns:
        Whether the softmax of the written model is the calibrated probabilities.

    Raises:
        UserError: No plain timm model decides as this one does.
    """
    layer = linear_decisions(classifier)
    network = _network(classifier, layer)
    settings = {name: network.pretrained_cfg[name] for name in _OF_LAYERS if name in network.pretrained_cfg}
    images = {**preprocessing._asdict(), "interpolation": "bilinear", "crop_mode": "center"}
    network.pretrained_cfg = {**settings, **images, "num_classes": network.num_classes}
    names = {} if classifier.class_names is None else {"label_names": classifier.class_names}
    save_for_hf(network, str(folder), names, _arguments(classifier), safe_serialization=True)
    # safetensors lets nobody else read what it writes
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    _check(classifier, layer, preprocessing, folder)
    return layer.calibrated


def _others() -> str:
    return f"export it with {argument('format', 'onnx torch-export')}, which take heads that are not linear"


@torch.no_grad()
def linear_decisions(classifier: Classifier) -> Linear:
    """The linear layer on pooled features that makes the decisions of the classifier's head, logit adjustment and temperature.

    Raises:
        UserError: No linear layer does: the head is not linear, even before its embedding is scaled to norm 1.
    """
    head: Head = classifier.head
    exact = copy.deepcopy(head).double().eval()
    if isinstance(exact.embedder, Embedder):
        exact.embedder.normalize = False  # it divides all logits of an image by one number
    width = head.in_features
    bias = exact(torch.zeros(1, width, dtype=torch.float64))[0]
    weight = exact(torch.eye(width, dtype=torch.float64)).T - bias[:, None]

    features = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    found = features.double() @ weight.T + bias
    logits = head(features).double()
    linear = torch.allclose(exact(features.double()), found, rtol=1e-6, atol=1e-6)
    lost = logits.amax(1) - logits.gather(1, found.argmax(1, keepdim=True))[:, 0]
    if not linear or (lost > 1e-4 * logits.abs().amax()).any():
        raise UserError(f"no linear layer decides as a {type(head).__name__} with these options does: {_others()}")
    calibrated = torch.allclose(logits, found, rtol=1e-4, atol=1e-4)
    shift, one = (classifier.calibrated(torch.full((1, head.num_classes), value))[0].double() for value in (0.0, 1.0))
    if calibrated:  # then the adjustment of each class and the temperature belong to the layer
        weight, bias = weight * (one - shift)[:, None], bias * (one - shift) + shift
    elif shift.any():
        tau: float = classifier.hparams["logit_adjustment"]
        raise UserError(
            f"the logit adjustment of {tau} is added to cosines, for which a linear layer lacks the normalisation: {_others()}"
        )
    else:
        weight, bias = weight * one[:, None], bias * one
    return Linear(weight.float(), bias.float(), calibrated)


@torch.no_grad()
def _network(classifier: Classifier, layer: Linear) -> Any:
    """The timm model with the backbone's name and weights, and with the layer as its classifier."""
    name = classifier.hparams["backbone"]
    network: Any = timm.create_model(name, num_classes=len(layer.bias), **_arguments(classifier)).eval()
    own: Any = network.get_classifier()
    linear = isinstance(own, nn.Linear | nn.Conv2d) and own.bias is not None
    if not linear or own.weight.numel() != layer.weight.numel():
        raise UserError(f"timm's {name} has no linear classifier on its pooled features: {_others()}")
    prefix = next(key for key, module in network.named_modules() if module is own)
    state = dict(classifier.backbone.state_dict())
    state |= {f"{prefix}.weight": layer.weight.view_as(own.weight), f"{prefix}.bias": layer.bias}
    network.load_state_dict(state)
    return network


def _arguments(classifier: Classifier) -> dict[str, Any]:
    return {"in_chans": classifier.hparams["in_chans"], **(classifier.hparams["model_kwargs"] or {})}


@torch.no_grad()
def _check(classifier: Classifier, layer: Linear, preprocessing: Preprocessing, folder: Path) -> None:
    """Read the files as their users will, and compare the logits with the classifier's."""
    images = torch.randn(2, *preprocessing.input_size, generator=torch.Generator().manual_seed(0))
    expected = classifier.features(images) @ layer.weight.T + layer.bias
    found = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(images)
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        raise UserError(f"timm does not read the exported {classifier.hparams['backbone']} as it was: {_others()}")
