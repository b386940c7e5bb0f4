"""Where a split's images come from, and the data set that loaders read."""

import re
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from etflight.errors import UserError

Batch = tuple[Tensor, Tensor]
MAX_PIXELS = 89_478_485  # Pillow's limit, from where on it suspects a bomb: 256 MiB as RGB
FORMATS = ("JPEG", "PNG", "WEBP")
_PLACE_IN_SOURCE = re.compile(r"\w+, \S+\.(?:cpp|h):\d+, ")  # of the decoder, in its messages


class ImageSource(ABC):
    """All images of one split, before any subset is chosen. `labels` is int64 `[N]`."""

    labels: Tensor

    @abstractmethod
    def images(self, indices: Tensor) -> Tensor:
        """uint8 `[B, C, H, W]`, contiguous, at `indices` (int64 `[B]`)."""

    def name(self, index: int) -> str:
        """What people call image `index`."""
        return str(index)


class ArraySource(ImageSource):
    """Images in memory.

    Args:
        images: uint8 `[N, C, H, W]` tensor.
        labels: `[N]` tensor of integers.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.pixels = images.contiguous()
        self.labels = labels.long()

    def images(self, indices: Tensor) -> Tensor:
        """Fetch the whole batch in one call."""
        return self.pixels.index_select(0, indices)


class FileSource(ImageSource):
    """Image files (JPEG, PNG, WebP), decoded to RGB, the shorter side resized to `size`, the centre cropped to a square.

    At most `MAX_PIXELS` are decoded from a file.

    Args:
        paths: N files.
        labels: `[N]` tensor of integers.
        size: Pixels of the square's side.
    """

    def __init__(self, paths: Sequence[Path], labels: Tensor, size: int) -> None:
        self.paths = [str(path) for path in paths]
        self.labels = labels.long()
        self.size = size

    def __getitem__(self, index: int) -> Tensor:
        """Decode one file: uint8 `[3, size, size]`.

        Raises:
            UserError: The file is missing, is no image, or is too large; names its path.
        """
        # torchvision takes seconds, which sets in memory and `--help` need not wait for
        from torchcodec.decoders import decode_image  # type: ignore[attr-defined]
        from torchvision.transforms.v2.functional import center_crop, resize  # type: ignore[attr-defined]

        path = self.paths[index]
        try:
            content = Path(path).read_bytes()
            self._check_shape(path, *_size_in_header(content))
            image = decode_image(content, mode="RGB")
        except UserError:
            raise
        except Exception as error:  # readers of broken files raise all kinds
            reason = _PLACE_IN_SOURCE.sub("", str(error))
            raise UserError(f"{path} cannot be read as an image ({reason}): replace it or remove it") from None
        if image.ndim == 4:  # of an animation the first picture
            image = image[0]
        return center_crop(resize(image, [self.size], antialias=True), [self.size, self.size])

    def _check_shape(self, path: str, width: int, height: int) -> None:
        """Refuse a line of pixels: with its shorter side resized it would fill the memory."""
        shorter, longer = sorted((width, height))
        if self.size**2 * longer // max(shorter, 1) > max(MAX_PIXELS, 4 * self.size**2):
            raise UserError(
                f"{path} has {width}×{height} pixels, too long and thin for a square: crop it, or remove it"
            )

    def images(self, indices: Tensor) -> Tensor:
        """Decode the batch's files one by one."""
        # in a worker, unlike `torch.stack`, it stacks into the memory that the main process reads: no second copy
        return cast(Tensor, default_collate([self[i] for i in indices.tolist()]))

    def name(self, index: int) -> str:
        """The file's path."""
        return self.paths[index]


def _size_in_header(content: bytes) -> tuple[int, int]:
    """Width and height of an image file, without decoding it; an animation's pictures lie side by side."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        # by content, whatever the name: Pillow would run Ghostscript for a PostScript file that is called .png
        with Image.open(BytesIO(content), formats=FORMATS) as file:
            width, height = file.size
            frames = getattr(file, "n_frames", 1)
    if width * height * frames > MAX_PIXELS:
        raise ValueError(f"{frames} pictures of {width}×{height} pixels are more than {MAX_PIXELS}")
    return width, height


class ImageSplit(Dataset[Batch]):
    """The images of a source that one split uses, fetched a whole batch at a time.

    Args:
        source: The images.
        indices: int64 `[N]` positions in the source.
    """

    def __init__(self, source: ImageSource, indices: NDArray[np.int64]) -> None:
        self.source = source
        self.indices = torch.from_numpy(indices)
        self.labels = source.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitems__(self, positions: list[int]) -> Batch:
        """Images uint8 `[B, C, H, W]` and labels int64 `[B]`; DataLoader calls this once per batch."""
        where = torch.from_numpy(np.array(positions, np.int64))  # `torch.tensor` of a list is several times as slow
        return self.source.images(self.indices.index_select(0, where)), self.labels.index_select(0, where)

    def __getitem__(self, position: int) -> Batch:
        """One image uint8 `[C, H, W]` and its label, int64 without dimensions."""
        images, labels = self.__getitems__([position])
        return images[0], labels[0]

    def name(self, position: int) -> str:
        """What people call the image at `position`."""
        return self.source.name(int(self.indices[position]))
