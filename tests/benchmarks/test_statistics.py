"""What collecting and finalising class statistics costs, against the bare linear algebra it cannot do without."""

import itertools

import pytest
import torch

from etflight.geometry import simplex_etf
from etflight.metrics import ClassStatistics, measures

pytestmark = pytest.mark.benchmark


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1.4), (torch.float64, 3.5)])
def test_update_costs_little_more_than_the_bare_product(dtype, limit, median_ratio, record_ratio):
    z, labels = torch.randn(256, 512), torch.randint(100, (256,))
    metric = ClassStatistics(100, 512, scatter_dtype=dtype)
    ratio = median_ratio(lambda: metric.update(z, labels), lambda: z.T @ z, repeats=200, warm_up=10)
    record_ratio(f"update, {str(dtype).removeprefix('torch.')} scatter / float32 z.T @ z", ratio, limit)


def test_update_without_scatter_costs_little_more_than_one_index_add(median_ratio, record_ratio):
    K, d, B = 100_000, 512, 256
    z, bare = torch.randn(B, d), torch.zeros(K, d)
    batches = itertools.cycle([torch.randint(K, (B,)) for _ in range(400)])
    metric = ClassStatistics(K, d, scatter=False, scatter_dtype=torch.float32)
    ratio = median_ratio(
        lambda: metric.update(z, next(batches)), lambda: bare.index_add_(0, next(batches), z), repeats=400, warm_up=20
    )
    record_ratio("update, no scatter, K = 100,000 / index_add_ of the batch", ratio, 4.0)


@pytest.fixture(scope="module")
def large():
    K, d = 1000, 2048
    g = torch.Generator().manual_seed(0)
    centres = simplex_etf(K, d) + 0.3 * torch.randn(K, d, generator=g) / d**0.5
    metric = ClassStatistics(K, d)
    for _ in range(20):
        labels = torch.randint(K, (256,), generator=g)
        metric.update(centres[labels] + 0.5 * torch.randn(256, d, generator=g) / d**0.5, labels)
    return metric, centres + 0.1 * torch.randn(K, d, generator=g) / d**0.5


def test_finalising_costs_less_than_half_a_pseudo_inverse_and_cdnv_less_than_a_tenth(large, median_ratio, record_ratio):
    metric, weight = large
    moments, bias = metric.compute(), torch.zeros(len(weight))
    means = measures.centred_means(moments)
    between = means.T @ means / len(means)

    def finalise():
        metric._computed = None
        return measures.summary(metric.compute(), weight, bias, spectra=False)

    assert len(finalise()) >= 18
    for name, ours, limit in (("compute + summary", finalise, 0.5), ("cdnv", lambda: measures.cdnv(moments), 0.1)):
        ratio = median_ratio(ours, lambda: torch.linalg.pinv(between), repeats=3, warm_up=0)
        record_ratio(f"{name} / pinv, d 2048, K 1000", ratio, limit)
