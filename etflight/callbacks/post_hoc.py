"""Classifiers that replace a trained model's head in an evaluation, found without training."""

import math
from abc import ABC, abstractmethod
from functools import partial
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from etflight.analysis.features import HEAD, EmbeddingSource
from etflight.analysis.sweep import PassStatistics, plain_tensors, sweep, undisturbed
from etflight.callbacks.temperature import decided, evaluation_batches
from etflight.checkpoint.specs import Spec, from_spec, to_spec
from etflight.checkpoint.weights_to_come import weights_come_next
from etflight.classifier import Classifier
from etflight.data.facts import other_images
from etflight.embedder import Embedder
from etflight.heads import CosineHead, ETFHead, Head, LinearHead, ScaledLinearHead
from etflight.losses import CrossEntropyLoss, Loss, temperature_of_cosines
from etflight.utils.errors import UserError, argument
from etflight.utils.modes import evaluation_mode
from etflight.utils.precision import at_least_float32
from etflight.utils.trainer import GivesBack, data_module


class _Trained(NamedTuple):
    """What a method takes from a model, and gives back."""

    head: Head
    loss: Loss
    temperature: Tensor
    is_calibrated: bool
    arguments: dict[str, Any]


class PostHoc(GivesBack, ABC):
    """Validates, tests and predicts with another head of a `Classifier`.

    Meanwhile the model is an ordinary classifier of this head and of cross-entropy, since no loss has trained the head: its temperature is
    1 until one is fitted for it (`FitTemperature`). Afterwards the model has its own head, loss and temperature again, and no file of the
    model ever lost them. `applied` returns the ordinary classifier itself.

    Attributes:
        training_data: A data module with the images of the model's training, if the trainer's own has others; else None.
        needs_training_data: Whether there is no new head without these images.

    Raises:
        UserError: It is used in training, where there is nothing to replace yet, or on a model with a `logit_adjustment`, which is for
            the logits of the model's own head.
    """

    training_data: Any = None
    needs_training_data: ClassVar[bool] = False
    _own: _Trained | None = None
    _stays = False

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
                f"give {argument('model.logit_adjustment', 0)}"
            )
        if stage == "fit":
            raise UserError(
                f"{type(self).__name__} takes a trained model and trains nothing: "
                "etflight test -c CONFIG --ckpt_path RUN/checkpoints/last.ckpt"
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace the head."""
        model = cast(Classifier, pl_module)
        with torch.no_grad(), plain_tensors(), evaluation_mode(model):
            head = self.new_head(trainer, model).eval()
            rank_zero_info(f"{type(self).__name__} decides in place of the trained {type(model.head).__name__}")
            arguments = {name: model.hparams[name] for name in ("head", "loss")}
            self._own = _Trained(model.head, model.loss, model.temperature, model.is_calibrated, arguments)
            model.hparams["head"] = head.__dict__.get("spec", arguments["head"])
            model.hparams["loss"] = to_spec(CrossEntropyLoss, "loss")
            model.head, model.loss = head, CrossEntropyLoss().eval()
            model.temperature = torch.empty_like(model.temperature)
            model.set_temperature(None)

    on_test_start = on_predict_start = on_validation_start

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the model its head back."""
        if self._own is not None and not self._stays:
            model = cast(Classifier, pl_module)
            model.head, model.loss, model.temperature, model.is_calibrated = self._own[:4]
            model.hparams.update(self._own.arguments)
        self._own = None

    def applied(self, model: Classifier, data: Any, image_shape: tuple[int, ...] | None = None) -> Classifier:
        """Return the ordinary classifier that decides as this method does with a trained model, which stays as it is.

        It tests, predicts and exports like any other, and a checkpoint of it loads if the trained head is one of etflight's.

        Args:
            model: The trained model.
            data: The data module of its training, or None; a temperature is fitted if it has held-out images.
            image_shape: The shape `[C, H, W]` of the images; None: that of the data.

        Returns:
            The classifier, in evaluation mode, on the CPU.
        """
        known = self.training_data
        self.training_data, self._stays = data, True
        try:
            return decided(model, data, image_shape or data.preprocessing.input_size, self)
        finally:
            self.training_data, self._stays = known, False


class TauNormalization(PostHoc):
    """τ-normalisation: class vectors `w_k / ‖w_k‖^τ` without biases, because in a linear head classes with more images have larger norms.

    All of them are multiplied by g^τ, with the geometric mean g of the norms: logits keep the scale that the softmax was trained with, and
    no decision changes.

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
        return _head_of(model, weight / (norm / norm.log().mean().exp()) ** self.tau)


class NearestClassMean(PostHoc):
    """Nearest class mean (NCM): an image belongs to the class whose mean training embedding has the largest cosine with its own.

    The means are those of all training images, without augmentation, in evaluation mode: summed in one pass in float64, over all processes.
    The logits are `s cos`. Their scale s gives an embedding that points to its class mean the probability 0.99, as the default temperature
    of dot regression does (`etflight.losses.temperature_of_cosines`): the softmax of cosines themselves is never confident.

    Raises:
        UserError: When it starts: the training images are not the checkpoint's, or there is no data module of this package.

    Source:
        Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, arXiv 1910.09217, section 4,
        with cosine similarity.
    """

    needs_training_data = True

    def new_head(self, trainer: Trainer, model: Classifier) -> Head:
        """Keep the trained embedding, and take the class means as class vectors."""
        data = self.training_data or data_module(trainer)
        if not hasattr(data, "eval_dataloader"):
            raise UserError(
                "NearestClassMean takes the training images from a data module of etflight: give datamodule="
            )
        if differ := other_images(model.class_counts.tolist(), model.fingerprint, data):
            raise UserError(
                f"NearestClassMean: {differ}: give the data options of its training ({argument('data.imbalance_ratio')} and the like)"
            )
        passed = PassStatistics(model.head.num_classes, model.device, scatter=False)
        source, batches = EmbeddingSource(model, "head"), evaluation_batches(model, data, "train")
        with undisturbed(trainer, model):
            sweep(batches, source, passed, forward_context=trainer.precision_plugin.forward_context)
        means = passed.compute()[HEAD].means
        if len(empty := (~means.isfinite().all(1)).nonzero().flatten()):
            raise UserError(
                f"NearestClassMean: class {model.names_or_labels[int(empty[0])]} has no training image that can be read, so it has no mean"
            )
        vectors = F.normalize(means, dim=1).to(at_least_float32(model.temperature))
        # class vectors may all be equal
        return _head_of(model, vectors, scale=1 / max(temperature_of_cosines(vectors), 1e-4))


# A head of other class vectors --------------------------------------------------------------------------------------

_SAME_EMBEDDING = (LinearHead, ScaledLinearHead, CosineHead, ETFHead)  # a subclass may embed in another way


def _head_of(model: Classifier, vectors: Tensor, scale: float | None = None) -> Head:
    """Make a head on the embedder of the trained one, without biases.

    It is one of etflight's if the trained head is, and then has `spec`, from which a checkpoint makes it again.

    Args:
        model: The trained model.
        vectors: The class vectors `[K, d']`.
        scale: The factor of the cosines that are the logits; None for the products of embedding and class vectors.
    """
    trained = model.head
    if type(trained) not in _SAME_EMBEDDING:
        return _Replacement(trained, vectors, scale)
    spec = _spec_of(trained, to_spec(model.hparams["head"], "head")["init_args"], scale)
    with weights_come_next():
        head: Head = from_spec(spec, Head, "head")(trained.in_features, trained.num_classes)
    state = trained.state_dict()
    head.load_state_dict({name: state.get(name) for name in head.state_dict()} | {"weight": vectors})
    head.to(vectors.device).to(model.temperature.dtype).requires_grad_(False)
    head.weight.data = vectors  # in float32 at least, whatever the network has
    head.__dict__["spec"] = spec
    return head


def _spec_of(trained: Head, arguments: dict[str, Any], scale: float | None) -> Spec:
    if isinstance(trained, ETFHead):
        fixed = {"normalize": True, "scale": scale, "learn_scale": False, "reserved_classes": 0}
        return to_spec(partial(ETFHead, **{**arguments, **fixed}), "head")
    kept = {name: arguments[name] for name in ("batch_norm", "normalize") if name in arguments}
    if scale is None:
        return to_spec(partial(LinearHead, **kept, use_bias=False), "head")
    kept.pop("normalize", None)  # a cosine head always does
    return to_spec(partial(CosineHead, **kept, scale=scale), "head")


class _Replacement(Head):
    """Fixed class vectors, without biases, on the embedder of a trained head of the user's own."""

    def __init__(self, trained: Head, vectors: Tensor, scale: float | None) -> None:
        embedder = trained.embedder
        if scale is not None:
            embedder = nn.Sequential(embedder, Embedder(vectors.shape[1], normalize=True))
        super().__init__(trained.in_features, trained.num_classes, embedder=embedder, scale=scale or 1.0)
        self.register_buffer("weight", vectors)
        self.bias = None
