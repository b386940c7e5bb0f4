"""The LightningModule: backbone -> head -> loss."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from contextvars import ContextVar
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.cli import ReduceLROnPlateau as MonitoredReduceLROnPlateau
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from etflight import penalties
from etflight.checkpoint.files import read_checkpoint, refuse_others
from etflight.checkpoint.hyperparameters import differing, fixed_by, make_with, plain_arguments, plain_hyperparameters
from etflight.checkpoint.specs import as_plain, from_spec, objections, to_spec
from etflight.data.base import ImageDataModule
from etflight.data.facts import (
    class_names_of,
    other_images,
    other_names,
    other_preprocessing,
    preprocessing_of,
    refuse_other_shape,
    refuse_twins,
)
from etflight.data.preprocessing import Preprocessing
from etflight.decision import RULES_OF_OPTIONS, Adjustment, Decision, is_of_another
from etflight.heads import ETFHead, Head, codes_from_state_dict
from etflight.losses import DotRegressionLoss, Loss, class_weights_of
from etflight.metrics.accuracy import SampleMean, TemperatureFit
from etflight.metrics.evaluation import Evaluation, EvaluationMetrics
from etflight.optim import (
    PROTOCOL_SGD,
    at_sharpest_point,
    keeps_scales,
    kept_statistics,
    match_layouts,
    rate_groups,
    scale_rates,
    spare_from_decay,
)
from etflight.prediction import Picture, Predictions, predict
from etflight.utils.batches import images_in, labelled
from etflight.utils.errors import UserError, brief, let_through, warn
from etflight.utils.fingerprints import fingerprint_in
from etflight.utils.lightning_private import (
    hide_tips,
    ignore_own_deprecations,
    ignore_remarks_on_hooks,
    only_passes,
    replace_hyperparameters,
)
from etflight.utils.modes import evaluation_mode
from etflight.utils.ranks import in_process_group
from etflight.utils.terminal import readable
from etflight.utils.torch_private import leave_out_of_broadcasts
from etflight.utils.trainer import averaged, data_module, is_trial_run, shows_after, take_buffers_of_rank_zero

if TYPE_CHECKING:
    from etflight.backbones.cost import Cost

hide_tips()  # here, since who trains with this package has imported this module before making a trainer

Batch = tuple[Tensor, Tensor]
_MEND_OF_DIVERGENCE = (
    "lower the learning rate (--model.optimizer.lr), lengthen the warm-up, or clip gradients (--trainer.gradient_clip_val 1); "
    "the last checkpoint is from before"
)
PRIOR_SHIFTS = (2, 5, 10, 25, 50)  # the ratios of the long-tailed test sets for which an accuracy is logged
_NEVER = 2**62  # a step that no training reaches
_ARCHITECTURE = ("backbone", "model_kwargs", "head")
# what a run may change when it is resumed: none of it is part of a training step's mathematics
_FREE_WHEN_RESUMED = {"compile", "logit_adjustment", "adjustment", "pretrained", "num_classes", "in_chans"}
_has_weights = ContextVar(
    "_has_weights", default=False
)  # whether a checkpoint's are loaded next, so that none need be fetched
Compile = bool | Literal["reduce-overhead", "max-autotune"]
# the first type makes the parser find Lightning's ReduceLROnPlateau by this name instead of torch's
ScheduleCallable = Callable[[Optimizer], MonitoredReduceLROnPlateau] | Callable[[Optimizer], LRScheduler]


class Classifier(LightningModule):
    """An image classifier made of a timm backbone, a head and a loss.

    `head`, `loss`, `optimizer` and `lr_scheduler` are classes, or `functools.partial` of classes with keyword arguments; they are
    saved as plain data, so a checkpoint loads with `weights_only=True`.

    It logs `train/loss`, `train/lr` (of the epoch's last step), and for `val/` and `test/`: `loss`, `acc`, `acc_macro` (balanced
    accuracy), `acc_worst`, `acc_harmonic`, `acc_many`, `acc_medium`, `acc_few`, `acc_head`, `acc_middle`, `acc_tail` (see `ShotAccuracy`),
    `ece`, `ece_calibrated`; for `test/` also `acc_forward_R` and `acc_backward_R` for test sets that are long-tailed with ratio R.
    Accuracies lie in [0, 1].

    Args:
        num_classes: The number of classes K >= 2.
        backbone: Any name that timm knows, ours included (`resnet32_cifar`).
        head: A class that makes a `Head` from (in_features, num_classes).
        loss: A class that makes a `Loss`.
        optimizer: A class that makes an optimizer from parameters.
        lr_scheduler: A class that makes a schedule, stepped each epoch, from an optimizer; None keeps the rate. `ReduceLROnPlateau` is
            Lightning's, which follows its `monitor`, any number that is logged; torch's follows `val/loss`.
        class_counts: The number of training images of each class, `[K]`, for shot groups and "global" class balance, where there is no data
            module that tells them.
        in_chans: The number of channels of the images.
        pretrained: Whether the backbone starts from timm's weights.
        model_kwargs: Further arguments of timm's model, such as `{"width": 2}` for the CIFAR ResNets.
        logit_adjustment: The τ of post-hoc logit adjustment (Menon et al. 2021): validation, test and predict decide by `z - τ T₀ log π`,
            with the training frequencies π that the checkpoint holds and the temperature T₀ whose softmax the loss implies: 1 for
            cross-entropy, the loss's `default_temperature` for others. Training and the logged losses do not use it.
        adjustment: "additive" as above, or "multiplicative", which decides by `z π^(-τ)` (Hasegawa & Sato, ICLR 2024).
        layer_decay: The factor of the learning rate from a layer of the backbone to the one before it, above 0 and up to 1; the head has
            the optimizer's own rate. With 1 all layers have that rate. It is meant for fine-tuning.
        lr_scale: Factors of the learning rate for parts of the model, by name, such as `{"head.linear": 0.5}`; the rest has 1.
        sam_rho: The radius ρ of sharpness-aware minimization (SAM, Foret et al. 2021), with any optimizer; 0 for none. Each step then takes
            a second pass over its images, whose BatchNorm statistics are not kept: see `etflight.optim.at_sharpest_point`.
        sam_adaptive: Whether that radius is relative to the size of each weight (ASAM, Kwon et al. 2021).
        compile: Whether to train through `torch.compile`, or its mode; "reduce-overhead" is the one with CUDA graphs.
        class_weights: Explicit weights of the classes in the training loss: K positive, finite numbers, or such numbers by class name,
            where a class that is not named has 1. They multiply those of the loss's class balance.
        feature_penalty: The λ of a penalty `λ/2 · mean ‖h‖²` on the pooled features, >= 0; see `etflight.penalties.feature_penalty`.
        center_pull: The λ of a pull of embeddings towards the means of their classes in the batch, >= 0; see
            `etflight.penalties.center_pull`. It needs class indices, so neither mixup nor CutMix. Both penalties act in training only,
            where they are part of `train/loss`.

    Attributes:
        temperature: A scalar buffer that divides the logits of `predict` and of `ece_calibrated`, after any `logit_adjustment`, so it
            never changes a decision. It is fitted on held-out images for one decision: that of the training, or that of an evaluation with
            `etflight.callbacks.FitTemperature`. Until then, and for any other decision, it is the loss's default.
        is_calibrated: Whether the temperature was fitted.
        class_names: The names of the classes, from the data module or the checkpoint; None if unknown.
        preprocessing: Shape and normalisation of the images, from the data module trained on or the checkpoint; None if unknown.
        fingerprint: The fingerprint of the training images, from the data module trained on or the checkpoint; None if unknown.

    Raises:
        UserError: The parts cannot work together.

    Source:
        The defaults train the method of Yang et al. 2022, arXiv 2203.09081: a fixed frame and dot regression.
    """

    # the arguments that take a class, and the base of that class
    PLUGGABLE: ClassVar[Mapping[str, type]] = {
        "head": Head, "loss": Loss, "optimizer": Optimizer, "lr_scheduler": LRScheduler,
    }  # fmt: skip
    temperature: Tensor
    class_counts: Tensor
    _bad_step: Tensor

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet32_cifar",
        head: Callable[[int, int], Head] = ETFHead,
        loss: Callable[[], Loss] = DotRegressionLoss,
        optimizer: OptimizerCallable = PROTOCOL_SGD,
        lr_scheduler: ScheduleCallable | None = None,
        class_counts: list[int] | None = None,
        in_chans: int = 3,
        pretrained: bool = False,
        model_kwargs: dict[str, Any] | None = None,
        logit_adjustment: float = 0.0,
        adjustment: Adjustment = "additive",
        layer_decay: float = 1.0,
        lr_scale: dict[str, float] | None = None,
        sam_rho: float = 0.0,
        sam_adaptive: bool = False,
        compile: Compile = False,
        class_weights: list[float] | dict[str, float] | None = None,
        feature_penalty: float = 0.0,
        center_pull: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, str):
            raise UserError(
                f"backbone is a {type(backbone).__name__}: give a name that timm knows, with its arguments in model_kwargs; "
                "timm.register_model gives a network of your own a name"
            )
        buffers = ["class_counts"]  # these are in the state dict
        self.save_hyperparameters(ignore=buffers)
        self.hparams.pop("_instantiator", None)  # it names a function that loading would import and call
        if isinstance(class_weights, Mapping):  # in YAML the name 3 is a number
            class_weights = {str(name): weight for name, weight in class_weights.items()}
        self._class_weights = as_plain(class_weights, containers=True)
        if isinstance(self.hparams["class_weights"], Mapping):
            self.hparams["class_weights"] = self._class_weights
        replace_hyperparameters(self, plain_arguments(self.hparams, Classifier))
        _check_numbers(self.hparams)
        from etflight.backbones import build_backbone  # timm takes a second, which `--help` need not wait for

        self.backbone, feature_dim = build_backbone(
            backbone, in_chans=in_chans, pretrained=pretrained and not _has_weights.get(), model_kwargs=model_kwargs
        )
        self.backbone.to(memory_format=torch.channels_last)
        self.head: Any = self._build("head")(feature_dim, num_classes)
        self.loss: Any = self._build("loss")()
        self.loss.check_head(self.head)
        weights = self._class_weights
        if weights is not None and not isinstance(weights, Mapping):  # names wait for the data's
            self.loss.set_class_weights(class_weights_of(weights, num_classes, None))
        self.class_names: list[str] | None = None
        self.preprocessing: Preprocessing | None = None
        self.fingerprint: str | None = None
        self.is_calibrated = False
        self.register_buffer("temperature", torch.tensor(self.loss.default_temperature(self.head)))
        self.register_buffer("class_counts", torch.zeros(num_classes, dtype=torch.long))
        self.register_buffer("_bad_step", torch.tensor(_NEVER), persistent=False)
        if class_counts is not None:
            self._set_class_counts(_as_counts(class_counts))
        self._lr = math.nan
        self._batches: list[tuple[Batch, int]] = []  # those of this step, for SAM's second pass
        self.is_second_pass = False  # of a sharpness-aware step, which adds nothing to the metrics
        self._total_epochs: int | None = None
        self._other_arguments: list[str] = []  # in which the checkpoint being loaded differs from this model
        self.losses: Any = nn.ModuleDict({f"{stage}_loss": SampleMean() for stage in ("train", "val", "test")})
        self.evaluation_metrics: Any = nn.ModuleDict(
            {
                "val": EvaluationMetrics(num_classes),
                "test": EvaluationMetrics(num_classes, PRIOR_SHIFTS, confusion=True),
            }
        )
        self.temperature_fit = TemperatureFit()
        # the vectors are broadcast once, when training starts: in every forward it would cost 205 MB at K = 100,000
        own = [name for name, _ in self.named_buffers() if name in ("head.weight", "head.reserved", "_bad_step")]
        leave_out_of_broadcasts(self, own)

    # --- the model ---------------------------------------------------------------------------------------------------------

    def features(self, images: Tensor) -> Tensor:
        """Compute the pooled features that the head receives.

        Args:
            images: Images `[B, C, H, W]`, float32, normalised as in training (`preprocessing`).

        Returns:
            Pooled features `[B, d]`, of the network's dtype.

        Raises:
            UserError: They are not such images, or the backbone does not take this size.
        """
        if images.ndim != 4 or not images.is_floating_point():
            mend = "normalised, as the data module's eval_transform returns them, or train with Trainer.fit(model, datamodule=…)"
            raise UserError(f"images must be floating [B, C, H, W], {mend}; got {images.dtype} {list(images.shape)}")
        images = images.to(self.dtype)  # the data module does not know of a network in half or double precision
        images = images.contiguous(memory_format=torch.channels_last)
        try:
            return cast(Tensor, self.backbone(images))
        except (AssertionError, RuntimeError, ValueError) as error:
            let_through(error)
            from etflight.backbones import describe_refused_size

            name, shape = self.hparams["backbone"], images.shape[1:]
            way_out = describe_refused_size(name, shape, self.hparams["model_kwargs"])
            if way_out is None:  # the size is not the cause
                raise
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise UserError(
                f"{name} does not take images of {' x '.join(map(str, shape))} ({reason}): {way_out}"
            ) from error

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
        """Compute the logits that decide; their softmax is the calibrated probabilities.

        The `logit_adjustment` is applied, and the result divided by the temperature; so each logit goes through a linear function.

        Args:
            logits: The logits `[B, K]` of `forward`.

        Returns:
            `[B, K]`, float32 or float64.

        Raises:
            UserError: There is a `logit_adjustment`, but no training counts.
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
        self.temperature.copy_(
            torch.tensor(self.loss.default_temperature(self.head)) if temperature is None else temperature
        )

    @property
    def names_or_labels(self) -> list[str]:
        """The names of the classes, or the labels as text where they are unknown, `[K]`."""
        return self.class_names or [str(k) for k in range(self.hparams["num_classes"])]

    # --- steps -------------------------------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Make labels of any integer dtype int64; the step of a subclass gets its batches as they are.

        Raises:
            UserError: The batch is not what the step takes, or a label names no class.
        """
        stage = self.trainer.state.stage
        steps = {"train": "training_step", "test": "test_step", "predict": "predict_step"}
        step = steps.get(stage.value if stage is not None else "", "validation_step")
        if isinstance(data_module(self.trainer), ImageDataModule) or not self._keeps_step(step):
            return batch  # a data module of this package has looked at all labels when it read them
        if step == "predict_step":
            return images_in(batch)
        return labelled(batch, self.hparams["num_classes"], training=step == "training_step")

    def _keeps_step(self, name: str) -> bool:
        """Whether a step is this class's own, and not a subclass's."""
        return getattr(type(self), name) is getattr(Classifier, name)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Remember the head's learning rate, because at the end of the epoch the schedule has already set the next one."""
        if self.trainer.optimizers:  # a subclass may have none
            group = self.trainer.optimizers[0].param_groups[0]
            self._lr = float(group["lr"]) / group.get("lr_scale", 1.0)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of one training batch."""
        images, target = batch
        loss = self._training_loss(images, target)
        if self.is_second_pass:
            return loss * self._share_of_images(len(images))
        if self.hparams["sam_rho"] > 0 and not (self._is_fitting and only_passes(self.trainer)):
            self._batches.append((batch, batch_idx))
        self.losses["train_loss"].update(loss, len(images))
        bad_step = torch.where(torch.isfinite(loss.detach()), _NEVER, self.global_step)
        self._bad_step = torch.minimum(self._bad_step, bad_step)  # it stays on the device, so that a step need not wait
        return loss * self._share_of_images(len(images))

    # Lightning wants `dataloader_idx` where there are several loaders; `_start` refuses them with a mend
    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add one validation batch to the metrics."""
        logits = self._evaluate(batch, "val")
        if self._fits_temperature:
            self.temperature_fit.update(logits, batch[1])

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Add one test batch to the metrics."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Batch | Tensor, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        """Compute the calibrated probabilities `[B, K]` of images, with or without labels."""
        return self.probabilities(batch if isinstance(batch, Tensor) else batch[0])

    def _training_loss(self, images: Tensor, target: Tensor) -> Tensor:
        """The loss with its penalties."""
        feature_penalty, center_pull = self.hparams["feature_penalty"], self.hparams["center_pull"]
        if type(self).forward is not Classifier.forward:  # a subclass has logits of its own
            if feature_penalty or center_pull:
                raise UserError(
                    f"{type(self).__name__} has a forward of its own: leave out feature_penalty and center_pull"
                )
            return cast(Tensor, self.loss(self(images), target))
        if center_pull and target.is_floating_point():
            raise UserError(
                "center_pull needs one class for each image, but mixup and CutMix mix them: give --data.mixup 0 and --data.cutmix 0, or "
                "leave it out"
            )
        try:
            features = self.features(images)
            embedding = self.head.embedder(features)
        except ValueError as error:
            if len(images) > 1 or isinstance(error, UserError):
                raise
            raise UserError(
                "batch normalisation cannot train on a step of one image: give --data.batch_size 2 or more"
            ) from error
        loss = self._loss_of_targets(embedding, target)
        if feature_penalty:
            loss = loss + feature_penalty * penalties.feature_penalty(features)
        if center_pull:
            loss = loss + center_pull * penalties.center_pull(embedding, target, self.head.num_classes)
        return loss

    def _loss_of_targets(self, embedding: Tensor, target: Tensor) -> Tensor:
        if target.is_floating_point() or not self.loss.takes_target_logits:
            return cast(Tensor, self.loss(self.head.logits(embedding), target))
        # the logits of all classes would cost hundreds of times as much at K = 100,000
        own = self.head.target_logits(embedding, target)
        return cast(Tensor, self.loss.from_target_logits(own, target, self.head.num_classes))

    def _share_of_images(self, images: int) -> Tensor | float:
        """The number of images of this process, divided by its mean over processes.

        It corrects the averaging of gradients over processes, which counts each process the same whatever the size of its batch.
        """
        if not in_process_group():
            return 1.0
        dtype = torch.promote_types(self.temperature.dtype, torch.float32)
        total = torch.full((), float(images), dtype=dtype, device=self.device)
        dist.all_reduce(total)
        return images * dist.get_world_size() / total

    def _evaluate(self, batch: Batch, stage: str) -> Tensor:
        images, target = batch
        logits: Tensor = self(images)
        self.losses[f"{stage}_loss"].update(self.loss(logits, target), len(images))
        logits = self.decision.adjusted(logits)
        self.evaluation_metrics[stage].update(logits, target, self.temperature)
        return logits

    # --- epochs ------------------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Compile the backbone for training, and take the facts about classes and images from the data module, if there is one.

        Raises:
            UserError: The data module has another number of classes or channels, or no class of a name in `class_weights`.
        """
        ignore_own_deprecations()
        ignore_remarks_on_hooks()
        if stage == "fit":  # an earlier training may have ended anywhere
            self._bad_step.fill_(_NEVER)
            for metric in (*self.losses.values(), self.temperature_fit):
                metric.reset()
            self.set_temperature(None)  # one that was fitted is not that of the weights to come
        if stage == "fit" and (compile := self.hparams["compile"]):
            self.backbone.compile(mode="default" if compile is True else compile)
        data = data_module(self.trainer)
        if data is not None:
            self._take_facts(data, stage)
        if stage == "fit" and isinstance(weights := self._class_weights, Mapping):
            self.loss.set_class_weights(class_weights_of(weights, self.hparams["num_classes"], self.class_names))

    def _take_facts(self, data: Any, stage: str) -> None:
        refuse_other_shape("the model", self.hparams["num_classes"], self.hparams["in_chans"], data, "give other data")
        names = class_names_of(data)
        if names is not None and len(names) == self.hparams["num_classes"]:
            self.class_names = names if stage == "fit" else self.class_names or names
        if stage != "fit":
            return
        refuse_twins(names or [], data)
        if (differ := other_preprocessing(self.preprocessing, data)) and self.global_rank == 0:
            warn(differ)
        if (counts := getattr(data, "class_counts", None)) is not None:
            self._set_class_counts(_as_counts(counts))
        self.preprocessing = preprocessing_of(data)
        self.fingerprint = getattr(data, "fingerprint", None)

    def differences(self, data: Any, *, images: bool = False) -> list[str]:
        """Describe how data differ from those the model was trained on, as far as both are known.

        Args:
            data: A data module.
            images: Whether to compare the training images too, which means reading them.

        Returns:
            Lines for people, about the class names, about size and normalisation, and about the training images.
        """
        names = other_names(self.class_names, data)
        found = [names and f"{names}: the names in the results are the checkpoint's"]
        found += [other_preprocessing(self.preprocessing, data)]
        found += [other_images(self.class_counts.tolist(), self.fingerprint, data)] if images else []
        return [line for line in found if line]

    def _tell_differences(self) -> None:
        data = data_module(self.trainer)
        held_out = self.trainer.state.fn == "validate" and getattr(data, "val_fraction", 0) > 0
        if data is not None and self.global_rank == 0:
            for line in self.differences(data, images=held_out):
                warn(line)

    def on_validation_start(self) -> None:
        """Say how the data differ from those trained on; images that are held out now may have been trained on."""
        if self.trainer.state.fn == "fit":
            return
        self._tell_differences()
        if not getattr(data_module(self.trainer), "val_is_held_out", True):
            rank_zero_info("the validation images are the test images, since none are held out (--data.val_fraction)")

    on_test_start = on_predict_start = _tell_differences

    def on_fit_start(self) -> None:
        """Say how the data differ from those trained on; give averaged weights the model's facts, and all processes one frame.

        The descent behind a code amplifies rounding, which may differ between machines.
        """
        self._tell_differences()
        counts, temperature = self.class_counts.clone(), self.temperature.clone()
        with averaged(self.trainer, self):  # an average that was made before these were known
            self.class_counts.copy_(counts)
            self.temperature.copy_(temperature)
        if in_process_group() and not self.head.weight.requires_grad:
            dist.broadcast(self.head.weight, 0)

    def on_train_start(self) -> None:
        """Give restored optimizer states their parameters' memory layout; refuse what cannot be trained as it was asked for."""
        if not self.trainer.enable_validation:
            self._check_monitor("val/")
        self._batches = []
        for optimizer in self.trainer.optimizers:
            match_layouts(optimizer)
            if self.hparams["sam_rho"] > 0 and isinstance(optimizer, LBFGS):
                raise UserError(
                    "sam_rho: LBFGS evaluates the loss several times a step by itself: leave one of them out"
                )

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Check the recorded loss from time to time, because each check waits for the device."""
        if shows_after(self.trainer, batch_idx):
            self._stop_at_bad_loss()
            if outputs and "loss" in outputs:  # the step of a subclass may skip a batch, or optimise by itself
                loss = outputs["loss"] * self.trainer.accumulate_grad_batches
                self.trainer.progress_bar_metrics["loss"] = float(loss)

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics, and set the shot groups of the training counts."""
        if self.trainer.state.fn == "fit":
            self._stop_at_bad_loss()
            take_buffers_of_rank_zero(self)  # by now callbacks have put averaged weights into the model
        self._start("val")

    def on_test_epoch_start(self) -> None:
        """Reset the metrics, and set the shot groups of the training counts; the new counts are kept for `evaluation`."""
        self._start("test")

    def _start(self, stage: Literal["val", "test"]) -> None:
        batches = self.trainer.num_val_batches if stage == "val" else self.trainer.num_test_batches
        if len(batches) > 1 and self._keeps_step("validation_step" if stage == "val" else "test_step"):
            raise UserError(
                f"there are {len(batches)} {stage} loaders, whose images would be counted together: give one, or evaluate them one by one"
            )
        self.losses[f"{stage}_loss"].reset()
        self.evaluation_metrics[stage].start(self.class_counts)

    def on_train_epoch_end(self) -> None:
        """Log the loss; never let a checkpoint be written after a loss that is not finite."""
        self._stop_at_bad_loss()
        if self._has_counted("train"):
            self.log("train/loss", self.losses["train_loss"])
        self.log("train/lr", self._lr, sync_dist=True)
        self._check_monitor()

    def on_train_end(self) -> None:
        """Warn if the temperature cannot be trusted."""
        if self.global_rank == 0 and (doubt := self.temperature_fit.doubt) is not None:
            warn(f"do not trust the temperature {self.temperature:.3g}: {doubt}; hold out more (--data.val_fraction)")

    def on_validation_epoch_end(self) -> None:
        """Log the metrics, and fit the temperature if the validation images are held out."""
        self._log_epoch("val")
        if self.trainer.sanity_checking:
            self._check_monitor("val/")
        if self._fits_temperature and not self.trainer.sanity_checking:
            temperature = self.temperature_fit.compute()
            with averaged(self.trainer, self):  # by now callbacks have removed the validated weights from the model
                self.set_temperature(temperature)
            self.set_temperature(temperature)
        self.temperature_fit.reset()
        self.evaluation_metrics["val"].start(self.class_counts)

    def on_test_epoch_end(self) -> None:
        """Log the metrics."""
        self._log_epoch("test")

    def _has_counted(self, stage: str) -> bool:
        """Whether a step of some process has added to the metrics; those of a subclass may log numbers of their own instead."""
        counted = self.losses[f"{stage}_loss"].update_called
        return bool(self.trainer.strategy.reduce_boolean_decision(counted, all=False))

    def _log_epoch(self, stage: str) -> None:
        if not self._has_counted(stage):
            return
        self.log(f"{stage}/loss", self.losses[f"{stage}_loss"])
        for name, value in self.evaluation_metrics[stage].compute().items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "acc", sync_dist=True)

    def evaluation(self) -> Evaluation:
        """Return the counts of the last test epoch over all processes; every process must call it."""
        return cast(Evaluation, self.evaluation_metrics["test"].counts())

    @property
    def _fits_temperature(self) -> bool:
        held_out = getattr(data_module(self.trainer), "val_is_held_out", False)
        return bool(held_out) and self._is_fitting

    @property
    def _is_fitting(self) -> bool:
        try:
            return self.trainer.state.fn == "fit"
        except RuntimeError:  # a module without a trainer raises it
            return False

    def _stop_at_bad_loss(self) -> None:
        step = int(self.trainer.strategy.reduce(self._bad_step, reduce_op="min"))
        if step < _NEVER:
            raise UserError(
                f"the loss became NaN or infinite at step {step} (epoch {self.current_epoch}): {_MEND_OF_DIVERGENCE}"
            )

    def _set_class_counts(self, class_counts: Tensor) -> None:
        if class_counts.shape != self.class_counts.shape:
            entries = (
                f"{len(class_counts)} entries" if class_counts.ndim == 1 else f"the shape {list(class_counts.shape)}"
            )
            raise UserError(f"class_counts has {entries} for {len(self.class_counts)} classes: give one per class")
        self.class_counts.copy_(class_counts)
        self.loss.set_class_counts(self.class_counts)

    # --- optimizer ---------------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer over everything trainable, and the schedule, stepped each epoch."""
        self._total_epochs = self.trainer.max_epochs  # callbacks may add epochs of their own later
        make = self._build("optimizer")
        fused = {"fused": True} if self._can_fuse(make) else {}
        decay, scales = self.hparams["layer_decay"], self.hparams["lr_scale"]
        if decay == 1 and not scales:
            optimizer = make((p for p in self.parameters() if p.requires_grad), **fused)
        else:
            optimizer = make(rate_groups(self, self.backbone, decay, scales), **fused)
            scale_rates(optimizer)
        spare_from_decay(optimizer, (self.head.get_parameter(name) for name in self.head.no_weight_decay()))
        if isinstance(optimizer, LBFGS):
            self._adapt_to_lbfgs()
        if self.hparams["lr_scheduler"] is None:
            return cast(Optimizer, optimizer)
        arguments = {"total_epochs": self._total_epochs} if self._schedule_takes_total_epochs else {}
        schedule = self._build("lr_scheduler")(optimizer, **arguments)
        if "lr_scale" in optimizer.param_groups[0] and not keeps_scales(optimizer):
            option = "layer_decay" if decay != 1 else "lr_scale"
            raise UserError(
                f"{type(schedule).__name__} gives all layers one learning rate, so {option} would have no effect: "
                f"choose a schedule that multiplies rates, such as WarmupCosine, or leave {option} out"
            )
        if getattr(schedule, "only_rises", False) and self.global_rank == 0 and not is_trial_run(self.trainer):
            warn(
                f"the learning rate only rises: training ends after {self._total_epochs} epochs, before the warm-up is over: give a "
                "smaller warmup_epochs (--model.lr_scheduler.warmup_epochs)"
            )
        config: dict[str, Any] = {"scheduler": schedule}
        if isinstance(schedule, ReduceLROnPlateau):
            config["monitor"] = monitor = getattr(schedule, "monitor", "val/loss")
            if not monitor.startswith("train/"):  # there is a new value only after each validation
                config["frequency"] = self.trainer.check_val_every_n_epoch or 1
        return cast(OptimizerLRScheduler, {"optimizer": optimizer, "lr_scheduler": config})

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step the optimizer, with `sam_rho` by the gradients of the sharpest point nearby; not in a pass for BatchNorm alone."""
        closure = optimizer_closure
        if closure is not None and only_passes(self.trainer):
            closure()  # gradients may be left from the last step
            return
        if self.hparams["sam_rho"] > 0 and closure is not None:
            closure = partial(self._gradients_at_sharpest_point, optimizer, closure)
        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def _gradients_at_sharpest_point(
        self, optimizer: Optimizer | LightningOptimizer, closure: Callable[[], Any]
    ) -> Any:
        """Run the closure, the last forward and backward of a step, then take all the step's batches again where they lead."""
        result = closure()
        batches, self._batches = self._batches, []
        strategy = self.trainer.strategy
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        with (
            at_sharpest_point(parameters, self.hparams["sam_rho"], self.hparams["sam_adaptive"]),
            kept_statistics(self),
        ):
            optimizer.zero_grad()
            self.is_second_pass = True
            try:
                for position, (batch, batch_idx) in enumerate(batches, start=1):
                    waits = position < len(batches) and isinstance(strategy, ParallelStrategy)
                    with cast(ParallelStrategy, strategy).block_backward_sync() if waits else nullcontext():
                        loss = cast(Tensor, strategy.training_step(batch, batch_idx))
                        strategy.backward(loss / self.trainer.accumulate_grad_batches, cast(Optimizer, optimizer))
            finally:
                self.is_second_pass = False
        return result

    def _adapt_to_lbfgs(self) -> None:
        """Adapt to LBFGS, which evaluates the loss several times a step and flattens gradients; refuse what cannot work with it."""
        several = "optimizer: LBFGS evaluates the loss several times a step, and"
        if self.trainer.world_size > 1:
            raise UserError(f"{several} each process would decide for itself when a step is over: train on one device")
        if self.trainer.accumulate_grad_batches > 1:
            raise UserError(
                f"{several} each evaluation of a step would add to the accumulated gradients: "
                "raise --data.batch_size instead of accumulating"
            )
        self.backbone.to(memory_format=torch.contiguous_format)

    def _check_monitor(self, prefix: str = "") -> None:
        """Refuse a schedule that follows a number which nothing has logged, if it needs it now or its name starts with `prefix`."""
        for config in self.trainer.lr_scheduler_configs:
            monitor, logged = config.monitor or "", list(self.trainer.callback_metrics)
            due = monitor.startswith(prefix) if prefix else (self.current_epoch + 1) % config.frequency == 0
            if config.reduce_on_plateau and due and monitor not in logged:
                near = ", ".join(get_close_matches(monitor, logged)) or "train/loss or, with validation, val/loss"
                raise UserError(
                    f"lr_scheduler: ReduceLROnPlateau cannot follow its monitor {monitor!r}, which nothing has logged: give another, "
                    f"such as {near}"
                )

    def _can_fuse(self, make: Any) -> bool:
        """Whether to use the optimizer's fused step: it exists here, no other was asked for, and no gradients are clipped.

        Lightning cannot clip gradients for a fused step.
        """
        if self.trainer.gradient_clip_val or "fused" not in inspect.signature(make.func).parameters:
            return False
        chosen = any(make.keywords.get(name) not in (None, False) for name in ("foreach", "differentiable"))
        return not chosen and make.keywords.get("fused") is None and self.device.type in ("cpu", "cuda")

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step the schedule; only here does a schedule of torch fail on a period of 0."""
        make = None if self.hparams["lr_scheduler"] is None else self._build("lr_scheduler")
        # a callback such as StochasticWeightAveraging may have put its own schedule there
        with make.objections() if make and isinstance(scheduler, make.func) else nullcontext():
            super().lr_scheduler_step(scheduler, metric)

    @property
    def _schedule_takes_total_epochs(self) -> bool:
        if self.hparams["lr_scheduler"] is None:
            return False
        make = self._build("lr_scheduler")
        return "total_epochs" in inspect.signature(make).parameters and make.keywords.get("total_epochs") is None

    # --- plain data in, plain data out -------------------------------------------------------------------------------------

    def _build(self, name: str) -> Any:
        return from_spec(to_spec(self.hparams[name], name), self.PLUGGABLE[name], name)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the weights alone do not tell; refuse to save a model that has become useless.

        Raises:
            UserError: A loss or a weight is not finite.
        """
        checkpoint["hyper_parameters"] = plain_arguments(self.hparams, Classifier)  # a subclass may have saved its own
        checkpoint["class_names"] = self.class_names
        checkpoint["preprocessing"] = self.preprocessing and self.preprocessing._asdict()
        checkpoint["fingerprint"] = self.fingerprint
        checkpoint["temperature"] = "fitted" if self.is_calibrated else "default"
        checkpoint["state_dict"]["class_counts"] = self.class_counts  # averaging of weights rounds whole numbers down
        if not self._is_fitting:
            return
        checkpoint["total_epochs"] = self._total_epochs
        self._stop_at_bad_loss()
        if not all(bool(torch.isfinite(p).all()) for p in self.parameters()):
            raise UserError(f"weights became NaN or infinite by step {self.global_step}: {_MEND_OF_DIVERGENCE}")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back what the checkpoint knows of classes and images; refuse to continue a training with other settings.

        Raises:
            UserError: The images are prepared differently or are other images, or the model, its loss or its optimizer differs from the
                saved one.
        """
        if (counts := checkpoint.get("current_model_state", {}).get("class_counts")) is not None:
            checkpoint["state_dict"]["class_counts"] = counts  # in the averaged weights they are rounded down
        if (names := checkpoint.get("class_names")) is not None:
            self.class_names = list(map(readable, names))
        self._other_arguments = differing(checkpoint.get("hyper_parameters", {}), self.hparams, Classifier)
        self.is_calibrated = checkpoint.get("temperature") == "fitted"
        self.preprocessing = Preprocessing.in_checkpoint(checkpoint) or self.preprocessing
        self.fingerprint = fingerprint_in(checkpoint) or self.fingerprint
        if not self._is_fitting:
            return
        data = data_module(self.trainer)
        counts = checkpoint["state_dict"].get("class_counts", torch.zeros(0)).flatten().tolist()
        differ = other_preprocessing(self.preprocessing, data) or other_images(counts, self.fingerprint, data)
        if differ:
            raise UserError(f"{differ}: give the same --data options to resume the run, or start a new one")
        if other := sorted(set(self._other_arguments) - _FREE_WHEN_RESUMED):
            raise UserError(
                f"--model.{other[0]} differs from that of the run being resumed: give the same, or start a new run, "
                "with the checkpoint as its --fine_tuning.checkpoint if it is to have these weights"
            )
        epochs = checkpoint.get("total_epochs")
        if self._schedule_takes_total_epochs and epochs not in (None, self.trainer.max_epochs):
            raise UserError(
                f"the schedule of the checkpoint being resumed was made for {epochs} epochs, and its saved state would undo another "
                f"length: give --trainer.max_epochs {epochs}, or start a new run from scratch"
            )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights as any module does; the loss takes the training counts among them.

        Raises:
            UserError: They are those of another model.
        """
        arguments, self._other_arguments = self._other_arguments, []
        is_stale = is_of_another(arguments, self.hparams, fitted=self.is_calibrated)
        try:
            result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        except RuntimeError as error:
            other = [f"--model.{name}" for name in _ARCHITECTURE if name in arguments]
            what = f"other than {' and '.join(other)} says" if other else brief(error, 300)
            raise UserError(f"the checkpoint's weights are those of another model: {what}") from error
        if is_stale:
            if self.is_calibrated:
                rank_zero_info(
                    f"temperature {float(self.temperature):.3g} was fitted for another decision; this one has none: it is fitted in a test "
                    "or prediction with the images of the training (its data options, --data.val_fraction included)"
                )
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
        checkpoint = read_checkpoint(checkpoint_path, map_location)
        for name in fixed_by(cls):
            checkpoint["hyper_parameters"].pop(name, None)
        refuse_others(checkpoint_path, checkpoint, cls)
        code = codes_from_state_dict() if "head.weight" in checkpoint["state_dict"] else nullcontext()
        with code, objections({"class_path": cls.__name__, "init_args": {}}, f"checkpoint {checkpoint_path}"):
            reset = _has_weights.set(True)
            try:
                model = make_with(cls, plain_hyperparameters(checkpoint, cls, kwargs), kwargs)
            finally:
                _has_weights.reset(reset)
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"], strict=strict is not False)
        return model.to(next(iter(checkpoint["state_dict"].values())).device)


def _check_numbers(given: Mapping[str, Any]) -> None:
    """Refuse options that no training can use, before a network is built or its weights are downloaded."""
    needs_radius = "it needs a radius: give sam_rho, for example 0.5"
    rules: list[tuple[str, Callable[[Any], bool], str]] = [
        *RULES_OF_OPTIONS,
        ("layer_decay", lambda factor: 0 < factor <= 1, "give a factor from above 0 to 1, 1 for one learning rate"),
        ("sam_rho", lambda rho: 0 <= rho < math.inf, "give a finite radius, 0 for none"),
        ("sam_adaptive", lambda adapts: not adapts or given["sam_rho"] > 0, needs_radius),
    ]
    for name in ("feature_penalty", "center_pull"):
        rules.append((name, lambda factor: 0 <= factor < math.inf, "give a finite factor, not negative, 0 for none"))
    for name, holds, mend in rules:
        try:
            fine = holds(given[name])
        except TypeError:  # it is no number
            fine = False
        if not fine:
            raise UserError(f"{name} is {given[name]}: {mend}")
    for part, scale in (given["lr_scale"] or {}).items():
        if not 0 < scale < math.inf:
            raise UserError(
                f"lr_scale of {part} is {scale}: give a positive, finite factor; to freeze it, --fine_tuning.freeze"
            )


def _as_counts(class_counts: Any) -> Tensor:
    try:
        return torch.as_tensor(class_counts)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f"class_counts is {class_counts!r:.80}: give the number of training images of each class, as a list, an array or a tensor"
        ) from error
