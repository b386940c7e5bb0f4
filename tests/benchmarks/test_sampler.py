"""What drawing an epoch's images costs at the size of ImageNet and of iNaturalist 2018, against torch's own weighted draw.

`torch.utils.data.WeightedRandomSampler` makes one `torch.multinomial` call over the images, of float64 weights, with replacement;
it takes at most 2**24 of them. Ours draws classes and walks through their images, so that none comes again before all others did.
"""

import numpy as np
import pytest
import torch

from etflight.data import ImbalancedSampler, class_counts
from etflight.data.sampler import POLICIES

pytestmark = pytest.mark.benchmark

EPOCHS = 10


def labels_of(num_images, num_classes, imbalance_ratio):
    """Shuffled labels with a long tail, `num_images` in all."""
    counts = class_counts(num_classes, 1000, imbalance_ratio)
    counts = np.maximum(1, counts * num_images // counts.sum())
    counts[0] += num_images - counts.sum()
    return np.random.default_rng(0).permutation(np.repeat(np.arange(num_classes), counts))


@pytest.mark.parametrize(
    ("num_images", "num_classes", "imbalance_ratio"), [(1_281_167, 1_000, 256), (437_513, 8_142, 500)]
)
def test_an_epochs_draw_costs_at_most_five_times_one_multinomial(
    num_images, num_classes, imbalance_ratio, median_ratio, record_ratio
):
    labels = labels_of(num_images, num_classes, imbalance_ratio)
    counts = np.bincount(labels, minlength=num_classes)
    weights = torch.from_numpy(1 / counts[labels])
    ratios = {}
    for policy in (*POLICIES, 0.3):
        sampler = ImbalancedSampler(labels, policy, num_epochs=EPOCHS)
        sampler.set_epoch(EPOCHS // 2)
        assert len(list(sampler)) == len(labels) == num_images
        ratios[policy] = median_ratio(
            lambda sampler=sampler: list(sampler),
            lambda: torch.multinomial(weights, num_images, replacement=True),
            repeats=5,
        )
    slowest = max(ratios, key=ratios.get)
    record_ratio(
        f"epoch of {num_images:,} images, {num_classes:,} classes, slowest sampler ({slowest}) / torch.multinomial",
        ratios[slowest],
        5,
    )
