"""Class vectors shared out over processes give what a whole matrix gives."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from etflight import class_code, simplex_etf
from etflight.losses import DotRegressionLoss
from etflight.sharded import ShardedClassVectors
from etflight.utils.errors import UserError

K, D, SCALE = 23, 8, 12.0
SIZES = (5, 3)  # the batches of two processes


def samples(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    embedding = F.normalize(torch.randn(sum(SIZES), D, generator=generator, dtype=dtype), dim=1)
    return embedding, torch.randint(0, K, (sum(SIZES),), generator=generator)


def vectors(dtype=torch.float64):
    return class_code(K, D, dtype=dtype)


def whole(embedding, target):
    """Losses, logits of the targets, decisions and the gradient of a weighted sum of the losses, from the whole matrix."""
    embedding = embedding.clone().requires_grad_()
    logits = SCALE * embedding @ vectors(embedding.dtype).T
    losses = F.cross_entropy(logits, target, reduction="none")
    (losses * weights(len(target), losses)).sum().backward()
    return losses.detach(), logits[torch.arange(len(target)), target].detach(), logits.argmax(1), embedding.grad


def weights(size, like):
    return torch.linspace(0.5, 2.0, size).to(like)


def sharded(embedding, target, weight):
    embedding = embedding.clone().requires_grad_()
    code = ShardedClassVectors(vectors(embedding.dtype), scale=SCALE)
    losses = code.cross_entropy(embedding, target)
    (losses * weight).sum().backward()
    return losses.detach(), code.target_logits(embedding, target).detach(), code.decide(embedding)[0], embedding.grad


def _on_rank(rank, embedding, target, weight):
    return *sharded(embedding, target, weight), tuple(ShardedClassVectors(vectors(), scale=SCALE).shard.shape)


def test_one_process_has_all_rows():
    embedding, target = samples()
    for found, expected in zip(
        sharded(embedding, target, weights(8, embedding)), whole(embedding, target), strict=True
    ):
        assert_close(found, expected)


def test_two_processes_with_batches_of_other_sizes_have_the_losses_decisions_and_gradients_of_the_whole(two_processes):
    embedding, target = samples()
    parts = [part.split(SIZES) for part in (embedding, target, weights(8, embedding))]
    found = two_processes(_on_rank, [tuple(part[rank] for part in parts) for rank in range(2)])
    assert [result[-1] for result in found] == [(11, D), (12, D)]
    for values, expected in zip(zip(*found, strict=True), whole(embedding, target), strict=False):
        assert_close(torch.cat(values), expected)


class Network(nn.Module):
    """A layer before class vectors that are shared out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(D, D, dtype=torch.float64)
        self.code = ShardedClassVectors(vectors(), scale=SCALE)

    def forward(self, embedding, target):
        return self.code.cross_entropy(self.layer(embedding), target)


def _inside_ddp(rank, embedding, target):
    network = DistributedDataParallel(Network())
    for _ in range(2):  # DDP broadcasts buffers when it is made and in each forward
        losses = network(embedding, target)
    return losses.detach()


def test_ddp_leaves_each_process_its_own_rows(two_processes):
    embedding, target = samples()
    parts = [part.split(SIZES) for part in (embedding, target)]
    found = two_processes(_inside_ddp, [tuple(part[rank] for part in parts) for rank in range(2)])
    logits = SCALE * Network().layer(embedding) @ vectors().T
    assert_close(torch.cat(found), F.cross_entropy(logits, target, reduction="none").detach())


def test_an_embedding_that_is_not_a_number_is_decided_for_a_class():
    classes, logits = ShardedClassVectors(vectors()).decide(torch.full((1, D), torch.nan, dtype=torch.float64))
    assert 0 <= classes < K
    assert logits.isnan()


def test_the_rows_follow_the_module():
    code = nn.Sequential(ShardedClassVectors(vectors())).to("meta", torch.float32)[0]
    assert (code.shard.device.type, code.shard.dtype) == ("meta", torch.float32)


@pytest.mark.parametrize("outside", [-100, -1, K])
def test_a_target_that_is_no_class_is_refused(outside):
    embedding, target = samples()
    target[3] = outside
    code = ShardedClassVectors(vectors())
    for method in (code.cross_entropy, code.target_logits):
        with pytest.raises(UserError, match=f"target {outside} is not a class"):
            method(embedding, target)


def test_dot_regression_takes_the_targets_logits_with_their_gradient():
    embedding, target = samples()
    embedding.requires_grad_()
    loss = DotRegressionLoss()
    loss.from_target_logits(ShardedClassVectors(vectors()).target_logits(embedding, target), target, K).backward()
    found, embedding.grad = embedding.grad, None
    loss(embedding @ vectors().T, target).backward()
    assert_close(found, embedding.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_products_are_in_float32_under_autocast_too(dtype):
    embedding, target = samples(torch.float32)
    code = ShardedClassVectors(vectors(torch.float32), scale=SCALE)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        losses = code.cross_entropy(embedding.requires_grad_(), target)
        losses.sum().backward()
    expected, *_ = whole(embedding.detach().double(), target)
    assert_close(losses.detach().double(), expected, rtol=1e-5, atol=1e-5)


def test_second_derivatives_are_refused_and_not_dropped():
    embedding, target = samples()
    losses = ShardedClassVectors(vectors(), scale=SCALE).cross_entropy(embedding.requires_grad_(), target)
    with pytest.raises(UserError, match="create_graph"):
        torch.autograd.grad(losses.sum(), embedding, create_graph=True)


def test_nothing_is_trained_or_saved():
    code = ShardedClassVectors(simplex_etf(10, 16))
    assert not list(code.parameters())
    assert not code.state_dict()


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(UserError, match="scale"):
        ShardedClassVectors(vectors(), scale=0.0)
    monkeypatch.setattr("etflight.sharded.world", lambda: (4, 0))
    with pytest.raises(UserError, match=r"3 class vectors .* 4 processes"):
        ShardedClassVectors(simplex_etf(3, 4))
