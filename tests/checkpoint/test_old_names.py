"""Checkpoints of version 0.1, whose heads had other names for their options and parts."""

from functools import partial

import pytest
import torch

from etflight import Classifier, CosineHead, CrossEntropyLoss, ETFHead, LinearHead
from etflight.data import Digits
from tests.training import save_trained

NORMED = {"batch_norm": "feature_batch_norm", "normalize": "feature_normalize", "scale": "cosine_scale"}
HEADS = {
    "frame": (partial(ETFHead, projection_dim=80, learn_rotation=True, scale=16.0), {}),
    "linear": (partial(LinearHead, batch_norm=True, normalize=True), NORMED),
    "cosine": (partial(CosineHead, batch_norm=True, scale=9.0), NORMED),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_checkpoint_with_the_old_names_is_the_same_model(kind, tmp_path):
    head, names = HEADS[kind]
    model = Classifier(10, "resnet20_cifar", head=head, loss=CrossEntropyLoss, in_chans=1)
    file = save_trained(tmp_path / "new.ckpt", model, Digits(batch_size=64), max_steps=2)
    content = torch.load(file, weights_only=True)
    saved = content["hyper_parameters"]["head"]
    saved["init_args"] = {names.get(name, name): value for name, value in saved["init_args"].items()}
    renamed = {name.replace("head.embedder.", "head."): value for name, value in content["state_dict"].items()}
    assert renamed.keys() != content["state_dict"].keys()
    torch.save({**content, "state_dict": renamed}, tmp_path / "old.ckpt")
    images = torch.randn(4, 1, 8, 8)
    loaded = [Classifier.load_from_checkpoint(tmp_path / name).eval() for name in ("new.ckpt", "old.ckpt")]
    torch.testing.assert_close(loaded[0](images), loaded[1](images), rtol=0, atol=0)
    assert loaded[0].hparams["head"] == loaded[1].hparams["head"]
