"""Classes of pictures from anywhere: files, pictures that Pillow has opened, and arrays, prepared as in training."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from etflight.data.decoding import decode_file, fit_to, from_pillow, with_channels
from etflight.data.files import Square, stack
from etflight.data.preprocessing import Preprocessing
from etflight.data.transforms import normalize
from etflight.utils.errors import UserError, argument

Picture = str | Path | Image.Image | NDArray[np.uint8] | Tensor


class Predictions(NamedTuple):
    """The k most probable classes of each of N images, the most probable first.

    Attributes:
        names: The names of the classes, a list of k for each image; the labels as texts where the names are unknown.
        probabilities: Their calibrated probabilities `[N, k]`, float32, on the CPU.
        labels: Their indices `[N, k]`, int64, on the CPU.
    """

    names: list[list[str]]
    probabilities: Tensor
    labels: Tensor


@torch.no_grad()
def predict(
    probabilities: Callable[[Tensor], Tensor],
    images: Picture | Sequence[Picture],
    preprocessing: Preprocessing | None,
    names: Sequence[str],
    *,
    device: torch.device,
    batch_size: int,
    top_k: int,
) -> Predictions:
    """Predict the classes of pictures; see `etflight.Classifier.predict`.

    Args:
        probabilities: What computes the probabilities `[B, K]` of prepared images `[B, C, H, W]`.
        images: The pictures.
        preprocessing: How they are prepared, or None if that is unknown.
        names: The names of the K classes.
        device: The device of the prepared images.
        batch_size: The number of images at a time.
        top_k: The number k of classes for each image.

    Raises:
        UserError: An image cannot be read or has other channels, the preprocessing is unknown, or a number is out of range.
    """
    if preprocessing is None:
        raise UserError(
            "the model does not know how its images were prepared, since it was trained without a data module of etflight's: "
            "set model.preprocessing to an etflight.data.preprocessing.Preprocessing"
        )
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: give at least 1")
    if not 1 <= top_k <= len(names):
        raise UserError(f"{argument('top_k', top_k)}: the model has {len(names)} classes: give 1 to {len(names)}")
    pictures, kept = _pictures(images), []
    while batch := [_prepared(picture, name, preprocessing) for name, picture in islice(pictures, batch_size)]:
        prepared = normalize(stack(batch).to(device), preprocessing.mean, preprocessing.std)
        kept.append([part.cpu() for part in probabilities(prepared).float().topk(top_k, dim=1)])
    if not kept:
        raise UserError("there is no image: give at least one")
    found, labels = (torch.cat(parts) for parts in zip(*kept, strict=True))
    if len(broken := (~found.isfinite()).any(dim=1).nonzero()):
        raise UserError(
            f"the probabilities of {len(broken)} of {len(found)} images are NaN, the first is image {int(broken[0])}: "
            "the weights have diverged, or half precision is not enough"
        )
    return Predictions([[names[label] for label in row] for row in labels.tolist()], found, labels)


def _pictures(images: Any) -> Iterator[tuple[str, Any]]:
    """Each picture with its name for people: a path, a picture of Pillow's, or uint8 `[C, H, W]`."""
    if isinstance(images, np.ndarray | Tensor) and images.ndim == 4:
        for i, pixels in enumerate(_as_tensor(images, "images")):
            yield f"images[{i}] of [B, C, H, W]", pixels
    elif isinstance(images, str | Path | Image.Image | np.ndarray | Tensor):
        yield _named(images, "the image")
    else:
        for i, picture in enumerate(images):
            yield _named(picture, f"image {i}")


def _named(picture: Any, name: str) -> tuple[str, Any]:
    if isinstance(picture, str | Path):
        return str(picture), picture
    if isinstance(picture, Image.Image):
        return name, picture
    if isinstance(picture, np.ndarray | Tensor) and picture.ndim in (2, 3):
        pixels = _as_tensor(picture, name)
        return f"{name} [H, W, C]", pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)
    shape = f" of shape {list(picture.shape)}" if hasattr(picture, "shape") else ""
    raise UserError(
        f"{name} is a {type(picture).__name__}{shape}: give the path of an image file, a picture of Pillow's, uint8 [H, W, C], "
        "a list of these, or uint8 [B, C, H, W]"
    )


def _as_tensor(pixels: NDArray[Any] | Tensor, name: str) -> Tensor:
    if (dtype := str(pixels.dtype).removeprefix("torch.")) != "uint8":
        raise UserError(
            f"{name}: pixels are {dtype}: give uint8, from 0 to 255; model.probabilities takes images that are prepared already"
        )
    return pixels.cpu() if isinstance(pixels, Tensor) else torch.from_numpy(np.require(pixels, requirements=["C", "W"]))


def _prepared(picture: Any, name: str, preprocessing: Preprocessing) -> Tensor:
    """Read a picture: uint8 `[C, H, W]` of the model's size."""
    channels, *size = preprocessing.input_size
    covered = [Square(side, preprocessing.crop_pct).side for side in size]
    mode: Any = "GRAY" if channels == 1 else "RGB"
    if isinstance(picture, str | Path):
        if Path(picture).is_dir():
            raise UserError(f"{picture} is a folder: give the paths of the image files in it")
        picture = decode_file(str(picture), max(covered), mode)
    elif isinstance(picture, Image.Image):
        try:
            picture = from_pillow(picture, mode)
        except (OSError, ValueError) as error:
            raise UserError(f"{name} cannot be read ({error}): leave it out") from error
    return fit_to(with_channels(picture, channels, name), size, covered)
