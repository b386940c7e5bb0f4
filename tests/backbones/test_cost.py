import pytest
import torch
from torch import nn

from etflight import Classifier, CrossEntropyLoss, ETFHead, LinearHead
from etflight.backbones.cost import Cost, network_cost


@pytest.mark.parametrize(("width", "params", "multiply_adds"), [(1, 0.46, 0.069), (4, 7.39, 1.10)])
def test_the_published_sizes_of_the_cifar_resnets(width, params, multiply_adds):
    model = Classifier(10, "resnet32_cifar", LinearHead, CrossEntropyLoss, model_kwargs={"width": width})
    cost = model.cost((3, 32, 32))
    assert cost.params / 1e6 == pytest.approx(params, abs=0.005)
    assert cost.multiply_adds / 1e9 == pytest.approx(multiply_adds, abs=0.005)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_they_are_known_in_any_precision(dtype):
    model = Classifier(10, "resnet20_cifar")
    assert model.cost((3, 32, 32)) == model.to(dtype).cost((3, 32, 32))


def test_they_are_those_of_the_formulas_and_nothing_changes():
    backbone = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1, bias=False), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    head = ETFHead(5, 3, projection_dim=4)
    before = [value.clone() for value in (*backbone.state_dict().values(), *head.state_dict().values())]
    cost = network_cost(backbone, head, (2, 7, 8))
    assert cost == Cost(params=2 * 5 * 9 + 10 + 5 * 4 + 8, multiply_adds=2 * 5 * 9 * 56 + 5 * 4 + 4 * 3)
    after = (*backbone.state_dict().values(), *head.state_dict().values())
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert backbone.training
    assert head.training


class Opaque(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)) if float(images.sum()) == 0 else images


def test_a_network_that_looks_into_its_numbers_has_parameters_only():
    cost = network_cost(Opaque(), ETFHead(3, 3), (3, 4, 4))
    assert (cost.params, cost.multiply_adds, str(cost)) == (6, None, "0.00 million parameters")
