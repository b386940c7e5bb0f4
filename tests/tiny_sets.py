"""Published sets with few or blank images, in the layout of their files."""

import gzip

import numpy as np


def tiny_fashion(folder):
    """Arguments for FashionMNIST with 40 images in each split."""
    raw = folder / "fashion"
    raw.mkdir()
    for split in ("train", "t10k"):
        labels = np.arange(40, dtype=np.uint8) % 10
        for kind, array in (("images-idx3", np.zeros((40, 28, 28), np.uint8)), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (raw / f"{split}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return ["--data.root", raw]


def tiny_cifar(folder):
    """Arguments for CIFAR10 with as many images as it has."""
    labels = (np.arange(10000) % 10).astype(np.uint8)[:, None]
    content = np.hstack([labels, np.zeros((10000, 3072), np.uint8)]).tobytes()
    (folder / "cifar-10-batches-bin").mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        (folder / "cifar-10-batches-bin" / f"{name}.bin").write_bytes(content)
    return ["--data.root", folder]
