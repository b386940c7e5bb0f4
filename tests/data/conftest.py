import numpy as np
import pytest


@pytest.fixture
def arrays(tmp_path):
    """Writes an `.npz` in MedMNIST's layout and returns its path: 3 classes of 40, 20 and 10, 2×4 pixels, RGB.

    Pixels of an image all hold its position in the split. Keyword arguments replace arrays, None leaves one out.
    """

    def write(**changes):
        members = {}
        for split, counts in (("train", (40, 20, 10)), ("test", (5, 5, 3))):
            labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3), counts))
            pixels = np.arange(len(labels), dtype=np.uint8)[:, None, None, None]
            members[f"{split}_images"] = np.broadcast_to(pixels, (len(labels), 2, 4, 3))
            members[f"{split}_labels"] = labels
        members.update(changes)
        path = tmp_path / "set.npz"
        np.savez(path, **{name: array for name, array in members.items() if array is not None})
        return str(path)

    return write
