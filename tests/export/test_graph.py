"""Heads as graphs: what they give is calibrated, whatever the head and the number of images."""

from functools import partial
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import nn

from etflight import ETFHead
from etflight.data.preprocessing import Preprocessing
from etflight.export import graph
from tests.export.test_network import DECISIONS, EXACT, trained

TINY = Preprocessing((1, 8, 8), (0.5,), (0.5,))
HEADS = {  # one of each operator that a head can have
    "scaled": (EXACT["scaled"], {}),
    "frame, turned": (DECISIONS["frame, turned"], {}),
    "frame, projected to more than d": (partial(ETFHead, projection_dim=80, learn_scale=True), {}),
    "cosine with BatchNorm": (DECISIONS["cosine with BatchNorm"], {}),
    "linear, adjusted": (EXACT["linear"], {"logit_adjustment": 1.5}),
}


@pytest.mark.parametrize("name", HEADS)
@torch.no_grad()
def test_every_head_gives_the_calibrated_probabilities(name, tmp_path: Path):
    head, options = HEADS[name]
    model = trained(head, **options)
    model.backbone = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64)
    ).eval()  # what comes before a head is traced elsewhere
    program = graph.trace(model, TINY)
    assert all(parameter.requires_grad for parameter in model.parameters())  # so that its training can go on
    graph.save_torch_export(program, model, {}, tmp_path / "m.pt2")
    graph.save_onnx(program, model, {}, tmp_path / "m.onnx")
    images = torch.randn(7, 1, 8, 8)
    prior = torch.arange(5, 55, 5) / torch.arange(5, 55, 5).sum()
    adjusted = model.head(model.backbone(images)) - options.get("logit_adjustment", 0) * prior.log()
    expected = (adjusted / 0.3).softmax(1)
    read = torch.export.load(tmp_path / "m.pt2").module()
    torch.testing.assert_close(read(images).softmax(1), expected, rtol=0, atol=1e-5)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    for some in (images, images[:1]):
        (logits,) = session.run(None, {"images": some.numpy()})
        torch.testing.assert_close(torch.from_numpy(logits).softmax(1), expected[: len(some)], rtol=0, atol=1e-4)
