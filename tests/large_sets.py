"""Published sets of image files at their real size, without the images: real numbers of lines and classes, small files on disk."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# published: most and fewest training images of a class, and training, validation and test images in all
IMAGENET_LT = {"num_classes": 1000, "most": 1280, "fewest": 5, "train": 115_846, "val": 20_000, "test": 50_000}
INATURALIST = {"num_classes": 8142, "most": 1000, "fewest": 2, "train": 437_513, "val": 24_426}
_LINKS = 60_000  # of a file; ext4 has room for 65,000


def long_tail(num_classes: int, most: int, fewest: int, total: int) -> NDArray[np.int64]:
    """`[K]` sizes of classes that fall from `most` to `fewest` like a power of the rank, `total` in all."""
    rank = np.arange(num_classes) / (num_classes - 1)

    def sizes(power: float) -> NDArray[np.int64]:
        return np.rint(fewest + (most - fewest) * (1 - rank) ** power).astype(np.int64)

    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sizes(middle).sum() > total else (low, middle)
    counts = sizes(high)
    short = int(total - counts.sum())
    counts[1 : 1 + short] += 1  # rounding
    assert counts.sum() == total
    return counts


def lay_out(root: Path, pattern: str, file: str, sizes: Mapping[str, int]) -> None:
    """Write lists and the files they name, which are hard links of a few small JPEG files.

    Args:
        root: Gets the lists, in random order, and the folders.
        pattern: Of a list's name, with the split for `{}`.
        file: A file's path, with `{label}`, `{number}` and `{split}`.
        sizes: What is published; training images have a long tail, all others equal classes.
    """
    root.mkdir(parents=True)
    links, num_classes = 0, sizes["num_classes"]
    for split in [split for split in ("train", "val", "test") if split in sizes]:
        counts = np.full(num_classes, sizes[split] // num_classes)
        if split == "train":
            counts = long_tail(num_classes, sizes["most"], sizes["fewest"], sizes["train"])
        lines = []
        for label, count in enumerate(counts.tolist()):
            paths = [file.format(split=split, label=label, number=number) for number in range(count)]
            (root / paths[0]).parent.mkdir(parents=True, exist_ok=True)
            for path in paths:
                if links % _LINKS == 0:
                    picture = root / f"picture{links // _LINKS}.jpg"
                    Image.effect_noise((16, 16), 64).convert("RGB").save(picture)
                os.link(picture, root / path)
                links += 1
            lines += [f"{path} {label}\n" for path in paths]
        order = np.random.default_rng(0).permutation(len(lines))
        (root / pattern.format(split)).write_text("".join(lines[i] for i in order))


def inaturalist(root: Path) -> None:
    """iNaturalist 2018's folders and lists, with names as long as the published ones, of 32 digits."""
    lay_out(root, "iNaturalist18_{}.txt", "train_val2018/Plantae/{label}/{split}{number:027}.jpg", INATURALIST)


def imagenet_lt(root: Path) -> None:
    """ImageNet-LT's folders and lists."""
    lay_out(root, "ImageNet_LT_{}.txt", "{split}/n{label:08}/n{label:08}_{number}.JPEG", IMAGENET_LT)
