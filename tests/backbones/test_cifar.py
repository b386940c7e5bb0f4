"""timm's contract, kept by the networks for 32 × 32 images."""

from itertools import groupby

import pytest
import torch
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


def test_channels_last_is_kept_and_gives_the_same_features(name):
    model, x = make(name, num_classes=0), images()
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    features = model.forward_features(x.to(memory_format=torch.channels_last))
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert_close(model.forward_head(features), expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


def test_forward_is_head_after_features_and_pre_logits_stop_before_the_classifier(name):
    model, x = make(name, num_classes=7), images()
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert_close(pooled, features.mean((2, 3)))
    assert_close(model(x), model.fc(pooled))
    assert model(x).shape == (2, 7)


def test_ten_classes_are_the_default(name):
    assert make(name).num_classes == make(name).get_classifier().out_features == 10


def test_drop_rate_drops_pooled_features_in_training_only(name):
    model = make(name, num_classes=0, drop_rate=0.5)
    features = torch.ones(4, 64, 2, 2)
    assert (model.forward_head(features) == 1).all()
    assert set(model.train().forward_head(features).unique().tolist()) == {0.0, 2.0}


def test_get_classifier_gives_the_module_or_its_name(name):
    model = make(name, num_classes=5)
    assert getattr(model, model.get_classifier(name_only=True)) is model.get_classifier()
    assert model.get_classifier().weight.shape == (5, WIDTHS[name])


def test_reset_classifier_changes_classes_and_keeps_pooling_mode_and_dtype(name):
    model = make(name, num_classes=10, global_pool="max").double()
    model.reset_classifier(3)
    assert model.num_classes == 3
    assert model.global_pool.pool_type == "max"
    assert not any(module.training for module in model.modules())
    assert model(images().double()).shape == (2, 3)
    model.reset_classifier(4, "catavgmax")
    assert model.head_hidden_size == 2 * WIDTHS[name]
    assert model(images().double()).shape == (2, 4)
    model.reset_classifier(0, "")
    assert model(images().double()).shape == (2, WIDTHS[name], 8, 8)


def test_forward_intermediates_equal_features_only(name):
    x = images()
    expected = make(name, features_only=True)(x)
    final, intermediates = make(name).forward_intermediates(x)
    assert len(intermediates) == len(expected) == 4
    for got, want in zip(intermediates, expected, strict=True):
        assert_close(got, want, rtol=0, atol=0)
    assert_close(final, expected[-1], rtol=0, atol=0)
    picked = make(name, features_only=True, out_indices=(1, 3))(x)
    for got, want in zip(picked, [expected[1], expected[3]], strict=True):
        assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize(("indices", "taken"), [(2, [2, 3]), ([0, 2], [0, 2]), ([-1], [3]), (None, [0, 1, 2, 3])])
def test_forward_intermediates_takes_indices_as_timm_does(name, indices, taken):
    model, x = make(name), images(8)
    _, every = model.forward_intermediates(x)
    got = model.forward_intermediates(x, indices=indices, intermediates_only=True)
    assert isinstance(got, list)
    for feature, index in zip(got, taken, strict=True):
        assert_close(feature, every[index], rtol=0, atol=0)


def test_stop_early_runs_no_later_stage(name):
    model, x = make(name), images(8)
    seen: list[str] = []
    for stage in ("layer1", "layer2", "layer3"):
        getattr(model, stage).register_forward_hook(lambda *_, stage=stage: seen.append(stage))
    final, (wanted,) = model.forward_intermediates(x, indices=[1], stop_early=True)
    assert seen == ["layer1"]
    assert final is wanted
    model.forward_intermediates(x, indices=[1])
    assert seen == ["layer1", "layer1", "layer2", "layer3"]


def test_forward_intermediates_knows_no_other_format(name):
    with pytest.raises(AssertionError, match="NCHW"):
        make(name).forward_intermediates(images(8), output_fmt="NLC")


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_pruning_keeps_the_wanted_intermediate_and_nothing_after_it(name, index):
    model, x = make(name), images(8)
    wanted = model.forward_intermediates(x)[1][index]
    assert model.prune_intermediate_layers([index]) == [index]
    assert_close(model.forward_features(x), wanted, rtol=0, atol=0)
    assert_close(model(x), wanted, rtol=0, atol=0)  # neither pooling nor classifier
    assert model.num_features == wanted.shape[1]
    kept = {parameter.split(".")[0] for parameter, _ in model.named_parameters()}
    assert kept - {"bn1"} == {"conv1", *("layer1", "layer2", "layer3")[:index]}
    model.set_grad_checkpointing()
    assert_close(model.train().eval().forward_features(x.requires_grad_()), wanted, rtol=0, atol=0)


def test_pruning_can_keep_the_head_when_no_stage_goes(name):
    model, x = make(name), images(8)
    expected = model(x)
    assert model.prune_intermediate_layers([-1], prune_head=False) == [3]
    assert_close(model(x), expected, rtol=0, atol=0)


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


def test_gradient_checkpointing_recomputes_blocks_and_gives_the_same_gradients(name):
    x = images(8)
    plain, checkpointed = make(name, num_classes=3), make(name, num_classes=3)
    checkpointed.set_grad_checkpointing()
    calls = []
    checkpointed.layer2[1].conv1.register_forward_hook(lambda *_: calls.append(1))
    for model in (plain, checkpointed):
        model(x.clone().requires_grad_()).square().sum().backward()
    assert len(calls) == 2
    for got, want in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        assert_close(got.grad, want.grad)
    checkpointed.set_grad_checkpointing(False)
    checkpointed(x).sum().backward()
    assert len(calls) == 3


def test_pretrained_cfg_names_stem_classifier_and_input(name):
    model = make(name, num_classes=0)
    cfg = model.pretrained_cfg
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
    assert cfg["classifier"] == model.get_classifier(name_only=True)
    assert cfg["input_size"] == (3, 32, 32)
    assert model.forward_features(images()).shape[2:] == cfg["pool_size"]
