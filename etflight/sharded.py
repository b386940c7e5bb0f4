"""Fixed class vectors that are shared out over processes, for more classes than one device has room for."""

import math
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from etflight.utils.errors import UserError
from etflight.utils.precision import at_least_float32, exact_product, no_autocast
from etflight.utils.ranks import max_over_ranks, sum_over_ranks, world


class ShardedClassVectors(nn.Module):
    """Fixed class vectors `[K, d]` of which each of W processes keeps K/W rows.

    Each process calls the methods with its own batch, all of them equally often, since every call is collective. What they exchange is
    embeddings, `O(W·B·d)` numbers a step whatever K; a learnable head exchanges its gradient, `K·d`. Memory is `K·d/W` for the vectors and
    `W·B·K/W` for the logits of `cross_entropy`; `target_logits` makes no logits of other classes.

    Products are in float32 under autocast too, or in float64.

    Args:
        vectors: All class vectors `[K, d]`, such as `etflight.class_code(K, d)`, the same on each process; the module copies its rows.
        scale: The factor of the products, > 0.

    Attributes:
        shard: This process's rows `[k, d]`, which follow the module to a device or dtype. They are no buffer: DDP would give all processes
            those of the first one, and they are not saved, since `vectors` bring them again, on any number of processes.
        start: The class of its first row.
        num_classes: The number of classes K.

    Raises:
        UserError: There are fewer vectors than processes, or the scale is not positive.

    Source:
        The sharing of classes is that of An et al., "Partial FC: Training 10 Million Identities on a Single Machine", ICCV Workshops 2021,
        arXiv 2010.05222, with all classes in each step and without gradients of the vectors.
    """

    def __init__(self, vectors: Tensor, *, scale: float = 1.0) -> None:
        super().__init__()
        if not 0 < scale < math.inf:
            raise UserError(f"ShardedClassVectors: scale must be positive and finite, got {scale}")
        size, rank = world()
        if len(vectors) < size:
            raise UserError(f"{len(vectors)} class vectors cannot be shared by {size} processes: use fewer processes")
        self.num_classes = len(vectors)
        self.scale = scale
        self.start = len(vectors) * rank // size
        end = len(vectors) * (rank + 1) // size
        self.shard = vectors[self.start : end].detach().clone()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.shard = fn(self.shard)
        return self

    def cross_entropy(self, embedding: Tensor, target: Tensor) -> Tensor:
        """Compute the softmax cross-entropy over all K classes.

        Args:
            embedding: This process's embeddings `[B, d]`; processes may differ in B.
            target: Its class indices `[B]`, int64.

        Returns:
            The losses `[B]`, differentiable with respect to the embedding. As with any loss, DDP averages the gradients over processes.

        Raises:
            UserError: On every process, if a target of any is not a class.
        """
        return _CrossEntropy.apply(at_least_float32(embedding), target, self)  # type: ignore[no-any-return]

    def target_logits(self, embedding: Tensor, target: Tensor) -> Tensor:
        """Compute the logit of each sample's own class, `[B]`, for `DotRegressionLoss.from_target_logits`.

        Args:
            embedding: This process's embeddings `[B, d]`.
            target: Its class indices `[B]`, int64.

        Raises:
            UserError: On every process, if a target of any is not a class.
        """
        embedding = at_least_float32(embedding)
        sizes = _sizes(len(target), target.device)
        targets = self._all_targets(target, sizes)
        own, rows = self._rows_of_targets(targets)
        vectors = embedding.new_zeros(len(targets), self.shard.shape[1])
        vectors[own] = self.shard[rows].to(vectors.dtype)
        return (embedding * sum_over_ranks(vectors)[_own_slice(sizes)]).sum(1) * self.scale

    @torch.no_grad()
    def decide(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Find the class of the largest logit; of equal ones the first.

        Args:
            embedding: This process's embeddings `[B, d]`.

        Returns:
            The class indices `[B]`, int64, and their logits `[B]`.
        """
        embedding = at_least_float32(embedding)
        sizes = _sizes(len(embedding), embedding.device)
        value, index = self._logits(_gathered(embedding, sizes)).max(dim=1)
        largest = max_over_ranks(value)
        index = torch.where((value == largest) | value.isnan(), index + self.start, self.num_classes)
        return -max_over_ranks(-index)[_own_slice(sizes)], largest[_own_slice(sizes)]

    def extra_repr(self) -> str:
        """Return the sizes, for `print`."""
        return f"num_classes={self.num_classes}, here {self.start} to {self.start + len(self.shard) - 1}, dim={self.shard.shape[1]}"

    def _logits(self, embedding: Tensor) -> Tensor:
        """The logits of this process's classes, `[N, k]`."""
        return self.scale * exact_product(embedding, self.shard)

    def _all_targets(self, own: Tensor, sizes: list[int]) -> Tensor:
        """The targets of all processes."""
        targets = _gathered(own, sizes)
        outside = targets[(targets < 0) | (targets >= self.num_classes)]
        if len(outside):
            raise UserError(f"target {int(outside[0])} is not a class: give 0 to {self.num_classes - 1}")
        return targets

    def _rows_of_targets(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Which samples belong to classes of this process, and the rows of those classes."""
        own = torch.nonzero((targets >= self.start) & (targets < self.start + len(self.shard))).flatten()
        return own, targets[own] - self.start


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, embedding: Tensor, target: Tensor, vectors: ShardedClassVectors) -> Tensor:
        sizes = _sizes(len(target), target.device)
        targets = vectors._all_targets(target, sizes)
        logits = vectors._logits(_gathered(embedding, sizes))
        logits -= max_over_ranks(logits.amax(dim=1))[:, None]
        own, rows = vectors._rows_of_targets(targets)
        sums = logits.new_zeros(2, len(targets))  # of the exponentials, and of the targets' logits
        sums[1, own] = logits[own, rows]
        probabilities = logits.exp_()
        sums[0] = probabilities.sum(dim=1)
        sums = sum_over_ranks(sums)
        probabilities /= sums[0][:, None]
        probabilities[own, rows] -= 1  # by now the gradient of the losses with respect to the logits
        ctx.vectors, ctx.sizes = vectors, sizes
        ctx.save_for_backward(probabilities)
        return (sums[0].log() - sums[1])[_own_slice(sizes)]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():  # asked for by create_graph
            raise UserError(
                "cross-entropy over sharded class vectors has no second derivatives: leave out create_graph"
            )
        (gradient,) = ctx.saved_tensors
        vectors, sizes = ctx.vectors, ctx.sizes
        weights = vectors.scale * _gathered(grad.contiguous(), sizes)
        with no_autocast(gradient.device):
            own = (gradient * weights[:, None]) @ vectors.shard.to(gradient.dtype)
        return sum_over_ranks(own)[_own_slice(sizes)], None, None


# Collectives, which do nothing on a single process ---------------------------------------------------------------


def _sizes(own: int, device: torch.device) -> list[int]:
    """The batch size of each process."""
    size, rank = world()
    if size == 1:
        return [own]
    sizes = torch.zeros(size, dtype=torch.int64, device=device)
    sizes[rank] = own
    return sum_over_ranks(sizes).tolist()


def _own_slice(sizes: list[int]) -> slice:
    """The place of this process's samples among all."""
    _, rank = world()
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def _gathered(own: Tensor, sizes: list[int]) -> Tensor:
    """The rows of all processes, without gradient."""
    if len(sizes) == 1:
        return own.detach()
    padded = own.new_zeros(max(sizes), *own.shape[1:])
    padded[: len(own)] = own.detach()
    ranks = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(ranks, padded)
    return torch.cat([rows[:size] for rows, size in zip(ranks, sizes, strict=True)])
