import copy

import pytest
import timm
import torch
from torch import nn
from torch.testing import assert_close

import etflight.backbones  # noqa: F401  registers the models
from etflight.backbones import SyncBatchNorm
from etflight.cli.stages import main


def trained(name):
    """A network whose BatchNorm has seen images."""
    torch.manual_seed(0)
    model = nn.Sequential(timm.create_model(name, num_classes=0))
    for _ in range(2):
        model(torch.randn(4, 3, 32, 32))
    return model.eval()


@pytest.mark.parametrize("name", ["test_efficientnet", "resnet20_cifar"])
def test_synchronised_layers_compute_what_the_others_do_and_can_be_turned_back(name):
    model, images = trained(name), torch.randn(2, 3, 32, 32)
    expected, names = model(images), list(model.state_dict())
    layers = {path: type(module) for path, module in model.named_modules()}
    synced = SyncBatchNorm().apply(copy.deepcopy(model))
    norms = [module for module in synced.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    assert norms
    assert all(isinstance(module, nn.SyncBatchNorm) for module in norms)
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
    trial = ["--trainer.accelerator", "cpu", "--trainer.fast_dev_run", "true", "--trainer.enable_progress_bar", "false"]
    cli = main(
        ["fit", "--data", "Digits", "--model.backbone", "resnet20_cifar", "--trainer.sync_batchnorm", "true", *trial]
    )
    assert type(cli.trainer._accelerator_connector._layer_sync) is SyncBatchNorm
