import numpy as np
import pytest
import torch
from PIL import Image

from etflight.data import ArrayImages, Digits
from etflight.data.adapted import AdaptedSplit
from etflight.data.preprocessing import Preprocessing
from etflight.utils.errors import UserError
from tests.training import save_arrays


def adapted(path, size, shape):
    save_arrays(path, test=6, shape=shape, classes=3)
    split = ArrayImages(path=str(path)).split("test")
    preprocessing = Preprocessing(size, (0.5,) * size[0], (0.5,) * size[0])
    return split, AdaptedSplit(split, preprocessing, "the set")


@pytest.mark.parametrize("size", [(1, 8, 8), (3, 8, 8), (3, 20, 20), (1, 32, 32)])
@pytest.mark.parametrize("shape", [(20, 20), (20, 20, 3)])
def test_images_are_those_of_pillow_converted_and_resized_bilinearly(size, shape, tmp_path):
    split, changed = adapted(tmp_path / "a.npz", size, shape)
    images, labels = changed.__getitems__([4, 1])
    assert images.shape == (2, *size)
    assert images.dtype == torch.uint8
    assert labels.tolist() == [1, 1] == changed.labels[[4, 1]].tolist()
    for position, image in zip([4, 1], images, strict=True):
        pixels = split[position][0].permute(1, 2, 0).squeeze(2).numpy()
        picture = Image.fromarray(pixels).convert("L" if size[0] == 1 else "RGB")
        expected = np.atleast_3d(picture.resize(size[:0:-1], Image.Resampling.BILINEAR)).transpose(2, 0, 1)
        np.testing.assert_allclose(image.numpy().astype(int), expected.astype(int), atol=2)  # rounded in another order


def test_proportions_are_kept_and_the_middle_is_cropped(tmp_path):
    path = tmp_path / "a.npz"
    wide = np.repeat(np.arange(12, dtype=np.uint8)[None, None] * 20, 4, axis=1)
    save_arrays(path, test=1, shape=(4, 12), test_images=wide, test_labels=np.zeros(1, int), classes=2)
    split = ArrayImages(path=str(path)).split("test")
    images, _ = AdaptedSplit(split, Preprocessing((1, 4, 4), (0.5,), (0.5,)), "wide").__getitems__([0])
    assert images[0, 0, 0].tolist() == [80, 100, 120, 140]


def test_channels_that_are_neither_grey_nor_rgb_are_refused(tmp_path):
    _, changed = adapted(tmp_path / "a.npz", (2, 8, 8), (8, 8, 3))
    with pytest.raises(UserError, match="the set: 3 channels, but the model takes 2"):
        changed.__getitems__([0])


def test_other_test_images_are_normalised_as_the_modules_own(tmp_path):
    save_arrays(tmp_path / "a.npz", test=6, classes=3)
    known, others = Digits(std=[0.25], mean=[0.1]), ArrayImages(path=str(tmp_path / "a.npz")).split("test")
    own = len(known.split("test"))
    (batch,) = known.with_test_images(others).eval_dataloader("test")
    torch.testing.assert_close(known.eval_transform(batch)[0], (batch[0] / 255 - 0.1) / 0.25)
    assert torch.equal(batch[0], others.__getitems__(range(6))[0])
    assert len(known.split("test")) == own != 6
