from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from etflight import plotting, simplex_etf
from etflight.utils.errors import UserError

NOISE = np.random.default_rng(0)


def test_an_embedding_equal_to_a_class_vector_lies_on_its_corner_or_in_the_centre():
    weight = simplex_etf(10, 32, dtype=torch.float64)
    figure = plotting.triangle(weight[[7, 2, 5, 9]], [7, 2, 5, 7], weight, (7, 2, 5), epoch=3)
    points = [np.asarray(c.get_offsets()) for c in figure.axes[0].collections]
    np.testing.assert_allclose(np.concatenate(points[:3]), points[3][[0, 0, 1, 2]] * [[1], [0], [1], [1]], atol=1e-12)
    sides = [np.linalg.norm(points[3][i] - points[3][j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    np.testing.assert_allclose(sides, float((weight[0] - weight[1]).norm()))
    assert figure.axes[0].get_title() == "epoch 3"
    top, left, right = points[3]
    assert left[0] < top[0] < right[0]
    assert top[1] > max(left[1], right[1])
    plotting.render(figure)


def test_triangle_keeps_distances_within_its_plane_and_draws_three_classes_only():
    weight = NOISE.normal(size=(5, 12))
    mix = NOISE.dirichlet([1, 1, 1], size=20)
    embeddings = np.concatenate([mix @ weight[[0, 3, 4]], NOISE.normal(size=(3, 12))])
    figure = plotting.triangle(embeddings, [0] * 20 + [1] * 3, weight, (0, 3, 4))
    points = [np.asarray(c.get_offsets()) for c in figure.axes[0].collections]
    assert [len(p) for p in points] == [20, 0, 0, 3]
    np.testing.assert_allclose(points[0], mix @ points[3], atol=1e-12)


def snapshots(folder: Path, number: int) -> list[Path]:
    weight = simplex_etf(4, 8).numpy()
    labels = np.repeat(np.arange(4), 5)
    files = []
    for epoch in range(number):
        embeddings = weight[labels] * epoch / number + NOISE.normal(size=(20, 8)) * 0.1
        files.append(folder / f"epoch_{epoch:03d}.npz")
        np.savez(files[-1], embeddings=embeddings.astype(np.float16), labels=labels, epoch=epoch, weight=weight)
    return files


def test_film_has_a_frame_per_snapshot_all_to_one_scale(tmp_path):
    path = tmp_path / "films" / "triangle.gif"
    plotting.triangle_film(snapshots(tmp_path, 4), (0, 1, 3), path)
    with Image.open(path) as film:
        shown = [
            (np.asarray(frame.convert("L")).astype(int), frame.info["duration"])
            for frame in ImageSequence.Iterator(film)
        ]
    frames, times = zip(*shown, strict=True)
    assert times == (150, 150, 150, 2000)
    # the triangle's edges stay where they are: pixels dark in the first frame are dark in all, but for titles and points
    low = int(0.75 * len(frames[0]))
    dark = frames[0][low:] < 140
    assert min((frame[low:] < 170)[dark].mean() for frame in frames) > 0.9
    assert (frames[0] != frames[3]).any()
    assert list(path.parent.iterdir()) == [path]


def test_film_names_a_file_that_is_no_snapshot(tmp_path):
    good, bad = snapshots(tmp_path, 1)[0], tmp_path / "other.npz"
    np.savez(bad, labels=[1])
    with pytest.raises(UserError, match=r"other\.npz is not whole"):
        plotting.triangle_film([good, bad], (0, 1, 2), tmp_path / "film.gif")
