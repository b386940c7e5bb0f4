"""The part of a model after its logits: an adjustment by class frequencies and a temperature, and whether that belongs to it."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from torch import Tensor

from etflight.checkpoint.hyperparameters import require
from etflight.losses import log_prior
from etflight.utils.errors import UserError, argument
from etflight.utils.precision import at_least_float32

Adjustment = Literal["additive", "multiplicative"]


def check_adjustment(given: Mapping[str, Any]) -> None:
    """Refuse a model's `logit_adjustment` and `adjustment` that decide nothing; see `Classifier`.

    Raises:
        UserError: They are not finite, or not one of the names.
    """
    require(given, "logit_adjustment", math.isfinite, "give a finite τ, 0 for none")
    names = get_args(Adjustment)
    require(given, "adjustment", lambda name: name in names, f"give one of {', '.join(names)}")


@dataclass(frozen=True, eq=False)
class Decision:
    """What is done with the logits z of a head: `y = z - τ T₀ log π` or `y = z π^(-τ)` decides, `softmax(y / T)` are the probabilities.

    π are the training frequencies, T₀ is the temperature whose softmax the loss implies, and T the temperature. With T = T₀ the first is
    `softmax(z / T₀)` divided by `π^τ`, summing to 1 again. Another T takes these probabilities to the power `T₀ / T`, summing to 1 again:
    it comes last, so it changes no decision.

    Attributes:
        tau: The τ.
        adjustment: "additive" for the first y, "multiplicative" for the second.
        unit: Computes T₀.
        class_counts: The number of training images of each class, `[K]`; all 0 if unknown.
        temperature: T, a scalar.
        is_fitted: Whether T was fitted for this decision.
        loss: The name of the loss that implies T₀.

    Source:
        Menon et al., ICLR 2021, arXiv 2007.07314; the second of Hasegawa & Sato, ICLR 2024.
    """

    tau: float
    adjustment: Adjustment
    unit: Callable[[], float]
    class_counts: Tensor
    temperature: Tensor
    is_fitted: bool
    loss: str

    def adjusted(self, logits: Tensor) -> Tensor:
        """Compute y, whose softmax is the probabilities without a temperature: `[B, K]`, float32 or float64.

        Raises:
            UserError: There is an adjustment, but no training counts.
        """
        logits = at_least_float32(logits)
        if self.tau == 0:
            return logits
        if not bool(self.class_counts.any()):
            raise UserError(
                "logit_adjustment needs the training counts, which this model does not hold: give class_counts, or leave it out"
            )
        log_p = log_prior(self.class_counts.to(logits))
        if self.adjustment == "multiplicative":
            return logits * (-self.tau * log_p).exp()
        return logits - self.tau * self.unit() * log_p

    def calibrated(self, logits: Tensor) -> Tensor:
        """Compute `y / T`, whose softmax is the probabilities: `[B, K]`, float32 or float64. See `adjusted`."""
        return self.adjusted(logits) / self.temperature

    def temperature_of_bare_logits(self) -> float:
        """Return T if it is that of the logits as they are, else T₀."""
        return float(self.temperature) if self.tau == 0 else self.unit()

    def describe_temperature(self) -> str:
        """Say what temperature the probabilities have, and where it comes from."""
        temperature = float(self.temperature)
        if temperature == 1:
            return f"no temperature fitted for this decision: see {argument('data.val_fraction')}"
        if self.is_fitted:
            return f"temperature {temperature:.3g}, fitted on held-out images"
        return f"temperature {temperature:.3g}, the default of {self.loss}"

    def describe_stale_temperature(self) -> str:
        """Say that the temperature, as it still is, was fitted for another decision, and where this one's comes from."""
        return (
            f"temperature {float(self.temperature):.3g} was fitted for another decision; this one has none: it is fitted in a test or "
            f"prediction with the images of the training (its data options, {argument('data.val_fraction')} included)"
        )

    def describe_adjustment(self) -> str:
        """Say by what the logits are adjusted; empty if they are not."""
        return f"{self.adjustment} logit adjustment {self.tau:g}" if self.tau else ""


def is_of_another(differing: Collection[str], now: Mapping[str, Any], *, fitted: bool) -> bool:
    """Whether a checkpoint's temperature is that of another decision than the model's.

    Args:
        differing: The names of the arguments in which the checkpoint's model differs.
        now: The model's own arguments.
        fitted: Whether the temperature was fitted; else it is the default of the checkpoint's loss.
    """
    adjusts = now["logit_adjustment"] != 0
    return (
        not {"logit_adjustment", "head"}.isdisjoint(differing)
        or ("adjustment" in differing and adjusts)
        or ("loss" in differing and (adjusts or not fitted))
    )
