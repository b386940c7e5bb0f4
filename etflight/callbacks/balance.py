"""Class balance that waits until the features have been learnt, and a warning if classes are balanced twice."""

from typing import cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from etflight.callbacks.post_hoc import TauNormalization
from etflight.classifier import Classifier
from etflight.data.sampler import EXPONENTS, ImbalancedSampler, resolve_policy
from etflight.losses import ClassBalance, LogitAdjustedLoss, Loss, check_class_balance
from etflight.utils.errors import UserError
from etflight.utils.trainer import GivesBack, callbacks_of, data_module, refuse_if_never_reached


class DeferredBalance(GivesBack):
    """Changes, from an epoch on, how the loss weighs classes (deferred re-weighting, DRW), how they are sampled (re-sampling), or both.

    The balance in force depends on the epoch alone, so a resumed run continues as if it had not stopped. The new balance takes its
    `exponent`, `beta` and `renormalize` from the loss.

    Args:
        epoch: The first epoch, counted from 0, of the new balance; a number below 1 is a part of `max_epochs`: 0.8 is epoch 160 of 200.
        class_balance: The loss's class balance from then on; None leaves it unchanged.
        sampler: The data module's class-sampling policy or exponent from then on; None leaves it unchanged.

    Raises:
        UserError: Neither a class balance nor a sampler is given, or one that does not exist, or `epoch` is not an epoch. When training
            starts: the epoch is never reached, or the loss or the data cannot do what is asked.

    Source:
        Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019, arXiv 1906.07413, section 3.3:
        LDAM-DRW is `LDAMLoss(renormalize=True)` with `class_balance="effective"`.
    """

    def __init__(
        self,
        epoch: int | float = 0.8,
        class_balance: ClassBalance | None = None,
        sampler: str | float | None = None,
    ) -> None:
        super().__init__()
        if not (0 <= epoch < 1 or (epoch >= 1 and float(epoch).is_integer())):
            raise UserError(
                f"DeferredBalance: epoch is {epoch}: give an epoch, or a part of max_epochs from 0 to below 1"
            )
        if class_balance is None and sampler is None:
            raise UserError("DeferredBalance has nothing to change: give class_balance, sampler or both")
        if class_balance is not None:
            check_class_balance("DeferredBalance", class_balance)
        self.epoch = epoch
        self.class_balance = class_balance
        self.sampler = None if sampler is None else resolve_policy(sampler)
        self._own: ClassBalance | None = None  # of the loss before training
        # the sampler, and its policy before training
        self._drawing: tuple[ImbalancedSampler, str | float] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the loss's own balance, before any other callback of this kind changes it."""
        if self.class_balance is not None:
            self._own = self._loss(pl_module).class_balance

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give loss and sampler their own balance back, for another training."""
        if self._own is not None:
            self._loss(pl_module).set_class_balance(self._own)
            self._own = None
        if self._drawing is not None:
            sampler, policy = self._drawing
            sampler.set_policy(policy)
            self._drawing = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse now what would otherwise fail in that epoch; switch to the new balance if the run is resumed after it."""
        first = self._first_epoch(trainer)
        refuse_if_never_reached(trainer, first, f"DeferredBalance: epoch {first}")
        if self.class_balance in ("global", "effective"):
            self._loss(pl_module).training_counts()
        for other in callbacks_of(trainer, DeferredBalance):  # before any of them changes the policy
            if other.sampler is not None and other._drawing is None:
                other._drawing = (sampler := self._sampler(trainer)), sampler.policy
        self._apply_if_due(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Change the balance; the epoch's images have not been drawn yet."""
        self._apply_if_due(trainer, pl_module)

    def _apply_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        changes = []
        if (
            self._decides(trainer, "class_balance")
            and (loss := self._loss(pl_module)).class_balance != self.class_balance
        ):
            loss.set_class_balance(cast(ClassBalance, self.class_balance))
            changes.append(f"class balance {self.class_balance!r}")
        if self._decides(trainer, "sampler") and (sampler := self._sampler(trainer)).policy != self.sampler:
            sampler.set_policy(cast("str | float", self.sampler))
            changes.append(f"sampler {self.sampler!r}")
        if changes:
            rank_zero_info(f"from epoch {trainer.current_epoch} on: {', '.join(changes)}")

    def _decides(self, trainer: Trainer, name: str) -> bool:
        """Whether this callback is the last one due, by epochs and then by their order, of those that set the `name` part."""
        due = [
            other
            for other in callbacks_of(trainer, DeferredBalance)
            if getattr(other, name) is not None and other._first_epoch(trainer) <= trainer.current_epoch
        ]
        return bool(due) and max(reversed(due), key=lambda other: other._first_epoch(trainer)) is self

    def _first_epoch(self, trainer: Trainer) -> int:
        if self.epoch >= 1 or self.epoch == 0:
            return int(self.epoch)
        if trainer.max_epochs in (None, -1):
            raise UserError(
                f"DeferredBalance: epoch {self.epoch} is a part of max_epochs, which this training does not have: "
                "give the epoch itself"
            )
        return round(self.epoch * trainer.max_epochs)

    def _loss(self, pl_module: LightningModule) -> Loss:
        loss = getattr(pl_module, "loss", None)
        if not isinstance(loss, Loss):
            raise UserError(f"DeferredBalance needs {type(pl_module).__name__}.loss to be an etflight.Loss")
        return loss

    def _sampler(self, trainer: Trainer) -> ImbalancedSampler:
        sampler = getattr(trainer.train_dataloader, "sampler", None)
        if not isinstance(sampler, ImbalancedSampler):
            raise UserError(
                "DeferredBalance can change the sampler only if it is an etflight.data.ImbalancedSampler, as in the loaders of etflight's "
                f"data modules; this training loader has a {type(sampler).__name__}"
            )
        return sampler


class DoubleCorrection(Callback):
    """Warns in one line when a run corrects class frequencies in two ways that do not take account of each other.

    Re-sampling, weights in the loss and logit adjustment each make a model decide as if classes were balanced; two of them favour rare
    classes beyond that. Class balance `"batch"` weighs the drawn images, so it works with any sampler, and `LogitAdjustedLoss` does with
    one whose exponent is its τ. In an evaluation the loss and what decides count.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warn on the first process. It is a warning, not an error, because somebody may want to measure exactly that."""
        model = cast(Classifier, pl_module)
        sampler = getattr(data_module(trainer), "sampler", None) if stage == "fit" else None
        tau: float = model.hparams["logit_adjustment"]
        found = corrections(model.loss, sampler, callbacks_of(trainer, Callback), tau)
        if len(found) > 1:
            rank_zero_warn(
                f"class frequencies are corrected {len(found)} times, by {', '.join(found[:-1])} and {found[-1]}: rare classes are "
                "favoured beyond balance; keep one of them, unless that is what you want to measure"
            )


def corrections(loss: Loss, sampler: str | float | None, callbacks: list[Callback], tau: float = 0.0) -> list[str]:
    """The names of the corrections for class frequencies, in training and of decisions; those that work together count as one.

    Example:
        >>> from etflight import LogitAdjustedLoss
        >>> corrections(LogitAdjustedLoss(class_balance="global"), "balanced", [])
        ["sampler 'balanced'", "class balance 'global'", 'LogitAdjustedLoss (tau 1)']
    """
    deferred = [callback for callback in callbacks if isinstance(callback, DeferredBalance)]
    samplers = [policy for policy in (sampler, *(d.sampler for d in deferred)) if not _draws_images_alike(policy)]
    balances = [b for b in (loss.class_balance, *(d.class_balance for d in deferred)) if b not in (None, "none")]
    found = [f"sampler {policy!r}" for policy in samplers[:1]]
    if balances and not (samplers and set(balances) == {"batch"}):
        found.append(f"class balance {balances[0]!r}")
    if named := loss.frequency_correction():
        if samplers and not deferred and _is_of_what_is_drawn(loss, samplers[0]):
            found[0] += f" with {named}"
        else:
            found.append(named)
    if tau:
        found.append(f"post-hoc logit_adjustment {tau:g}")
    return found + [f"TauNormalization (tau {c.tau:g})" for c in callbacks if isinstance(c, TauNormalization) and c.tau]


def _is_of_what_is_drawn(loss: Loss, policy: str | float | None) -> bool:
    """Whether the loss adjusts logits for exactly the class frequencies that are drawn: `τ log n` is the logarithm of `n^q` for τ = q."""
    known = resolve_policy(cast("str | float", policy))
    exponent = EXPONENTS.get(known, known) if isinstance(known, str) else known
    return isinstance(loss, LogitAdjustedLoss) and exponent == loss.tau


def _draws_images_alike(policy: str | float | None) -> bool:
    return policy is None or resolve_policy(policy) in ("instance", 1.0)
