"""Classifier heads: they map a backbone's pooled features to logits, with class vectors."""

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflight.checkpoint.weights_to_come import do_weights_come_next
from etflight.embedder import Embedder, FeatureMap
from etflight.geometry import class_code, orthant_code, simplex_etf
from etflight.utils.errors import UserError
from etflight.utils.precision import at_least_float32, exact_product

Code = Literal["simplex", "orthant", "sphere"]


class Head(nn.Module):
    """The base class of heads: an `embedder`, then `logits(embedding)`. `Classifier` trains any subclass, and the callbacks measure it.

    The logits are `scale · <c_k, h> + b_k` with the embedding h, the class vectors c_k and the biases b_k, unless a subclass has `logits`
    of its own. A subclass has neither `embed` nor `forward`.

    Args:
        in_features: The width d of the features it takes.
        num_classes: The number of classes K >= 2.
        embedder: The module that makes embeddings `[B, d']` of features `[B, d]`; None leaves the features as they are.
        scale: The factor of the products, > 0.
        learn_scale: Whether the scale is a parameter.

    Attributes:
        in_features: The width d.
        num_classes: The number of classes K.
        embedder: The module that makes embeddings; what hooks on it see is what meets the class vectors.
        weight: The class vectors `[K, d']`, a parameter or a buffer.
        bias: The biases `[K]`, or None.
        learn_scale: Whether the scale is a parameter.

    Raises:
        UserError: There are fewer than two classes, the scale is not positive, or a subclass has an `embed` or a `forward`.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        embedder: nn.Module | None = None,
        scale: float = 1.0,
        learn_scale: bool = False,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if num_classes < 2:
            raise UserError(f"a classifier needs at least two classes, got num_classes={num_classes}")
        if not 0 < scale < math.inf:
            raise UserError(f"{name}: scale must be positive and finite, got {scale}")
        if type(self).embed is not Head.embed or type(self).forward is not Head.forward:
            raise UserError(
                f"{name}: a head has no embed and no forward of its own: give super().__init__ an embedder, a module that makes the "
                "embedding, and compute the logits in logits(embedding)"
            )
        self.in_features = in_features
        self.num_classes = num_classes
        self.learn_scale = learn_scale
        self._scale = float(scale)
        self._log_scale = nn.Parameter(torch.tensor(scale).log()) if learn_scale else None
        self.embedder = nn.Identity() if embedder is None else embedder

    @property
    def scale(self) -> float | Tensor:
        """The factor of the products: a number, or if learned a scalar tensor (the parameter is its logarithm, so it stays positive)."""
        return self._scale if self._log_scale is None else self._log_scale.exp()

    @property
    def normalize(self) -> bool:
        """Whether embeddings have norm 1."""
        return isinstance(self.embedder, Embedder | FeatureMap) and self.embedder.normalize

    @property
    def gives_cosines(self) -> bool:
        """Whether the logits are `scale` times the cosines of embedding and class vectors."""
        return False

    @property
    def class_vectors(self) -> Tensor:
        """The vectors `[K, d']` with which the embedding is compared: `weight`, unless the head changes it first."""
        return self.weight

    def no_weight_decay(self) -> set[str]:
        """The names of the parameters that weight decay would pull to an arbitrary value, as timm's networks name theirs.

        They are the learnt scale, which decay would pull to 1, and the learnt rotation, which it would turn back to the identity.
        """
        return {"_log_scale", "embedder.rotation.generator"} & {name for name, _ in self.named_parameters()}

    def embed(self, features: Tensor) -> Tensor:
        """Compute the embeddings `[B, d']` that are compared with the class vectors, of features `[B, d]` of any float dtype."""
        embedding: Tensor = self.embedder(features)
        return embedding

    def logits(self, embedding: Tensor) -> Tensor:
        """Compute the logits `[B, K]` of embeddings `[B, d']`, in float32, or float64."""
        logits = exact_product(at_least_float32(embedding), self.class_vectors) * self.scale
        return logits if self.bias is None else logits + self.bias

    def target_logits(self, embedding: Tensor, target: Tensor) -> Tensor:
        """Compute the logit of each sample's own class only: O(B·d') time and memory, forward and backward, whatever K.

        Dot regression trains with it. For a subclass with `logits` of its own it takes them from those.

        Args:
            embedding: The embeddings `[B, d']`, any float dtype.
            target: The class indices `[B]`, int64.

        Returns:
            `[B]`, equal to `logits(embedding)[arange(B), target]`.
        """
        if type(self).logits is not Head.logits:
            return self.logits(embedding).gather(1, target[:, None])[:, 0]
        own = self.class_vectors.index_select(0, target)
        logits = (at_least_float32(embedding) * own).sum(dim=1) * self.scale
        return logits if self.bias is None else logits + self.bias[target]

    def forward(self, features: Tensor) -> Tensor:
        """Compute the logits `[B, K]` of features `[B, d]`."""
        return self.logits(self.embedder(features))

    def extra_repr(self) -> str:
        """Return the sizes, for `print(head)`."""
        return f"num_classes={self.num_classes}, dim={self.weight.shape[1]}"


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
        super().__init__(
            in_features,
            num_classes,
            embedder=Embedder(
                in_features,
                projection_dim=projection_dim,
                linear_projection=linear_projection,
                batch_norm=batch_norm,
                normalize=normalize,
                learn_rotation=learn_rotation,
            ),
            scale=scale,
            learn_scale=learn_scale,
        )
        if reserved_classes < 0:
            raise UserError(f"ETFHead: reserved_classes is {reserved_classes}: give 0 or more classes to come")
        if code not in get_args(Code):
            raise UserError(f"ETFHead: code must be one of {', '.join(get_args(Code))}, got {code!r}")
        vectors = num_classes + reserved_classes
        if linear_projection and vectors > in_features + 1:
            raise UserError(
                f"ETFHead: a linear projection of {in_features} features has no room for the frame of {vectors} classes: "
                "leave out linear_projection"
            )
        self.bias = None
        width = in_features if projection_dim is None else projection_dim
        with torch.device("cpu"):  # the same numbers wherever the head is made
            frame = _class_vectors(code, vectors, width, seed)
        if (device := torch.get_default_device()).type != "meta":  # losses need to know the vectors
            frame = frame.to(device)
        # copies, since a state dict would save the whole frame with each view of it
        self.register_buffer("weight", frame[:num_classes].clone() if reserved_classes else frame)
        self.register_buffer("reserved", frame[num_classes:].clone() if reserved_classes else None)

    @property
    def gives_cosines(self) -> bool:
        """Whether the logits are `scale` times cosines: if embeddings are normalised, since class vectors are."""
        return self.normalize

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


class LinearHead(Head):
    """The learnable head of every baseline: `W h + b`.

    `batch_norm` and `normalize` give it the embedding of `ETFHead`, so that an experiment can change one thing at a time.

    Args:
        in_features: The width d of the features.
        num_classes: The number of classes K.
        use_bias: Whether there is a bias.
        batch_norm: Whether an affine `BatchNorm1d` comes before the product.
        normalize: Whether the embedding is scaled to norm 1.
        frozen: Whether weight and bias keep their random values: a control that separates "fixed" from "fixed to a frame".
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        use_bias: bool = True,
        batch_norm: bool = False,
        normalize: bool = False,
        frozen: bool = False,
    ) -> None:
        changes = batch_norm or normalize
        embedder = Embedder(in_features, batch_norm=batch_norm, normalize=normalize) if changes else None
        super().__init__(in_features, num_classes, embedder=embedder)
        # nn.Linear gives torch's own initialisation
        linear = nn.Linear(in_features, num_classes, bias=use_bias).requires_grad_(not frozen)
        self.weight = linear.weight
        self.bias = linear.bias

    def logits(self, embedding: Tensor) -> Tensor:
        """Compute the logits `[B, K]` as `nn.Linear` does, under autocast too."""
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

    def logits(self, embedding: Tensor) -> Tensor:
        """Compute the logits `[B, K]` as `nn.Linear` does, then scale them."""
        logits: Tensor = self.linear(embedding)
        return self.class_scale * logits


class CosineHead(Head):
    """A learnable head on the sphere: `scale · cos(h, w_k)`, no bias.

    Args:
        in_features: The width d of the features.
        num_classes: The number of classes K.
        scale: The factor of the cosine, > 0.
        batch_norm: Whether an affine `BatchNorm1d` comes before the normalisation, as in `ETFHead`.

    Raises:
        UserError: The scale is not positive.

    Source:
        Gidaris & Komodakis, "Dynamic Few-Shot Visual Learning without Forgetting", CVPR 2018, arXiv 1804.09458, section 3.
    """

    def __init__(self, in_features: int, num_classes: int, *, scale: float = 16.0, batch_norm: bool = False) -> None:
        embedder = Embedder(in_features, batch_norm=batch_norm, normalize=True)
        super().__init__(in_features, num_classes, embedder=embedder, scale=scale)
        self.weight = nn.Linear(in_features, num_classes, bias=False).weight
        self.bias = None

    @property
    def gives_cosines(self) -> bool:
        """True."""
        return True

    @property
    def class_vectors(self) -> Tensor:
        """The unit vectors `[K, d]`; the norms of `weight` decide nothing."""
        return F.normalize(at_least_float32(self.weight), dim=1)


class FittedHead(Head):
    """A head whose class vectors and embedder were computed from features, as `etflight.closed_form` does, and not trained.

    The logits are `scale · <c_k, M (h - m)> + b_k`, with features and embeddings of norm 1 where asked for. A new one has no class vectors
    yet (they are 0). Fine-tuning changes class vectors and biases unless they are `frozen`; the map of the features stays as it is.

    Args:
        in_features: The width d of the features.
        num_classes: The number of classes K.
        has_matrix: Whether features are mapped by a matrix, such as one that whitens them.
        unit_features: Whether features are scaled to norm 1 first.
        normalize: Whether embeddings are scaled to norm 1.
        use_bias: Whether there is a bias.
        scale: The factor of the products, > 0.
        frozen: Whether class vectors and biases are fixed, as those of a frame.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        has_matrix: bool = False,
        unit_features: bool = True,
        normalize: bool = True,
        use_bias: bool = False,
        scale: float = 1.0,
        frozen: bool = False,
    ) -> None:
        embedder = FeatureMap(in_features, has_matrix=has_matrix, unit_features=unit_features, normalize=normalize)
        super().__init__(in_features, num_classes, embedder=embedder, scale=scale)
        weight, bias = torch.zeros(num_classes, in_features), torch.zeros(num_classes) if use_bias else None
        if frozen:
            self.register_buffer("weight", weight)
            self.register_buffer("bias", bias)
        else:
            self.weight = nn.Parameter(weight)
            self.bias = None if bias is None else nn.Parameter(bias)


def _class_vectors(code: Code, num_classes: int, width: int, seed: int) -> Tensor:
    if code == "simplex":
        return simplex_etf(num_classes, width, seed=seed)
    if code == "orthant":
        return orthant_code(num_classes, width, seed=seed)
    if do_weights_come_next():
        return torch.full((num_classes, width), math.nan)
    return class_code(num_classes, width, seed=seed)
