"""Features of Lightning with which a run could not keep its promises; they are refused before training."""

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, StochasticWeightAveraging

from etflight.utils.errors import UserError
from etflight.utils.lightning_private import forks_processes
from etflight.utils.trainer import callbacks_of


def refuse_unsupported(trainer: Trainer, model: LightningModule) -> None:
    """Check a trainer and a model before they train together.

    Raises:
        UserError: They would train something other than the run's files say, or not react to signals and errors as documented.
    """
    clip = trainer.gradient_clip_val or 0
    if forks_processes(trainer.strategy):
        raise UserError(
            "this --trainer.strategy starts its processes in the way of notebooks, in which no signal and no error reaches the others: "
            "give --trainer.strategy ddp, which trains the same"
        )
    if clip < 0:
        raise UserError(
            f"--trainer.gradient_clip_val is {clip}, which would reverse gradients: give a positive norm, or 0 for none"
        )
    if trainer.accumulate_grad_batches < 1:
        raise UserError(
            f"--trainer.accumulate_grad_batches is {trainer.accumulate_grad_batches}: give 1 (each batch is a step) or more"
        )
    if callbacks_of(trainer, LearningRateFinder):
        raise UserError(
            "LearningRateFinder would set a learning rate that neither the schedule nor the run's config.yaml knows of: leave it out, and "
            "compare short runs with other --model.optimizer.lr, each with a --name of its own (etflight study trains several)"
        )
    if callbacks_of(trainer, BatchSizeFinder):
        raise UserError(
            "BatchSizeFinder would set a batch size that the run's config.yaml does not know of: leave it out, and give --data.batch_size"
        )
    if callbacks_of(trainer, StochasticWeightAveraging) and model.hparams.get("layer_decay", 1) != 1:
        raise UserError(
            "StochasticWeightAveraging gives all layers one learning rate, so layer_decay would have no effect: leave one of them out"
        )
