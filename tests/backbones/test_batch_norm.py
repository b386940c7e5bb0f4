import copy

import pytest
import timm
import torch
from torch import nn
from torch.testing import assert_close

import etflight.backbones
from etflight.backbones import SyncBatchNorm
from etflight.cli.stages import main


@pytest.mark.parametrize("name", ["test_efficientnet", "resnet20_cifar"])
def test_synchronised_layers_compute_what_the_others_do_and_can_be_turned_back(name):
    torch.manual_seed(0)
    model, images = nn.Sequential(timm.create_model(name, num_classes=0)), torch.randn(4, 3, 32, 32)
    model(images)  # so that its statistics are not those of a new network
    expected, names = model.eval()(images), list(model.state_dict())
    layers = {path: type(module) for path, module in model.named_modules()}
    synced = SyncBatchNorm().apply(copy.deepcopy(model))
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in synced.modules()) == sum("running_mean" in n for n in names)
    assert_close(synced.eval()(images), expected, rtol=0, atol=0)
    assert list(synced.state_dict()) == names
    own = SyncBatchNorm().revert(synced)
    assert_close(own.eval()(images), expected, rtol=0, atol=0)
    assert list(own.state_dict()) == names
    if name == "test_efficientnet":
        assert {path: type(module) for path, module in own.named_modules()} == layers
        lost = nn.SyncBatchNorm.convert_sync_batchnorm(model).eval()(images)
        assert not torch.allclose(lost, expected, rtol=0.1)  # why this class is needed


def test_sync_batchnorm_on_the_command_line_means_this_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = []
    monkeypatch.setattr(etflight.backbones, "SyncBatchNorm", lambda: made.append(SyncBatchNorm()) or made[-1])
    trial = ["--trainer.accelerator", "cpu", "--trainer.fast_dev_run", "true", "--trainer.sync_batchnorm", "true"]
    main(["fit", "--data", "Digits", "--model.backbone", "resnet20_cifar", *trial])
    assert len(made) == 1
