import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as F

from etflight.data.transforms import TrainTransform, crop_and_flip, draw_crops, jitter_colors, normalize
from etflight.utils.errors import UserError

MEAN, STD = (0.1, 0.5, 0.7), (0.2, 0.3, 0.4)


@pytest.fixture
def batch():
    images = torch.randint(0, 256, (15, 3, 6, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return images, torch.arange(15) % 5  # neighbours differ, the last and the first too


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 4])
def test_whole_batch_crop_equals_one_image_at_a_time(batch, padding, flip):
    images, _ = batch
    crops = draw_crops(len(images), padding, flip, np.random.default_rng(0))
    slow = []
    for image, (top, left, flipped) in zip(images, crops.T.tolist(), strict=True):
        image = F.crop(F.pad(image, [padding] * 4), top, left, 6, 9)
        slow.append(F.hflip(image) if flipped else image)
    fast = crop_and_flip(images, crops, padding)
    assert torch.equal(fast, torch.stack(slow))
    assert fast.is_contiguous()
    other = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(crop_and_flip(other, crops, padding), fast)


def test_every_offset_and_both_sides_are_drawn_evenly():
    crops = draw_crops(100_000, 4, True, np.random.default_rng(0))
    for values, choices in ((crops[0], 9), (crops[1], 9), (crops[2], 2)):
        seen = np.bincount(values, minlength=choices)
        assert len(seen) == choices
        assert np.abs(seen / 100_000 - 1 / choices).max() < 0.01
    assert abs(np.triu(np.corrcoef(crops), 1)).max() < 0.02


def test_normalize_is_torchvisions(batch):
    images, _ = batch
    expected = F.normalize(F.to_dtype(images, torch.float32, scale=True), MEAN, STD)
    torch.testing.assert_close(normalize(images, MEAN, STD), expected, rtol=0, atol=2e-6)
    assert torch.equal(normalize(images, (0.5,), (0.5,)), normalize(images, (0.5,) * 3, (0.5,) * 3))


def by_torchvision(image, factors):
    brightness, contrast, saturation = factors
    image = F.adjust_brightness(image.float() / 255, brightness)
    return 255 * F.adjust_saturation(F.adjust_contrast(image, contrast), saturation)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_batch_is_jittered_as_torchvision_does_one_image_at_a_time(batch, channels):
    images = batch[0][:, :channels] // 4 + 90  # nothing is clipped on the way
    factors = np.random.default_rng(0).uniform(0.6, 1.4, (3, len(images))).astype(np.float32)
    expected = torch.stack([by_torchvision(*pair) for pair in zip(images, factors.T.tolist(), strict=True)])
    torch.testing.assert_close(jitter_colors(images, factors), expected, rtol=0, atol=2e-3)
    clipped = jitter_colors(images, np.full((3, len(images)), 2, np.float32))
    assert (clipped.min() >= 0, clipped.max()) == (True, 255)


def test_colours_change_by_uniform_factors_before_normalisation():
    """Of grey images of one value only the brightness can change."""
    transform = TrainTransform(num_classes=2, mean=(0.0,), std=(1.0,), color_jitter=0.3)
    images, _ = transform(torch.full((5000, 3, 1, 1), 100, dtype=torch.uint8), torch.zeros(5000).long(), 0)
    factors = images[:, 0, 0, 0].double() * 2.55
    assert (factors.min() - 0.7).abs() < 0.01
    assert (factors.max() - 1.3).abs() < 0.01
    assert (factors.std() - 0.3 / 3**0.5).abs() < 0.01


def test_padding_is_black_before_normalising():
    white = torch.full((64, 1, 4, 4), 255, dtype=torch.uint8)
    images, _ = TrainTransform(num_classes=2, mean=(0.5,), std=(0.5,), crop_padding=4)(white, torch.zeros(64).long(), 0)
    assert images.unique().tolist() == [-1.0, 1.0]


@pytest.mark.parametrize("mixing", [{"mixup": 0.7}, {"cutmix": 0.7}, {"mixup": 0.7, "cutmix": 0.7}], ids=str)
def test_mixed_labels_are_probabilities_of_the_two_images(batch, mixing):
    images, labels = batch
    mix = TrainTransform(num_classes=5, mean=MEAN, std=STD, **mixing)
    for step in range(10):
        mixed, target = mix(images, labels, step)
        assert mixed.shape == images.shape
        assert target.shape == (15, 5)
        torch.testing.assert_close(target.sum(1), torch.ones(15))
        own = target[torch.arange(15), labels]
        torch.testing.assert_close(own, own[:1].expand(15))  # λ, one for the batch
        torch.testing.assert_close(target[torch.arange(15), labels.roll(1)], 1 - own)


def test_mixup_mixes_pixels_by_the_weight_of_the_labels(batch):
    images, labels = batch
    mixed, target = TrainTransform(num_classes=5, mean=MEAN, std=STD, mixup=1.0)(images, labels, 3)
    weight = target[0, labels[0]]
    plain = normalize(images, MEAN, STD)
    torch.testing.assert_close(mixed, weight * plain + (1 - weight) * plain.roll(1, 0))


def test_cutmix_weighs_labels_by_the_area(batch):
    _, labels = batch
    cut = TrainTransform(num_classes=5, mean=(0.5,), std=(0.5,), cutmix=1.0)
    constant = labels.to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 20, 20)
    for step in range(10):
        mixed, target = cut(constant, labels, step)
        kept = (mixed == normalize(constant, (0.5,), (0.5,))).float().mean((1, 2, 3))
        torch.testing.assert_close(target[torch.arange(15), labels], kept)


def test_with_both_mixings_each_comes_about_half_of_the_time(batch):
    images, labels = batch
    plain = normalize(images, MEAN, STD)
    both = TrainTransform(num_classes=5, mean=MEAN, std=STD, mixup=1.0, cutmix=1.0)
    # CutMix copies pixels; mixup changes nearly all of them.
    cut = sum(
        bool(((mixed == plain) | (mixed == plain.roll(1, 0))).all())
        for mixed in (both(images, labels, step)[0] for step in range(200))
    )
    assert 70 < cut < 130


def test_a_step_repeats_exactly_and_differs_from_every_other(batch):
    def run(seed, step, rank):
        options = {
            "crop_padding": 4, "flip": True, "auto_augment": "trivialaugment", "color_jitter": 0.3, "cutout": 3, "random_erasing": 0.5,
            "mixup": 1.0, "seed": seed,
        }  # fmt: skip
        transform = TrainTransform(num_classes=5, mean=MEAN, std=STD, **options)
        return transform(*batch, step, rank)

    torch.manual_seed(1)
    first = run(3, 1, 4)
    torch.manual_seed(2)
    for one, other in zip(first, run(3, 1, 4), strict=True):
        assert torch.equal(one, other)
    sums = {run(*key)[0].sum().item() for key in ((3, 1, 4), (1, 3, 4), (3, 4, 1), (4, 1, 3), (3, 1, 5))}
    assert len(sums) == 5


def test_views_are_augmented_apart_and_lie_one_after_the_other(batch):
    images, labels = batch
    transform = TrainTransform(num_classes=5, mean=(0.0,), std=(1 / 255,), crop_padding=2, flip=True, views=3)
    viewed, repeated = transform(images, labels, 0)
    assert torch.equal(repeated, torch.cat([labels] * 3))
    once = TrainTransform(num_classes=5, mean=(0.0,), std=(1 / 255,), crop_padding=2, flip=True)
    assert torch.equal(viewed, once(images.repeat(3, 1, 1, 1), repeated, 0)[0])
    first, second, third = viewed.split(15)
    assert sum(torch.equal(a, b) for a, b in zip(first, second, strict=True)) < 5
    assert not torch.equal(second, third)


def test_the_global_generator_is_left_alone(batch):
    transform = TrainTransform(num_classes=5, mean=MEAN, std=STD, crop_padding=4, flip=True, mixup=1.0, cutmix=1.0)
    before = torch.get_rng_state()
    transform(*batch, 7, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_padding_wider_than_the_images_is_refused(batch):
    fits = TrainTransform(num_classes=5, mean=MEAN, std=STD, crop_padding=6)
    assert fits(*batch, step=0)[0].shape == (15, 3, 6, 9)
    with pytest.raises(UserError, match="crop_padding is 7, but images are 6 × 9"):
        TrainTransform(num_classes=5, mean=MEAN, std=STD, crop_padding=7)(*batch, step=0)


@pytest.mark.parametrize(
    ("options", "channels", "reason"),
    [
        ({"cutout": 7}, 3, "cutout is 7, but images are 6 × 9"),
        ({"auto_augment": "randaugment"}, 2, "these have 2 channels"),
    ],
)
def test_what_the_images_do_not_allow_is_refused(options, channels, reason):
    with pytest.raises(UserError, match=reason):
        TrainTransform(num_classes=2, mean=MEAN[:1], std=STD[:1], **options)(
            torch.zeros(4, channels, 6, 9, dtype=torch.uint8), torch.zeros(4, dtype=torch.long), 0
        )


@pytest.mark.parametrize("options", [{"cutout": 4}, {"random_erasing": 1.0}])
def test_erased_pixels_are_the_mean_of_normalised_images(options):
    white = torch.full((50, 3, 6, 9), 255, dtype=torch.uint8)
    erased, _ = TrainTransform(num_classes=2, mean=MEAN, std=STD, **options)(white, torch.zeros(50).long(), 0)
    plain = normalize(white, MEAN, STD)
    assert bool((erased == 0).flatten(1).any(1).sum() > 25)
    assert bool(((erased == 0) | (erased == plain)).all())
    assert bool(((erased == 0).all(1) == (erased == 0).any(1)).all())  # all channels or none
