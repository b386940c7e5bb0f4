"""Says when class frequencies are corrected more than once, which is easy to ask for and hard to see in the results."""

from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from etflight.callbacks.deferred import DeferredBalance
from etflight.callbacks.post_hoc import TauNormalization
from etflight.callbacks.trainer import callbacks_of, data_module
from etflight.classifier import Classifier
from etflight.data.sampler import resolve_policy
from etflight.losses import LogitAdjustedLoss, Loss


class DoubleCorrection(Callback):
    """Warns in one line when a run corrects class frequencies in two ways that do not know of each other.

    Re-sampling, weights in the loss and logit adjustment each make a model decide as if classes were balanced; two of them favour rare
    classes beyond that. Only class balance `"batch"` weighs what was drawn, so it goes with any sampler. An evaluation warns where it
    corrects anew what, to its knowledge, training has corrected.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warn on the first process; a warning and no error, because somebody may want to measure just that."""
        model = cast(Classifier, pl_module)
        callbacks = callbacks_of(trainer, Callback)
        afterwards = post_hoc_corrections(model, callbacks)
        if stage != "fit" and not afterwards:
            return
        data = data_module(trainer)
        found = training_corrections(model.loss, getattr(data, "sampler", None), callbacks) + afterwards
        if len(found) > 1:
            rank_zero_warn(
                f"class frequencies are corrected {len(found)} times, by {', '.join(found[:-1])} and {found[-1]}: rare classes are "
                "favoured beyond balance; keep one of them, unless that is what you want to measure"
            )


def training_corrections(loss: Loss, sampler: str | float | None, callbacks: list[Callback]) -> list[str]:
    """What in a training makes up for class frequencies, in words; of those that work together, one.

    Example:
        >>> training_corrections(LogitAdjustedLoss(class_balance="global"), "balanced", [])
        ["sampler 'balanced'", "class balance 'global'", 'LogitAdjustedLoss (tau 1)']
    """
    deferred = [callback for callback in callbacks if isinstance(callback, DeferredBalance)]
    samplers = [policy for policy in (sampler, *(d.sampler for d in deferred)) if not _draws_images_alike(policy)]
    balances = [b for b in (loss.class_balance, *(d.class_balance for d in deferred)) if b not in (None, "none")]
    found = [f"sampler {policy!r}" for policy in samplers[:1]]
    if balances and not (samplers and set(balances) == {"batch"}):
        found.append(f"class balance {balances[0]!r}")
    if isinstance(loss, LogitAdjustedLoss) and loss.tau > 0:
        found.append(f"LogitAdjustedLoss (tau {loss.tau:g})")
    return found


def post_hoc_corrections(model: Classifier, callbacks: list[Callback]) -> list[str]:
    """What in an evaluation makes up for class frequencies, in words."""
    tau: float = model.hparams["logit_adjustment"]
    found = [f"post-hoc logit_adjustment {tau:g}"] if tau != 0 else []
    taus = [callback.tau for callback in callbacks if isinstance(callback, TauNormalization)]
    return found + [f"TauNormalization (tau {tau:g})" for tau in taus if tau > 0]


def _draws_images_alike(policy: str | float | None) -> bool:
    return policy is None or resolve_policy(policy) in ("instance", 1.0)
