"""A network that decides: backbone and head, what is done with the logits, and what it knows of the data it was trained on."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from etflight.checkpoint.model import load_model, other_weights
from etflight.data import facts
from etflight.data.preprocessing import Preprocessing
from etflight.decision import Decision, is_of_another
from etflight.heads import Head
from etflight.losses import Loss
from etflight.prediction import Picture, Predictions, predict
from etflight.utils.errors import UserError, let_through, warn
from etflight.utils.fingerprints import fingerprint_in
from etflight.utils.modes import evaluation_mode
from etflight.utils.terminal import readable

if TYPE_CHECKING:
    from etflight.backbones.cost import Cost


class Network(LightningModule):
    """What is left of a `Classifier` after its training.

    A subclass has the arguments `num_classes`, `in_chans`, `backbone`, `model_kwargs`, `logit_adjustment` and `adjustment` among its
    hyper-parameters, and calls `_assemble` with the parts that it makes of them.

    Attributes:
        temperature: A scalar buffer that divides the logits of `predict` and of `ece_calibrated`, after any `logit_adjustment`, so it
            never changes a decision. It is fitted on held-out images for one decision: that of the training, or that of an evaluation with
            `etflight.callbacks.FitTemperature`. Until then, and for any other decision, it is the loss's default.
        is_calibrated: Whether the temperature was fitted.
        class_counts: The number of training images of each class, a buffer `[K]`; all 0 if unknown.
        class_names: The names of the classes, from the data module or the checkpoint; None if unknown.
        preprocessing: Shape and normalisation of the images, from the data module trained on or the checkpoint; None if unknown.
        fingerprint: The fingerprint of the training images, from the data module trained on or the checkpoint; None if unknown.
    """

    temperature: Tensor
    class_counts: Tensor
    class_names: list[str] | None = None
    preprocessing: Preprocessing | None = None
    fingerprint: str | None = None
    is_calibrated: bool = False
    _other_arguments: Sequence[str] = ()  # in which the checkpoint being loaded differs from this model

    def _assemble(self, backbone: nn.Module, head: Head, loss: Loss, num_classes: int) -> None:
        loss.check_head(head)
        self.backbone = backbone.to(memory_format=torch.channels_last)
        self.head: Any = head
        self.loss: Any = loss
        self.register_buffer("temperature", torch.tensor(loss.default_temperature(head)))
        self.register_buffer("class_counts", torch.zeros(num_classes, dtype=torch.long))

    def features(self, images: Tensor) -> Tensor:
        """Compute the pooled features that the head receives.

        Args:
            images: Images `[B, C, H, W]`, float32, normalised as in training (`preprocessing`); or their pooled features `[B, d]`, computed
                before, which come back as they are.

        Returns:
            Pooled features `[B, d]`, of the network's dtype.

        Raises:
            UserError: They are not such images, or the backbone does not take this size.
        """
        if images.ndim == 2 and images.is_floating_point() and images.shape[1] == self.head.in_features:
            return images
        if images.ndim != 4 or not images.is_floating_point():
            mend = "normalised, as the data module's eval_transform returns them, or train with Trainer.fit(model, datamodule=…)"
            raise UserError(f"images must be floating [B, C, H, W], {mend}; got {images.dtype} {list(images.shape)}")
        images = images.to(self.dtype)  # the data module does not know of a network in half or double precision
        try:
            return cast(Tensor, self.backbone(images.contiguous(memory_format=torch.channels_last)))
        except (AssertionError, RuntimeError, ValueError) as error:
            let_through(error)
            from etflight.backbones import describe_refused_size

            name, shape = self.hparams["backbone"], images.shape[1:]
            way_out = describe_refused_size(name, shape, self.hparams["model_kwargs"])
            if way_out is None:  # the size is not the cause
                raise
            size, reason = " x ".join(map(str, shape)), str(error).strip().partition("\n")[0].rstrip(".")
            raise UserError(f"{name} does not take images of {size} ({reason}): {way_out}") from error

    def embed(self, images: Tensor) -> Tensor:
        """Compute the embedding that is compared with the class vectors, for images as in `features`.

        Returns:
            `[B, d']`, float32 or float64; of norm 1 if the head normalises.
        """
        return cast(Tensor, self.head.embed(self.features(images)))

    def forward(self, images: Tensor) -> Tensor:
        """Compute the head's logits `[B, K]`, neither adjusted nor calibrated, for images as in `features`."""
        return cast(Tensor, self.head(self.features(images)))

    def probabilities(self, images: Tensor) -> Tensor:
        """Compute the calibrated probabilities of the classes, for images as in `features`.

        Returns:
            `[B, K]`, float32 or float64, in [0, 1], with rows of sum 1.

        Raises:
            UserError: There is a `logit_adjustment`, but no training counts.
        """
        return self.calibrated(self(images)).softmax(dim=1)

    def predict(self, images: Picture | Sequence[Picture], batch_size: int = 64, top_k: int = 1) -> Predictions:
        """Predict the classes of pictures, prepared as the images of the training were, in evaluation mode.

        Args:
            images: The path of an image file, a picture that Pillow has opened, uint8 `[H, W, C]` or `[H, W]` as an array or tensor, or a
                list of these; or uint8 `[B, C, H, W]`. Of any size, grey or RGB, with or without transparency.
            batch_size: The number of images at a time.
            top_k: The number k of classes for each image, the most probable first.

        Returns:
            Names, calibrated probabilities `[N, k]` and labels `[N, k]`; the numbers are those of `etflight predict`.

        Raises:
            UserError: An image cannot be read or has other channels, or the model does not know how its images were prepared.
        """
        with evaluation_mode(self):
            prepare, names, device = self.preprocessing, self.names_or_labels, self.device
            return predict(
                self.probabilities, images, prepare, names, device=device, batch_size=batch_size, top_k=top_k
            )

    def calibrated(self, logits: Tensor) -> Tensor:
        """Compute the logits `[B, K]` that decide, whose softmax is the calibrated probabilities, from those of `forward`.

        Each goes through a linear function: see `etflight.decision.Decision.calibrated`.
        """
        return self.decision.calibrated(logits)

    def cost(self, image_shape: Sequence[int]) -> "Cost":
        """Count the network's parameters, and its multiply-adds for an image of shape `[C, H, W]`."""
        # torch's counter takes half a second, which `--help` need not wait for
        from etflight.backbones.cost import network_cost

        return network_cost(self.backbone, self.head, image_shape)

    @property
    def decision(self) -> Decision:
        """What is done with the logits, as it is now."""
        return Decision(
            tau=float(self.hparams["logit_adjustment"]),
            adjustment=self.hparams["adjustment"],
            unit=partial(self.loss.default_temperature, self.head),
            class_counts=self.class_counts,
            temperature=self.temperature,
            is_fitted=self.is_calibrated,
            loss=type(self.loss).__name__,
        )

    def describe_temperature(self) -> str:
        """Say what temperature the probabilities have, and where it comes from."""
        return self.decision.describe_temperature()

    def set_temperature(self, temperature: Tensor | None) -> None:
        """Take a temperature that was fitted for the model's decision as it is now; None for the default of its loss."""
        self.is_calibrated = temperature is not None
        default = torch.tensor(self.loss.default_temperature(self.head))
        self.temperature.copy_(default if temperature is None else temperature)

    @property
    def names_or_labels(self) -> list[str]:
        """The names of the classes, or the labels as text where they are unknown, `[K]`."""
        return self.class_names or [str(k) for k in range(self.hparams["num_classes"])]

    def differences(self, data: Any, *, images: bool = False) -> list[str]:
        """Describe how data differ from those the model was trained on, as far as both are known.

        Args:
            data: A data module.
            images: Whether to compare the training images too, which means reading them.

        Returns:
            Lines for people, about the class names, about size and normalisation, and about the training images.
        """
        names = facts.other_names(self.class_names, data)
        found = [names and f"{names}: the names in the results are the checkpoint's"]
        found += [facts.other_preprocessing(self.preprocessing, data)]
        found += [facts.other_images(self.class_counts.tolist(), self.fingerprint, data)] if images else []
        return [line for line in found if line]

    def set_class_counts(self, class_counts: Any) -> None:
        """Take the number of training images of each class, `[K]`, as a list, an array or a tensor.

        Raises:
            UserError: They are something else.
        """
        self.class_counts.copy_(facts.class_counts_of(class_counts, len(self.class_counts)))
        self.loss.set_class_counts(self.class_counts)

    def take_facts(self, data: Any, *, trains: bool) -> None:
        """Take what a data module tells of classes and, to train on it, of its images.

        Raises:
            UserError: It has another number of classes or channels, or two classes of one name.
        """
        shape = self.hparams["num_classes"], self.hparams["in_chans"]
        facts.refuse_other_shape("the model", *shape, data, "give other data")
        names = facts.class_names_of(data)
        if names is not None and len(names) == self.hparams["num_classes"]:
            self.class_names = names if trains else self.class_names or names
        if not trains:
            return
        facts.refuse_equal_class_names(names or [], data)
        if (differ := facts.other_preprocessing(self.preprocessing, data)) and self.global_rank == 0:
            warn(differ)
        if (counts := getattr(data, "class_counts", None)) is not None:
            self.set_class_counts(counts)
        self.preprocessing = facts.preprocessing_of(data)
        self.fingerprint = getattr(data, "fingerprint", None)

    # --- in a checkpoint ---------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the weights alone do not tell."""
        checkpoint["class_names"] = self.class_names
        checkpoint["preprocessing"] = self.preprocessing and self.preprocessing._asdict()
        checkpoint["fingerprint"] = self.fingerprint
        checkpoint["temperature"] = "fitted" if self.is_calibrated else "default"
        checkpoint["state_dict"]["class_counts"] = self.class_counts  # averaging of weights rounds whole numbers down

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back what the checkpoint knows of classes and images."""
        if (counts := checkpoint.get("current_model_state", {}).get("class_counts")) is not None:
            checkpoint["state_dict"]["class_counts"] = counts  # in the averaged weights they are rounded down
        if (names := checkpoint.get("class_names")) is not None:
            self.class_names = list(map(readable, names))
        self.is_calibrated = checkpoint.get("temperature") == "fitted"
        self.preprocessing = Preprocessing.in_checkpoint(checkpoint) or self.preprocessing
        self.fingerprint = fingerprint_in(checkpoint) or self.fingerprint

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights as any module does; the loss takes the training counts among them.

        Raises:
            UserError: They are those of another model.
        """
        arguments, self._other_arguments = self._other_arguments, ()
        is_stale = is_of_another(arguments, self.hparams, fitted=self.is_calibrated)
        try:
            result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        except RuntimeError as error:
            raise other_weights(error, arguments) from error
        if is_stale:
            if self.is_calibrated:
                rank_zero_info(self.decision.describe_stale_temperature())
            self.set_temperature(None)
        if bool(self.class_counts.any()):
            self.loss.set_class_counts(self.class_counts)
        return result

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = "cpu",
        hparams_file: None = None,
        strict: bool | None = None,
        weights_only: bool | None = True,
        **kwargs: Any,
    ) -> Self:
        """Load a model from a checkpoint; nothing in the file can import or run code.

        Args:
            checkpoint_path: The file.
            map_location: The device for the tensors.
            hparams_file: Not used; hyper-parameters are in the checkpoint.
            strict: Whether all weights must match, True by default.
            weights_only: Not used; only plain data is ever read.
            kwargs: Hyper-parameters that replace the saved ones.

        Raises:
            UserError: The file cannot be read, or names a class which is not imported.
        """
        return load_model(cls, checkpoint_path, map_location, strict is not False, kwargs)
