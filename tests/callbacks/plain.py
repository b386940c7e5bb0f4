"""Somebody else's module, which knows nothing of etflight, on four classes of points; and a monitor of it."""

import torch
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from etflight.callbacks import NeuralCollapseMonitor
from tests.training import new_trainer

K = 4


class Plain(LightningModule):
    def __init__(self, dropout=0.0):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Dropout(dropout))
        self.fc = nn.Linear(5, K)
        self.forwards = 0

    def forward(self, x):
        self.forwards += 1
        return self.fc(self.body(x))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


def points(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % K
    return TensorDataset(torch.randn(n, 6, generator=generator) + labels[:, None], labels)


TRAIN, VAL = points(43), points(21, seed=1)


def trainer(tmp_path, *callbacks, epochs=2, **options):
    return new_trainer(*callbacks, max_epochs=epochs, default_root_dir=tmp_path, **options)


def plain_monitor(**kwargs):
    return NeuralCollapseMonitor(head="fc", train_dataloader=DataLoader(TRAIN, batch_size=8, shuffle=True), **kwargs)


def fit(tmp_path, *callbacks, model=None, val=True, ckpt_path=None, **kwargs):
    torch.manual_seed(0)
    model = Plain() if model is None else model
    runs = trainer(tmp_path, *callbacks, **kwargs)
    loaders = (DataLoader(TRAIN, batch_size=8), DataLoader(VAL, batch_size=8) if val else None)
    runs.fit(model, *loaders, ckpt_path=ckpt_path, weights_only=True)
    return model, runs
