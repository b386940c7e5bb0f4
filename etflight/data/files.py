"""Image files: paths in a few tensors, squares that loaders read, missing and corrupt files."""

import os
from abc import abstractmethod
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from etflight.data.base import ImageDataModule
from etflight.data.decoding import decode_file, fit_to, random_square, warn_of_few_levels_in_files
from etflight.data.preprocessing import LARGEST_SIDE, LEAST_CROP, Preprocessing
from etflight.data.sampler import Draw, ImbalancedSampler, NumberedSampler
from etflight.data.sources import Batch, ImageSource, ImageSplit, Split
from etflight.data.transforms import step_randomness
from etflight.utils.errors import UserError, argument, first_few, warn

_CHUNK = 1024  # files of a thread's turn
_THREADS = 8  # they wait for a network file system together


class Paths:
    """N paths below a folder, packed into two tensors.

    A list of strings would be copied into every loader process: reading a string writes its reference count, and so its
    memory page. Tensors are shared, also with processes that are not forked.

    Args:
        root: The folder.
        paths: Relative to `root`.
    """

    def __init__(self, root: str, paths: Iterable[str]) -> None:
        encoded = [os.fsencode(path) for path in paths]
        self.root = root
        self._text = torch.from_numpy(np.frombuffer(bytearray(b"".join(encoded)), np.uint8))
        self._ends = torch.from_numpy(np.cumsum([0, *map(len, encoded)]))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> str:
        """The path, with the folder."""
        return os.path.join(self.root, self.relative(index))

    def relative(self, index: int) -> str:
        """The path as it was given."""
        start, end = self._ends.numpy()[index : index + 2]
        return os.fsdecode(self._text.numpy()[start:end].tobytes())

    def all_relative(self) -> list[str]:
        """All paths as they were given."""
        text = self._text.numpy().tobytes()
        return [os.fsdecode(text[start:end]) for start, end in pairwise(self._ends.tolist())]

    def marks(self) -> Iterator[memoryview]:
        """The bytes of all paths, and the places where each path begins and ends."""
        return (values.numpy().data for values in (self._text, self._ends[:-1], self._ends[1:]))

    def missing(self) -> list[int]:
        """Positions of the files that are not there."""
        root = os.path.join(self.root, "")
        paths = [root + path for path in self.all_relative()]

        def missing_from(start: int) -> list[int]:
            part = enumerate(paths[start : start + _CHUNK], start)
            return [index for index, path in part if not os.access(path, os.F_OK)]  # half the work of os.path.exists

        with ThreadPool(_THREADS) as threads:
            return [index for part in threads.map(missing_from, range(0, len(paths), _CHUNK)) for index in part]


def files_below(folder: str, suffixes: Collection[str] | None = None) -> list[str]:
    """The paths of the files below a folder, relative to it and sorted by folder and name, part by part.

    Only files with one of these suffixes, in upper or lower case, are listed, or all without `suffixes`; hidden files, and files in hidden
    folders, where editors keep originals and thumbnails, never are.
    """
    found: list[str] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            os.path.relpath(os.path.join(parent, name), folder)
            for name in names
            if (suffixes is None or os.path.splitext(name)[1].lower() in suffixes) and not name.startswith(".")
        ]
    return sorted(found, key=lambda path: path.split(os.sep))


class Square(NamedTuple):
    """How a picture becomes a square.

    Attributes:
        image_size: Its side, in pixels.
        crop_pct: Part of the resized shorter side that the square in the middle keeps, in (0, 1]; timm's name.
        min_crop_scale: Least part of the picture's area that a random square of training shows, in (0, 1]; 1: always the
            middle.
    """

    image_size: int
    crop_pct: float = 1.0
    min_crop_scale: float = 1.0

    @property
    def side(self) -> int:
        """Pixels to which the shorter side is resized."""
        return max(self.image_size, int(self.image_size / self.crop_pct))


class FileSource(ImageSource):
    """Image files, decoded to RGB and cut to squares.

    Args:
        paths: N files.
        labels: `[N]` tensor of integers.
        square: How the pictures are cut.
    """

    def __init__(self, paths: Paths, labels: Tensor, square: Square) -> None:
        self.paths = paths
        self.labels = labels.long()
        self.square = square
        self.crop_pct = square.crop_pct
        self.folder = os.path.realpath(paths.root)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """C, H and W, known before any file is read."""
        return 3, self.square.image_size, self.square.image_size

    def picture(self, index: int, draw: Draw | None = None) -> Tensor:
        """Decode one file: uint8 `[3, size, size]`.

        Args:
            index: The file.
            draw: For training: a part of the picture that depends on its seed and number. None: the middle, for evaluation.

        Raises:
            UserError: The file is missing, is no image, or is too large; the message has its path.
        """
        image, size = decode_file(self.paths[index], self.square.side), self.square.image_size
        if draw is None or self.square.min_crop_scale == 1:
            return fit_to(image, [size] * 2, [self.square.side] * 2)
        with step_randomness(draw.seed, draw.number):
            return random_square(image, size, self.square.min_crop_scale)

    def images(self, indices: Tensor) -> Tensor:
        """Decode files one by one, for evaluation."""
        return stack([self.picture(i) for i in indices.tolist()])

    def name(self, index: int) -> str:
        """The file's path."""
        return self.paths[index]

    def marks(self) -> Iterable[memoryview]:
        """The paths below the folder, independent of where it is; no file is read."""
        return self.paths.marks()

    def sizes(self, indices: Tensor) -> NDArray[np.int64]:
        """The sizes of the files in bytes, -1 for a file that is missing."""

        def size(index: int) -> int:
            try:
                return os.stat(self.paths[index]).st_size
            except OSError:
                return -1

        with ThreadPool(_THREADS) as threads:
            return np.array(threads.map(size, indices.tolist(), _CHUNK), np.int64)


class FileSplit(ImageSplit):
    """The image files that one split uses.

    Args:
        source: The files.
        indices: Int64 `[N]` positions in the source.
        skip_corrupt: Skip files that cannot be read, and count them.
    """

    source: FileSource

    def __init__(self, source: FileSource, indices: NDArray[np.int64], *, skip_corrupt: bool = False) -> None:
        super().__init__(source, indices)
        self._unreadable = torch.zeros(len(indices), dtype=torch.bool) if skip_corrupt else None
        if self._unreadable is not None:
            self._unreadable.share_memory_()  # type: ignore[no-untyped-call]

    def __getitems__(self, positions: Sequence[int | Draw]) -> Batch:
        """Images uint8 `[B, 3, size, size]` and labels int64 `[B]`: `Draw`s are cut for training, integers for evaluation.

        A draw that cannot be read is replaced by the next of the batch that can, so that a training batch keeps its size; an
        evaluation batch becomes shorter, or empty.

        Raises:
            UserError: A file cannot be read and is not to be skipped, or no file of a training batch can be read.
        """
        draws = [position if isinstance(position, Draw) else None for position in positions]
        where = [position.position if isinstance(position, Draw) else position for position in positions]
        pictures = [self._read(place, draw) for place, draw in zip(where, draws, strict=True)]
        readable = np.flatnonzero([picture is not None for picture in pictures])
        if draws[0] is not None:
            if len(readable) == 0:
                raise UserError(
                    f"no image of a batch of {len(positions)} can be read, the first is {self.name(where[0])}"
                )
            readable = readable[np.searchsorted(readable, np.arange(len(positions))) % len(readable)]
        elif len(readable) == 0:
            return torch.empty(0, *self.source.image_shape, dtype=torch.uint8), self.labels[:0]
        kept = readable.tolist()
        return stack([cast(Tensor, pictures[slot]) for slot in kept]), self.labels[[where[slot] for slot in kept]]

    def _read(self, place: int, draw: Draw | None) -> Tensor | None:
        try:
            return self.source.picture(int(self.indices[place]), draw)
        except UserError:
            if self._unreadable is None:
                raise
            self._unreadable[place] = True  # in shared memory: the main process reads what a loader process writes
            return None

    def end_pass(self) -> None:
        """Warn of the images that were skipped since the last pass ended."""
        if self._unreadable is None or not self._unreadable.any():
            return
        positions = self._unreadable.nonzero().flatten().tolist()
        self._unreadable.zero_()
        count, verb = ("1 image", "was") if len(positions) == 1 else (f"{len(positions)} images", "were")
        warn(f"{count} could not be read and {verb} skipped: {first_few(map(self.name, positions), len(positions))}")


def stack(pictures: Sequence[Tensor]) -> Tensor:
    """Stack pictures; a loader process does so in the memory that the main process reads, without a second copy."""
    return cast(Tensor, default_collate(list(pictures)))


class PhotoRecipe:
    """The field's recipe for photographs, after ImageNet: random squares, mirrored; ImageNet's mean and standard deviation."""

    named_after: ClassVar[str | None] = None
    standard_mean: ClassVar[tuple[float, ...]] = (0.485, 0.456, 0.406)
    standard_std: ClassVar[tuple[float, ...]] = (0.229, 0.224, 0.225)
    standard_flip: ClassVar[bool] = True
    standard_min_crop_scale: ClassVar[float] = 0.08
    standard_crop_pct: ClassVar[float] = 0.875


@dataclass(eq=False, kw_only=True)
class FileImages(ImageDataModule):
    """Image files, decoded to RGB squares by the loader processes (`num_workers`).

    A file that cannot be read ends a run with an error that has its path. With `skip_corrupt`, a training image that cannot be read is
    replaced by the next of its batch; where training or validation images are evaluated it is left out. At the end of each pass, even one
    that is cut short, one line says how many there were and names the first three. Only if no image of a training batch, or of a whole
    evaluation, can be read does the run end. Test images are never skipped, even when they are watched in training: a result covers all
    of them.

    Args:
        root: Folder that holds the files.
        image_size: Side of the square, in pixels; None: the set's standard recipe, 224 for folders and lists.
        min_crop_scale: In training, show a random part of the picture, at least this of its area (RandomResizedCrop); 1: the middle, as in
            evaluation; None: the set's standard recipe.
        crop_pct: In evaluation the shorter side is resized to `image_size / crop_pct` and the middle cropped (timm's name); None: the set's
            standard recipe.
        skip_corrupt: Skip training and validation images that cannot be read, and count them.
    """

    standard_image_size: ClassVar[int] = 224
    standard_min_crop_scale: ClassVar[float] = 1.0
    standard_crop_pct: ClassVar[float] = 1.0
    sampler_class: ClassVar[type[ImbalancedSampler]] = NumberedSampler
    num_channels: ClassVar[int] = 3

    root: str = field(kw_only=False)
    image_size: int | None = None
    min_crop_scale: float | None = None
    crop_pct: float | None = None
    skip_corrupt: bool = False

    _levels_checked: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        """Check the options that need no file."""
        super().__post_init__()
        rule = "give a part of the resized side, from 0.1 to 1"
        self._refuse_unless(LEAST_CROP <= self._or_standard("crop_pct") <= 1, "crop_pct", rule)
        rule = "give a part of the picture's area, above 0 and at most 1"
        self._refuse_unless(0 < self._or_standard("min_crop_scale") <= 1, "min_crop_scale", rule)
        rule = f"give at least 1 pixel, and for image_size / crop_pct at most {LARGEST_SIDE}"
        self._refuse_unless(self._square.image_size >= 1 and self._square.side <= LARGEST_SIDE, "image_size", rule)

    def __str__(self) -> str:
        return f"{type(self).__name__} in {self.root}"

    @classmethod
    def options_for(cls, preprocessing: Preprocessing) -> dict[str, Any]:
        """As in the base class, plus the size of the square and the part of the picture that it keeps."""
        _, height, width = preprocessing.input_size
        square = {"image_size": width, "crop_pct": preprocessing.crop_pct} if height == width else {}
        return {**super().options_for(preprocessing), **square}

    @property
    def training_options(self) -> dict[str, Any]:
        """As in the base class, plus how pictures are cut."""
        return {**super().training_options, "min_crop_scale": self._or_standard("min_crop_scale")}

    @property
    def changing(self) -> dict[str, Any]:
        """As in the base class, plus how pictures are cut, and whether another may take the place of one that cannot be read."""
        own = {"min_crop_scale": (self._or_standard("min_crop_scale"), 1.0), "skip_corrupt": (self.skip_corrupt, False)}
        off = {f"{self.option}.{name}": neutral for name, (value, neutral) in own.items() if value != neutral}
        return off | super().changing

    def _checked(self, name: Split) -> ImageSource:
        source = super()._checked(name)
        if not self._levels_checked:
            self._levels_checked = True
            warn_of_few_levels_in_files(self, len(source.labels), source.name)
        return source

    def make_split(self, name: Split, source: ImageSource, indices: NDArray[np.int64]) -> ImageSplit:
        """The chosen files; corrupt ones are skipped if `skip_corrupt` is set, but never test images."""
        return FileSplit(cast(FileSource, source), indices, skip_corrupt=self.skip_corrupt and name != "test")

    def read(self, *files: str | Path) -> Tensor:
        """Read files from anywhere as a model takes them: decoded, resized, cropped and normalised like the test images.

        Returns:
            Float32 `[B, 3, image_size, image_size]`.

        Raises:
            UserError: A file is missing or is no image; the message has its path.
        """
        source = self.make_source(Paths("", map(str, files)), torch.zeros(len(files)))
        images, _ = self.eval_transform((source.images(torch.arange(len(files))), source.labels))
        return images

    def make_source(self, paths: Paths, labels: Tensor) -> FileSource:
        """Files with labels `[N]`, cut as the options say."""
        return FileSource(paths, labels, self._square)

    @property
    def _square(self) -> Square:
        return Square(*map(self._or_standard, Square._fields))


@dataclass(eq=False, kw_only=True)
class ListedFileImages(FileImages):
    """Image files that a list names.

    Args:
        check_files: Check that all files are there before training starts; false saves a second for half a million files on a local
            disk, and more on a slow one.
    """

    published_counts: ClassVar[dict[Split, int]] = {}  # images of each split; with other counts it is another set
    published_classes: ClassVar[int | None] = None

    check_files: bool = True

    @property
    def num_classes(self) -> int:
        """K, fixed by the set, or else the number of its class names."""
        return super().num_classes if self.published_classes is None else self.published_classes

    @abstractmethod
    def listed(self, split: Split) -> tuple[Paths, Tensor]:
        """The files of one split and their labels `[N]`.

        Raises:
            UserError: The list is missing or malformed.
        """

    def load(self, split: Split) -> FileSource:
        """The files of one split.

        Raises:
            UserError: The list is missing or malformed, has more or fewer files than published, or files are missing; the message has their
                number and the first three.
        """
        paths, labels = self.listed(split)
        expected = self.published_counts.get(split, len(paths))
        if len(paths) != expected:
            raise UserError(
                f"{self.label_file(split)}: {len(paths):,} {split} images, but {expected:,} were published: "
                "fetch the set again, or read lists of your own with ListImages"
            )
        missing = paths.missing() if self.check_files else []
        if missing:
            raise UserError(
                f"{self}: {len(missing):,} of {len(paths):,} {split} images are missing: "
                f"{first_few((paths[i] for i in missing), len(missing))}: put them there, or correct "
                f"{argument(f'{self.option}.root')}"
            )
        return self.make_source(paths, labels)
