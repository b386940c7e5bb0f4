"""Any timm model with a linear classifier of its own, so that it can be measured like a trained `Classifier`."""

from difflib import get_close_matches
from typing import Any, NamedTuple

import timm
from timm.data.config import resolve_data_config
from torch import Tensor, nn

import etflight.backbones  # noqa: F401  registers our networks in timm
from etflight.checkpoint.files import misfit, read_weights
from etflight.data import ImageDataModule
from etflight.data.facts import refuse_other_shape
from etflight.utils.errors import UserError, argument, brief, let_through


class TimmModel(NamedTuple):
    """A timm model.

    Attributes:
        name: Its name for people, with the file of its weights.
        network: The network.
        head: The name of its classifier among its submodules.
    """

    name: str
    network: nn.Module
    head: str


def timm_model(name: str, data: ImageDataModule, weights: str | None = None) -> TimmModel:
    """Make a timm model, and let a data module normalise its images as for the model's training, unless the module was told how.

    Args:
        name: The name in timm.
        data: The data module whose images it is to see.
        weights: A state dict as a file (.safetensors, or of `torch.save`); None: the published weights.

    Raises:
        UserError: There is no such model, its weights cannot be had or do not fit, or it has no linear classifier for the data's classes.
    """
    network = _create(name, weights, data)
    called = f"timm model {name}" + (f" with {weights}" if weights else "")
    classifier = network.get_classifier()
    head = next((own for own, module in network.named_modules() if module is classifier), "")
    num_classes = getattr(getattr(classifier, "weight", None), "shape", (0,))[0]
    if not head or not num_classes:
        kind = type(classifier).__name__
        raise UserError(f"{called} has no linear classifier to measure (its get_classifier() is {kind})")
    refuse_other_shape(called, num_classes, data.num_channels, data, _own_weights())
    _adopt_normalisation(network, data)
    return TimmModel(called, network, head)


def _own_weights() -> str:
    return f"give {argument('weights', 'FILE')} of a model trained on these classes"


def _create(name: str, weights: str | None, data: ImageDataModule) -> Any:
    if ":" not in name and not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), n=5)
        hint = f"near matches: {', '.join(near)}" if near else "`timm.list_models()` has them all"
        raise UserError(f"no timm model is called {name!r}: {hint}")
    published: Any = timm.get_pretrained_cfg(name)  # None for a name of the Hub or of a folder
    arguments: dict[str, Any] = {"in_chans": data.num_channels, "pretrained": weights is None}
    state: dict[str, Tensor] = {}
    if weights is not None:
        state = read_weights(weights)
        classifier = state.get(f"{published and published.classifier}.weight")
        arguments["num_classes"] = data.num_classes if classifier is None else len(classifier)
        refuse_other_shape(f"{weights} of {name}", arguments["num_classes"], data.num_channels, data)
    elif published:  # before a download that would be in vain
        refuse_other_shape(f"timm model {name}", published.num_classes, data.num_channels, data, _own_weights())
    try:
        network: Any = timm.create_model(name, **arguments)
    except Exception as error:  # of the Hub, its transport and the files
        let_through(error)
        # with a file nothing is downloaded
        mend = f"give {argument('weights', 'FILE')}" if weights is None else f"give another {argument('timm')}"
        raise UserError(f"timm model {name!r} cannot be had ({brief(error)}): {mend}") from error
    if weights is not None:
        if problem := misfit(state, network.state_dict()):
            raise UserError(
                f"{weights} does not fit {name} for {data.num_channels} channels: {problem}: give the name that made it"
            )
        network.load_state_dict(state)
    return network


def _adopt_normalisation(network: Any, data: ImageDataModule) -> None:
    settings = resolve_data_config(model=network)  # type: ignore[no-untyped-call]
    for name in ("mean", "std"):
        values = [float(value) for value in settings[name]]
        if getattr(data, name) is None and len(values) in (1, data.num_channels):
            setattr(data, name, values)
