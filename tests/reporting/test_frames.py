import base64

import numpy as np
import pytest

from etflight.reporting.frames import frames
from etflight.utils.errors import UserError
from tests.reporting.folders import K, N, cosines, leave


def unpack(text, *shape):
    values = np.frombuffer(base64.b64decode(text), "<i2").reshape(shape).astype(float)
    return np.where(values == -32768, np.nan, values / 32767)


def test_cosines_are_those_of_means_vectors_and_embeddings(tmp_path):
    assert frames(tmp_path) is None
    made = leave(tmp_path)
    found = frames(tmp_path)
    assert found["epochs"] == [0, 1, 2]
    assert found["classes"] == list(range(K))
    heat, means, frame = (unpack(found[name], 3, K, K) for name in ("heat", "means", "frame"))
    points = unpack(found["points"], 3, K * N, K)
    for i, (M, W, H, labels) in enumerate(made.values()):
        np.testing.assert_allclose(heat[i], cosines(M - M.mean(0), W - W.mean(0)), atol=1e-4)
        np.testing.assert_allclose(means[i], cosines(M, W), atol=1e-4)
        np.testing.assert_allclose(frame[i], cosines(W, W), atol=1e-4)
        order = np.concatenate([np.flatnonzero(labels == k) for k in range(K)])
        np.testing.assert_allclose(points[i], cosines(H[order], W), atol=1e-4)
        assert found["labels"] == labels[order].tolist()


def test_a_class_without_images_has_no_cosines(tmp_path):
    leave(tmp_path, epochs=(0,), snapshots=False)
    with np.load(tmp_path / "gram/epoch_000.npz") as content:
        gram, classes = content["gram"].copy(), content["classes"]
    gram[1] = gram[:, 1] = np.nan
    np.savez_compressed(tmp_path / "gram/epoch_000.npz", gram=gram, classes=classes, epoch=0)
    found = frames(tmp_path)
    heat = unpack(found["heat"], K, K)
    assert np.isnan(heat[1]).all()
    assert np.isfinite(np.delete(heat, 1, axis=0)).all()
    assert "points" not in found


def test_the_size_is_bounded_whatever_the_run(tmp_path):
    leave(tmp_path, epochs=range(70), classes=50)
    found = frames(tmp_path)
    assert len(found["epochs"]) == len(found["classes"]) == 30
    assert (found["epochs"][0], found["epochs"][-1]) == (0, 69)
    assert (found["classes"][0], found["classes"][-1]) == (0, 49)
    assert len(found["labels"]) == 30 * N
    assert unpack(found["points"], 30, 30 * N, 30).shape


@pytest.mark.parametrize("folder", ["gram", "snapshots"])
def test_a_file_whose_arrays_do_not_fit_is_named(folder, tmp_path):
    leave(tmp_path)
    path = tmp_path / folder / "epoch_001.npz"
    labels = np.tile(np.arange(K), N)
    wrong = {"gram": np.eye(3), "embeddings": np.eye(3), "weight": np.eye(3)}
    np.savez(path, classes=np.arange(K), labels=labels, indices=np.arange(K * N), **wrong)
    with pytest.raises(UserError, match="is not whole") as caught:
        frames(tmp_path)
    assert str(path) in str(caught.value)
