"""The temperature of a decision that training did not make."""

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, TensorDataset

from etflight.analysis.sweep import plain_tensors, undisturbed
from etflight.classifier import Batch, Classifier
from etflight.data.facts import other_images
from etflight.data.sources import Split
from etflight.metrics.accuracy import TemperatureFit
from etflight.utils.errors import UserError, argument, warn
from etflight.utils.trainer import data_module


class FitTemperature(Callback):
    """Fits the temperature of a decision that has none, before a `Classifier` is validated, tested or predicts with it.

    It is fitted on the held-out images of the model's training, never on test images; where they are not at hand, the decision keeps the
    default of its loss. It stands behind a `PostHoc`, whose head it is then fitted for.

    Args:
        training_data: A data module with the images of the model's training, if the trainer's own has others.
    """

    def __init__(self, training_data: Any = None) -> None:
        self.training_data = training_data

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fit it, but not in a training, which does so itself."""
        model = cast(Classifier, pl_module)
        if trainer.state.fn == "fit" or model.is_calibrated:
            return
        data = self.training_data or data_module(trainer)
        if has_held_out_images(model, data):
            fit_temperature(trainer, model, data)

    on_test_start = on_predict_start = on_validation_start


def has_held_out_images(model: Classifier, data: Any) -> bool:
    """Whether a data module has images that are known to have been held out from the training of a model."""
    if model.fingerprint is None or not getattr(data, "val_is_held_out", False):
        return False
    try:
        return not other_images(model.class_counts.tolist(), model.fingerprint, data)
    except UserError:  # the training images may be missing, since an evaluation does not need them
        return False


def fit_temperature(trainer: Trainer, model: Classifier, data: Any) -> None:
    """Fit the temperature of a model's decision on the validation images of a data module."""
    with plain_tensors(), undisturbed(trainer, model):
        fit = TemperatureFit().to(model.device)
        for images, labels in evaluation_batches(model, data, "val"):
            with trainer.precision_plugin.forward_context():
                logits = model(images)
            fit.update(model.decision.adjusted(logits), labels)
        temperature = fit.compute()
        model.set_temperature(temperature)
    rank_zero_info(f"temperature {float(temperature):.3g} fitted for this decision on held-out images")
    if fit.doubt is not None and trainer.is_global_zero:
        more = argument("data.val_fraction")
        warn(f"do not trust the temperature {float(temperature):.3g}: {fit.doubt}; hold out more ({more})")


def evaluation_batches(model: Classifier, data: Any, split: Split) -> Iterator[Batch]:
    """The batches of a split of a data module of etflight's, which need not be the trainer's, on the model's device."""
    for images, labels in data.eval_dataloader(split):
        yield data.eval_transform((images.to(model.device), labels.to(model.device)))


def decided(model: Classifier, data: Any, image_shape: tuple[int, ...], *methods: Callback) -> Classifier:
    """Return a copy of a model that decides as an evaluation with these callbacks lets it.

    Args:
        model: The trained model.
        data: The data module of its training, or None.
        image_shape: The shape `[C, H, W]` of its images.
        methods: Callbacks such as a `PostHoc` that leave their head in the model.

    Returns:
        The copy, in evaluation mode, on the CPU, with a temperature if the data have held-out images.
    """
    model = copy.deepcopy(model)
    silent: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = Trainer(callbacks=[*methods, FitTemperature(data)], devices=1, **silent)
    trainer.predict(model, DataLoader(TensorDataset(torch.zeros(1, *image_shape))), return_predictions=False)
    model.trainer = None
    return model.cpu().eval()
