"""What two processes exchange, need and take for a step at K = 100,000: fixed class vectors against a learnable layer.

d = 512, 64 samples on each process. What is trained is a projection of 64 features, as ResNet-20's, to d dimensions. DDP averages the
gradients of all parameters: with a learnable layer its gradient of K·d numbers, 205 MB, with a fixed frame only the projection's. Sharded
vectors exchange embeddings, about 2·W·B·d numbers, and halve the memory of the vectors; each process then multiplies the samples of both
with half of the classes.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from etflight import DotRegressionLoss, class_code
from etflight.sharded import ShardedClassVectors
from tests.benchmarks.test_head import high_water_mark
from tests.distributed import ProcessPool

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(600)]

K, D, B, FEATURES = 100_000, 512, 64, 64
STEPS = 5


class Projection(nn.Module):
    """Unit embeddings `[B, d]`, and the learnable layer beside them, if there is one."""

    def __init__(self, *, learnable: bool) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(FEATURES, D), nn.BatchNorm1d(D), nn.ReLU(), nn.Linear(D, D))
        self.classifier = nn.Linear(D, K, bias=False) if learnable else None

    def forward(self, features: Tensor) -> Tensor:
        embedding = F.normalize(self.layers(features), dim=1)
        return embedding if self.classifier is None else 16 * self.classifier(embedding)


def losses_of(kind: str) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """What is trained, and the loss of its output."""
    if kind == "learnable":
        return Projection(learnable=True), F.cross_entropy
    model, code = Projection(learnable=False), class_code(K, D)
    if kind == "fixed":
        return model, lambda embedding, target: F.cross_entropy(16 * embedding @ code.T, target)
    if kind == "dot regression":
        loss = DotRegressionLoss()
        return model, lambda embedding, target: loss.from_target_logits((embedding * code[target]).sum(1), target, K)
    sharded = ShardedClassVectors(code, scale=16.0)
    return model, lambda embedding, target: sharded.cross_entropy(embedding, target).mean()


def steps(rank: int, kind: str) -> tuple[float, float, float]:
    """Median seconds of a step, bytes of this process's collectives in a step, and how much its largest resident size grew."""
    torch.manual_seed(rank)
    torch.set_num_threads(1)
    before = high_water_mark()
    model, loss = losses_of(kind)
    trained: Any = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sent = 0

    def counted(collective: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal sent
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            sent += sum(tensor.nbytes for tensor in tensors)
            return collective(*args, **kwargs)

        return call

    trained.register_comm_hook(None, allreduce_hook)  # which calls the `all_reduce` that is counted
    seconds = []
    collectives = {name: counted(getattr(dist, name)) for name in ("all_reduce", "all_gather")}
    with patch.multiple(dist, **collectives):
        for _ in range(STEPS):
            features, target = torch.randn(B, FEATURES), torch.randint(K, (B,))
            sent, start = 0, time.perf_counter()
            optimizer.zero_grad()
            loss(trained(features), target).backward()
            optimizer.step()
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]), sent, high_water_mark() - before


def on_two_processes(kind: str) -> tuple[float, float, float]:
    """The larger of the two processes' numbers, of processes of their own."""
    pool = ProcessPool(2, timeout=500)
    try:
        return tuple(map(max, zip(*pool(steps, [(kind,), (kind,)]), strict=True)))  # type: ignore[return-value]
    finally:
        pool.close()


def test_fixed_class_vectors_are_not_synchronised_and_can_be_shared_out(record_ratio):
    measured = {kind: on_two_processes(kind) for kind in ("learnable", "fixed", "dot regression", "sharded")}
    for kind, (seconds, sent, memory) in measured.items():
        print(f"{kind}: {seconds:.3f} s a step, {sent / 1e6:.2f} MB exchanged, {memory / 1e6:.0f} MB of memory")
    ratios = {kind: [a / b for a, b in zip(m, measured["learnable"], strict=True)] for kind, m in measured.items()}
    what = f"K = {K:,}, two processes, / learnable layer"
    record_ratio(f"bytes of a step, fixed vectors, cross-entropy; {what}", ratios["fixed"][1], 0.01)
    record_ratio(f"bytes of a step, fixed and sharded vectors, cross-entropy; {what}", ratios["sharded"][1], 0.02)
    record_ratio(f"seconds of a step, fixed vectors, cross-entropy; {what}", ratios["fixed"][0], 0.7)
    record_ratio(f"seconds of a step, fixed and sharded vectors, cross-entropy; {what}", ratios["sharded"][0], 0.7)
    record_ratio(f"seconds of a step, fixed vectors, dot regression; {what}", ratios["dot regression"][0], 0.05)
    record_ratio(f"memory, fixed vectors, cross-entropy; {what}", ratios["fixed"][2], 0.6)
