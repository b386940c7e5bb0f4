"""A training whose loss or weights are not finite ends before it writes a checkpoint."""

from collections.abc import Iterable

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from etflight.utils.errors import UserError, argument

_NEVER = 2**62  # a step that no training reaches


class FiniteLoss(nn.Module):
    """Keeps the first step whose loss is not finite, on the device, so that a step need not wait for it."""

    bad_step: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bad_step", torch.tensor(_NEVER), persistent=False)

    def reset(self) -> None:
        """Forget the losses of an earlier training."""
        self.bad_step.fill_(_NEVER)

    def watch(self, loss: Tensor, step: int) -> None:
        """Take the loss of a step, a scalar."""
        bad_step = torch.where(torch.isfinite(loss.detach()), _NEVER, step)
        self.bad_step = torch.minimum(self.bad_step, bad_step)

    def check(self, trainer: Trainer) -> None:
        """Stop a training with such a step; it waits for the device, and every process must call it.

        Raises:
            UserError: There is one on any process.
        """
        step = int(trainer.strategy.reduce(self.bad_step, reduce_op="min"))
        if step < _NEVER:
            raise UserError(
                f"the loss became NaN or infinite at step {step} (epoch {trainer.current_epoch}): {_mend()}"
            )


def refuse_bad_weights(weights: Iterable[Tensor], step: int) -> None:
    """Stop a training whose weights are not finite.

    Raises:
        UserError: One is not.
    """
    if not all(bool(torch.isfinite(weight).all()) for weight in weights):
        raise UserError(f"weights became NaN or infinite by step {step}: {_mend()}")


def _mend() -> str:
    return (
        f"lower the learning rate ({argument('model.optimizer.lr')}), lengthen the warm-up, or clip gradients "
        f"({argument('trainer.gradient_clip_val', 1)}); the last checkpoint is from before"
    )
