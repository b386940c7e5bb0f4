"""Sharpness-aware minimization (SAM): steps by the gradients of the sharpest point nearby."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from etflight.checkpoint.hyperparameters import require
from etflight.utils.errors import UserError
from etflight.utils.lightning_private import only_passes


def check_radius(given: Mapping[str, Any]) -> None:
    """Refuse a model's `sam_rho` and `sam_adaptive` that cannot be; see `Classifier`.

    Raises:
        UserError: The radius is negative or not finite, or is missing.
    """
    require(given, "sam_rho", lambda rho: 0 <= rho < math.inf, "give a finite radius, 0 for none")
    has_radius = given["sam_rho"] > 0
    require(
        given,
        "sam_adaptive",
        lambda adapts: has_radius or not adapts,
        "it needs a radius: give sam_rho, for example 0.5",
    )


class SharpnessAwareStep:
    """The gradients of a step by SAM in Lightning: those of a second pass over its batches, from where those of the first pass lead.

    The second pass keeps no BatchNorm statistics. It goes through the model's `training_step`, as the first does.

    Args:
        rho: The radius ρ > 0.
        adaptive: Whether the radius is relative to the size of each weight; see `at_sharpest_point`.
    """

    def __init__(self, rho: float, adaptive: bool) -> None:
        self.rho = rho
        self.adaptive = adaptive
        self._batches: list[tuple[Any, int]] = []

    def collect(self, batch: Any, batch_idx: int, trainer: Trainer) -> None:
        """Keep a batch that is about to be trained, as one of its step; several batches make a step while gradients accumulate."""
        if batch_idx % trainer.accumulate_grad_batches == 0:  # as Lightning, which then zeroes the gradients
            self._batches = []
        if not only_passes(trainer):
            self._batches.append((batch, batch_idx))

    def gradients(
        self, module: LightningModule, optimizer: Optimizer | LightningOptimizer, closure: Callable[[], Any]
    ) -> Any:
        """Compute the gradients of the step whose batches were collected.

        Args:
            module: The model that trains.
            optimizer: Its optimizer, whose parameters are moved.
            closure: The forward and backward of the step's last batch.

        Returns:
            What the closure returns: the loss of the first pass.

        Raises:
            UserError: The optimizer is LBFGS, which evaluates a closure several times.
        """
        if isinstance(getattr(optimizer, "optimizer", optimizer), LBFGS):
            raise UserError("sam_rho: LBFGS evaluates the loss several times a step by itself: leave one of them out")
        result = closure()
        batches, self._batches = self._batches, []
        trainer, strategy = module.trainer, module.trainer.strategy
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        with at_sharpest_point(parameters, self.rho, self.adaptive), kept_statistics(module):
            optimizer.zero_grad()
            for position, (batch, batch_idx) in enumerate(batches, start=1):
                # processes add up their gradients once, in the backward of the last batch
                waits = position < len(batches) and isinstance(strategy, ParallelStrategy)
                with cast(ParallelStrategy, strategy).block_backward_sync() if waits else nullcontext():
                    loss = cast(Tensor, strategy.training_step(batch, batch_idx))
                    strategy.backward(loss / trainer.accumulate_grad_batches, cast(Optimizer, optimizer))
        return result


@contextmanager
def at_sharpest_point(parameters: Iterable[nn.Parameter], rho: float, adaptive: bool = False) -> Iterator[None]:
    """Let parameters be, within the block, where the loss is highest near them, to first order: the ascent of SAM.

    They are moved by `ρ g/‖g‖`, or if adaptive by `ρ w² g/‖w g‖`, with the gradients g that they hold and norms over all of them
    together; afterwards they have their own values again, bit by bit. A common factor of the gradients, as of a loss scaler, changes
    nothing.

    Args:
        parameters: The parameters; those without a gradient stay.
        rho: The radius ρ > 0.
        adaptive: Whether the radius is relative to the size of each weight (ASAM), so that it need not know the weights' scale.

    Source:
        Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021, arXiv 2010.01412, equation 2;
        adaptive: Kwon et al., "ASAM", ICML 2021, arXiv 2102.11600, equation 8, without its constant η.
    """
    with torch.no_grad():
        moved = [parameter for parameter in parameters if parameter.grad is not None]
        own = [parameter.clone() for parameter in moved]
        slopes = [cast(Tensor, parameter.grad) for parameter in moved]
        if adaptive:
            slopes = [slope * parameter.abs() for slope, parameter in zip(slopes, moved, strict=True)]
        norm = nn.utils.get_total_norm(slopes)
        step = rho / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        for parameter, slope in zip(moved, slopes, strict=True):
            parameter.add_(slope * step * (parameter.abs() if adaptive else 1))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(moved, own, strict=True):
                parameter.copy_(value)


@contextmanager
def kept_statistics(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm's running statistics be after the block as they were before it."""
    names = ("running_mean", "running_var", "num_batches_tracked")
    statistics = [buffer for name, buffer in module.named_buffers() if name.rpartition(".")[2] in names]
    before = [buffer.clone() for buffer in statistics]
    try:
        yield
    finally:
        for buffer, value in zip(statistics, before, strict=True):
            buffer.copy_(value)
