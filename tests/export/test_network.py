from functools import partial

import pytest
import torch
from torch import nn

from etflight import Classifier, CosineHead, ETFHead, LinearHead, ScaledLinearHead
from etflight.export.timm import linear_decisions
from etflight.losses import CrossEntropyLoss
from etflight.utils.errors import UserError


def trained(head: object, **options: object) -> Classifier:
    """A classifier whose parameters and running statistics are nowhere near their first values."""
    torch.manual_seed(0)
    model = Classifier(
        10, "resnet20_cifar", head=head, loss=CrossEntropyLoss, class_counts=list(range(5, 55, 5)), **options
    )
    for module in model.head.modules():
        if isinstance(module, nn.BatchNorm1d):
            module.running_mean.uniform_(-2, 2)
            module.running_var.uniform_(0.1, 3)
    for parameter in model.head.parameters():
        parameter.data.normal_()
    model.temperature.fill_(0.3)
    return model.eval()


EXACT = {
    "linear": LinearHead,
    "linear with BatchNorm, without bias": partial(LinearHead, batch_norm=True, use_bias=False),
    "scaled": ScaledLinearHead,
    "frame without norm": partial(ETFHead, normalize=False),
}
DECISIONS = {
    "frame": ETFHead,
    "frame, turned": partial(ETFHead, learn_rotation=True, learn_scale=True),
    "frame, projected": partial(ETFHead, projection_dim=12),
    "cosine with BatchNorm": partial(CosineHead, batch_norm=True),
    "normalised, no bias": partial(LinearHead, use_bias=False, normalize=True, batch_norm=True),
}


@pytest.mark.parametrize("adjustment", ["additive", "multiplicative"])
@pytest.mark.parametrize("name", [*EXACT, *DECISIONS])
@torch.no_grad()
def test_one_linear_layer_decides_as_the_head(name, adjustment):
    """And as logit adjustment and temperature, where it gives the probabilities."""
    tau = 1.5 if name in EXACT or adjustment == "multiplicative" else 0.0
    model = trained({**EXACT, **DECISIONS}[name], logit_adjustment=tau, adjustment=adjustment)
    layer = linear_decisions(model)
    features = 3 * torch.randn(2000, 64)
    found = features @ layer.weight.T + layer.bias
    prior = torch.arange(5, 55, 5) / torch.arange(5, 55, 5).sum()
    logits = model.head(features)
    logits = (logits - tau * prior.log() if adjustment == "additive" else logits / prior**tau) / 0.3
    best, second = logits.topk(2).values.T
    clear = best - second > 1e-6 * best.abs()  # of closer ones rounding decides, another way on another processor
    assert clear.sum() >= 1995
    assert torch.equal(found.argmax(1)[clear], logits.argmax(1)[clear])
    assert layer.calibrated == (name in EXACT)
    if layer.calibrated:
        factor = prior**-tau if adjustment == "multiplicative" else 1.0  # up to 400, and rounding grows with it
        torch.testing.assert_close(found / factor, logits / factor, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("head", "options", "reason"),
    [
        (partial(ETFHead, projection_dim=80), {}, "no linear layer decides as a ETFHead"),
        (partial(LinearHead, normalize=True), {}, "no linear layer decides as a LinearHead"),
        (ETFHead, {"logit_adjustment": 1.0}, "logit adjustment of 1.0"),
    ],
)
def test_what_no_linear_layer_can_do_is_refused_with_the_way_out(head, options, reason):
    with pytest.raises(UserError, match=f"{reason}.*format='onnx torch-export'"):
        linear_decisions(trained(head, **options))
