"""The base class of losses, with class balance as a named option."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from etflight.losses.terms import count_classes
from etflight.utils.errors import UserError
from etflight.utils.precision import at_least_float32
from etflight.utils.ranks import sum_over_ranks

ClassBalance = Literal["none", "batch", "global", "effective"]


def option(default: Any, holds: Callable[[Any], bool], rule: str) -> Any:
    """Declare an option of a loss, a field of its data class, with the rule for its values, which the base class checks.

    Args:
        default: The default value.
        holds: Whether a value is allowed.
        rule: The rule in words, such as "must be positive".
    """
    return field(default=default, metadata={"holds": holds, "rule": rule})


def positive(default: float) -> Any:
    """Declare an option that is above 0 and finite."""
    return option(default, lambda value: 0 < value < math.inf, "must be positive and finite")


def not_negative(default: float) -> Any:
    """Declare an option that is 0 or more and finite."""
    return option(default, lambda value: 0 <= value < math.inf, "must be finite and not negative")


def below_one(default: float) -> Any:
    """Declare an option from 0 to below 1."""
    return option(default, lambda value: 0 <= value < 1, "must lie in [0, 1)")


@dataclass(eq=False, kw_only=True, repr=False)
class Loss(nn.Module, ABC):
    """The base class of losses: the batch's mean of per-sample losses, in training weighted by class if asked.

    - `"none"`: every sample counts the same.
    - `"batch"`: class y weighs `((B/U)/n_y)^exponent`, with the size B of the batch, the counts `n` (sums of probabilities if
      targets are mixed) and the number U of classes present, all taken over every rank of the step.
    - `"global"`: class y weighs `(N/(K n_y))^exponent` from the training counts given to `set_class_counts`.
    - `"effective"`: class y weighs `(c (1-β)/(1-β^n_y))^exponent` from the training counts, the inverse of its *effective number* of
      images, with c such that these inverses sum to K (Cui et al., CVPR 2019). β = 0 is "none", β -> 1 inverse frequency.

    The released code of Yang et al. 2022 uses "batch" with exponent 1; scaling by √E_W gives exponent 1/2.

    The mean over the batch divides by B, whatever the weights: frequent classes with small weights then make small gradients. With
    `renormalize` it divides by the sum of the weights, as `torch.nn.functional.cross_entropy(…, weight=…)` does, and with it the code of
    LDAM-DRW. B and the sum are taken over every rank of the step; if targets are mixed, the sum is that of the weights times the
    probabilities.

    `set_class_weights` gives weights of one's own, by which those of the class balance are multiplied.

    Everything that depends on class counts (these weights, and the margins, shifts and smoothings of subclasses) acts in training mode
    only: in eval mode nothing is communicated, no counts are needed, and the loss is the plain one of the same logits.

    Args:
        class_balance: "none", "batch", "global" or "effective".
        exponent: The exponent of the weights, >= 0.
        beta: The β of "effective", in [0, 1).
        renormalize: Whether the weights of a step are divided by their mean over its samples.

    Raises:
        UserError: The class balance is unknown, or a number is out of range.
    """

    class_balance: ClassBalance = "none"
    exponent: float = not_negative(1.0)
    beta: float = below_one(0.9999)
    renormalize: bool = False

    def __post_init__(self) -> None:
        """Check the options; a subclass that checks options of its own must also call this."""
        nn.Module.__init__(self)
        check_class_balance(type(self).__name__, self.class_balance)
        for own in fields(self):
            if "holds" in own.metadata:
                self._check(own.name, own.metadata["holds"](getattr(self, own.name)), own.metadata["rule"])
        self._class_counts: Tensor | None = None
        self._given_weights: Tensor | None = None

    def _check(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise UserError(f"{type(self).__name__}: {name} {rule}, got {getattr(self, name)!r}")

    def set_class_balance(self, class_balance: ClassBalance) -> None:
        """Use another class balance from now on.

        Raises:
            UserError: There is no such class balance.
        """
        check_class_balance(type(self).__name__, class_balance)
        self.class_balance = class_balance

    def set_class_counts(self, class_counts: Tensor | Sequence[int]) -> None:
        """Set the training counts `[K]`, which some losses and balances need; the first step moves them to its device.

        Raises:
            UserError: They are not counts, or no class has an image.
        """
        class_counts = torch.as_tensor(class_counts)
        if class_counts.dim() != 1 or not bool(((class_counts >= 0) & class_counts.isfinite()).all()):
            raise UserError(f"{type(self).__name__}: class_counts must be [K] numbers of images, none below 0")
        if not bool((class_counts > 0).any()):
            raise UserError(f"{type(self).__name__}: no class has a training image: give counts that are not all 0")
        self._class_counts = class_counts

    def set_class_weights(self, class_weights: Tensor | Sequence[float] | None) -> None:
        """Set explicit weights `[K]`, which act in training and multiply those of the class balance; None for none.

        Raises:
            UserError: They are not positive, finite numbers.
        """
        weights = None if class_weights is None else torch.as_tensor(class_weights)
        if weights is not None and (weights.dim() != 1 or not bool(((weights > 0) & weights.isfinite()).all())):
            raise UserError(f"{type(self).__name__}: class_weights must be [K] positive, finite numbers")
        self._given_weights = weights

    def training_counts(self) -> Tensor:
        """Return the training counts `[K]`.

        Raises:
            UserError: They have not been set.
        """
        if self._class_counts is None:
            raise UserError(
                f"{type(self).__name__} (class_balance {self.class_balance!r}) needs the training counts: "
                "train with a data module that has class_counts, give Classifier class_counts, or call set_class_counts"
            )
        return self._class_counts

    def _counts_like(self, logits: Tensor) -> Tensor:
        """The training counts `[K]`, of the dtype and on the device of `logits`."""
        # moved once: a copy from the host in every step would wait for the device
        self._class_counts = self.training_counts().to(logits.device)
        return self._class_counts.to(logits.dtype)

    @property
    def takes_target_logits(self) -> bool:
        """Whether it needs no more than the logits of the targets, which its method `from_target_logits` then takes."""
        return False

    def check_head(self, head: Any) -> None:
        """Raise `UserError` if this loss cannot train that head; most losses can train any head."""

    def default_temperature(self, head: Any) -> float:
        """Return the temperature of the probabilities of a model trained with this loss, until one is fitted; 1 unless overridden."""
        return 1.0

    def frequency_correction(self) -> str | None:
        """Name what corrects class frequencies in the logits, for a warning if they are corrected twice; None if nothing does."""
        return None

    @abstractmethod
    def sample_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the unweighted losses of the samples.

        For probabilities they must be linear in `target`, so that the base class can weigh classes.

        Args:
            logits: The logits `[B, K]`, float32 or float64.
            target: The class indices `[B]`, int64, or probabilities `[B, K]`.

        Returns:
            `[B]`.
        """

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the weighted mean over the batch, in float32 even under autocast, or in float64 for float64 logits.

        Args:
            logits: The logits `[B, K]`, any float dtype.
            target: The class indices `[B]`, of any integer dtype, or probabilities `[B, K]` whose rows sum to 1.

        Returns:
            The scalar loss.

        Raises:
            UserError: The training counts are needed, but have not been set; the shapes or the numbers of classes do not fit; or
                `sample_losses` returned anything but `[B]`.
        """
        if target.shape != (logits.shape if target.is_floating_point() else logits.shape[:1]):
            raise UserError(
                f"{type(self).__name__}: the target is {target.dtype} {list(target.shape)} for logits {list(logits.shape)}: give class "
                "indices [B], int64, or probabilities [B, K]"
            )
        target = target if target.is_floating_point() else target.long()  # as an index, uint8 would be a mask
        for name, given in (("class_counts", self._class_counts), ("class_weights", self._given_weights)):
            if self.training and given is not None and len(given) != logits.shape[1]:
                raise UserError(
                    f"{type(self).__name__}: there are {len(given)} {name} for logits of {logits.shape[1]} classes: give one for each class"
                )
        logits, weights_of_samples = at_least_float32(logits), None
        if self._is_balancing() and target.is_floating_point():
            target = target * self._class_weights(target.to(logits).sum(dim=0))
        elif self._is_balancing():
            weights_of_samples = self._class_weights(count_classes(target, logits.shape[1], logits.dtype))[target]
        losses = self.sample_losses(logits, target)
        if losses.shape != target.shape[:1]:
            raise UserError(
                f"{type(self).__name__}: sample_losses returned {list(losses.shape)} for {len(target)} images: let it return one loss for "
                "each, [B], whose mean is taken here"
            )
        return (losses if weights_of_samples is None else losses * weights_of_samples).mean()

    def _is_balancing(self) -> bool:
        return self.training and (self.class_balance != "none" or self._given_weights is not None)

    def _class_weights(self, batch_counts: Tensor) -> Tensor:
        """Compute the weights `[K]` in the dtype of the counts; 0 for a class without samples, whose weight no sample uses."""
        needs_step = self.class_balance == "batch" or self.renormalize
        step_counts = sum_over_ranks(batch_counts) if needs_step else batch_counts
        weights = self._balance(step_counts)
        if self._given_weights is not None:
            self._given_weights = self._given_weights.to(weights.device)  # once
            weights = weights * self._given_weights.to(weights.dtype)
        if self.renormalize:
            weights = weights * (step_counts.sum() / (step_counts * weights).sum().clamp(min=1e-12))
        return weights

    def _balance(self, step_counts: Tensor) -> Tensor:
        if self.class_balance == "none":
            return torch.ones_like(step_counts)
        if self.class_balance == "batch":
            counts = step_counts
            weights = counts.sum() / (counts > 0).sum() / counts.clamp(min=1e-12)
        else:
            counts = self._counts_like(step_counts)
            weights = counts.sum() / len(counts) / counts.clamp(min=1e-12)
            if self.class_balance == "effective":
                log_beta = math.log(self.beta) if self.beta > 0 else -math.inf
                inverse = (counts > 0) / -torch.expm1(counts.clamp(min=1e-12) * log_beta)
                weights = inverse * (len(counts) / inverse.sum())
        return torch.where(counts > 0, weights**self.exponent, 0.0)

    def extra_repr(self) -> str:
        """Return the options, for `print(loss)`."""
        return ", ".join(f"{option.name}={getattr(self, option.name)!r}" for option in fields(self))


def check_class_balance(owner: str, class_balance: str) -> None:
    """Refuse a class balance that does not exist.

    Args:
        owner: The class that has the argument, for the error.
        class_balance: The given value.

    Raises:
        UserError: There is no such class balance.
    """
    names = get_args(ClassBalance)
    if class_balance not in names:
        raise UserError(f"{owner}: class_balance must be one of {', '.join(names)}, got {class_balance!r}")
