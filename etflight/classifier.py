"""The LightningModule: backbone -> head -> loss."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar, Literal, cast

import torch.distributed as dist
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.cli import ReduceLROnPlateau as MonitoredReduceLROnPlateau
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from etflight import optim, penalties
from etflight.checkpoint.hyperparameters import differing, plain_arguments
from etflight.checkpoint.model import counts_of_training, refuse_other_training
from etflight.checkpoint.specs import as_plain, from_spec, to_spec
from etflight.checkpoint.weights_to_come import do_weights_come_next
from etflight.data.base import ImageDataModule
from etflight.data.facts import other_images, other_preprocessing
from etflight.decision import Adjustment, check_adjustment
from etflight.divergence import FiniteLoss, refuse_bad_weights
from etflight.heads import ETFHead, Head
from etflight.losses import DotRegressionLoss, Loss, class_weights_of
from etflight.metrics.accuracy import SampleMean, TemperatureFit
from etflight.metrics.evaluation import Evaluation, EvaluationMetrics
from etflight.network import Network
from etflight.objective import share_of_images, training_loss
from etflight.sam import SharpnessAwareStep, check_radius
from etflight.utils import lightning_private
from etflight.utils.batches import images_in, labelled
from etflight.utils.errors import UserError, argument, warn
from etflight.utils.ranks import in_process_group
from etflight.utils.torch_private import leave_out_of_broadcasts
from etflight.utils.trainer import averaged, data_module, shows_after, take_buffers_of_rank_zero

lightning_private.hide_tips()  # here, since who trains with this package has imported this module before making a trainer

Batch = tuple[Tensor, Tensor]
PRIOR_SHIFTS = (2, 5, 10, 25, 50)  # the ratios of the long-tailed test sets for which an accuracy is logged
Compile = bool | Literal["reduce-overhead", "max-autotune"]
# the first type makes the parser find Lightning's ReduceLROnPlateau by this name instead of torch's
ScheduleCallable = Callable[[Optimizer], MonitoredReduceLROnPlateau] | Callable[[Optimizer], LRScheduler]


class Classifier(Network):
    """An image classifier made of a timm backbone, a head and a loss: a `Network` that is trained.

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
        class_counts: The number of training images of each class, `[K]`, where there is no data module that tells them.
        in_chans: The number of channels of the images.
        pretrained: Whether the backbone starts from timm's weights.
        model_kwargs: Further arguments of timm's model, such as `{"width": 2}` for the CIFAR ResNets.
        logit_adjustment: The τ of post-hoc logit adjustment by the training frequencies, in validation, test and predict; see
            `etflight.decision.Decision`. Training and the logged losses do not use it.
        adjustment: "additive" (Menon et al. 2021), or "multiplicative" (Hasegawa & Sato, ICLR 2024).
        layer_decay: The factor of the learning rate from a layer of the backbone to the one before it, above 0 and up to 1, for
            fine-tuning; the head has the optimizer's own rate.
        lr_scale: Factors of the learning rate for parts of the model, by name, such as `{"head.linear": 0.5}`; the rest has 1.
        sam_rho: The radius ρ of sharpness-aware minimization, with any optimizer but LBFGS; 0 for none. See `etflight.sam`.
        sam_adaptive: Whether that radius is relative to the size of each weight (ASAM).
        compile: Whether to train through `torch.compile`, or its mode; "reduce-overhead" is the one with CUDA graphs.
        class_weights: Explicit weights of the classes in the training loss: K positive, finite numbers, or such numbers by class name,
            where a class that is not named has 1. They multiply those of the loss's class balance.
        feature_penalty: The λ >= 0 of `etflight.penalties.feature_penalty`, in training only and part of `train/loss`.
        center_pull: The λ >= 0 of `etflight.penalties.center_pull`, likewise. It needs class indices, so neither mixup nor CutMix.

    Attributes:
        temperature: What divides the logits of `predict` and of `ece_calibrated`, and others: see `etflight.network.Network`.

    Raises:
        UserError: The parts cannot work together.

    Source:
        The defaults train the method of Yang et al. 2022, arXiv 2203.09081: a fixed frame and dot regression.
    """

    # the arguments that take a class, and the base of that class
    PLUGGABLE: ClassVar[Mapping[str, type]] = {
        "head": Head, "loss": Loss, "optimizer": Optimizer, "lr_scheduler": LRScheduler,
    }  # fmt: skip

    def __init__(
        self,
        num_classes: int,
        backbone: str = "resnet32_cifar",
        head: Callable[[int, int], Head] = ETFHead,
        loss: Callable[[], Loss] = DotRegressionLoss,
        optimizer: OptimizerCallable = optim.PROTOCOL_SGD,
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
        self.save_hyperparameters(ignore=["class_counts"])  # which is in the state dict
        self.hparams.pop("_instantiator", None)  # it names a function that loading would import and call
        if isinstance(class_weights, Mapping):  # in YAML the name 3 is a number
            class_weights = {str(name): weight for name, weight in class_weights.items()}
        self._class_weights = as_plain(class_weights, containers=True)
        if isinstance(self.hparams["class_weights"], Mapping):
            self.hparams["class_weights"] = self._class_weights
        lightning_private.replace_hyperparameters(self, plain_arguments(self.hparams, Classifier))
        for check in (check_adjustment, optim.check_rates, check_radius, penalties.check_factors):
            check(self.hparams)
        from etflight.backbones import build_backbone  # timm takes a second, which `--help` need not wait for

        pretrained = pretrained and not do_weights_come_next()
        network, width = build_backbone(backbone, in_chans=in_chans, pretrained=pretrained, model_kwargs=model_kwargs)
        self._assemble(network, self._maker("head")(width, num_classes), self._maker("loss")(), num_classes)
        if isinstance(self._class_weights, list):  # names wait for the data's
            self.loss.set_class_weights(class_weights_of(self._class_weights, num_classes, None))
        if class_counts is not None:
            self.set_class_counts(class_counts)
        self._lr = float("nan")
        self._is_recorded = False  # whether the metrics have the loss of the batch that is being trained
        rho, adaptive = self.hparams["sam_rho"], self.hparams["sam_adaptive"]
        self._sharpness = SharpnessAwareStep(rho, adaptive) if rho > 0 else None
        self._total_epochs: int | None = None
        self.losses: Any = nn.ModuleDict({f"{stage}_loss": SampleMean() for stage in ("train", "val", "test")})
        self.finite_loss = FiniteLoss()
        test = EvaluationMetrics(num_classes, PRIOR_SHIFTS, confusion=True)
        self.evaluation_metrics: Any = nn.ModuleDict({"val": EvaluationMetrics(num_classes), "test": test})
        self.temperature_fit = TemperatureFit()
        # the vectors are broadcast once, when training starts: in every forward it would cost 205 MB at K = 100,000
        own = {"head.weight", "head.reserved", "finite_loss.bad_step"} & dict(self.named_buffers()).keys()
        leave_out_of_broadcasts(self, list(own))

    def _maker(self, part: str) -> Any:
        """The class of a pluggable part with its arguments bound; None if there is no such part."""
        given = self.hparams[part]
        return None if given is None else from_spec(to_spec(given, part), self.PLUGGABLE[part], part)

    # --- steps -------------------------------------------------------------------------------------------------------------

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Make labels of any integer dtype int64; the step of a subclass gets its batches as they are.

        Raises:
            UserError: The batch is not what the step takes, or a label names no class.
        """
        stage = self.trainer.state.stage
        steps = {"train": "training_step", "test": "test_step", "predict": "predict_step"}
        step = steps.get(stage.value if stage is not None else "", "validation_step")
        if isinstance(data_module(self.trainer), ImageDataModule) or not self._has_own(step):
            return batch  # a data module of this package has looked at all labels when it read them
        if step == "predict_step":
            return images_in(batch)
        return labelled(batch, self.hparams["num_classes"], training=step == "training_step")

    def _has_own(self, method: str) -> bool:
        """Whether a method is this class's own, and not a subclass's."""
        return getattr(type(self), method) is getattr(Classifier, method)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Remember the head's learning rate, because at the end of the epoch the schedule has already set the next one."""
        self._lr = optim.rate_of_head(self.trainer.optimizers)
        self._is_recorded = False
        if self._sharpness is not None:
            self._sharpness.collect(batch, batch_idx, self.trainer)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the loss of one training batch."""
        images, target = batch
        loss = training_loss(self, images, target)
        self.finite_loss.watch(loss, self.global_step)
        if not self._is_recorded:  # steps of SAM and LBFGS compute further losses, of weights that they only try
            self.losses["train_loss"].update(loss, len(images))
            self._is_recorded = True
        return loss * share_of_images(len(images), loss)

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
        lightning_private.ignore_own_deprecations()
        lightning_private.ignore_remarks_on_hooks()
        data = data_module(self.trainer)
        if data is not None:
            self.take_facts(data, trains=stage == "fit")
        if stage != "fit":
            return
        for state in (self.finite_loss, *self.losses.values(), self.temperature_fit):
            state.reset()  # an earlier training may have ended anywhere
        self.set_temperature(None)  # one that was fitted is not that of the weights to come
        if compile := self.hparams["compile"]:
            self.backbone.compile(mode="default" if compile is True else compile)
        if isinstance(weights := self._class_weights, Mapping):
            self.loss.set_class_weights(class_weights_of(weights, self.hparams["num_classes"], self.class_names))

    def _tell_differences(self) -> None:
        data = data_module(self.trainer)
        held_out = self.trainer.state.fn == "validate" and getattr(data, "val_fraction", 0) > 0
        # with another draw some of the test images may have been trained on
        drawn = held_out or getattr(data, "draws_test", False)
        if data is not None and self.global_rank == 0:
            for line in self.differences(data, images=drawn):
                warn(line)

    def on_validation_start(self) -> None:
        """Say how the data differ from those trained on; images that are held out now may have been trained on."""
        if self._is_fitting:
            return
        self._tell_differences()
        if not getattr(data_module(self.trainer), "val_is_held_out", True):
            option = argument("data.val_fraction")
            rank_zero_info(f"the validation images are the test images, since none are held out ({option})")

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
        """Give restored optimizer states their parameters' memory layout; refuse a schedule that waits for a validation there is not."""
        if not self.trainer.enable_validation:
            optim.refuse_unlogged_monitor(self.trainer, "val/")
        for optimizer in self.trainer.optimizers:
            optim.match_layouts(optimizer)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Check the loss from time to time, because each check waits for the device."""
        if shows_after(self.trainer, batch_idx):
            self.finite_loss.check(self.trainer)
            if outputs and "loss" in outputs:  # the step of a subclass may skip a batch, or optimise by itself
                loss = outputs["loss"] * self.trainer.accumulate_grad_batches
                self.trainer.progress_bar_metrics["loss"] = float(loss)

    def on_validation_epoch_start(self) -> None:
        """Reset the metrics, and set the shot groups of the training counts."""
        if self._is_fitting:
            self.finite_loss.check(self.trainer)
            take_buffers_of_rank_zero(self)  # by now callbacks have put averaged weights into the model
        self._start("val", "validation_step", len(self.trainer.num_val_batches))

    def on_test_epoch_start(self) -> None:
        """Reset the metrics, and set the shot groups of the training counts; the new counts are kept for `evaluation`."""
        self._start("test", "test_step", len(self.trainer.num_test_batches))

    def _start(self, stage: str, step: str, loaders: int) -> None:
        if loaders > 1 and self._has_own(step):
            mend = "give one, or evaluate them one by one"
            raise UserError(f"there are {loaders} {stage} loaders, whose images would be counted together: {mend}")
        self.losses[f"{stage}_loss"].reset()
        self.evaluation_metrics[stage].start(self.class_counts)

    def on_train_epoch_end(self) -> None:
        """Log the loss; never let a checkpoint be written after a loss that is not finite."""
        self.finite_loss.check(self.trainer)
        if self._has_counted("train"):
            self.log("train/loss", self.losses["train_loss"])
        self.log("train/lr", self._lr, sync_dist=True)
        optim.refuse_unlogged_monitor(self.trainer)

    def on_train_end(self) -> None:
        """Warn if the temperature cannot be trusted."""
        if self.global_rank == 0 and (doubt := self.temperature_fit.doubt) is not None:
            mend = f"hold out more ({argument('data.val_fraction')})"
            warn(f"do not trust the temperature {self.temperature:.3g}: {doubt}; {mend}")

    def on_validation_epoch_end(self) -> None:
        """Log the metrics, and fit the temperature if the validation images are held out."""
        self._log_epoch("val")
        if self.trainer.sanity_checking:
            optim.refuse_unlogged_monitor(self.trainer, "val/")
        elif self._fits_temperature:
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
        return self._is_fitting and bool(getattr(data_module(self.trainer), "val_is_held_out", False))

    @property
    def _is_fitting(self) -> bool:
        try:
            return self.trainer.state.fn == "fit"
        except RuntimeError:  # a module without a trainer raises it
            return False

    # --- optimizer ---------------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Make the optimizer over everything trainable, and the schedule, stepped each epoch."""
        self._total_epochs = self.trainer.max_epochs  # callbacks may add epochs of their own later
        return optim.assemble(
            self,
            self._maker("optimizer"),
            self._maker("lr_scheduler"),
            self.trainer,
            backbone=self.backbone,
            undecayed=[self.head.get_parameter(name) for name in self.head.no_weight_decay()],
            layer_decay=self.hparams["layer_decay"],
            lr_scale=self.hparams["lr_scale"],
        )

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Step the optimizer, with `sam_rho` by the gradients of the sharpest point nearby; not in a pass for BatchNorm alone."""
        closure = optimizer_closure
        if closure is not None and lightning_private.only_passes(self.trainer):
            closure()  # gradients may be left from the last step
            return
        if closure is not None and self._sharpness is not None:
            closure = partial(self._sharpness.gradients, self, optimizer, closure)
        super().optimizer_step(epoch, batch_idx, optimizer, closure)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        """Step the schedule; only here does a schedule of torch fail on a period of 0."""
        make = self._maker("lr_scheduler")
        # a callback such as StochasticWeightAveraging may have put its own schedule there
        with make.objections() if make and isinstance(scheduler, make.func) else nullcontext():
            super().lr_scheduler_step(scheduler, metric)

    # --- plain data in, plain data out -------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the weights alone do not tell; refuse to save a model that has become useless.

        Raises:
            UserError: A loss or a weight is not finite.
        """
        super().on_save_checkpoint(checkpoint)
        checkpoint["hyper_parameters"] = plain_arguments(self.hparams, Classifier)  # a subclass may have saved its own
        if self._is_fitting:
            checkpoint["total_epochs"] = self._total_epochs
            self.finite_loss.check(self.trainer)
            refuse_bad_weights(self.parameters(), self.global_step)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back what the checkpoint knows of classes and images; refuse to continue a training with other settings.

        Raises:
            UserError: The images are prepared differently or are other images, or the model, its loss or its optimizer differs from the
                saved one.
        """
        super().on_load_checkpoint(checkpoint)
        self._other_arguments = differing(checkpoint.get("hyper_parameters", {}), self.hparams, Classifier)
        if self._is_fitting:
            data, counts = data_module(self.trainer), counts_of_training(checkpoint)
            images_differ = other_preprocessing(self.preprocessing, data) or other_images(
                counts, self.fingerprint, data
            )
            length = self.trainer.max_epochs if optim.takes_length(self._maker("lr_scheduler")) else None
            refuse_other_training(checkpoint, self._other_arguments, images_differ, length)
