"""AutoAugment, RandAugment and TrivialAugment of whole batches against torchvision's transforms of single images."""

from collections import Counter

import numpy as np
import pytest
import torch
from timm.data.auto_augment import LEVEL_TO_ARG
from torchvision.transforms import AutoAugment as Published
from torchvision.transforms import AutoAugmentPolicy, v2

from etflight.data.auto_augment import OPERATIONS, AutoAugment, augment
from etflight.utils.errors import UserError

TORCHVISION = {
    "autoaugment_cifar10": v2.AutoAugment,
    "randaugment": v2.RandAugment,
    "trivialaugment": v2.TrivialAugmentWide,
}


def some_images(channels, size=32):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, channels, size, size), dtype=torch.uint8, generator=generator)
    images[0] = 7  # one colour
    images[1] = (torch.arange(size) * 5).to(torch.uint8)  # a ramp
    images[2] = images[2] // 4 + 90  # little contrast
    return images


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("policy", TORCHVISION)
def test_each_operation_at_each_magnitude_is_that_of_torchvision_on_a_single_image(policy, channels):
    images, theirs = some_images(channels), TORCHVISION[policy]()
    bins = 10 if policy.startswith("autoaugment") else 31
    for name, (magnitudes_of, signed) in theirs._AUGMENTATION_SPACE.items():
        levels = magnitudes_of(bins, *images.shape[-2:])
        values = np.array([0.0]) if levels is None else levels.numpy().astype(np.float64)
        for magnitude in np.concatenate([values, -values]) if signed else values:
            how = name, float(magnitude), theirs.interpolation, theirs._fill
            expected = [theirs._apply_image_or_video_transform(image, *how) for image in images]
            codes = np.full((1, len(images)), OPERATIONS.index(name))
            pixels = np.trunc(magnitude) if name.startswith("Translate") else magnitude
            changed = augment(images, codes, np.full(codes.shape, pixels))
            assert torch.equal(changed, torch.stack(expected)), (name, magnitude)


def test_images_of_one_batch_are_changed_each_by_its_own_draw():
    images = some_images(3)
    codes, magnitudes = AutoAugment.parse("randaugment-n3-m20").draw(len(images), 32, 32, np.random.default_rng(0))
    together = augment(images, codes, magnitudes)
    alone = [augment(images[i : i + 1], codes[:, i : i + 1], magnitudes[:, i : i + 1]) for i in range(len(images))]
    assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize("data", ["cifar10", "imagenet"])
def test_sub_policies_come_as_often_as_published(data):
    draws = 200_000
    codes, _ = AutoAugment.parse(f"autoaugment_{data}").draw(draws, 32, 32, np.random.default_rng(0))
    expected = Counter()
    for (first, p, _), (second, q, _) in Published(AutoAugmentPolicy(data)).policies:
        expected[first, second] += p * q / 25
        expected[first, "Identity"] += p * (1 - q) / 25
        expected["Identity", second] += (1 - p) * q / 25
    seen = Counter((OPERATIONS[a], OPERATIONS[b]) for a, b in codes.T)
    for pair, odds in expected.items():
        assert abs(seen[pair] / draws - odds) < 5 * (max(odds, 1e-5) / draws) ** 0.5, pair
    nothing = 1 - sum(expected.values())
    assert abs(seen["Identity", "Identity"] / draws - nothing) < 5 * (nothing / draws) ** 0.5


def test_operations_and_levels_of_the_random_policies_are_uniform_and_half_are_negative():
    draws = 140_000
    codes, magnitudes = AutoAugment.parse("trivialaugment").draw(draws, 32, 32, np.random.default_rng(0))
    counts = np.bincount(codes[0], minlength=15)
    assert codes.shape == (1, draws)
    assert counts[14] == 0
    assert np.abs(counts[:14] - draws / 14).max() < 5 * (draws / 14) ** 0.5
    rotated = magnitudes[codes == OPERATIONS.index("Rotate")]
    assert len(np.unique(np.abs(rotated))) == 31
    assert np.abs(rotated).max() == 135
    assert abs((rotated < 0).mean() / (30 / 31) - 0.5) < 0.03
    codes, magnitudes = AutoAugment.parse("randaugment-n3-m30").draw(1000, 32, 32, np.random.default_rng(0))
    assert codes.shape == (3, 1000)
    assert set(np.abs(magnitudes[codes == OPERATIONS.index("Rotate")])) == {30.0}


def test_levels_of_randaugment_are_those_of_torchvision_and_a_third_of_timms():
    theirs = v2.RandAugment(num_ops=2, magnitude=9)
    codes, magnitudes = AutoAugment.parse("randaugment-n2-m9").draw(4000, 32, 32, np.random.default_rng(0))
    for name, (magnitudes_of, _) in theirs._AUGMENTATION_SPACE.items():
        level = magnitudes_of(theirs.num_magnitude_bins, 32, 32)
        expected = 0.0 if level is None else float(level[theirs.magnitude])
        drawn = np.abs(magnitudes[codes == OPERATIONS.index(name)])
        assert np.allclose(drawn, int(expected) if name.startswith("Translate") else expected), name
    codes, magnitudes = AutoAugment.parse("randaugment-n2-m27").draw(4000, 32, 32, np.random.default_rng(0))
    for name in ("Rotate", "ShearX"):
        (of_timm,) = LEVEL_TO_ARG[name](9, {})
        assert np.allclose(np.abs(magnitudes[codes == OPERATIONS.index(name)]), abs(of_timm)), name


@pytest.mark.parametrize("name", ["autoaugment", "randaugment-m31", "randaugment-n0", "RandAugment", "rand-m9"])
def test_an_unknown_policy_is_refused_in_one_line(name):
    with pytest.raises(UserError, match=r"^auto_augment '.*': give|is unknown: give") as refused:
        AutoAugment.parse(name)
    assert "\n" not in str(refused.value)
