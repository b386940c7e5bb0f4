"""File paths in a few tensors, however many there are."""

import os
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

_THREADS = 8  # wait for a network file system together
_CHUNK = 1024


class Paths:
    """N paths below a folder, packed into one tensor of bytes.

    A list of strings would cost every loader process a copy of its own: who looks at a string writes its reference count,
    and so the memory page it lies on. Tensors are shared, in processes that are forked and in those that are not.

    Args:
        root: The folder.
        text: uint8 `[bytes]`, the paths and whatever lies between them.
        starts: int64 `[N]`, where each begins.
        ends: int64 `[N]`, where each has ended.
    """

    def __init__(self, root: str, text: Tensor, starts: Tensor, ends: Tensor) -> None:
        self.root = root
        self._text, self._starts, self._ends = text, starts, ends

    @classmethod
    def pack(cls, root: str, paths: Iterable[str]) -> "Paths":
        """Pack paths relative to `root`."""
        encoded = [os.fsencode(path) for path in paths]
        ends = torch.from_numpy(np.cumsum([len(path) for path in encoded], dtype=np.int64))
        starts = torch.cat([ends.new_zeros(1), ends])[:-1]
        return cls(
            root, torch.frombuffer(bytearray(b"".join(encoded)) or bytearray(1), dtype=torch.uint8), starts, ends
        )

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> str:
        """The path, with the folder."""
        return os.path.join(self.root, *self.relative([index]))

    def relative(self, indices: Iterable[int]) -> list[str]:
        """Paths as they were given."""
        text, starts, ends = (values.numpy().data for values in (self._text, self._starts, self._ends))
        return [os.fsdecode(text[starts[i] : ends[i]].tobytes()) for i in indices]

    def marks(self) -> Iterator[memoryview]:
        """The bytes that hold the paths, and where each begins and ends; of the lines of a list also what is written beside the paths."""
        yield from (values.numpy().data for values in (self._text, self._starts, self._ends))

    def missing(self) -> list[int]:
        """Positions of the files that are not there."""
        with ThreadPoolExecutor(_THREADS) as threads:
            chunks = (range(start, min(start + _CHUNK, len(self))) for start in range(0, len(self), _CHUNK))
            return [index for found in threads.map(self._missing_of, chunks) for index in found]

    def _missing_of(self, indices: range) -> list[int]:
        root = os.path.join(self.root, "")
        return [
            i for i, path in zip(indices, self.relative(indices), strict=True) if not os.access(root + path, os.F_OK)
        ]


def files_below(folder: str, suffixes: Collection[str] | None = None) -> list[str]:
    """Paths, relative to the folder, of the files below it with one of these endings, in any case, or all; hidden ones are passed over.

    Sorted by folder and name, part by part.
    """
    found = [
        os.path.relpath(os.path.join(parent, name), folder)
        for parent, _, names in os.walk(folder)
        for name in names
        if (suffixes is None or os.path.splitext(name)[1].lower() in suffixes) and not name.startswith(".")
    ]
    return sorted(found, key=lambda path: path.split(os.sep))
