"""What watching the collapse adds to an epoch of ResNet-20 on images of Fashion-MNIST's shape."""

import statistics
import time

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from etflight import Classifier
from etflight.callbacks import NeuralCollapseMonitor
from etflight.data import ArrayImages
from etflight.runs.loggers import MetricsCSV
from tests.training import new_trainer, save_arrays

pytestmark = pytest.mark.benchmark

PAIRS = 6


class EpochSeconds(Callback):
    """Processor seconds of each epoch, validation included: other programs' time does not count."""

    def __init__(self):
        self.marks = []

    def on_train_epoch_start(self, trainer, pl_module):
        self.marks.append(time.process_time())

    @property
    def ratio(self):
        """Median of each measured epoch over its unmeasured predecessor; the first pair warms up."""
        seconds = np.diff(self.marks)[2:]
        return statistics.median(seconds[1::2] / seconds[::2])


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("online", "limit"), [(False, 1.4), (True, 1.03)], ids=["sweep each epoch", "online"])
def test_the_monitor_adds_little_to_an_epoch(online, limit, tmp_path, record_ratio):
    # in the proportion of Fashion-MNIST at imbalance ratio 100
    save_arrays(tmp_path / "images.npz", train=768, test=512, shape=(28, 28))
    seconds = EpochSeconds()
    # every second epoch is measured, so that measured and unmeasured ones alternate within one run
    watch = NeuralCollapseMonitor(every_n_epochs=2, online=online)
    trainer = new_trainer(seconds, watch, max_epochs=2 * PAIRS + 3, logger=MetricsCSV(tmp_path))
    torch.manual_seed(0)
    model = Classifier(10, "resnet20_cifar", in_chans=1)
    trainer.fit(model, datamodule=ArrayImages(str(tmp_path / "images.npz"), batch_size=128))
    name = "online" if online else "a sweep and validation"
    record_ratio(f"epoch with the monitor ({name}) / without, ResNet-20", seconds.ratio, limit)
