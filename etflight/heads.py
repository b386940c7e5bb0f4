"""Classifier heads: they map a backbone's pooled features to logits, with class vectors."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from typing import Literal, Self, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflight.geometry import class_code, orthant_code, simplex_etf
from etflight.utils.errors import UserError
from etflight.utils.precision import at_least_float32, exact_product

Code = Literal["simplex", "orthant", "sphere"]
_WIDEST = 2**17  # the largest width of a projection; a frame and a layer of this width still fit some machine's memory
_codes_follow = ContextVar("codes_follow", default=False)


@contextmanager
def codes_from_state_dict() -> Iterator[None]:
    """Leave sphere codes NaN within the block, for models whose state dict is loaded next.

    Computing them can take minutes.
    """
    token = _codes_follow.set(True)
    try:
        yield
    finally:
        _codes_follow.reset(token)


class Head(nn.Module, ABC):
    """The base class of heads; any subclass can be trained by `Classifier` and measured by the callbacks.

    Args:
        in_features: The width d of the features it takes.
        num_classes: The number of classes K >= 2.

    Attributes:
        in_features: The width d.
        num_classes: The number of classes K.
        weight: The class vectors `[K, d']`, a parameter or a buffer.
        bias: The biases `[K]`, or None.

    Raises:
        UserError: There are fewer than two classes.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise UserError(f"a classifier needs at least two classes, got num_classes={num_classes}")
        self.in_features = in_features
        self.num_classes = num_classes

    @property
    def class_vectors(self) -> Tensor:
        """The vectors `[K, d']` with which the embedding is compared: `weight`, unless the head changes it first."""
        return self.weight

    def no_weight_decay(self) -> set[str]:
        """The names of the parameters that weight decay would pull to an arbitrary value, as timm's networks name theirs."""
        return set()

    @abstractmethod
    def embed(self, features: Tensor) -> Tensor:
        """Compute the embedding that is compared with the class vectors.

        Args:
            features: The features `[B, d]`, any float dtype.

        Returns:
            `[B, d']`.
        """

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Compute the logits `[B, K]` of features `[B, d]`."""


class ETFHead(Head):
    """A fixed frame of class vectors, never trained.

    `embed` is an optional projection, an optional `BatchNorm1d`, L2 normalisation, then an optional rotation; the logits are
    `scale · cos(h, w_k)`.

    The frame is a buffer: it is in the state dict, so a checkpoint always brings its own frame, but no optimizer sees it.

    BatchNorm is on by default: features pooled after a ReLU are non-negative and cannot reach the negative cosines of a simplex.
    Normalisation and the product with the class vectors stay in float32 under autocast and in a network of half precision, whose frame
    stays in float32 too: bfloat16 rounds a cosine of 0.9985 to 1, where dot regression has no gradient. In a network of float64 they are in
    float64.

    Args:
        in_features: The width d of the backbone's pooled features.
        num_classes: The number of classes K.
        projection_dim: The width d' of a projection before the frame, or None for no projection. It is linear up to `in_features`, and
            above that Linear-BatchNorm-ReLU-Linear (a linear map keeps the rank d, so it could not make room for more classes).
        linear_projection: Whether a wider projection is linear too; it needs K <= d + 1.
        code: "simplex", which needs K <= d' + 1; "orthant", `etflight.geometry.orthant_code`, which needs K <= d'; or "sphere",
            `etflight.class_code`, which for K > 2d' takes seconds to minutes to compute; a checkpoint already holds it.
        batch_norm: Whether to apply an affine `BatchNorm1d` to the embedding.
        normalize: Whether to scale the embedding to norm 1.
        scale: The factor of the cosine, > 0; 1 for dot regression, larger for cross-entropy, whose softmax of unit cosines can never be
            confident.
        learn_scale: Whether the scale is a parameter.
        learn_rotation: Whether a learnable `Rotation`, at first the identity, comes last in the embedding. Because of
            `<w_k, R h> = <Rᵀ w_k, h>`, this turns the frame as a rigid body without moving a class vector: see `Rotation`.
        seed: The seed of the frame's rotation, from which `learn_rotation` starts.
        reserved_classes: The number R of further class vectors, which wait for classes to come: the frame has K + R vectors, and the
            logits are those of the first K; see `extended`.

    Attributes:
        weight: The class vectors `[K, d']`, a buffer.
        reserved: The vectors `[R, d']` of classes to come, a buffer; None without any.

    Raises:
        UserError: No such code exists for K + R and d', or an argument is out of range.

    Source:
        Yang et al. 2022, arXiv 2203.09081, section 3; for reserved classes Yang et al., "Neural Collapse Inspired Feature-Classifier
        Alignment for Few-Shot Class-Incremental Learning", ICLR 2023, arXiv 2302.03004.
    """

    reserved: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        projection_dim: int | None = None,
        linear_projection: bool = False,
        code: Code = "simplex",
        batch_norm: bool = True,
        normalize: bool = True,
        scale: float = 1.0,
        learn_scale: bool = False,
        learn_rotation: bool = False,
        seed: int = 0,
        reserved_classes: int = 0,
    ) -> None:
        super().__init__(in_features, num_classes)
        _check_scale("ETFHead: scale", scale)
        if reserved_classes < 0:
            raise UserError(f"ETFHead: reserved_classes is {reserved_classes}: give 0 or more classes to come")
        if code not in get_args(Code):
            raise UserError(f"ETFHead: code must be one of {', '.join(get_args(Code))}, got {code!r}")
        if projection_dim is not None and not 1 <= projection_dim <= _WIDEST:
            raise UserError(
                f"ETFHead: projection_dim is {projection_dim}: give a width from 1 to {_WIDEST}, or leave it out for no projection"
            )
        vectors = num_classes + reserved_classes
        if linear_projection and projection_dim is None:
            raise UserError(
                "ETFHead: linear_projection without projection_dim is no projection: give its width, or leave it out"
            )
        width = in_features if projection_dim is None else projection_dim
        if normalize and width == 1:
            raise UserError("ETFHead: an embedding of one number and of norm 1 is ±1: give projection_dim 2 or more")
        if linear_projection and vectors > in_features + 1:
            raise UserError(
                f"ETFHead: a linear projection of {in_features} features has no room for the frame of {vectors} classes: "
                "leave out linear_projection"
            )
        self.normalize = normalize
        self.learn_scale = learn_scale
        self.bias = None
        with torch.device("cpu"):  # the same numbers wherever the head is made
            frame = _class_vectors(code, vectors, width, seed)
        if (device := torch.get_default_device()).type != "meta":  # losses need to know the vectors
            frame = frame.to(device)
        # copies, since a state dict would save the whole frame with each view of it
        self.register_buffer("weight", frame[:num_classes].clone() if reserved_classes else frame)
        self.register_buffer("reserved", frame[num_classes:].clone() if reserved_classes else None)
        self.projection = _projection(in_features, projection_dim, linear_projection)
        self.batch_norm = nn.BatchNorm1d(width) if batch_norm else nn.Identity()
        self.rotation = Rotation(width) if learn_rotation else nn.Identity()
        self._log_scale = nn.Parameter(torch.tensor(scale).log()) if learn_scale else None
        self._scale = float(scale)

    @property
    def scale(self) -> float | Tensor:
        """The factor of the cosine: a number, or if learned a scalar tensor (the parameter is its logarithm, so it stays positive)."""
        return self._scale if self._log_scale is None else self._log_scale.exp()

    def no_weight_decay(self) -> set[str]:
        """The learnt scale, which decay would pull to 1, and the rotation, which it would turn back to the identity."""
        return {"_log_scale", "rotation.generator"} & {name for name, _ in self.named_parameters()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or convert like any module, but keep the frame's dtype in half precision, which would be too coarse for it."""
        frame, reserved = self.weight, self.reserved
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.weight.dtype in (torch.bfloat16, torch.float16):
            self.weight = frame.to(self.weight.device)
            self.reserved = None if reserved is None else reserved.to(self.weight.device)
        return self

    @property
    def frame(self) -> Tensor:
        """The class vectors of all classes, those to come included, `[K + R, d']`."""
        return self.weight if self.reserved is None else torch.cat([self.weight, self.reserved])

    def extended(self, num_classes: int) -> Self:
        """Copy this head for more classes: the first reserved vectors become class vectors, everything else is the same.

        Args:
            num_classes: The number of classes of the copy, from K to K + R.

        Raises:
            UserError: The frame does not have as many vectors, or the head already has more classes.
        """
        frame = self.frame
        if not self.num_classes <= num_classes <= len(frame):
            raise UserError(
                f"ETFHead: {num_classes} classes asked for, but the head has {self.num_classes} and its frame {len(frame)} vectors: "
                "train with more reserved_classes, or add fewer classes"
            )
        head = deepcopy(self)
        head.num_classes = num_classes
        head.weight = frame[:num_classes].clone()
        head.reserved = frame[num_classes:].clone() if num_classes < len(frame) else None
        return head

    def embed(self, features: Tensor) -> Tensor:
        """Compute embeddings `[B, d']` in float32, or float64; they have norm 1 unless `normalize` is False."""
        embedding = at_least_float32(self.batch_norm(self.projection(features)))
        embedding = F.normalize(embedding, dim=1) if self.normalize else embedding
        return cast(Tensor, self.rotation(embedding))

    def forward(self, features: Tensor) -> Tensor:
        """Compute `scale · <w_k, h>` for every class, `[B, K]` in float32, or float64."""
        return exact_product(self.embed(features), self.weight) * self.scale

    def target_logits(self, features: Tensor, target: Tensor) -> Tensor:
        """Compute the logit of each sample's own class only: O(B·d) time and memory, forward and backward, whatever K.

        `Classifier` trains dot regression with it, so a subclass that computes other logits overrides both methods. (If it overrides only
        `forward`, `Classifier` uses that.)

        Args:
            features: The features `[B, d]`, any float dtype.
            target: The class indices `[B]`, int64.

        Returns:
            `[B]`, float32 or float64, equal to `forward(features)[arange(B), target]`.
        """
        own = self.weight.index_select(0, target)
        return (self.embed(features) * own).sum(dim=1) * self.scale

    def extra_repr(self) -> str:
        """Return the sizes, for `print(head)`."""
        return f"num_classes={self.num_classes}, dim={self.weight.shape[1]}, normalize={self.normalize}"


class Rotation(nn.Module):
    """A learnable rotation, `R h` with `R = (I - S)⁻¹ (I + S)` and `S = (A - Aᵀ)/2`: orthogonal up to rounding, whatever A becomes.

    Lengths and angles are preserved, so a frame that is seen through it keeps its Gram matrix. At first it is the identity.

    Args:
        dim: The dimension d.

    Attributes:
        generator: The matrix A `[d, d]`, of which only the skew-symmetric part counts.

    Source:
        Cayley's transform reaches every rotation except those with an eigenvalue -1. It takes one d x d solve per batch; a matrix
        exponential is many times slower.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.generator = nn.Parameter(torch.zeros(dim, dim))

    def matrix(self) -> Tensor:
        """Compute R `[d, d]`, float32 or float64, with determinant 1."""
        A = at_least_float32(self.generator)
        S = (A - A.T) / 2
        one = torch.eye(len(A), dtype=A.dtype, device=A.device)
        # I - S is never singular; `solve` would wait for the device to know
        return cast(Tensor, torch.linalg.solve_ex(one - S, one + S)[0])

    def forward(self, embedding: Tensor) -> Tensor:
        """Rotate rows `[B, d]` in float32, even under autocast, or in float64."""
        return exact_product(at_least_float32(embedding), self.matrix())


class LinearHead(Head):
    """The learnable head of every baseline: `W h + b`.

    The two `feature_` options give it the embedding of `ETFHead`, so that an experiment can change one thing at a time.

    Args:
        in_features: The width d of the features.
        num_classes: The number of classes K.
        use_bias: Whether there is a bias.
        feature_batch_norm: Whether an affine `BatchNorm1d` comes before the product.
        feature_normalize: Whether the embedding is scaled to norm 1.
        frozen: Whether weight and bias keep their random values: a control that separates "fixed" from "fixed to a frame".
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        use_bias: bool = True,
        feature_batch_norm: bool = False,
        feature_normalize: bool = False,
        frozen: bool = False,
    ) -> None:
        super().__init__(in_features, num_classes)
        self.feature_normalize = feature_normalize
        self.batch_norm = nn.BatchNorm1d(in_features) if feature_batch_norm else nn.Identity()
        # nn.Linear gives torch's own initialisation
        linear = nn.Linear(in_features, num_classes, bias=use_bias).requires_grad_(not frozen)
        self.weight = linear.weight
        self.bias = linear.bias

    def embed(self, features: Tensor) -> Tensor:
        """Return the features `[B, d]` themselves, unless an option changes them."""
        embedding: Tensor = self.batch_norm(features)
        return F.normalize(at_least_float32(embedding), dim=1) if self.feature_normalize else embedding

    def forward(self, features: Tensor) -> Tensor:
        """Compute the logits `[B, K]`."""
        embedding = self.embed(features)
        dtype = torch.promote_types(embedding.dtype, self.weight.dtype)  # they differ in a network of half precision
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(embedding.to(dtype), self.weight.to(dtype), bias)


class ScaledLinearHead(Head):
    """A linear head with a learnable scale for each class, `s_k (w_k h + b_k)`: learnable weight scaling (LWS).

    It is for a second stage, in which `linear` comes from a trained `LinearHead` and does not change; see `etflight.callbacks.FineTuning`.

    Args:
        in_features: The width d of the features.
        num_classes: The number of classes K.

    Attributes:
        linear: The `nn.Linear` that is scaled.
        class_scale: The scale of each class, `[K]`, 1 at first.

    Source:
        Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020, arXiv 1910.09217, section 4;
        the bias is scaled too, as in its released code.
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__(in_features, num_classes)
        self.linear = nn.Linear(in_features, num_classes)
        self.class_scale = nn.Parameter(torch.ones(num_classes))

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The scaled class vectors `[K, d]`."""
        return self.class_scale[:, None] * self.linear.weight

    @property
    def bias(self) -> Tensor:  # type: ignore[override]
        """The scaled biases `[K]`."""
        return self.class_scale * self.linear.bias

    def embed(self, features: Tensor) -> Tensor:
        """Return the features `[B, d]` themselves."""
        return features

    def forward(self, features: Tensor) -> Tensor:
        """Compute the logits `[B, K]`."""
        return self.class_scale * cast(Tensor, self.linear(features))


class CosineHead(Head):
    """A learnable head on the sphere: `cosine_scale · cos(h, w_k)`, no bias.

    Args:
        in_features: The width d of the features.
        num_classes: The number of classes K.
        cosine_scale: The factor of the cosine, > 0.
        feature_batch_norm: Whether an affine `BatchNorm1d` comes before the normalisation, as in `ETFHead`.

    Raises:
        UserError: The scale is not positive.

    Source:
        Gidaris & Komodakis, "Dynamic Few-Shot Visual Learning without Forgetting", CVPR 2018, arXiv 1804.09458, section 3.
    """

    def __init__(
        self, in_features: int, num_classes: int, *, cosine_scale: float = 16.0, feature_batch_norm: bool = False
    ) -> None:
        super().__init__(in_features, num_classes)
        _check_scale("CosineHead: cosine_scale", cosine_scale)
        self.cosine_scale = cosine_scale
        self.feature_normalize = True  # the export switches it off to find the part that is linear
        self.batch_norm = nn.BatchNorm1d(in_features) if feature_batch_norm else nn.Identity()
        self.weight = nn.Linear(in_features, num_classes, bias=False).weight
        self.bias = None

    @property
    def class_vectors(self) -> Tensor:
        """The unit vectors `[K, d]`; the norms of `weight` decide nothing."""
        return F.normalize(at_least_float32(self.weight), dim=1)

    def embed(self, features: Tensor) -> Tensor:
        """Compute unit embeddings `[B, d]` in float32, or float64."""
        embedding = at_least_float32(self.batch_norm(features))
        return F.normalize(embedding, dim=1) if self.feature_normalize else embedding

    def forward(self, features: Tensor) -> Tensor:
        """Compute the logits `[B, K]` in float32, or float64."""
        return exact_product(self.embed(features), self.class_vectors) * self.cosine_scale


def _class_vectors(code: Code, num_classes: int, width: int, seed: int) -> Tensor:
    if code == "simplex":
        return simplex_etf(num_classes, width, seed=seed)
    if code == "orthant":
        return orthant_code(num_classes, width, seed=seed)
    if _codes_follow.get():
        return torch.full((num_classes, width), math.nan)
    return class_code(num_classes, width, seed=seed)


def _check_scale(what: str, scale: float) -> None:
    if not 0 < scale < math.inf:
        raise UserError(f"{what} must be positive and finite, got {scale}")


def _projection(in_features: int, projection_dim: int | None, linear: bool) -> nn.Module:
    if projection_dim is None:
        return nn.Identity()
    if linear or projection_dim <= in_features:
        return nn.Linear(in_features, projection_dim, bias=False)
    return nn.Sequential(
        nn.Linear(in_features, projection_dim, bias=False),
        nn.BatchNorm1d(projection_dim),
        nn.ReLU(),
        nn.Linear(projection_dim, projection_dim, bias=False),
    )
