"""Says at the start of a training what one optimizer step is made of."""

from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from etflight.callbacks.trainer import data_module
from etflight.classifier import Classifier
from etflight.losses import Loss


class StepNotice(Callback):
    """One line when training starts: global batch, learning rate, class balance; and a warning about BatchNorm on several GPUs."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print it on the first process: optimizers exist by now."""
        data = data_module(trainer)
        rank_zero_info(
            describe_step(
                processes=trainer.world_size,
                batch_size=data.batch_size,
                accumulated=trainer.accumulate_grad_batches,
                lr=trainer.optimizers[0].defaults.get("lr"),
                loss=cast(Classifier, pl_module).loss,
            )
        )
        if (
            trainer.world_size > 1
            and trainer.strategy.root_device.type == "cuda"
            and has_unsynced_batch_norm(pl_module)
        ):
            rank_zero_warn(
                "BatchNorm normalises each process's images by themselves: add --trainer.sync_batchnorm true for the "
                "statistics of the global batch"
            )


def describe_step(*, processes: int, batch_size: int, accumulated: int, lr: float | None, loss: Loss) -> str:
    """The line, for instance of two processes with 64 images each.

    Example:
        >>> from etflight import CrossEntropyLoss
        >>> describe_step(processes=2, batch_size=64, accumulated=1, lr=0.1, loss=CrossEntropyLoss())
        "global batch 128 = 2 processes x 64 images; learning rate 0.1 as given (not scaled with the batch); class balance 'none'"
    """
    size = f"{processes} process{'es' if processes > 1 else ''} x {batch_size} images"
    if accumulated > 1:
        size += f" x {accumulated} accumulated"
    parts = [f"global batch {processes * batch_size * accumulated} = {size}"]
    if lr is not None:
        parts.append(f"learning rate {lr:g} as given (not scaled with the batch)")
    balance = f"class balance {loss.class_balance!r}"
    if loss.class_balance == "batch":
        balance += f" (exponent {loss.exponent:g}): counts over all processes of a step"
        balance += ", not over accumulated micro-batches" if accumulated > 1 else ""
    elif loss.class_balance == "global":
        balance += f" (exponent {loss.exponent:g}): the training set's counts"
    elif loss.class_balance == "effective":
        balance += f" (exponent {loss.exponent:g}, beta {loss.beta:g}): the training set's counts"
    if loss.renormalize and loss.class_balance != "none":
        balance += ", weights divided by their mean over a step"
    return "; ".join([*parts, balance])


def has_unsynced_batch_norm(model: nn.Module) -> bool:
    """Whether a BatchNorm of the model knows its own process's images only."""
    return any(isinstance(m, _BatchNorm) and not isinstance(m, nn.SyncBatchNorm) for m in model.modules())
