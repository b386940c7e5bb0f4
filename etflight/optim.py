"""Optimizer, parameter groups and learning-rate schedules of the field's protocols, composed from torch's own.

`Classifier` passes the trainer's `max_epochs` to a schedule that takes `total_epochs` and has no value for it.
"""

import inspect
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from etflight.checkpoint.hyperparameters import require
from etflight.checkpoint.specs import Maker
from etflight.utils.errors import UserError, argument, warn
from etflight.utils.trainer import is_trial_run

PROTOCOL_SGD = partial(SGD, lr=0.1, momentum=0.9, weight_decay=2e-4)
"""SGD as in the released code of Yang et al. 2022 for the CIFAR sets."""


def check_rates(given: Mapping[str, Any]) -> None:
    """Refuse a model's `layer_decay` and `lr_scale` that no optimizer can use; see `Classifier`.

    Raises:
        UserError: They are out of range.
    """
    require(
        given, "layer_decay", lambda factor: 0 < factor <= 1, "give a factor from above 0 to 1, 1 for one learning rate"
    )
    for part, scale in (given["lr_scale"] or {}).items():
        if not 0 < scale < math.inf:
            raise UserError(
                f"lr_scale of {part} is {scale}: give a positive, finite factor; to freeze it, {argument('fine_tuning.freeze')}"
            )


def assemble(
    model: nn.Module,
    make_optimizer: Maker,
    make_schedule: Maker | None,
    trainer: Trainer,
    *,
    backbone: nn.Module,
    undecayed: Iterable[nn.Parameter],
    layer_decay: float = 1.0,
    lr_scale: Mapping[str, float] | None = None,
) -> OptimizerLRScheduler:
    """Make the optimizer over everything trainable, and the schedule, stepped each epoch, as Lightning takes them.

    Args:
        model: The whole model.
        make_optimizer: Makes the optimizer from parameters or their groups.
        make_schedule: Makes the schedule from the optimizer, and from `total_epochs` if it takes this and has no value for it; or None.
        trainer: The trainer that will train.
        backbone: The part of the model that timm built.
        undecayed: The parameters that weight decay leaves alone.
        layer_decay: The factor of the learning rate from one layer of the backbone to the one before it.
        lr_scale: Factors of the learning rate for parts of the model, by name.

    Raises:
        UserError: The parts cannot work together.
    """
    fused = {"fused": True} if _can_fuse(make_optimizer, trainer, next(model.parameters()).device) else {}
    if layer_decay == 1 and not lr_scale:
        optimizer: Optimizer = make_optimizer((p for p in model.parameters() if p.requires_grad), **fused)
    else:
        optimizer = make_optimizer(rate_groups(model, backbone, layer_decay, lr_scale), **fused)
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * group["lr_scale"]
    spare_from_decay(optimizer, undecayed)
    if isinstance(optimizer, LBFGS):
        _refuse_for_lbfgs(trainer)
        backbone.to(memory_format=torch.contiguous_format)  # it flattens gradients
    if make_schedule is None:
        return optimizer
    schedule = make_schedule(optimizer, **({"total_epochs": trainer.max_epochs} if takes_length(make_schedule) else {}))
    if "lr_scale" in optimizer.param_groups[0] and not _keeps_scales(optimizer):
        option = "layer_decay" if layer_decay != 1 else "lr_scale"
        raise UserError(
            f"{type(schedule).__name__} gives all layers one learning rate, so {option} would have no effect: "
            f"choose a schedule that multiplies rates, such as WarmupCosine, or leave {option} out"
        )
    return cast(OptimizerLRScheduler, {"optimizer": optimizer, "lr_scheduler": _as_lightning_takes(schedule, trainer)})


def _as_lightning_takes(schedule: Any, trainer: Trainer) -> dict[str, Any]:
    """A schedule with what it follows and when; a warning comes for one that ends before its warm-up is over."""
    if getattr(schedule, "only_rises", False) and trainer.is_global_zero and not is_trial_run(trainer):
        warn(
            f"the learning rate only rises: training ends after {trainer.max_epochs} epochs, before the warm-up is over: "
            f"give a smaller {argument('model.lr_scheduler.warmup_epochs')}"
        )
    if not isinstance(schedule, ReduceLROnPlateau):
        return {"scheduler": schedule}
    monitor = getattr(schedule, "monitor", "val/loss")
    # there is a new value of others only after each validation
    epochs = 1 if monitor.startswith("train/") else trainer.check_val_every_n_epoch or 1
    return {"scheduler": schedule, "monitor": monitor, "frequency": epochs}


def takes_length(make_schedule: Maker | None) -> bool:
    """Whether a schedule takes the length of training from the trainer."""
    if make_schedule is None or "total_epochs" not in inspect.signature(make_schedule).parameters:
        return False
    return make_schedule.keywords.get("total_epochs") is None


def refuse_unlogged_monitor(trainer: Trainer, prefix: str = "") -> None:
    """Refuse a schedule that follows a number which nothing has logged.

    Args:
        trainer: The trainer.
        prefix: The start of the names that should be known by now; empty for those of schedules that need them after this epoch.

    Raises:
        UserError: There is such a schedule.
    """
    for config in trainer.lr_scheduler_configs:
        monitor, logged = config.monitor or "", list(trainer.callback_metrics)
        due = monitor.startswith(prefix) if prefix else (trainer.current_epoch + 1) % config.frequency == 0
        if config.reduce_on_plateau and due and monitor not in logged:
            near = ", ".join(get_close_matches(monitor, logged)) or "train/loss or, with validation, val/loss"
            raise UserError(
                f"lr_scheduler: ReduceLROnPlateau cannot follow its monitor {monitor!r}, which nothing has logged: give another, "
                f"such as {near}"
            )


def _can_fuse(make: Maker, trainer: Trainer, device: torch.device) -> bool:
    """Whether to use the optimizer's fused step: it exists here, no other was asked for, and no gradients are clipped.

    Lightning cannot clip gradients for a fused step.
    """
    if trainer.gradient_clip_val or "fused" not in inspect.signature(make.func).parameters:
        return False
    chosen = any(make.keywords.get(name) not in (None, False) for name in ("foreach", "differentiable"))
    return not chosen and make.keywords.get("fused") is None and device.type in ("cpu", "cuda")


def _refuse_for_lbfgs(trainer: Trainer) -> None:
    several = "optimizer: LBFGS evaluates the loss several times a step, and"
    if trainer.world_size > 1:
        raise UserError(f"{several} each process would decide for itself when a step is over: train on one device")
    if trainer.accumulate_grad_batches > 1:
        raise UserError(
            f"{several} each evaluation of a step would add to the accumulated gradients: "
            f"raise {argument('data.batch_size')} instead of accumulating"
        )


def rate_groups(
    model: nn.Module, backbone: nn.Module, decay: float, scales: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Group the trainable parameters by learning rate: the i-th layer before the head gets `decay^i` times the head's rate.

    Layers are those of timm's `group_matcher`: the stem, each block, and what follows the blocks; parameters that it does not place go
    with the head.

    Args:
        model: The whole model.
        backbone: The part of it that timm built.
        decay: The factor from one layer to the one before it, in (0, 1].
        scales: Further factors for parts of the model, by name; a part within another part has only its own.

    Returns:
        Groups for an optimizer, the fastest first, each with its `lr_scale`.

    Raises:
        UserError: The backbone's layers are unknown to timm, or there is no such part.

    Source:
        Clark et al., "ELECTRA", ICLR 2020, arXiv 2003.10555; for images Bao et al., "BEiT", ICLR 2022, arXiv 2106.08254.
    """
    depths = {} if decay == 1 else _depths(backbone)
    factors: dict[int, float] = {}
    for name, scale in sorted((scales or {}).items(), key=lambda item: item[0].count(".")):
        factors |= {id(parameter): scale for parameter in _part(model, name)}
    groups: dict[float, list[nn.Parameter]] = defaultdict(list)
    for parameter in model.parameters():
        if parameter.requires_grad:
            scale = decay ** depths.get(id(parameter), 0) * factors.get(id(parameter), 1.0)
            groups[scale].append(parameter)
    return [{"params": groups[scale], "lr_scale": scale} for scale in sorted(groups, reverse=True)]


def _depths(backbone: nn.Module) -> dict[int, int]:
    """The number of layers from the head down to each parameter, by the parameter's id."""
    from timm.models import group_parameters  # timm takes a second, which `--help` need not wait for

    matcher: Any = getattr(backbone, "group_matcher", None)
    if matcher is None:
        raise UserError(f"layer_decay: timm does not define the layers of {type(backbone).__name__}: leave it out")
    parameters = dict(backbone.named_parameters())
    with_head: Any = SimpleNamespace(named_parameters=lambda: [*parameters.items(), ("head.weight", None)])
    layers: dict[str, int] = group_parameters(with_head, matcher(coarse=False), reverse=True)
    return {id(parameter): layers["head.weight"] - layers[name] for name, parameter in parameters.items()}


def _part(model: nn.Module, name: str) -> list[nn.Parameter]:
    parts = dict(model.named_modules())
    parameters = list(parts[name].parameters()) if name in parts else []
    if not parameters:
        trained = [other for other, part in parts.items() if list(part.parameters())]
        near = ", ".join(get_close_matches(name, trained, cutoff=0.4)) or "backbone or head"
        raise UserError(
            f"lr_scale: no part of the model with weights is called {name!r}: give one that has some, such as {near}"
        )
    return parameters


def _keeps_scales(optimizer: Optimizer) -> bool:
    """Whether the rates that a schedule has set for the first epoch or cycle still differ by their `lr_scale`."""
    rates = [float(group.get("initial_lr", group["lr"])) / group["lr_scale"] for group in optimizer.param_groups]
    return all(math.isclose(rate, rates[0], rel_tol=1e-6) for rate in rates)


def rate_of_head(optimizers: Sequence[Optimizer]) -> float:
    """The learning rate of the first optimizer before any `lr_scale`, which is the head's; NaN without an optimizer."""
    group = optimizers[0].param_groups[0] if optimizers else {"lr": math.nan}
    return float(group["lr"]) / group.get("lr_scale", 1.0)


def spare_from_decay(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Move parameters to groups of their own without weight decay; an optimizer that decays none stays as it is."""
    spared = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in spared]
        if own and group.get("weight_decay"):
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in spared]
            optimizer.add_param_group({**group, "params": own, "weight_decay": 0.0})


def start_momentum(optimizer: Optimizer) -> None:
    """Give parameters that had no gradient so far a momentum of 0.

    torch's fused SGD treats either all parameters of a group as new or none.
    """
    if not isinstance(optimizer, SGD):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def match_layouts(optimizer: Optimizer) -> None:
    """Give an optimizer's states the memory formats of their parameters; torch's fused CPU steps rely on this without a check."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


class WarmupMultiStep(SequentialLR):
    """Linear warm-up, then steps: at epoch e, counted from 1, `lr·e/warmup_epochs`, later `lr·gamma^(milestones passed)`.

    Args:
        optimizer: The optimizer whose learning rate changes.
        milestones: The epochs after which the rate is multiplied by `gamma`; (160, 180) of 200 is the CIFAR protocol.
        gamma: The factor.
        warmup_epochs: The length of the warm-up; 0 or 1 for none.

    Raises:
        UserError: The length is negative, or a milestone lies within the warm-up.

    Source:
        The CIFAR protocol of the released code of Yang et al. 2022, arXiv 2203.09081, and of Cao et al. 2019 (LDAM), arXiv 1906.07413.
    """

    def __init__(
        self, optimizer: Optimizer, milestones: Sequence[int] = (160, 180), gamma: float = 0.1, warmup_epochs: int = 5
    ) -> None:
        warmup = _warmup(optimizer, warmup_epochs)
        if any(milestone <= warmup_epochs for milestone in milestones):
            raise UserError(
                f"WarmupMultiStep: milestones {list(milestones)} must come after the {warmup_epochs} warm-up epochs"
            )
        main = MultiStepLR(optimizer, [milestone - len(warmup) * warmup_epochs for milestone in milestones], gamma)
        super().__init__(optimizer, [*warmup, main], [warmup_epochs] * len(warmup))


class WarmupCosine(SequentialLR):
    """Linear warm-up, then a half cosine down to 0 at the end of training.

    A training that ends before the warm-up is over never reaches the cosine; `Classifier` then prints a warning.

    Args:
        optimizer: The optimizer whose learning rate changes.
        total_epochs: The length of training; None only if `Classifier` fills in the trainer's `max_epochs`.
        warmup_epochs: The length of the warm-up; 0 or 1 for none.

    Attributes:
        only_rises: Whether training ends before the warm-up is over.

    Raises:
        UserError: The length of the warm-up is negative, or the length of training is missing.
    """

    def __init__(self, optimizer: Optimizer, total_epochs: int | None = None, warmup_epochs: int = 5) -> None:
        if total_epochs is None or total_epochs < 1:
            raise UserError(
                f"WarmupCosine needs the length of training, got total_epochs={total_epochs}: set trainer.max_epochs"
            )
        warmup = _warmup(optimizer, warmup_epochs)
        rest = total_epochs - len(warmup) * warmup_epochs
        self.only_rises = rest < 1
        if self.only_rises:
            super().__init__(optimizer, warmup, [])
        else:
            super().__init__(optimizer, [*warmup, CosineAnnealingLR(optimizer, rest)], [warmup_epochs] * len(warmup))


def _warmup(optimizer: Optimizer, epochs: int) -> list[LRScheduler]:
    """Make the schedule of factors 1/n, 2/n, … 1 over n epochs; none for one epoch, which would change nothing."""
    if epochs < 0:
        raise UserError(f"warmup_epochs must not be negative, got {epochs}")
    return [LinearLR(optimizer, start_factor=1 / epochs, total_iters=epochs - 1)] if epochs > 1 else []
