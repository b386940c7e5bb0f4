"""Features of Lightning with which a run could not keep its promises; they are refused before training."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import BatchSizeFinder, Callback, LearningRateFinder, StochasticWeightAveraging

from etflight.utils.errors import UserError
from etflight.utils.lightning_private import forks_processes
from etflight.utils.trainer import callbacks_of


def refuse_unsupported(trainer: Trainer, model: LightningModule) -> None:
    """Check a trainer and a model before they train together.

    Raises:
        UserError: They would train something other than the run's files say, or not react to signals and errors as documented.
    """
    clip, accumulated = trainer.gradient_clip_val or 0, trainer.accumulate_grad_batches
    if forks_processes(trainer.strategy):
        raise UserError(
            "this --trainer.strategy starts its processes in the way of notebooks, in which no signal and no error reaches the others: "
            "give --trainer.strategy ddp, which trains the same"
        )
    if clip < 0:
        raise UserError(f"--trainer.gradient_clip_val is {clip}, which would reverse gradients: give a positive norm")
    if accumulated < 1:
        raise UserError(f"--trainer.accumulate_grad_batches is {accumulated}: give 1 (each batch is a step) or more")
    if trainer.check_val_every_n_epoch is not None and trainer.check_val_every_n_epoch < 1:
        raise UserError(
            f"--trainer.check_val_every_n_epoch is {trainer.check_val_every_n_epoch}: give 1 or more, or --trainer.limit_val_batches 0 "
            "to leave validation out"
        )
    if any(isinstance(c, LearningRateFinder | BatchSizeFinder) for c in callbacks_of(trainer, Callback)):
        raise UserError(
            "LearningRateFinder and BatchSizeFinder would set what the run's config.yaml does not know of: leave them out, and compare "
            "short runs with other --model.optimizer.lr or --data.batch_size, each with a --name of its own"
        )
    options = [name for name in ("layer_decay", "lr_scale") if model.hparams.get(name) not in (None, 1, {})]
    if callbacks_of(trainer, StochasticWeightAveraging) and options:
        raise UserError(
            f"StochasticWeightAveraging gives all layers one learning rate, so {options[0]} would have no effect: leave one of them out"
        )


def refuse_missing_hardware(accelerator: object, option: str = "--trainer.accelerator") -> None:
    """Check that this machine has the hardware that a user names.

    Args:
        accelerator: The name; anything else is left to Lightning.
        option: The option that gives it, for the error.

    Raises:
        UserError: There is no hardware of that name, or none here.
    """
    if not isinstance(accelerator, str) or accelerator == "auto":
        return
    kinds = {name: entry["accelerator"] for name, entry in AcceleratorRegistry.items()}
    here = sorted(name for name, kind in kinds.items() if kind.is_available())
    if accelerator not in ("gpu", *kinds):
        raise UserError(f"{option} {accelerator!r} is unknown: give auto, gpu, {', '.join(sorted(kinds))}")
    if not {"cuda", "mps"}.intersection(here) if accelerator == "gpu" else accelerator not in here:
        raise UserError(
            f"{option} is {accelerator}, but PyTorch finds none on this machine: give auto, which takes what there is ({', '.join(here)}), "
            "or check the driver (nvidia-smi) and that PyTorch is built for it (python -m torch.utils.collect_env)"
        )
