"""Features of the images of a split on disk: written in one pass, resumable, on any number of processes; read without being copied."""

import fcntl
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from etflight.data.base import ImageDataModule
from etflight.data.sources import Split
from etflight.network import Network
from etflight.runs.folder import writing_to
from etflight.utils.errors import UserError, argument, brief
from etflight.utils.files import flush_to_disk, replacing
from etflight.utils.ranks import gather_objects, world

Precision = Literal["float32", "bfloat16"]
PRECISIONS: dict[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_CODES = {"float32": "F32", "bfloat16": "BF16"}  # of safetensors
_AT_ONCE = 2**24  # bytes that are copied at a time


class SplitFeatures(NamedTuple):
    """The backbone's features of the N images of a split, on the CPU.

    Attributes:
        features: The pooled features `[N, d]`, float32, float64 or bfloat16; from a store they are in the file until they are used.
        labels: The class indices `[N]`, int64.
    """

    features: Tensor
    labels: Tensor


def facts_of(model: Network, data: ImageDataModule, split: Split, precision: Precision) -> dict[str, str]:
    """What the features of a split depend on, by names for people; a store with other facts is not used.

    Args:
        model: The model; of its parameters only those of the backbone count.
        data: The data module, whose files are looked up, not read.
        split: The split.
        precision: The precision of the stored features.
    """
    images = data.split(split)
    digest = sha256(images.source.content.encode())
    for values in (images.indices.numpy(), images.labels.numpy(), images.source.sizes(images.indices)):
        digest.update(values.astype("<i8").data)
    return {
        "backbone": str(model.hparams["backbone"]),
        "arguments": json.dumps(dict(model.hparams["model_kwargs"] or {}), sort_keys=True, default=str),
        "weights": weights_of(model.backbone),
        "preprocessing": json.dumps(data.preprocessing._asdict(), sort_keys=True),
        "images": digest.hexdigest(),
        "precision": precision,
    }


def weights_of(module: torch.nn.Module) -> str:
    """SHA-256 of a module's state dict: names, shapes, types and values; 64 hexadecimal digits."""
    digest = sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}\0".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def store_of(folder: Path, split: Split) -> Path:
    """The file of a split in a folder of stores."""
    return folder / f"{split}.safetensors"


def read_features(file: Path, facts: Mapping[str, str], labels: Tensor) -> SplitFeatures:
    """Open a store; its features stay in the file until they are used.

    Args:
        file: The file.
        facts: The facts that it has to have, as `facts_of` returns them.
        labels: The labels of its images, `[N]`.

    Raises:
        UserError: It is damaged or no store, or has other facts; nothing in it is ever run.
    """
    mend = f"remove it, or name another folder with {argument('features')}"
    try:
        with safe_open(file, "pt") as stored:
            known = stored.metadata() or {}
            slices = {name: stored.get_slice(name) for name in stored.keys()}  # noqa: SIM118, it is no mapping
            shapes = {name: (part.get_dtype(), part.get_shape()) for name, part in slices.items()}
            wanted = _CODES[facts["precision"]], shapes.get("features", ("", [0, 0]))[1]
            if other := [name for name, value in facts.items() if known.get(name, value) != value]:
                raise UserError(f"{file} has features of other {', '.join(_differing(other, known, facts))}: {mend}")
            fine = set(facts) <= set(known) and shapes.get("features") == wanted and len(wanted[1]) == 2
            if not fine or wanted[1][0] != len(labels) or shapes.get("labels") != ("I64", [len(labels)]):
                raise UserError(f"{file} is no store of features of these {len(labels)} images: {mend}")
            found = SplitFeatures(stored.get_tensor("features"), stored.get_tensor("labels"))
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read as a store of features ({brief(error)}): {mend}") from error
    if not torch.equal(found.labels, labels):
        raise UserError(f"{file} has other labels than these images: {mend}")
    return found


def _differing(names: Iterable[str], known: Mapping[str, str], facts: Mapping[str, str]) -> Iterator[str]:
    """Name what differs, and short values with it; hashes tell nobody anything."""
    for name in names:
        both = (known[name], facts[name])
        short = len(both[0]) <= 300 and name not in ("weights", "images")
        yield f"{name} ({both[0]} instead of {both[1]})" if short else name


class PartialFile:
    """The rows that one process has computed so far, in a hidden file beside the store; a killed pass goes on after the last whole row.

    Args:
        file: The store to come.
        facts: Its facts; a partial file with others is started anew.
        rank: The rank of this process.
        world_size: The number of processes W: rank r has the images r, r + W, r + 2W and so on.

    Attributes:
        path: The path of the partial file.
        rows: The number of whole rows in it.
        width: The width d of a row; 0 as long as there is none.
    """

    def __init__(self, file: Path, facts: Mapping[str, str], rank: int, world_size: int) -> None:
        self.path = file.with_name(f".{file.stem}.{rank}of{world_size}.partial")
        self._facts = dict(facts)
        self._dtype = PRECISIONS[facts["precision"]]
        self.rows, self.width, self._start = self._found()

    def _found(self) -> tuple[int, int, int]:
        """The rows, their width and where they start in a file with the same facts, else zeros."""
        try:
            with self.path.open("rb") as found:
                line = found.readline(2**20)
            header = json.loads(line)
            width = header["width"]
            if header["facts"] != self._facts or not isinstance(width, int) or width < 1:
                return 0, 0, 0
        except (OSError, ValueError, KeyError, TypeError):
            return 0, 0, 0
        rows = (self.path.stat().st_size - len(line)) // (width * self._dtype.itemsize)
        return rows, width, len(line)

    def write(self, batches: Iterable[Tensor]) -> None:
        """Append features `[B, d]`, batch by batch, each on its way to the disk before the next is computed.

        Raises:
            UserError: Another process writes the file.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(f"another process writes {self.path}: wait for it, or name another folder") from None
            # of the last row there may be a part
            file.truncate(self._start + self.rows * self.width * self._dtype.itemsize)
            file.seek(0, os.SEEK_END)
            for batch in batches:
                if not self.width:
                    self.width = batch.shape[1]
                    file.write(json.dumps({"facts": self._facts, "width": self.width}).encode() + b"\n")
                    self._start = file.tell()
                file.write(batch.to(self._dtype).contiguous().view(torch.uint8).numpy().data)
                file.flush()
                self.rows += len(batch)

    def part(self) -> tuple[str, int, int, int]:
        """What another process needs to read it: path, start, rows and width."""
        return str(self.path), self._start, self.rows, self.width


def write_features(
    file: Path, facts: Mapping[str, str], labels: Tensor, compute: Callable[[int], Iterator[Tensor]], *, describe: str
) -> SplitFeatures:
    """Compute the features of a split and write its store; all processes call this together and see one file system.

    Args:
        file: The file.
        facts: Its facts.
        labels: The labels of all N images, `[N]`.
        compute: A function that yields the features `[B, d]` of this rank's images in order, but for as many first ones as it is given.
        describe: The data, for errors.

    Returns:
        The features as `read_features` opens them.

    Raises:
        UserError: Some image gave no features, or the file cannot be written.
    """
    world_size, rank = world()
    partial = PartialFile(file, facts, rank, world_size)
    gather_objects(None)  # a rank that goes on from fewer rows must not meet one that has joined them already
    due = len(range(rank, len(labels), world_size))
    if partial.rows < due:
        with writing_to(file.parent, "features"):
            partial.write(compute(partial.rows))
    parts = gather_objects(partial.part())
    if (missing := len(labels) - sum(rows for _, _, rows, _ in parts)) != 0:
        partial.path.unlink(missing_ok=True)
        raise UserError(
            f"{missing} images of {describe} could not be read, and a store has the features of every image: remove those files"
        )
    if rank == 0:
        with writing_to(file.parent, "features"):
            _join(file, facts, labels, parts)
    gather_objects(None)  # the others wait for the file
    return read_features(file, facts, labels)


def _join(file: Path, facts: Mapping[str, str], labels: Tensor, parts: list[tuple[str, int, int, int]]) -> None:
    """Write the rows of all ranks in the order of the images, with labels, in the format of safetensors, a block of rows at a time.

    The library writes tensors that are in memory; of millions of images the features need not fit there.
    """
    count, width, dtype = len(labels), parts[0][3], PRECISIONS[facts["precision"]]
    row, label_bytes = width * dtype.itemsize, 8 * count
    header = {
        "__metadata__": dict(facts),
        "features": {"dtype": _CODES[facts["precision"]], "shape": [count, width], "data_offsets": [0, count * row]},
        "labels": {"dtype": "I64", "shape": [count], "data_offsets": [count * row, count * row + label_bytes]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = max(1, _AT_ONCE // row // len(parts))
    with replacing(file) as whole, whole.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        own = [np.memmap(path, np.uint8, "r", start, (rows, row)) for path, start, rows, _ in parts]
        for first in range(0, len(own[0]), block):
            blocks = [rows[first : first + block] for rows in own]
            if len(own) == 1:
                out.write(blocks[0].data)
                continue
            joined = np.empty((sum(map(len, blocks)), row), np.uint8)
            for rank, rows in enumerate(blocks):
                joined[rank :: len(own)] = rows
            out.write(joined.data)
        out.write(labels.numpy().astype("<i8").data)
    for left in file.parent.glob(f".{file.stem}.*of*.partial"):  # those of another number of processes too
        left.unlink(missing_ok=True)
    flush_to_disk(file.parent)
