"""Images per second of the input pipeline, against a training step and what reading files cannot do without."""

import itertools
import resource
from collections import deque
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import AutoAugmentPolicy, v2
from torchvision.transforms.v2.functional import center_crop, resize

from etflight import Classifier, LinearHead
from etflight.data import ArrayImages, FolderImages
from etflight.data.auto_augment import AutoAugment, augment
from etflight.losses import CrossEntropyLoss
from tests.training import save_arrays

pytestmark = pytest.mark.benchmark

MEAN, STD = [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]


@pytest.fixture(scope="module")
def cifar_like(tmp_path_factory):
    """A data module on images as many and as large as CIFAR-10's, by its options."""
    file = tmp_path_factory.mktemp("cifar") / "images.npz"
    save_arrays(file, train=50_000, test=10, shape=(32, 32, 3))
    return partial(ArrayImages, str(file), batch_size=128, crop_padding=4, flip=True, mean=MEAN, std=STD)


def exhaust(iterator):
    deque(iterator, maxlen=0)


def processor_seconds():
    """Of this process and of those that it has started and that have ended: what another load on the machine takes does not count."""
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


def transformed(data, loader):
    """The batches as a training step gets them."""
    for step, batch in enumerate(loader):
        yield data.train_transform(batch, step)


@pytest.mark.parametrize(
    ("name", "options", "limit"),
    [
        ("crop, flip", {}, 0.03),
        ("with mixup", {"mixup": 1.0}, 0.03),
        ("with AutoAugment and Cutout", {"auto_augment": "autoaugment_cifar10", "cutout": 16}, 0.05),
    ],
    ids=["crop and flip", "mixup too", "automatic augmentation too"],
)
def test_a_batch_in_memory_costs_little_of_a_training_step(
    name, options, limit, cifar_like, median_ratio, record_ratio
):
    data = cifar_like(**options)
    batches = transformed(data, itertools.chain.from_iterable(itertools.repeat(data.train_dataloader())))
    images, labels = next(batches)
    torch.manual_seed(0)
    model = Classifier(10, "resnet32_cifar", head=LinearHead, loss=CrossEntropyLoss)
    model.to(memory_format=torch.channels_last)  # the quicker of the two, here as in training
    images = images.contiguous(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step():
        optimizer.zero_grad()
        model.loss(model(images), labels).backward()
        optimizer.step()

    ratio = median_ratio(lambda: next(batches), step, repeats=9)
    record_ratio(f"batch of 128 ({name}) / step of ResNet-32", ratio, limit)


@pytest.mark.parametrize(
    ("policy", "published", "limit"),
    [
        ("autoaugment_cifar10", v2.AutoAugment(AutoAugmentPolicy.CIFAR10), 1 / 4),
        ("randaugment", v2.RandAugment(), 1 / 4),
        ("trivialaugment", v2.TrivialAugmentWide(), 1 / 4),
    ],
)
def test_a_batch_is_augmented_several_times_as_quickly_as_image_by_image(
    policy, published, limit, median_ratio, record_ratio
):
    images = torch.randint(256, (128, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    random, drawn = np.random.default_rng(0), AutoAugment.parse(policy)

    def ours():
        for _ in range(5):
            augment(images, *drawn.draw(128, 32, 32, random))

    def one_by_one():
        for _ in range(5):
            torch.stack([published(image) for image in images])

    ratio = median_ratio(ours, one_by_one, repeats=9)
    record_ratio(f"{policy} of a batch of 128 / torchvision's of its images one by one", ratio, limit)


class Bare(Dataset):
    """torchvision's decoder and the resize that `FolderImages` promises, and nothing else."""

    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        image = decode_image(self.files[index], mode=ImageReadMode.RGB)
        return center_crop(resize(image, [224], antialias=True), [224, 224]), 0


@pytest.mark.filterwarnings("ignore:.*deprecated since torchvision")
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_image_files_cost_little_more_than_bare_decoding(suffix, tmp_path, median_ratio, record_ratio):
    rng = np.random.default_rng(0)
    for split, n in (("train", 192 if suffix == "jpg" else 64), ("test", 1)):
        for name in ("cat", "dog"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(n):  # as large as ImageNet's on average, smooth with some grain
                smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((500, 375))
                grain = rng.integers(-8, 9, (375, 500, 3))
                photo = Image.fromarray((np.asarray(smooth) + grain).clip(0, 255).astype(np.uint8))
                photo.save(folder / f"{i}.{suffix}", quality=90)
    data = FolderImages(root=str(tmp_path), batch_size=32, num_workers=2)
    files = [data.sample_name("train", i) for i in range(len(data.split("train")))]
    bare = DataLoader(Bare(files), batch_size=32, shuffle=True, num_workers=2)
    assert torch.equal(data.split("train")[0][0], bare.dataset[0][0])
    # a loader of its own each time, so that its processes have ended, and count
    ratio = median_ratio(
        lambda: exhaust(data.train_dataloader()), lambda: exhaust(bare), repeats=9, clock=processor_seconds
    )
    record_ratio(f"epoch of {suffix.upper()} files / bare torchvision.io, 2 workers each", ratio, 1 / 0.9)
