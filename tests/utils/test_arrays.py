import zipfile

import numpy as np
import pytest

from etflight.utils.arrays import read_arrays
from etflight.utils.errors import UserError


def cut_off(path):
    np.savez(path, gram=np.eye(30))
    path.write_bytes(path.read_bytes()[:100])


def growing(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("gram.npy", b"little")
        archive.infolist()[0].file_size = 2**30  # what the archive says of it


def changed_inside(path):
    np.savez_compressed(path, gram=np.arange(900.0))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content)


DAMAGE = {
    "missing": lambda path: None,
    "cut off": cut_off,
    "changed inside": changed_inside,
    "text": lambda path: path.write_text("text"),
    "another array": lambda path: np.savez(path, labels=[1]),
    "objects": lambda path: np.savez(path, gram=np.array([{}])),
    "texts": lambda path: np.savez(path, gram=np.array(["x"])),
    "a bomb": growing,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_in_one_line(damage, tmp_path):
    path = tmp_path / "epoch_001.npz"
    DAMAGE[damage](path)
    with pytest.raises(UserError) as caught:
        read_arrays(path, "gram")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (damage == "a bomb") == ("unpacks" in str(caught.value))


def test_arrays_are_read_as_they_were_written(tmp_path):
    np.savez(tmp_path / "a.npz", gram=np.eye(3), epoch=4, name=["x"])
    found = read_arrays(tmp_path / "a.npz", "gram", "epoch")
    assert (found["gram"].tolist(), int(found["epoch"])) == (np.eye(3).tolist(), 4)
