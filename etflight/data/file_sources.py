"""Image files as loaders read them: decoded in their processes, cut to squares, unreadable ones named or passed over."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from etflight.data.decoding import center_square, decode_file, random_square
from etflight.data.paths import Paths
from etflight.data.sampler import Draw
from etflight.data.sources import Batch, ImageSource, ImageSplit
from etflight.errors import UserError, warn


class Square(NamedTuple):
    """How a picture becomes a square.

    Attributes:
        size: Its side, in pixels.
        crop_pct: Part of the resized shorter side that the square in the middle keeps, in (0, 1]; timm's name.
        min_crop_scale: Least part of the picture's area that a random square of training shows, in (0, 1]; 1: always the
            middle.
    """

    size: int
    crop_pct: float = 1.0
    min_crop_scale: float = 1.0

    @property
    def side(self) -> int:
        """Pixels to which the shorter side is resized."""
        return max(self.size, int(self.size / self.crop_pct))


class FileSource(ImageSource):
    """Image files, decoded to RGB and cut to squares.

    Args:
        paths: N files.
        labels: `[N]` tensor of integers.
        square: How they are cut.
    """

    def __init__(self, paths: Paths, labels: Tensor, square: Square) -> None:
        self.paths = paths
        self.labels = labels.long()
        self.square = square
        self.crop_pct = square.crop_pct

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """C, H and W, known before any file is read."""
        return 3, self.square.size, self.square.size

    def __getitem__(self, index: int) -> Tensor:
        """Decode one file, for evaluation: uint8 `[3, size, size]`, the middle.

        Raises:
            UserError: The file is missing, is no image, or is too large; names its path.
        """
        return center_square(self._decode(index), self.square.size, self.square.side)

    def drawn(self, index: int, seed: int, number: int) -> Tensor:
        """Decode one file, for training: uint8 `[3, size, size]`, a part that (seed, number) choose.

        Raises:
            UserError: As for evaluation.
        """
        if self.square.min_crop_scale == 1:
            return self[index]
        random = np.random.default_rng([seed, number])
        return random_square(self._decode(index), self.square.size, self.square.min_crop_scale, random)

    def images(self, indices: Tensor) -> Tensor:
        """Decode files one by one, for evaluation."""
        return stack([self[i] for i in indices.tolist()])

    def name(self, index: int) -> str:
        """The file's path."""
        return self.paths[index]

    def marks(self) -> Iterable[memoryview]:
        """Their paths below the folder, wherever that is; no file is read."""
        return self.paths.marks()

    def _decode(self, index: int) -> Tensor:
        return decode_file(self.paths[index], self.square.side)


class FileSplit(ImageSplit):
    """The image files that one split uses.

    Args:
        source: The files.
        indices: int64 `[N]` positions in the source.
        skip_corrupt: Pass over what cannot be read, and count it.
    """

    source: FileSource

    def __init__(self, source: FileSource, indices: NDArray[np.int64], *, skip_corrupt: bool = False) -> None:
        super().__init__(source, indices)
        self._unreadable = torch.zeros(len(indices), dtype=torch.bool) if skip_corrupt else None
        if self._unreadable is not None:
            self._unreadable.share_memory_()  # type: ignore[no-untyped-call]

    def __getitems__(self, positions: Sequence[int | Draw]) -> Batch:
        """Images uint8 `[B, 3, size, size]` and labels int64 `[B]`, as evaluation sees them, or as training does where a `Draw` is given.

        A draw that cannot be read is replaced by the next of the batch that can, so that a batch of training keeps its size; in
        evaluation the batch is shorter, or empty.

        Raises:
            UserError: A file cannot be read and is not to be passed over, or none of a batch of training can.
        """
        drawn = isinstance(positions[0], Draw)
        where = [position.position if isinstance(position, Draw) else position for position in positions]
        pictures = [self._read(position) for position in positions]
        readable = np.flatnonzero([picture is not None for picture in pictures])
        if drawn:
            if len(readable) == 0:
                raise UserError(
                    f"no image of a batch of {len(positions)} can be read, the first is {self.name(where[0])}"
                )
            readable = readable[np.searchsorted(readable, np.arange(len(positions))) % len(readable)]
        kept = readable.tolist()
        if not kept:
            return torch.empty(0, *self.source.image_shape, dtype=torch.uint8), self.labels[:0]
        return stack([cast(Tensor, pictures[slot]) for slot in kept]), self.labels[[where[slot] for slot in kept]]

    def _read(self, position: int | Draw) -> Tensor | None:
        where = position.position if isinstance(position, Draw) else position
        try:
            index = int(self.indices[where])
            if isinstance(position, Draw):
                return self.source.drawn(index, position.seed, position.number)
            return self.source[index]
        except UserError:
            if self._unreadable is None:
                raise
            self._unreadable[where] = True  # shared: what a loader process writes the main process reads
            return None

    def end_pass(self) -> None:
        """Tell what was passed over since the last time."""
        if self._unreadable is None or not self._unreadable.any():
            return
        positions = self._unreadable.nonzero().flatten().tolist()
        self._unreadable.zero_()
        rest = f" and {len(positions) - 3} more" if len(positions) > 3 else ""
        count, verb = ("1 image", "was") if len(positions) == 1 else (f"{len(positions)} images", "were")
        warn(f"{count} could not be read and {verb} skipped: {', '.join(map(self.name, positions[:3]))}{rest}")


def stack(pictures: Sequence[Tensor]) -> Tensor:
    """`torch.stack`; in a loader process into the memory that the main process reads, without a second copy."""
    return cast(Tensor, default_collate(list(pictures)))
