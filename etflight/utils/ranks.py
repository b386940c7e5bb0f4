"""Sums, maxima and objects of all processes; without a process group they are the process's own."""

from typing import Any, TypeVar, cast

import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

_Kind = TypeVar("_Kind")


def in_process_group() -> bool:
    """Whether there is a process group, be it of one process."""
    return dist.is_available() and dist.is_initialized()


def world() -> tuple[int, int]:
    """World size and rank, `(1, 0)` without a process group."""
    return (dist.get_world_size(), dist.get_rank()) if in_process_group() else (1, 0)


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum tensors of one shape over all processes; the gradient is summed as well, so every process must call its backward."""
    return cast(Tensor, _Sum.apply(values)) if in_process_group() else values


def max_over_ranks(values: Tensor) -> Tensor:
    """Compute the largest entries over all processes of tensors of one shape, without a gradient."""
    values = values.detach()
    if in_process_group():
        values = values.clone()
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def gather_objects(own: _Kind) -> list[_Kind]:
    """Gather an object of each process, in the order of ranks; a collective call."""
    ranks = [own] * world()[0]
    if len(ranks) > 1:
        dist.all_gather_object(ranks, own)
    return ranks


class _Sum(Function):
    """That of `torch.distributed.nn.functional` is deprecated, and what replaces it has no gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)
