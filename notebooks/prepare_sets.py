"""Makes data/gtsrb32.npz or data/omniglot.npz from the public sources, which it downloads into data/ where they are missing:

python -m notebooks.prepare_sets gtsrb
python -m notebooks.prepare_sets omniglot

GTSRB: of the 39,209 images of the final training set the last of every five frames of a track, of the 12,630 test images every second one.
Omniglot: eight alphabets of its background set, of each character the first 15 drawings for training and the other 5 for the test.
The choice of the images, and Omniglot's pixels, are those of the files that the published results were measured on; their signs were
resized with OpenCV, from which these may differ by rounding.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torchvision import datasets
from torchvision.datasets.utils import download_and_extract_archive
from torchvision.transforms.v2.functional import pil_to_tensor, resize

from etflight.data import GTSRB

ALPHABETS = (
    "Balinese", "Early_Aramaic", "Greek", "Japanese_(katakana)", "Korean", "Latin", "Sanskrit", "Tagalog",
)  # fmt: skip
_GTSRB = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370/GTSRB_Final_Training_Images.zip"
_TRAINED_WITH = 15  # drawings of each character


def gtsrb(root: Path) -> None:
    """Write `gtsrb32.npz` from `root/gtsrb`, torchvision's folder with the final training set beside it."""
    folder = root / "gtsrb"
    classes = folder / "GTSRB/Final_Training/Images"
    if not classes.is_dir():  # torchvision itself fetches 26,640 images of an earlier phase
        download_and_extract_archive(_GTSRB, str(folder), remove_finished=True)
    labels = sorted(path for path in classes.iterdir() if path.is_dir())
    frames = [(path, int(label.name)) for label in labels for path in sorted(label.glob("*_*.ppm"))]
    train = [(path, label) for path, label in frames if int(path.stem.split("_")[1]) % 5 == 4]
    test = datasets.GTSRB(root, split="test", download=True)._samples[::2]
    names = GTSRB(root=str(root)).class_names
    _save(root / "gtsrb32.npz", train, [(Path(path), label) for path, label in test], names, _rgb)


def omniglot(root: Path) -> None:
    """Write `omniglot.npz` from `root/omniglot-py/images_background`, as torchvision leaves it."""
    folder = root / "omniglot-py/images_background"
    if not folder.is_dir():
        datasets.Omniglot(root, background=True, download=True)
    characters = [path for alphabet in ALPHABETS for path in sorted((folder / alphabet).iterdir())]
    train, test = [], []
    for label, character in enumerate(characters):
        drawings = [(path, label) for path in sorted(character.glob("*.png"))]
        train += drawings[:_TRAINED_WITH]
        test += drawings[_TRAINED_WITH:]
    names = [f"{character.parent.name}/{character.name}" for character in characters]
    _save(root / "omniglot.npz", train, test, names, _strokes)


def _rgb(path: Path) -> NDArray[np.uint8]:
    """`[32, 32, 3]`."""
    with Image.open(path) as image:
        pixels = pil_to_tensor(image.convert("RGB"))
    return resize(pixels, [32, 32], antialias=False).permute(1, 2, 0).numpy()


def _strokes(path: Path) -> NDArray[np.uint8]:
    """`[28, 28, 1]`, white on black."""
    with Image.open(path) as image:
        return np.asarray(ImageOps.invert(image.convert("L")).resize((28, 28), Image.Resampling.BOX))[..., None]


def _save(
    file: Path,
    train: Sequence[tuple[Path, int]],
    test: Sequence[tuple[Path, int]],
    names: Sequence[str],
    read: Callable[[Path], NDArray[np.uint8]],
) -> None:
    arrays = {}
    for split, samples in (("train", train), ("test", test)):
        arrays[f"{split}_images"] = np.stack([read(path) for path, _ in samples])
        arrays[f"{split}_labels"] = np.array([label for _, label in samples], np.uint16)
    np.savez(file, **arrays, class_names=np.array(names))
    print(f"{file}: {len(train)} training and {len(test)} test images of {len(names)} classes")


if __name__ == "__main__":
    makers = {"gtsrb": gtsrb, "omniglot": omniglot}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=makers)
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of the sets")
    arguments = parser.parse_args()
    makers[arguments.set](arguments.root)
