"""What stands between pooled features and class vectors: projection, batch or L2 normalisation, rotation, a computed map."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from etflight.utils.errors import UserError
from etflight.utils.precision import at_least_float32, exact_product

_WIDEST = 2**17  # the largest width of a projection; a frame and a layer of this width still fit some machine's memory


class Embedder(nn.Module):
    """The usual embedder: an optional projection, an optional `BatchNorm1d`, an optional L2 normalisation, then an optional rotation.

    Normalisation is in float32 under autocast and in a network of half precision, or in float64.

    Args:
        in_features: The width d of the features.
        projection_dim: The width d' of a projection, or None for no projection. It is linear up to `in_features`, and above that
            Linear-BatchNorm-ReLU-Linear (a linear map keeps the rank d, so it could not make room for more classes).
        linear_projection: Whether a wider projection is linear too.
        batch_norm: Whether to apply an affine `BatchNorm1d`.
        normalize: Whether to scale embeddings to norm 1.
        learn_rotation: Whether a learnable `Rotation`, at first the identity, comes last.

    Attributes:
        width: The width d' of the embeddings.

    Raises:
        UserError: `projection_dim` is out of range, `linear_projection` has no projection, or an embedding would be one number of norm 1.
    """

    def __init__(
        self,
        in_features: int,
        *,
        projection_dim: int | None = None,
        linear_projection: bool = False,
        batch_norm: bool = False,
        normalize: bool = False,
        learn_rotation: bool = False,
    ) -> None:
        super().__init__()
        if projection_dim is not None and not 1 <= projection_dim <= _WIDEST:
            raise UserError(
                f"projection_dim is {projection_dim}: give a width from 1 to {_WIDEST}, or leave it out for no projection"
            )
        if linear_projection and projection_dim is None:
            raise UserError(
                "linear_projection without projection_dim is no projection: give its width, or leave it out"
            )
        self.width = in_features if projection_dim is None else projection_dim
        if normalize and self.width == 1:
            raise UserError("an embedding of one number and of norm 1 is ±1: give projection_dim 2 or more")
        self.normalize = normalize
        self.projection = _projection(in_features, projection_dim, linear_projection)
        self.batch_norm = nn.BatchNorm1d(self.width) if batch_norm else nn.Identity()
        self.rotation = Rotation(self.width) if learn_rotation else nn.Identity()

    def forward(self, features: Tensor) -> Tensor:
        """Compute embeddings `[B, d']` of features `[B, d]`, in float32, or float64."""
        embedding = at_least_float32(self.batch_norm(self.projection(features)))
        embedding = F.normalize(embedding, dim=1) if self.normalize else embedding
        rotated: Tensor = self.rotation(embedding)
        return rotated


class FeatureMap(nn.Module):
    """A fixed embedder that was computed, not trained: optionally unit features, minus a shift, times a matrix, optionally unit embeddings.

    Whitening of features is one. In a new map the shift is 0 and the matrix the identity.

    Args:
        in_features: The width d of the features.
        has_matrix: Whether there is a matrix.
        unit_features: Whether features are scaled to norm 1 first.
        normalize: Whether embeddings are scaled to norm 1.

    Attributes:
        shift: What is subtracted, a buffer `[d]`.
        matrix: The matrix M `[d, d]` of `M (h - shift)`, a buffer, or None.
        unit_features: Whether features are scaled to norm 1 first.
        normalize: Whether embeddings have norm 1.
    """

    shift: Tensor
    matrix: Tensor | None

    def __init__(self, in_features: int, *, has_matrix: bool, unit_features: bool, normalize: bool) -> None:
        super().__init__()
        self.unit_features, self.normalize = unit_features, normalize
        self.register_buffer("shift", torch.zeros(in_features))
        self.register_buffer("matrix", torch.eye(in_features) if has_matrix else None)

    def forward(self, features: Tensor) -> Tensor:
        """Compute embeddings `[B, d]` of features `[B, d]`, in float32 even under autocast, or in float64."""
        rows = at_least_float32(features)
        return self.mapped(F.normalize(rows, dim=1) if self.unit_features else rows)

    def mapped(self, rows: Tensor) -> Tensor:
        """Compute what comes after `unit_features`, as of means of unit features: rows `[B, d]`, float32 or float64, to `[B, d]`."""
        rows = rows - at_least_float32(self.shift)
        if self.matrix is not None:
            rows = exact_product(rows, at_least_float32(self.matrix))
        return F.normalize(rows, dim=1) if self.normalize else rows


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
