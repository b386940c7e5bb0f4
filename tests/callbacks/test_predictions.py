import pytest
import torch

from etflight import Classifier, CrossEntropyLoss, LinearHead
from etflight.callbacks.predictions import PredictionTable
from etflight.data import ArrayImages
from etflight.utils.errors import UserError
from tests.training import new_trainer, read_csv, save_numbered


class Breaks(Classifier):
    """Has no number for the image whose position is 3, of which there are no others."""

    def forward(self, images):
        order = images[:, 0, 0, 0].argsort()
        return super().forward(images).index_fill(0, order[3:4], torch.nan)


def test_no_class_is_written_for_an_image_whose_probabilities_are_no_numbers(tmp_path):
    data, table = ArrayImages(save_numbered(tmp_path / "set.npz")), PredictionTable(tmp_path / "predictions.csv")
    parts = {"head": LinearHead, "loss": CrossEntropyLoss}
    with pytest.raises(UserError, match=r"1 of 13 images .* are NaN, the first is 3: nothing is written"):
        new_trainer(table).predict(Breaks(3, "resnet20_cifar", **parts), data, return_predictions=False)
    assert not table.path.exists()
    table = PredictionTable(tmp_path / "predictions.csv")
    new_trainer(table).predict(Classifier(3, "resnet20_cifar", **parts), data, return_predictions=False)
    assert len(read_csv(table.path)) == 13
