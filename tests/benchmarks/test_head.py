"""What head and loss cost a training step at K = 100,000, d = 512, batch 256, against a learnable layer.

`nn.Linear` with cross-entropy multiplies features and class vectors once in the forward and twice in the backward, makes a gradient as
large as its weight, and moves momentum and weight by it: about 6·B·K·d operations, and 3·K·d numbers beside the B·K logits and
their gradient. The fixed head reads B of its K rows and writes none: O(B·d), whatever K. Its memory is the frame, K·d numbers.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from etflight import DotRegressionLoss, ETFHead

pytestmark = [pytest.mark.benchmark, pytest.mark.timeout(600)]

K, D, B = 100_000, 512, 256


def fixed_step():
    """One step of the head's BatchNorm and of the features, by `Classifier`'s way through head and loss."""
    head, loss = ETFHead(D, K, code="sphere"), DotRegressionLoss()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)

    def step(features, target):
        optimizer.zero_grad()
        loss.from_target_logits(head.target_logits(head.embed(features), target), target).backward()
        optimizer.step()

    return step


def learnable_step():
    layer = nn.Linear(D, K)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)

    def step(features, target):
        optimizer.zero_grad()
        nn.functional.cross_entropy(layer(features), target).backward()
        optimizer.step()

    return step


def batch():
    return torch.randn(B, D, requires_grad=True), torch.randint(K, (B,))


def high_water_mark():
    """Bytes; not getrusage's, which a new process takes over from its parent."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))


def peak_bytes_of(make):
    """How much the largest resident size of this process grows by building a head and taking three steps."""
    features, target = batch()
    small = nn.Linear(8, 8)  # so that the backward's own threads and the optimizer's imports are there before
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1, momentum=0.9)
    small(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    before = high_water_mark()
    step = make()
    for _ in range(3):
        step(features, target)
    return high_water_mark() - before


def peak_of_new_process(name):
    result = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=True)
    return int(result.stdout)


def test_head_and_loss_are_a_hundred_times_faster_than_a_learnable_layer(median_ratio, record_ratio):
    fixed, learnable = fixed_step(), learnable_step()
    inputs = batch()
    ratio = median_ratio(lambda: fixed(*inputs), lambda: learnable(*inputs), repeats=7, warm_up=2)
    record_ratio("step of ETF head + dot regression / Linear + cross-entropy, K = 100,000", ratio, 0.01)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's own account of memory")
def test_head_and_loss_need_a_third_of_the_memory(record_ratio):
    fixed, learnable = (peak_of_new_process(name) for name in ("fixed_step", "learnable_step"))
    assert fixed > 0.9 * 4 * K * D  # the frame was made
    record_ratio("peak memory of the same", fixed / learnable, 1 / 3)


if __name__ == "__main__":
    print(peak_bytes_of(globals()[sys.argv[1]]))
