import numpy as np

from etflight.data import UnlabelledImages


def test_sixteen_bits_become_eight(tmp_path):
    deep = np.array([0, 257, 200 * 257, 65535], np.uint16).reshape(1, 2, 2)
    np.savez(tmp_path / "a.npz", images=deep)
    data = UnlabelledImages(paths=[str(tmp_path / "a.npz")], input_size=(1, 2, 2), names=["a", "b"])
    images, labels = next(iter(data.predict_dataloader()))
    assert images.flatten().tolist() == [0, 1, 200, 255]
    assert (labels.tolist(), data.sample_name("test", 0)) == ([-1], f"{tmp_path}/a.npz[0]")
