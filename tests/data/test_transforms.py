import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as F

from etflight.data.base import _as_it_is
from etflight.data.sources import ArraySource, ImageSplit
from etflight.data.transforms import TrainTransform, crop_and_flip, draw_crops, normalize, step_randomness
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
    crops = draw_crops(len(images), padding, flip, seed=0, step=0, rank=0)
    slow = []
    for image, (top, left, flipped) in zip(images, crops.T.tolist(), strict=True):
        image = F.crop(F.pad(image, [padding] * 4), top, left, 6, 9)
        slow.append(F.hflip(image) if flipped else image)
    fast = crop_and_flip(images, crops, padding)
    assert torch.equal(fast, torch.stack(slow))
    assert fast.is_contiguous()


class Operations(TorchDispatchMode):
    """Counts what reaches torch's kernels."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_a_batch_takes_as_many_operations_as_one_image_does(batch):
    images, labels = batch
    counts = []
    for n in (1, 15):
        data = ImageSplit(ArraySource(images, labels), np.arange(15))
        loader = DataLoader(data, batch_size=n, collate_fn=_as_it_is)
        transform = TrainTransform(num_classes=5, mean=MEAN, std=STD, crop_padding=4, flip=True, mixup=1.0)
        transform(*next(iter(loader)), 0)  # makes what is kept
        with Operations() as operations:
            transform(*next(iter(loader)), 0)
        counts.append(operations.count)
    assert counts[0] == counts[1] > 10


def test_a_batch_in_any_layout_is_cropped_alike(batch):
    images, crops = batch[0], draw_crops(15, 2, True, seed=0, step=0, rank=0)
    other = images.contiguous(memory_format=torch.channels_last)
    assert not other.is_contiguous()
    assert torch.equal(crop_and_flip(other, crops, 2), crop_and_flip(images, crops, 2))


def test_every_offset_and_both_sides_are_drawn_evenly():
    crops = np.hstack([draw_crops(1000, 4, True, 0, step, 0) for step in range(100)])
    for values, choices in ((crops[0], 9), (crops[1], 9), (crops[2], 2)):
        seen = np.bincount(values, minlength=choices)
        assert len(seen) == choices
        assert np.abs(seen / 100_000 - 1 / choices).max() < 0.01
    assert abs(np.triu(np.corrcoef(crops), 1)).max() < 0.02


def test_normalize_is_torchvisions(batch):
    images, _ = batch
    expected = F.normalize(F.to_dtype(images, torch.float32, scale=True), MEAN, STD)
    torch.testing.assert_close(normalize(images, MEAN, STD), expected, rtol=0, atol=2e-6)


def test_one_number_normalises_every_channel(batch):
    images, _ = batch
    assert torch.equal(normalize(images, (0.5,), (0.5,)), normalize(images, (0.5,) * 3, (0.5,) * 3))


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


def test_without_mixing_labels_stay(batch):
    images, labels = batch
    kept = TrainTransform(num_classes=5, mean=MEAN, std=STD, crop_padding=2, flip=True)(images, labels, 0)[1]
    assert torch.equal(kept, labels)


def test_a_step_repeats_exactly_and_differs_from_every_other(batch):
    def run(seed, step, rank):
        transform = TrainTransform(num_classes=5, mean=MEAN, std=STD, crop_padding=4, flip=True, mixup=1.0, seed=seed)
        return transform(*batch, step, rank)

    torch.manual_seed(1)
    first = run(3, 1, 4)
    torch.manual_seed(2)
    for one, other in zip(first, run(3, 1, 4), strict=True):
        assert torch.equal(one, other)
    sums = {run(*key)[0].sum().item() for key in ((3, 1, 4), (1, 3, 4), (3, 4, 1), (4, 1, 3), (3, 1, 5))}
    assert len(sums) == 5


def test_the_global_generator_is_left_alone(batch):
    transform = TrainTransform(num_classes=5, mean=MEAN, std=STD, crop_padding=4, flip=True, mixup=1.0, cutmix=1.0)
    before = torch.get_rng_state()
    transform(*batch, 7, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_global_generator_is_restored_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), step_randomness(0, 0, 0):
        torch.rand(3).reshape(2)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_padding_wider_than_the_images_is_refused(batch):
    fits = TrainTransform(num_classes=5, mean=MEAN, std=STD, crop_padding=6)
    assert fits(*batch, step=0)[0].shape == (15, 3, 6, 9)
    with pytest.raises(UserError, match="crop_padding is 7, but images are 6 × 9"):
        TrainTransform(num_classes=5, mean=MEAN, std=STD, crop_padding=7)(*batch, step=0)
