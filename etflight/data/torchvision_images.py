"""What the sets that torchvision downloads share: fixed classes, and downloads that are whole or not there."""

import os
import socket
import tarfile
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import shorten
from typing import Any, ClassVar

from etflight.data.base import ImageDataModule
from etflight.errors import UserError

PATIENCE = 60.0


@dataclass(eq=False)
class TorchvisionImages(ImageDataModule):
    """A set with a fixed list of classes, which torchvision can download.

    Args:
        root: Folder that holds the set's files.
        download: Fetch what is missing into `root`.
    """

    root: str = "data"
    download: bool = False

    published_name: ClassVar[str]  # in torchvision.datasets
    names: ClassVar[tuple[str, ...]]
    channels: ClassVar[int]

    def __str__(self) -> str:
        return f"{type(self).__name__} in {self.root}"

    @property
    def num_classes(self) -> int:
        """K, fixed by the set."""
        return len(self.names)

    @property
    def num_channels(self) -> int:
        """C, fixed by the set."""
        return self.channels

    @property
    def class_names(self) -> list[str]:
        """The published names."""
        return list(self.names)

    @property
    def published(self) -> Any:
        """The set's class in torchvision."""
        from torchvision import datasets  # seconds, which `--help` need not wait for

        return getattr(datasets, self.published_name)

    @property
    @abstractmethod
    def is_there(self) -> bool:
        """Whether the files can be read without torchvision."""

    def prepare_data(self) -> None:
        """Download what is missing, if asked to; Lightning calls this on one process per node.

        Raises:
            UserError: the files cannot be fetched, are not those that were published, or cannot be written.
        """
        if not self.download or self.is_there:
            return
        try:
            with members_stay_inside(), silence_ends():
                self.fetch()
        except UserError:
            raise
        except Exception as error:  # of the network, of archives, and torchvision's own
            reason = shorten(str(error) or type(error).__name__, 300, placeholder=" …")
            raise UserError(
                f"{self}: the download failed ({reason}): try again, or put the files there yourself"
            ) from error

    def fetch(self) -> None:
        """Download into a folder of its own, and let only what is whole into `root`: torchvision takes half a file for the file."""
        Path(self.root).mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=self.root, prefix=".download-") as partial:
            self.download_to(partial)
            move_into(Path(partial), Path(self.root))

    def download_to(self, folder: str) -> None:
        """Let torchvision download the published files."""
        self.published(folder, download=True)

    def _missing(self, what: str) -> UserError:
        return UserError(f"{self}: {what}: put the files there, or give --data.download true")


@contextmanager
def silence_ends() -> Iterator[None]:
    """Inside, a server that says nothing for `PATIENCE` seconds has failed; by default Python waits for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def members_stay_inside() -> Iterator[None]:
    """Inside, tar archives are unpacked without members that leave their folder, links out of it, devices and set-uid bits.

    Python itself does so from 3.14 on. (torchvision verifies an archive's checksum first; its zip files cannot leave their folder.)

    Raises:
        UserError: an archive with such a member, of which nothing more is unpacked.
    """
    before = tarfile.TarFile.extraction_filter
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    try:
        yield
    except tarfile.TarError as error:
        raise UserError(f"a downloaded archive was refused: {error}") from error
    finally:
        tarfile.TarFile.extraction_filter = before


def move_into(source: Path, target: Path) -> None:
    """Move what is missing from a file or folder, in one step where nothing has its name; files that are there stay."""
    if not target.exists():
        os.replace(source, target)
    elif source.is_dir() and target.is_dir():
        for child in source.iterdir():
            move_into(child, target / child.name)
