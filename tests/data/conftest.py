import numpy as np
import pytest
import torch

from etflight import Classifier, CrossEntropyLoss, LinearHead
from tests.quiet import trainer


@pytest.fixture
def arrays(tmp_path):
    """Writes an `.npz` in MedMNIST's layout and returns its path: 3 classes of 40, 20 and 10, 2×4 pixels, RGB.

    Pixels of an image all hold its position in the split. Keyword arguments replace arrays, None leaves one out.
    """

    def write(**changes):
        members = {}
        for split, counts in (("train", (40, 20, 10)), ("test", (5, 5, 3))):
            labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3), counts))
            pixels = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
            members[f"{split}_images"] = np.broadcast_to(pixels, (len(labels), 2, 4, 3))
            members[f"{split}_labels"] = labels
        members.update(changes)
        path = tmp_path / "set.npz"
        np.savez(path, **{name: array for name, array in members.items() if array is not None})
        return str(path)

    return write


@pytest.fixture
def train_a_step():
    """Takes a data module through a batch of training, validation and test, after which the network is another."""

    def run(data):
        model = Classifier(
            data.num_classes, "test_resnet", head=LinearHead, loss=CrossEntropyLoss, in_chans=data.num_channels
        )
        before = {name: value.clone() for name, value in model.named_parameters()}
        trial = trainer(fast_dev_run=True)
        trial.fit(model, datamodule=data)
        trial.test(model, datamodule=data, verbose=False)
        assert any(not torch.equal(value, before[name]) for name, value in model.named_parameters())
        assert model.class_names == data.class_names
        assert model.class_counts.tolist() == data.class_counts.tolist()

    return run
