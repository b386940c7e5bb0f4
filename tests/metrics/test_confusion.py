import pytest
import torch
from sklearn.metrics import confusion_matrix

from etflight.metrics import Confusion


def test_counts_equal_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(0, 5, (300,), generator=generator)
    predicted = torch.where(torch.rand(300, generator=generator) < 0.6, target, (target + 1) % 7)
    metric = Confusion(7)
    for part in (slice(0, 7), slice(7, None)):
        metric.update(predicted[part], target[part])
    assert metric.compute().tolist() == confusion_matrix(target, predicted, labels=range(7)).tolist()


def test_a_matrix_that_would_fill_the_memory_is_refused():
    with pytest.raises(ValueError, match="8142 classes: at most 1000"):
        Confusion(8142)
