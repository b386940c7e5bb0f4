"""timm's contract, kept by the networks for 32 × 32 images."""

from itertools import groupby

import pytest
from timm.models import group_parameters
from torch import nn
from torch.testing import assert_close

from tests.backbones.nets import images, make

WIDTHS = {"resnet20_cifar": 64, "densenet_bc_150_cifar": 510}
pytestmark = pytest.mark.parametrize("name", WIDTHS)


def test_convolutions_start_from_he_normal_over_the_fan_of_the_fields_code(name):
    """LDAM-DRW, MiSLAS and Yang et al. call `kaiming_normal_(weight)` for ResNets; the last divides by k²·out for DenseNets."""
    for module in make(name).modules():
        if isinstance(module, nn.Conv2d):
            chs = module.in_channels if name.startswith("resnet") else module.out_channels
            std = (2 / (module.kernel_size[0] * module.kernel_size[1] * chs)) ** 0.5
            tolerance = 5 / (2 * module.weight.numel()) ** 0.5  # five standard errors of a normal sample's deviation
            assert module.weight.std().item() == pytest.approx(std, rel=tolerance)


def test_pooled_features_stop_before_the_classifier(name):
    model, x = make(name, num_classes=7), images(16)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert_close(pooled, model.forward_features(x).mean((2, 3)))
    assert pooled.shape == (2, WIDTHS[name])
    assert_close(model(x), model.fc(pooled))
    assert model.get_classifier() is getattr(model, model.get_classifier(name_only=True)) is model.fc
    assert make(name).num_classes == 10


def test_drop_rate_drops_pooled_features_in_training_only(name):
    model = make(name, num_classes=0, drop_rate=0.5)
    features = images(2).new_ones(4, 64, 2, 2)
    assert (model.forward_head(features) == 1).all()
    assert set(model.train().forward_head(features).unique().tolist()) == {0.0, 2.0}


def test_reset_classifier_changes_classes_and_keeps_pooling_mode_and_dtype(name):
    model = make(name, num_classes=10, global_pool="max").double()
    model.reset_classifier(3)
    assert (model.num_classes, model.global_pool.pool_type) == (3, "max")
    assert not any(module.training for module in model.modules())
    assert model(images(8).double()).shape == (2, 3)
    model.reset_classifier(4, "catavgmax")
    assert model.head_hidden_size == model.fc.in_features == 2 * WIDTHS[name]
    model.reset_classifier(0, "")
    assert model(images(8).double()).shape == (2, WIDTHS[name], 2, 2)


def test_features_only_gives_stem_and_stages_as_feature_info_describes_them(name):
    x, model = images(16), make(name, features_only=True)
    features = model(x)
    assert model.feature_info.channels() == [feature.shape[1] for feature in features]
    assert model.feature_info.reduction() == [16 // feature.shape[2] for feature in features] == [1, 1, 2, 4]
    assert_close(features[-1], make(name).forward_features(x), rtol=0, atol=0)


@pytest.mark.parametrize("coarse", [True, False])
def test_group_matcher_orders_every_parameter_by_depth(name, coarse):
    model = make(name)
    groups = group_parameters(model, model.group_matcher(coarse=coarse))

    def place(parameter):
        parts = parameter.split(".")
        return parts[: 1 if coarse else 2] if parts[0].startswith("layer") else parts[0] == "fc"

    in_order = [list(names) for _, names in groupby((n for n, _ in model.named_parameters()), place)]
    assert [groups[i] for i in sorted(groups)] == in_order
    assert len(in_order) == {"resnet20_cifar": (5, 11), "densenet_bc_150_cifar": (5, 77)}[name][not coarse]


def test_pretrained_cfg_names_stem_classifier_and_input(name):
    model = make(name, num_classes=0)
    cfg = model.pretrained_cfg
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
    assert cfg["classifier"] == model.get_classifier(name_only=True)
    assert cfg["input_size"] == (3, 32, 32)
    assert model.forward_features(images()).shape[2:] == cfg["pool_size"]
