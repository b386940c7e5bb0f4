import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from etflight.data.transforms import TrainTransform, draw_color_factors, jitter_colors


@pytest.fixture
def images():
    return torch.randint(90, 150, (9, 3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def by_torchvision(image, factors):
    brightness, contrast, saturation = factors
    image = F.adjust_brightness(image.float() / 255, brightness)
    return 255 * F.adjust_saturation(F.adjust_contrast(image, contrast), saturation)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_is_jittered_as_torchvision_does_one_image_at_a_time(images, channels):
    images = images[:, :channels]
    factors = draw_color_factors(len(images), 0.4, seed=0, step=0, rank=0)
    expected = torch.stack([by_torchvision(*pair) for pair in zip(images, factors.T.tolist(), strict=True)])
    assert 0 < expected.min() < expected.max() < 255  # nothing was clipped on the way
    torch.testing.assert_close(jitter_colors(images, factors), expected, rtol=0, atol=2e-3)


def test_colours_stay_in_range(images):
    factors = np.array([[2.0], [2.0], [2.0]], np.float32).repeat(len(images), 1)
    jittered = jitter_colors(images, factors)
    assert jittered.min() >= 0
    assert jittered.max() == 255


def test_factors_of_one_change_nothing(images):
    jittered = jitter_colors(images, np.ones((3, len(images)), np.float32))
    torch.testing.assert_close(jittered, images.float(), rtol=0, atol=1e-4)


def test_factors_are_uniform_independent_and_of_the_step():
    factors = draw_color_factors(100_000, 0.3, 1, 2, 0)
    assert factors.min() >= 0.7 - 1e-6
    assert factors.max() <= 1.3 + 1e-6
    assert np.abs(factors.mean(1) - 1).max() < 0.003
    assert np.abs(factors.std(1) - 0.3 / np.sqrt(3)).max() < 0.003
    assert np.abs(np.triu(np.corrcoef(factors), 1)).max() < 0.02
    drawn = [draw_color_factors(4, 0.3, *key).tolist() for key in ((1, 2, 0), (2, 1, 0), (1, 3, 0), (1, 2, 1))]
    assert all(one != other for i, one in enumerate(drawn) for other in drawn[:i])


def test_the_training_transform_jitters_before_it_normalises(images):
    labels = torch.zeros(len(images), dtype=torch.int64)
    transform = TrainTransform(num_classes=2, mean=(0.5,), std=(0.25,), color_jitter=0.4, seed=3)
    factors = draw_color_factors(len(images), 0.4, 3, 7, 1)
    expected = (jitter_colors(images, factors) / 255 - 0.5) / 0.25
    torch.testing.assert_close(transform(images, labels, step=7, rank=1)[0], expected)
