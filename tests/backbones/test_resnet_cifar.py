from typing import Any

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import Tensor, nn
from torch.testing import assert_close

import etflight.backbones  # noqa: F401  registers the models
from etflight.backbones.resnet_cifar import BasicBlock
from etflight.errors import UserError


def make(name: str = "resnet20_cifar", *, seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    return timm.create_model(name, **kwargs).eval()


def images(size: int = 32, in_chans: int = 3, batch: int = 2) -> Tensor:
    return torch.randn(batch, in_chans, size, size, generator=torch.Generator().manual_seed(1))


def num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def expected_parameters(depth: int, width: int = 1, in_chans: int = 3) -> int:
    """Every convolution and its BatchNorm, counted from the paper's table."""
    chs, total = 16 * width, 9 * in_chans * 16 * width + 2 * 16 * width
    for stage in range(3):
        out = 16 * width * 2**stage
        for _ in range((depth - 2) // 6):
            total += 9 * chs * out + 2 * out + 9 * out * out + 2 * out
            chs = out
    return total


def test_resnet32_has_463504_parameters():
    assert num_parameters(make("resnet32_cifar", num_classes=0)) == 463_504


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_parameters_are_those_of_the_paper_at_every_depth(depth):
    assert num_parameters(make(f"resnet{depth}_cifar", num_classes=0)) == expected_parameters(depth)


@pytest.mark.parametrize(("width", "in_chans"), [(2, 3), (3, 1)])
def test_width_multiplies_every_channel(width, in_chans):
    model = make("resnet32_cifar", num_classes=0, width=width, in_chans=in_chans)
    assert num_parameters(model) == expected_parameters(32, width, in_chans)
    assert [info["num_chs"] for info in model.feature_info] == [16 * width, 16 * width, 32 * width, 64 * width]


@pytest.mark.parametrize("width", [0, -1, 1.5])
def test_a_width_that_is_not_a_positive_integer_is_refused(width):
    with pytest.raises(UserError, match="positive integer"):
        make(width=width)


@pytest.mark.parametrize("depth", [20, 32, 44, 56, 110])
def test_depth_counts_the_layers_with_weights(depth):
    model = make(f"resnet{depth}_cifar", num_classes=10)
    assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == depth


def test_shortcut_subsamples_and_pads_with_zero_channels_without_parameters():
    block = BasicBlock(2, 5, stride=2)
    assert {name.split(".")[0] for name, _ in block.named_parameters()} == {"conv1", "bn1", "conv2", "bn2"}
    nn.init.zeros_(block.bn2.weight)  # silences the residual branch
    x = images(size=7, in_chans=2)
    out = block(x)
    assert out.shape == (2, 5, 4, 4)
    assert_close(out[:, :2], x[:, :, ::2, ::2].relu(), rtol=0, atol=0)
    assert out[:, 2:].abs().max() == 0


def test_shortcut_of_an_unchanged_shape_is_the_input():
    block = BasicBlock(3, 3)
    x = images(size=5)
    assert block.shortcut(x) is x


def test_convolutions_start_from_he_normal_over_the_fan_out():
    model = make(width=2)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            std = (2 / (9 * module.out_channels)) ** 0.5
            tolerance = 5 / (2 * module.weight.numel()) ** 0.5  # five standard errors of a normal sample's deviation
            assert module.weight.std().item() == pytest.approx(std, rel=tolerance)


@pytest.mark.parametrize("size", [8, 28, 32])
@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("width", [1, 2])
def test_without_classifier_the_output_is_pooled_features(size, in_chans, width):
    model = make(num_classes=0, in_chans=in_chans, width=width)
    x = images(size, in_chans)
    features = model.forward_features(x)
    assert features.shape == (2, 64 * width, size // 4, size // 4)
    assert_close(model(x), features.mean((2, 3)))
    assert (model.num_classes, model.in_chans) == (0, in_chans)
    assert model.num_features == model.head_hidden_size == 64 * width


def test_channels_last_is_kept_and_gives_the_same_features():
    model, x = make(num_classes=0), images()
    expected = model(x)
    model = model.to(memory_format=torch.channels_last)
    features = model.forward_features(x.to(memory_format=torch.channels_last))
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert_close(model.forward_head(features), expected, rtol=1e-4, atol=1e-5)


def test_forward_is_head_after_features_and_pre_logits_stop_before_the_classifier():
    model, x = make(num_classes=7), images()
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert_close(pooled, features.mean((2, 3)))
    assert_close(model(x), model.fc(pooled))
    assert model(x).shape == (2, 7)


def test_ten_classes_are_the_default():
    assert make().num_classes == make().get_classifier().out_features == 10


def test_drop_rate_drops_pooled_features_in_training_only():
    model = make(num_classes=0, drop_rate=0.5)
    features = torch.ones(4, 64, 2, 2)
    assert (model.forward_head(features) == 1).all()
    assert set(model.train().forward_head(features).unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize(("pool", "width"), [("avg", 64), ("max", 64), ("avgmax", 64), ("catavgmax", 128)])
def test_global_pool_sets_the_pooled_width(pool, width):
    model = make(num_classes=0, global_pool=pool)
    assert model.num_features == 64
    assert model.head_hidden_size == model(images()).shape[1] == width


def test_get_classifier_gives_the_module_or_its_name():
    model = make(num_classes=5)
    assert getattr(model, model.get_classifier(name_only=True)) is model.get_classifier()
    assert model.get_classifier().weight.shape == (5, 64)


def test_reset_classifier_changes_classes_and_keeps_pooling_mode_and_dtype():
    model = make(num_classes=10, global_pool="max").double()
    model.reset_classifier(3)
    assert model.num_classes == 3
    assert model.global_pool.pool_type == "max"
    assert not any(module.training for module in model.modules())
    assert model(images().double()).shape == (2, 3)
    model.reset_classifier(4, "catavgmax")
    assert model.head_hidden_size == 128
    assert model(images().double()).shape == (2, 4)
    model.reset_classifier(0, "")
    assert model(images().double()).shape == (2, 64, 8, 8)


def test_feature_info_describes_what_features_only_gives():
    model = make(features_only=True, width=2)
    features = model(images())
    assert [tuple(f.shape[1:]) for f in features] == [(32, 32, 32), (32, 32, 32), (64, 16, 16), (128, 8, 8)]
    assert model.feature_info.channels() == [f.shape[1] for f in features]
    assert model.feature_info.reduction() == [32 // f.shape[2] for f in features]


def test_forward_intermediates_equal_features_only():
    x = images()
    expected = make(features_only=True)(x)
    final, intermediates = make().forward_intermediates(x)
    assert len(intermediates) == len(expected) == 4
    for got, want in zip(intermediates, expected, strict=True):
        assert_close(got, want, rtol=0, atol=0)
    assert_close(final, expected[-1], rtol=0, atol=0)
    picked = make(features_only=True, out_indices=(1, 3))(x)
    for got, want in zip(picked, [expected[1], expected[3]], strict=True):
        assert_close(got, want, rtol=0, atol=0)


@pytest.mark.parametrize(("indices", "taken"), [(2, [2, 3]), ([0, 2], [0, 2]), ([-1], [3]), (None, [0, 1, 2, 3])])
def test_forward_intermediates_takes_indices_as_timm_does(indices, taken):
    model, x = make(), images(8)
    _, every = model.forward_intermediates(x)
    got = model.forward_intermediates(x, indices=indices, intermediates_only=True)
    assert isinstance(got, list)
    for feature, index in zip(got, taken, strict=True):
        assert_close(feature, every[index], rtol=0, atol=0)


def test_stop_early_runs_no_later_stage():
    model, x = make(), images(8)
    seen: list[str] = []
    for name in ("layer1", "layer2", "layer3"):
        getattr(model, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    final, (wanted,) = model.forward_intermediates(x, indices=[1], stop_early=True)
    assert seen == ["layer1"]
    assert final is wanted
    model.forward_intermediates(x, indices=[1])
    assert seen == ["layer1", "layer1", "layer2", "layer3"]


def test_forward_intermediates_knows_no_other_format():
    with pytest.raises(AssertionError, match="NCHW"):
        make().forward_intermediates(images(8), output_fmt="NLC")


@pytest.mark.parametrize("index", [0, 1, 2, 3])
def test_pruning_keeps_the_wanted_intermediate_and_nothing_after_it(index):
    model, x = make(), images(8)
    wanted = model.forward_intermediates(x)[1][index]
    assert model.prune_intermediate_layers([index]) == [index]
    assert_close(model.forward_features(x), wanted, rtol=0, atol=0)
    assert_close(model(x), wanted, rtol=0, atol=0)  # neither pooling nor classifier
    assert model.num_features == wanted.shape[1]
    kept = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert kept == {"conv1", "bn1", *("layer1", "layer2", "layer3")[:index]}
    model.set_grad_checkpointing()
    assert_close(model.train().eval().forward_features(x.requires_grad_()), wanted, rtol=0, atol=0)


def test_pruning_can_keep_the_head_when_no_stage_goes():
    model, x = make(), images(8)
    expected = model(x)
    assert model.prune_intermediate_layers([-1], prune_head=False) == [3]
    assert_close(model(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("coarse", [True, False])
def test_group_matcher_orders_every_parameter_by_depth(coarse):
    model = make()
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    prefixes = [{name.rsplit(".", 1)[0] for name in groups[i]} for i in sorted(groups)]
    stages = ["layer1", "layer2", "layer3"]
    blocks = stages if coarse else [f"{stage}.{i}" for stage in stages for i in range(3)]
    assert prefixes[0] == {"conv1", "bn1"}
    assert [{p[: len(b)] for p in group} for group, b in zip(prefixes[1:-1], blocks, strict=True)] == [
        {b} for b in blocks
    ]
    assert prefixes[-1] == {"fc"}
    assert sum(len(group) for group in groups.values()) == len(list(model.named_parameters()))


def test_gradient_checkpointing_recomputes_blocks_and_gives_the_same_gradients():
    x = images(8)
    plain, checkpointed = make(num_classes=3), make(num_classes=3)
    checkpointed.set_grad_checkpointing()
    calls = []
    checkpointed.layer2[0].conv1.register_forward_hook(lambda *_: calls.append(1))
    for model in (plain, checkpointed):
        model(x.clone().requires_grad_()).square().sum().backward()
    assert len(calls) == 2
    for got, want in zip(checkpointed.parameters(), plain.parameters(), strict=True):
        assert_close(got.grad, want.grad)
    checkpointed.set_grad_checkpointing(False)
    checkpointed(x).sum().backward()
    assert len(calls) == 3


def test_pretrained_cfg_names_stem_classifier_and_input():
    model = make(num_classes=0)
    cfg = model.pretrained_cfg
    assert isinstance(model.get_submodule(cfg["first_conv"]), nn.Conv2d)
    assert cfg["classifier"] == model.get_classifier(name_only=True)
    assert cfg["input_size"] == (3, 32, 32)
    assert model.forward_features(images()).shape[2:] == cfg["pool_size"]
