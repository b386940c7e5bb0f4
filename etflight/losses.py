"""Losses on logits; each has class balance as a named option."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflight.utils.errors import UserError
from etflight.utils.precision import at_least_float32, in_float64
from etflight.utils.ranks import in_process_group, max_over_ranks, sum_over_ranks

ClassBalance = Literal["none", "batch", "global", "effective"]
SURE = 0.99  # the probability of a class for an embedding that equals its class vector
SmoothingShape = Literal["concave", "linear", "convex"]


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
    exponent: float = 1.0
    beta: float = 0.9999
    renormalize: bool = False

    def __post_init__(self) -> None:
        """Check the options; a subclass that checks options of its own must also call this."""
        nn.Module.__init__(self)
        check_class_balance(type(self).__name__, self.class_balance)
        self._check("exponent", 0 <= self.exponent < math.inf, "must be finite and not negative")
        self._check("beta", 0 <= self.beta < 1, "must lie in [0, 1)")
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
            weights_of_samples = self._class_weights(_count(target, logits.shape[1], logits.dtype))[target]
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


@dataclass(eq=False, kw_only=True, repr=False)
class CrossEntropyLoss(Loss):
    """Softmax cross-entropy, with label smoothing.

    It is `-Σ_k t_k [(1-ε) log p_k + ε/K Σ_j log p_j]`, as in `torch.nn.functional.cross_entropy`; the weight of the target's class also
    scales its smoothing term.

    Args:
        label_smoothing: The smoothing ε in [0, 1).
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("label_smoothing", 0 <= self.label_smoothing < 1, "must lie in [0, 1)")

    def sample_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the cross-entropies `[B]`."""
        if not target.is_floating_point():
            return _cross_entropy(logits, target, self.label_smoothing)
        log_p = logits.log_softmax(dim=1)
        smoothing = self.label_smoothing * log_p.mean(dim=1) * target.sum(dim=1)
        return -((1 - self.label_smoothing) * (target * log_p).sum(dim=1) + smoothing)


def temperature_of_cosines(vectors: Tensor) -> float:
    """The temperature of the softmax of cosines at which an embedding that equals its class vector has the probability `SURE`.

    Without it the largest probability would be 0.25 at best for ten classes. With the mean cosine c of two class vectors, -1/(K-1) in a
    simplex, it is `(1 - c) / log((K-1) SURE / (1 - SURE))`.

    Args:
        vectors: The class vectors `[K, d]`, of norm 1.
    """
    vectors = in_float64(vectors)
    K = len(vectors)
    cosine = float((vectors.sum(dim=0).square().sum() - K) / (K * (K - 1)))
    return (1 - cosine) / math.log((K - 1) * SURE / (1 - SURE))


@dataclass(eq=False, kw_only=True, repr=False)
class DotRegressionLoss(Loss):
    """Dot regression: pull the embedding onto its class vector, with no push from the others.

    `L = (z_y - length)² / (2·length)` with `z_y = <w_y, h>`; for probabilities `Σ_k t_k L_k`, which for a mixup pair is
    `λ L(y_a) + (1-λ) L(y_b)`. Its gradient in h is `-(1 - cos) w_y` at matching lengths.

    Args:
        length: The value `√(E_W E_H)` > 0 to which z_y is pulled; it must equal the head's scale.

    Source:
        Yang et al. 2022, arXiv 2203.09081, section 4.
    """

    length: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("length", 0 < self.length < math.inf, "must be positive and finite")

    def check_head(self, head: Any) -> None:
        """Refuse a head whose target logit cannot be `length`.

        Raises:
            UserError: The head's scale is learned or differs from `length`, or its embeddings are not normalised.
        """
        name, mend = type(head).__name__, "or use CrossEntropyLoss"
        if head.learn_scale:
            raise UserError(
                f"DotRegressionLoss needs a fixed scale, but {name} learns its own: set learn_scale to false, {mend}"
            )
        if not head.gives_cosines or head.weight.requires_grad:
            raise UserError(
                f"DotRegressionLoss needs the unit embeddings and fixed class vectors of ETFHead(normalize=True), which {name} lacks: "
                f"use that, {mend}"
            )
        if head.scale != self.length:
            raise UserError(
                f"DotRegressionLoss has length {self.length}, but {name} has scale {head.scale}: set one to the other"
            )

    def default_temperature(self, head: Any) -> float:
        """Return the temperature at which an embedding that equals its class vector has the probability `SURE`.

        Dot regression pulls each logit to `length` and has no softmax of its own; see `temperature_of_cosines`.
        """
        return self.length * temperature_of_cosines(head.class_vectors.detach())

    def sample_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the squared errors `[B]`."""
        if target.is_floating_point():
            return _at_target(self._squared_error(logits), target)
        return self._squared_error(_at_target(logits, target))

    @property
    def takes_target_logits(self) -> bool:
        """Whether `from_target_logits` can compute it: unless a subclass has losses of its own."""
        cls = type(self)
        return cls.sample_losses is DotRegressionLoss.sample_losses and cls.forward is Loss.forward

    def from_target_logits(
        self, target_logits: Tensor, target: Tensor | None = None, num_classes: int | None = None
    ) -> Tensor:
        """Compute the same loss from `Head.target_logits`, for class indices; `Classifier` trains with it.

        Args:
            target_logits: The logits `[B]` of the targets, any float dtype.
            target: The class indices `[B]`, int64; needed only if classes are balanced.
            num_classes: The number of classes K; needed only to count a batch over several processes, unless `set_class_counts` was called.

        Returns:
            The scalar loss.

        Raises:
            UserError: Targets, K or the training counts are needed to balance classes, but missing.
        """
        losses = self._squared_error(at_least_float32(target_logits))
        if not self._is_balancing():
            return losses.mean()
        if target is None:
            raise UserError(
                f"DotRegressionLoss(class_balance={self.class_balance!r}) needs the targets beside their logits"
            )
        counts = _count(target, num_classes or self._num_classes(target), losses.dtype)
        return (losses * self._class_weights(counts)[target]).mean()

    def _num_classes(self, target: Tensor) -> int:
        for by_class in (self._class_counts, self._given_weights):
            if by_class is not None:
                return len(by_class)
        if in_process_group():
            raise UserError(
                "DotRegressionLoss.from_target_logits counts classes over ranks: give num_classes, or call set_class_counts before"
            )
        return int(target.max()) + 1

    def _squared_error(self, logits: Tensor) -> Tensor:
        return (logits - self.length) ** 2 / (2 * self.length)


@dataclass(eq=False, kw_only=True, repr=False)
class FocalLoss(Loss):
    """Focal loss: cross-entropy that gives less weight to samples that are already right.

    `L = -(1 - p_y)^γ log p_y` with the softmax p; for probabilities `Σ_k t_k L_k`. γ = 0 is cross-entropy. With the class balance
    "effective" it is the class-balanced focal loss of Cui et al. 2019, with a softmax where theirs has a sigmoid for each class.

    Args:
        gamma: The exponent γ >= 0.

    Source:
        Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017, arXiv 1708.02002, equation 4, with a softmax.
    """

    gamma: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("gamma", 0 <= self.gamma < math.inf, "must be finite and not negative")

    def sample_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the focal losses `[B]`."""
        log_p = logits.log_softmax(dim=1)
        # not 0, because the power's gradient is infinite there for γ < 1
        one_minus_p = (-log_p.expm1()).clamp(min=torch.finfo(log_p.dtype).eps)
        return -_at_target(one_minus_p**self.gamma * log_p, target)


@dataclass(eq=False, kw_only=True, repr=False)
class LDAMLoss(Loss):
    """Label-distribution-aware margin: cross-entropy after a margin, larger for rarer classes, is subtracted from the target's cosine.

    With logits `z_k = s cos_k` and margins `Δ_k = max_margin (n_min / n_k)^(1/4)`: `L_y = log(1 + Σ_{k≠y} exp(z_k - (z_y - s Δ_y)))`; for
    probabilities `Σ_k t_k L_k`, a mixup pair's `λ L(y_a) + (1-λ) L(y_b)`. `max_margin = 0` is cross-entropy. A class without training
    images counts as the rarest that has some. With `renormalize` and `DeferredBalance` this is LDAM-DRW.

    Args:
        max_margin: The margin Δ of the rarest class, a difference of cosines, in [0, 2].
        scale: The scale s > 0 of the head, by which the logits are already multiplied.

    Source:
        Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019, arXiv 1906.07413,
        equations 11 to 13. (In its released code the loss multiplies bare cosines by s.)
    """

    max_margin: float = 0.5
    scale: float = 30.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("max_margin", 0 <= self.max_margin <= 2, "must lie in [0, 2]")
        self._check("scale", 0 < self.scale < math.inf, "must be positive and finite")

    def check_head(self, head: Any) -> None:
        """Refuse a head whose logits are not `scale` times a cosine.

        Raises:
            UserError: The head does not give cosines, learns its scale, or has another one.
        """
        name = type(head).__name__
        if head.learn_scale or not head.gives_cosines:
            raise UserError(
                f"LDAMLoss needs cosines times a fixed scale, which {name} does not give: "
                f"use CosineHead or ETFHead with scale {self.scale:g}"
            )
        if head.scale != self.scale:
            raise UserError(f"LDAMLoss has scale {self.scale}, but {name} has {head.scale}: set one to the other")

    def sample_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the margin losses `[B]`."""
        excess = _log_sum_exp_of_others(logits) - logits
        if self.training:
            excess = excess + self.scale * self._margins(logits)
        return _at_target(F.softplus(excess), target)

    def _margins(self, logits: Tensor) -> Tensor:
        counts = _positive(self._counts_like(logits))
        return self.max_margin * (counts.min() / counts) ** 0.25


@dataclass(eq=False, kw_only=True, repr=False)
class LogitAdjustedLoss(Loss):
    """Cross-entropy of logits that are shifted by class frequencies, so that the bare logits decide as if classes were balanced.

    `L = CE(z + τ log π, t)` with `π_k = n_k / N`. τ = 1 is *balanced softmax* (Ren et al., NeurIPS 2020, arXiv 2007.10740), τ = 0
    cross-entropy. The shift is the same for every target, so probabilities need no rule of their own. A class without training images
    counts as the rarest that has some. With a sampler that draws class k in proportion to `n_k^q`, τ = q adjusts for what is drawn.
    `Classifier(logit_adjustment=τ)` adjusts a model afterwards instead, whatever its loss.

    Args:
        tau: The strength τ >= 0 of the adjustment.

    Source:
        Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, arXiv 2007.07314, equation 10.
    """

    tau: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("tau", 0 <= self.tau < math.inf, "must be finite and not negative")

    def frequency_correction(self) -> str | None:
        """The shift of the logits."""
        return f"{type(self).__name__} (tau {self.tau:g})" if self.tau > 0 else None

    def sample_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the cross-entropies `[B]` of adjusted logits."""
        if self.training:
            logits = logits + self.tau * log_prior(self._counts_like(logits))
        return _cross_entropy(logits, target)


@dataclass(eq=False, kw_only=True, repr=False)
class LabelAwareSmoothingLoss(Loss):
    """Cross-entropy with more label smoothing for the frequent classes, which are the over-confident ones.

    `L_y = -[(1-ε_y) log p_y + ε_y/K Σ_j log p_j]`; for probabilities `Σ_k t_k L_k`. `ε_y = ε_tail + (ε_head - ε_tail) g(f_y)` with
    `f_y = (n_y - n_min)/(n_max - n_min)` and g one of `sin(πf/2)` ("concave"), `f` ("linear"), `1 - cos(πf/2)` ("convex"). If all counts
    are equal, every class has ε_tail; a class without training images counts as the rarest that has some.

    Args:
        head_smoothing: The ε of the most frequent class, in [0, 1); at ratio 100 the authors take 0.3 for CIFAR-10-LT and
            0.4 for CIFAR-100-LT.
        tail_smoothing: The ε of the rarest class, from 0 to `head_smoothing`; the authors take 0 and 0.1.
        shape: The curve by which ε rises with the count.

    Source:
        Zhong et al., "Improving Calibration for Long-Tailed Recognition" (MiSLAS), CVPR 2021, arXiv 2104.00466, section 3.2. The
        smoothed part goes to all K classes, as in its released code and in `CrossEntropyLoss`; in the paper the other classes get ε/(K-1).
    """

    head_smoothing: float = 0.3
    tail_smoothing: float = 0.0
    shape: SmoothingShape = "concave"

    def __post_init__(self) -> None:
        super().__post_init__()
        shapes = get_args(SmoothingShape)
        self._check("head_smoothing", 0 <= self.head_smoothing < 1, "must lie in [0, 1)")
        self._check(
            "tail_smoothing", 0 <= self.tail_smoothing <= self.head_smoothing, "must lie in [0, head_smoothing]"
        )
        self._check("shape", self.shape in shapes, f"must be one of {', '.join(shapes)}")

    def sample_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the smoothed cross-entropies `[B]`."""
        log_p = logits.log_softmax(dim=1)
        if not self.training:
            return -_at_target(log_p, target)
        smoothing = self._smoothing(logits)
        return -_at_target((1 - smoothing) * log_p + smoothing * log_p.mean(dim=1, keepdim=True), target)

    def _smoothing(self, logits: Tensor) -> Tensor:
        counts = _positive(self._counts_like(logits))
        fraction = (counts - counts.min()) / (counts.max() - counts.min()).clamp(min=1e-12)
        match self.shape:
            case "concave":
                rise = (math.pi / 2 * fraction).sin()
            case "linear":
                rise = fraction
            case "convex":
                rise = 1 - (math.pi / 2 * fraction).cos()
        return self.tail_smoothing + (self.head_smoothing - self.tail_smoothing) * rise


@dataclass(eq=False, kw_only=True, repr=False)
class NTCELoss(Loss):
    """NTCE: a softmax down a column of the logits, of the target's logit among those of its class over the batch.

    `L_i = -log[exp(z_iy/τ) / Σ_j exp(z_jy/τ)]` for sample i of class y, with j over the batch of all ranks: each class vector chooses among
    images, where cross-entropy lets each image choose among class vectors. For probabilities `Σ_k t_k L_ik`. In eval mode, where a batch
    is arbitrary, it is the cross-entropy of `z/τ` over classes.

    Args:
        temperature: The temperature τ > 0; with unit embeddings and class vectors `z` is a cosine.

    Source:
        Koromilas et al., "Neural Collapse by Design: Learning Class Prototypes on the Hypersphere", ICML 2026, arXiv 2605.20302.
    """

    temperature: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("temperature", 0 < self.temperature < math.inf, "must be positive and finite")

    def default_temperature(self, head: Any) -> float:
        """Return τ, since the loss is that of the softmax of `z/τ`."""
        return self.temperature

    def sample_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the losses `[B]`; in training every process of the step must call it."""
        z = logits / self.temperature
        if not self.training:
            return _cross_entropy(z, target)
        return -_at_target(_log_share_of_batch(z, self._rivals(z, target)), target)

    def _rivals(self, z: Tensor, target: Tensor) -> Tensor:
        """The scaled logits of the denominators, -inf where a sample does not belong to one."""
        return z


@dataclass(eq=False, kw_only=True, repr=False)
class NONLLoss(NTCELoss):
    """NONL: `NTCELoss` with the samples of other classes alone in the denominator, so that images of one class do not compete.

    `L_i = -log[exp(z_iy/τ) / Σ_{j: y_j ≠ y} exp(z_jy/τ)]`, with j over the batch of all ranks; it may be negative. For probabilities
    `Σ_k t_k L_ik`, where the samples whose target gives class k nothing are in its denominator. A class costs nothing if no sample of the
    batch is in its denominator.

    Args:
        temperature: The temperature τ > 0.

    Source:
        Koromilas et al., ICML 2026, arXiv 2605.20302; its released code trains with τ 0.1.
    """

    def _rivals(self, z: Tensor, target: Tensor) -> Tensor:
        if target.is_floating_point():
            return z.masked_fill(target > 0, -math.inf)
        return z.scatter(1, target[:, None], -math.inf)


@dataclass(eq=False, kw_only=True, repr=False)
class BinaryCrossEntropyLoss(Loss):
    """A yes or no for each class instead of one choice among all, so that no class is weighed against another.

    `L_y = softplus(-x_y) + Σ_{k≠y} softplus(x_k)` with `x_k = z_k + b_k`; for probabilities
    `Σ_k [t_k softplus(-x_k) + (1-t_k) softplus(x_k)]`. The bias is the prior's log-odds: in training `b_k = τ log(π_k / (1-π_k))` of the
    training counts, where a class without images counts as the rarest that has some; in eval mode that of equal classes, `-τ log(K-1)`.

    Args:
        tau: The strength τ >= 0 of the prior; with 0 there is no bias, and no counts are needed.

    Source:
        Fan et al., AAAI 2026, arXiv 2511.14097 (BCE3S), the first of its three terms; the third spreads class vectors, which a simplex
        has spread already. The bias: Menon et al., ICLR 2021, arXiv 2007.07314, for a sigmoid.
    """

    tau: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("tau", 0 <= self.tau < math.inf, "must be finite and not negative")

    def frequency_correction(self) -> str | None:
        """The bias."""
        return f"{type(self).__name__} (tau {self.tau:g})" if self.tau > 0 else None

    def sample_losses(self, logits: Tensor, target: Tensor) -> Tensor:
        """Compute the sums `[B]` over classes."""
        x = logits + self._bias(logits)
        if not target.is_floating_point():
            own = target[:, None]
            return -F.logsigmoid((-x).scatter(1, own, x.gather(1, own))).sum(dim=1)
        rest = target.sum(dim=1, keepdim=True) - target
        return -(target * F.logsigmoid(x) + rest * F.logsigmoid(-x)).sum(dim=1)

    def _bias(self, logits: Tensor) -> Tensor | float:
        if self.tau == 0:
            return 0.0
        counts = self._counts_like(logits) if self.training else torch.ones_like(logits[0])
        counts = _positive(counts)
        return self.tau * (counts / (counts.sum() - counts)).log()


def class_weights_of(
    given: Sequence[float] | Mapping[str, float], num_classes: int, class_names: Sequence[str] | None
) -> Tensor:
    """Return explicit class weights as a tensor.

    Args:
        given: K positive, finite numbers, or such numbers by class name; a class that is not named has 1.
        num_classes: The number of classes K.
        class_names: The names of the classes, or None if unknown.

    Returns:
        `[K]`, float32.

    Raises:
        UserError: There is no such class, or its name is not known; there are too many or too few numbers; a number is not positive and
            finite.
    """
    for weight in given.values() if isinstance(given, Mapping) else given:
        if not (type(weight) in (int, float) and 1e-30 <= weight <= 1e30):
            raise UserError(f"class_weights: {weight!r} is no weight: give positive, finite numbers, 1 for no change")
    if not isinstance(given, Mapping):
        if len(given) != num_classes:
            raise UserError(f"class_weights has {len(given)} entries for {num_classes} classes: give one per class")
        return torch.tensor(given, dtype=torch.float32)
    if class_names is None:
        raise UserError(
            f"class_weights names classes, but the data have no class names: give a list of {num_classes} weights"
        )
    for name in given:
        if name not in class_names:
            near = get_close_matches(str(name), class_names)
            known = f"near matches: {', '.join(near)}" if near else f"the first are {', '.join(class_names[:5])}"
            raise UserError(f"class_weights: no class is called {name!r}; {known}")
        if (times := class_names.count(name)) > 1:
            raise UserError(f"class_weights: {times} classes are called {name!r}: give a list of {num_classes} weights")
    return torch.tensor([given.get(name, 1.0) for name in class_names], dtype=torch.float32)


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


def _cross_entropy(logits: Tensor, target: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropies `[B]` of class indices; none of them means "ignore", as -100 does in torch."""
    no_class = torch.iinfo(torch.int64).min
    return F.cross_entropy(logits, target, reduction="none", label_smoothing=label_smoothing, ignore_index=no_class)


def log_prior(class_counts: Tensor) -> Tensor:
    """Compute `log π`, `[K]`, of the class frequencies, in float64 for float64 counts, else in float32.

    A class without images counts as the rarest that has some.
    """
    counts = _positive(class_counts)
    return (counts / counts.sum()).log()


def _positive(class_counts: Tensor) -> Tensor:
    counts = at_least_float32(class_counts)
    return torch.where(counts > 0, counts, counts.where(counts > 0, math.inf).min())


def _at_target(values: Tensor, target: Tensor) -> Tensor:
    """`Σ_k t_k v_k`, `[B]`, of values `[B, K]`."""
    if target.is_floating_point():
        return (target * values).sum(dim=1)
    return values.gather(1, target[:, None]).squeeze(1)


def _log_sum_exp_of_others(logits: Tensor) -> Tensor:
    """`log Σ_{j≠k} exp z_j` for every k, `[B, K]`; the largest is summed separately, because its 1 - p would lose all digits."""
    top = logits.argmax(dim=1, keepdim=True)
    p_of_rest = logits.softmax(dim=1).scatter(1, top, 0.0)
    without_top = logits.scatter(1, top, torch.finfo(logits.dtype).min).logsumexp(dim=1, keepdim=True)
    return (logits.logsumexp(dim=1, keepdim=True) + (-p_of_rest).log1p()).scatter(1, top, without_top)


def _log_share_of_batch(z: Tensor, rivals: Tensor) -> Tensor:
    """`z_ik - log Σ_j exp(rivals_jk)`, `[B, K]`, with j over the batch of all ranks; 0 for a class whose rivals are all -inf."""
    highest = max_over_ranks(rivals.amax(dim=0))
    alone = highest.isneginf()
    highest = highest.masked_fill(alone, 0.0)
    sums = sum_over_ranks((rivals - highest).exp().sum(dim=0))
    return (z - highest - sums.masked_fill(alone, 1.0).log()).masked_fill(alone, 0.0)


def _count(target: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    # index_add_, because bincount synchronises with the host on a GPU
    ones = torch.ones_like(target, dtype=dtype)
    return ones.new_zeros(num_classes).index_add_(0, target, ones)
