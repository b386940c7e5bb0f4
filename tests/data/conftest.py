from functools import partial

import pytest
import torch

from etflight import Classifier, CrossEntropyLoss, LinearHead
from tests.training import new_trainer, save_numbered


@pytest.fixture
def arrays(tmp_path):
    """`arrays(**changes)` writes the file of `save_numbered` and returns its path."""
    return partial(save_numbered, tmp_path / "set.npz")


@pytest.fixture
def small(monkeypatch):
    """`small(set_class, K, **counts)`: let it be a set of so many classes and images."""

    def shrink(set_class, classes, **counts):
        monkeypatch.setattr(set_class, "published_classes", classes)
        monkeypatch.setattr(set_class, "published_counts", counts)
        return set_class

    return shrink


@pytest.fixture
def train_a_step():
    """Takes a data module through a batch of training, validation and test, after which the network is another."""

    def run(data):
        model = Classifier(
            data.num_classes, "test_resnet", head=LinearHead, loss=CrossEntropyLoss, in_chans=data.num_channels
        )
        before = {name: value.clone() for name, value in model.named_parameters()}
        trial = new_trainer(fast_dev_run=True)
        trial.fit(model, datamodule=data)
        trial.test(model, datamodule=data, verbose=False)
        assert any(not torch.equal(value, before[name]) for name, value in model.named_parameters())
        assert model.class_names == data.class_names
        assert model.class_counts.tolist() == data.class_counts.tolist()

    return run
