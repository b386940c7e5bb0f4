"""Classifiers that replace a trained model's head in an evaluation, found without training."""

import math
from abc import ABC, abstractmethod
from typing import cast

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from etflight.callbacks.features import HEAD, EmbeddingSource, PassStatistics, evaluation_mode, trainer_sweep
from etflight.classifier import Classifier
from etflight.heads import Head, LinearHead, ScaledLinearHead
from etflight.utils.errors import UserError
from etflight.utils.precision import at_least_float32, exact_product
from etflight.utils.trainer import data_module
from etflight.utils.training_data import other_images


class PostHoc(Callback, ABC):
    """Validates, tests and predicts with another head of a `Classifier`.

    Afterwards the model has its own head again, and no file of the model ever lost it. The temperature in a checkpoint was fitted to the
    logits of the model's own head, so it is 1 meanwhile.

    Raises:
        UserError: It is used in training, where there is nothing to replace yet, or on a model with a `logit_adjustment`, which is for
            the logits of the model's own head.
    """

    _own: tuple[Head, Tensor] | None = None

    @abstractmethod
    def new_head(self, trainer: Trainer, model: Classifier) -> Head:
        """Make the head that decides in place of `model.head`.

        Args:
            trainer: The trainer, with its data module.
            model: The trained model, on its device.
        """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to train, to be adjusted, and any other model."""
        if not isinstance(pl_module, Classifier):
            raise UserError(
                f"{type(self).__name__} replaces the head of an etflight.Classifier, not of a {type(pl_module).__name__}"
            )
        if tau := pl_module.hparams["logit_adjustment"]:
            raise UserError(
                f"logit_adjustment {tau:g} is for the logits of the trained head, in place of which {type(self).__name__} decides: "
                "give --model.logit_adjustment 0"
            )
        if stage == "fit":
            raise UserError(
                f"{type(self).__name__} takes a trained model and trains nothing: "
                "etflight test -c CONFIG --ckpt_path RUN/checkpoints/last.ckpt"
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the head."""
        model = cast(Classifier, pl_module)
        with torch.no_grad(), evaluation_mode(model):
            head = self.new_head(trainer, model)
        rank_zero_info(f"{type(self).__name__} decides in place of the trained {type(model.head).__name__}")
        self._own = model.head, model.temperature
        model.head = head.eval()
        model.temperature = torch.ones_like(model.temperature)

    on_test_start = on_predict_start = on_validation_start

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the model its head back."""
        if self._own is not None:
            model = cast(Classifier, pl_module)
            model.head, model.temperature = self._own
            self._own = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the model its head back."""
        self.teardown(trainer, pl_module, "")


class TauNormalization(PostHoc):
    """τ-normalisation: class vectors `w_k / ‖w_k‖^τ` without biases, because in a linear head classes with more images have larger norms.

    Args:
        tau: The exponent τ >= 0; 0 keeps the norms, 1 makes all of them 1. The authors choose it between the two on held-out images.

    Raises:
        UserError: The exponent is out of range; when it starts: the head is not linear in its class vectors.

    Source:
        Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, arXiv 1910.09217, section 4.
    """

    def __init__(self, tau: float = 1.0) -> None:
        super().__init__()
        if not 0 <= tau < math.inf:
            raise UserError(f"TauNormalization: tau must be finite and not negative, got {tau}")
        self.tau = tau

    def new_head(self, trainer: Trainer, model: Classifier) -> Head:
        """Keep the trained embedding, and rescale the class vectors."""
        head = model.head
        if not isinstance(head, LinearHead | ScaledLinearHead):
            raise UserError(
                f"TauNormalization rescales the class vectors of a linear head; those of {type(head).__name__} have norms that "
                "decide nothing: give the checkpoint of a LinearHead"
            )
        weight = at_least_float32(head.weight.detach())
        norm = torch.linalg.vector_norm(weight, dim=1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
        return _Replacement(head, weight / norm**self.tau)


class NearestClassMean(PostHoc):
    """Nearest class mean (NCM): an image belongs to the class whose mean training embedding has the largest cosine with its own.

    The means are those of all training images, without augmentation, in evaluation mode: summed in one pass in float64, over all processes.
    The logits are the cosines, so the softmax is never confident.

    Raises:
        UserError: When it starts: the training images are not the checkpoint's, or there is no data module of this package.

    Source:
        Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, arXiv 1910.09217, section 4,
        with cosine similarity.
    """

    def new_head(self, trainer: Trainer, model: Classifier) -> Head:
        """Keep the trained embedding, and take the class means as class vectors."""
        data = data_module(trainer)
        if not hasattr(data, "eval_dataloader"):
            raise UserError(
                "NearestClassMean takes the training images from a data module of etflight: give datamodule="
            )
        if differ := other_images(model.class_counts.tolist(), model.fingerprint, data):
            raise UserError(
                f"NearestClassMean: {differ}: give the data options of its training (--data.imbalance_ratio and the like)"
            )
        passed = PassStatistics(model.head.num_classes, model.device, scatter=False)
        source = EmbeddingSource(model, "head")
        trainer_sweep(trainer, model, data.eval_dataloader("train"), source, passed)
        means = passed.compute()[HEAD].means
        if len(empty := (~means.isfinite().all(1)).nonzero().flatten()):
            raise UserError(
                f"NearestClassMean: class {model.names_or_labels[int(empty[0])]} has no training image that can be read, so it has no mean"
            )
        return _Replacement(model.head, F.normalize(means, dim=1).to(at_least_float32(model.temperature)), cosine=True)


class _Replacement(Head):
    """Fixed class vectors, without biases, on the embedding of a trained head."""

    def __init__(self, trained: Head, weight: Tensor, *, cosine: bool = False) -> None:
        super().__init__(trained.in_features, trained.num_classes)
        self.trained = trained
        self.cosine = cosine
        self.register_buffer("weight", weight)
        self.bias = None

    def embed(self, features: Tensor) -> Tensor:
        embedding = at_least_float32(self.trained.embed(features))
        return F.normalize(embedding, dim=1) if self.cosine else embedding

    def forward(self, features: Tensor) -> Tensor:
        return exact_product(self.embed(features), self.weight)
