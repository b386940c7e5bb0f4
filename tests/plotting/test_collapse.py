import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from etflight import plotting, simplex_etf
from etflight.errors import UserError
from etflight.metrics import ClassStatistics, measures


def cosines(means: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """cos(μ_i - μ_G, w_j - w̄), one pair at a time."""
    M, W = means - means.mean(0), weight - weight.mean(0)
    return np.array([[m @ w / np.sqrt((m @ m) * (w @ w)) for w in W] for m in M])


def drawn(figure: Figure, tmp_path: Path) -> np.ndarray:
    plotting.save(figure, tmp_path / "figure.png")
    return np.asarray(Image.open(tmp_path / "figure.png").convert("RGB"))


@pytest.fixture
def noise() -> np.random.Generator:
    return np.random.default_rng(0)


# The heat map


def test_heat_map_shows_the_cosines_of_centred_means_and_class_vectors(noise, tmp_path):
    means, weight = noise.normal(size=(7, 16)) + 3, noise.normal(size=(7, 16))
    figure = plotting.cosine_heatmap(torch.tensor(means), torch.tensor(weight))
    (image,) = figure.axes[0].images
    np.testing.assert_allclose(image.get_array(), cosines(means, weight), atol=1e-12)
    assert image.get_clim() == (-1, 1)
    assert len(np.unique(drawn(figure, tmp_path).reshape(-1, 3), axis=0)) > 50


def test_heat_map_writes_values_into_cells_of_few_classes_only(noise):
    for K in (12, 13):
        means, weight = noise.normal(size=(K, 16)), noise.normal(size=(K, 16))
        texts = [text.get_text() for text in plotting.cosine_heatmap(means, weight).axes[0].texts]
        expected = [f"{value:.2f}".replace("-", "−") for value in cosines(means, weight).flat] if K == 12 else []
        assert texts == expected


def test_heat_map_diagonal_is_the_measures_class_alignment_with_classes_missing(noise):
    statistics = ClassStatistics(5, 8)
    labels = torch.tensor([0, 0, 1, 3, 3, 4])
    statistics.update(torch.tensor(noise.normal(size=(6, 8)), dtype=torch.float32), labels)
    moments, weight = statistics.compute(), torch.tensor(noise.normal(size=(5, 8)))
    for global_mean in ("class", "sample"):
        for center_weight in (True, False):
            figure = plotting.cosine_heatmap(
                moments.means, weight, global_mean=global_mean, counts=moments.counts, center_weight=center_weight
            )
            image = np.ma.filled(figure.axes[0].images[0].get_array(), np.nan)
            expected = measures.class_alignment(moments, weight, global_mean=global_mean, center_weight=center_weight)
            np.testing.assert_allclose(np.diag(image), expected.numpy(), atol=1e-12)
            assert np.isnan(image[2]).all()
            assert np.isnan(image[:, 2]).all()
            assert np.isfinite(np.delete(np.delete(image, 2, 0), 2, 1)).all()


def test_heat_map_names_classes_and_thins_them_when_many(noise):
    for K, most in ((10, 10), (40, 40), (100, 20), (1000, 20)):
        means, weight = noise.normal(size=(K, 4)), noise.normal(size=(K, 4))
        axes = plotting.cosine_heatmap(means, weight, [f"class {k}" for k in range(K)]).axes[0]
        for ticks, labels in (
            (axes.get_xticks(), axes.get_xticklabels()),
            (axes.get_yticks(), axes.get_yticklabels()),
        ):
            assert 8 <= len(ticks) <= most
            assert [label.get_text() for label in labels] == [f"class {int(k)}" for k in ticks]


def test_heat_map_of_too_many_classes_shows_an_even_choice_and_says_so(noise):
    means, weight = noise.normal(size=(2500, 3)), noise.normal(size=(2500, 3))
    axes = plotting.cosine_heatmap(means, weight).axes[0]
    image = axes.images[0].get_array()
    assert image.shape == (1000, 1000)
    assert "1000 of 2500" in axes.get_title()
    full = cosines(means[[0, 2499]] - means.mean(0), weight[[0, 2499]] - weight.mean(0))
    assert full.shape == (2, 2)
    M, W = means - means.mean(0), weight - weight.mean(0)
    corner = M[-1] @ W[-1] / np.linalg.norm(M[-1]) / np.linalg.norm(W[-1])
    assert image[-1, -1] == pytest.approx(corner)


def test_heat_map_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\[3, 4\] and \[4, 4\]"):
        plotting.cosine_heatmap(np.zeros((3, 4)), np.zeros((4, 4)))


# Curves


def history(epochs: int) -> dict[str, list[float]]:
    names = ["nc1", "alignment", "alignment_std", "nc2_equinorm", "nc2_equiangularity", "etf_distance"]
    names += [f"{name}{end}" for name in ("cos_means", "cos_weights", "cos_cross") for end in ("", "_std")]
    return {
        f"nc/{split}/{name}": [(i + 1) * 10.0 ** (-epoch) for epoch in range(epochs)]
        for split in ("val", "train")
        for i, name in enumerate(names)
    }


def lines(figure: Figure) -> dict[str, tuple[list[float], list[float]]]:
    return {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata()))
        for axes in figure.axes
        for line in axes.lines
        if line.get_label().startswith("nc")
    }


def test_curves_are_the_history_over_its_epochs(tmp_path):
    recorded, epochs = history(4), [0, 2, 4, 6]
    figure = plotting.collapse_curves(recorded, epochs, num_classes=10)
    expected = {key: (epochs, values) for key, values in recorded.items() if not key.endswith("_std")}
    assert lines(figure) == expected
    assert figure.axes[0].get_yscale() == "log"
    assert [axes.get_yscale() for axes in figure.axes[1:]] == ["linear"] * 3
    (simplex,) = [line for line in figure.axes[3].lines if "simplex" in line.get_label()]
    assert list(simplex.get_ydata()) == pytest.approx([-1 / 9] * 2)
    drawn(figure, tmp_path)


def test_curves_tell_splits_apart_by_line_style_train_first():
    figure = plotting.collapse_curves(history(3), [0, 1, 2])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["train", "val"]
    styles = {line.get_label(): line.get_linestyle() for line in figure.axes[0].lines}
    assert styles == {"nc/train/nc1": "-", "nc/val/nc1": "--"}


def test_curves_align_a_late_measure_with_the_last_epochs():
    figure = plotting.collapse_curves({"nc/train/nc1": [3.0, 2.0, 1.0], "nc/val/nc1": [5.0]}, [0, 1, 2])
    np.testing.assert_array_equal(lines(figure)["nc/val/nc1"][1], [np.nan, np.nan, 5.0])


def test_curves_without_scatter_show_the_ratio_and_say_what_was_not_measured():
    figure = plotting.collapse_curves({"nc/train/nc1_ratio": [3.0, 2.0]}, [0, 1])
    assert set(lines(figure)) == {"nc/train/nc1_ratio"}
    assert [text.get_text() for axes in figure.axes[1:] for text in axes.texts] == ["not measured"] * 3


def test_curves_of_another_space_leave_the_first_alone():
    recorded = {"nc/train/nc1": [1.0], "nc_raw/train/nc1": [2.0]}
    assert set(lines(plotting.collapse_curves(recorded, [0], prefix="nc_raw"))) == {"nc_raw/train/nc1"}


def test_curves_of_nothing_are_refused():
    for recorded, epochs in (({}, [0]), ({"nc/train/nc1": []}, []), ({"val/acc": [1.0]}, [0])):
        with pytest.raises(ValueError, match="nothing to draw"):
            plotting.collapse_curves(recorded, epochs)


# Class by class


def test_variability_points_are_counts_and_variances(tmp_path):
    variances, counts = torch.tensor([0.5, 0.2, 0.1]), torch.tensor([10, 100, 1000])
    figure = plotting.variability_by_size(variances, counts, ["a", "b", "c"])
    axes = figure.axes[0]
    np.testing.assert_allclose(axes.collections[0].get_offsets(), [[10, 0.5], [100, 0.2], [1000, 0.1]], rtol=1e-6)
    assert axes.get_xscale() == "log"
    assert sorted(text.get_text() for text in axes.texts) == ["a", "b", "c"]
    drawn(figure, tmp_path)


def test_variability_marks_variance_zero_and_leaves_missing_classes_out():
    axes = plotting.variability_by_size([0.5, 0.0, np.nan], [10, 1, 0]).axes[0]
    assert axes.collections[0].get_offsets().tolist() == [[10, 0.5]]
    assert axes.collections[1].get_offsets()[:, 0].tolist() == [1]
    assert [text.get_text() for text in axes.texts if "hollow" in text.get_text()]


def test_variability_names_only_the_extremes_of_many_classes():
    variances = np.arange(1, 51) / 50
    axes = plotting.variability_by_size(variances, np.arange(50, 0, -1)).axes[0]
    assert sorted(int(text.get_text()) for text in axes.texts) == [0, 1, 2, 47, 48, 49]


def test_names_of_classes_of_one_size_do_not_cover_each_other(tmp_path):
    figure = plotting.variability_by_size([0.1, 0.1001, 0.1002, 0.2], [50] * 4, ["one", "two", "three", "four"])
    drawn(figure, tmp_path)
    boxes = [Text.get_window_extent(text) for text in figure.axes[0].texts]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_spectrum_lies_beside_a_flat_one_of_the_same_norm(tmp_path):
    values = torch.tensor([3.0, 2.0, 1.0])
    figure = plotting.spectrum(values)
    ours, flat = figure.axes[0].lines
    assert (list(ours.get_xdata()), list(ours.get_ydata())) == ([1, 2, 3], [3, 2, 1])
    assert sum(values**2) == pytest.approx(3 * flat.get_ydata()[0] ** 2)
    share = values / 6
    rank = float((-(share * share.log()).sum()).exp())
    assert f"{rank:.1f} of 3" in figure.axes[0].get_title()
    drawn(figure, tmp_path)


def test_empty_spectrum_is_refused():
    with pytest.raises(ValueError, match="two classes"):
        plotting.spectrum(torch.zeros(0))


# The triangle


def test_an_embedding_equal_to_a_class_vector_lies_on_its_corner(tmp_path):
    weight = simplex_etf(10, 32, dtype=torch.float64)
    figure = plotting.triangle(weight, range(10), weight, (7, 2, 5), epoch=3)
    points = [np.asarray(c.get_offsets()) for c in figure.axes[0].collections]
    for own, corner in zip(points[:3], points[3], strict=True):
        np.testing.assert_allclose(own, corner[None], atol=1e-12)
    sides = [np.linalg.norm(points[3][i] - points[3][j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    np.testing.assert_allclose(sides, float((weight[0] - weight[1]).norm()))
    assert figure.axes[0].get_title() == "epoch 3"
    top, left, right = points[3]
    assert left[0] < top[0] < right[0]
    assert top[1] > max(left[1], right[1])
    drawn(figure, tmp_path)


def test_other_class_vectors_of_a_simplex_fall_on_the_centre_of_the_triangle():
    weight = simplex_etf(10, 32, dtype=torch.float64)
    figure = plotting.triangle(weight[[9, 0]], [0, 1], weight, (0, 1, 2))
    points = [np.asarray(c.get_offsets()) for c in figure.axes[0].collections]
    np.testing.assert_allclose(points[0][0], points[3].mean(0), atol=1e-12)


def test_triangle_keeps_distances_within_its_plane_and_draws_three_classes_only(noise):
    weight = noise.normal(size=(5, 12))
    mix = noise.dirichlet([1, 1, 1], size=20)
    embeddings = np.concatenate([mix @ weight[[0, 3, 4]], noise.normal(size=(3, 12))])
    figure = plotting.triangle(embeddings, [0] * 20 + [1] * 3, weight, (0, 3, 4))
    points = [np.asarray(c.get_offsets()) for c in figure.axes[0].collections]
    assert [len(p) for p in points] == [20, 0, 0, 3]
    np.testing.assert_allclose(points[0], mix @ points[3], atol=1e-12)


def test_triangle_refuses_classes_that_make_none():
    weight = simplex_etf(4, 8)
    for classes in ((0, 1), (0, 1, 1), (0, 1, 4), (0, 1, -1)):
        with pytest.raises(ValueError, match="three different labels from 0 to 3"):
            plotting.triangle(weight, range(4), weight, classes)
    line = np.outer([0.0, 1.0, 2.0], np.ones(3))
    with pytest.raises(ValueError, match="one line"):
        plotting.triangle(line, range(3), line, (0, 1, 2))
    with pytest.raises(ValueError, match="2 embeddings for 3 labels"):
        plotting.triangle(weight[:2], [0, 1, 2], weight, (0, 1, 2))


def snapshots(folder: Path, noise: np.random.Generator, number: int) -> list[Path]:
    weight = simplex_etf(4, 8).numpy()
    labels = np.repeat(np.arange(4), 5)
    files = []
    for epoch in range(number):
        embeddings = weight[labels] * epoch / number + noise.normal(size=(20, 8)) * 0.1
        files.append(folder / f"epoch_{epoch:03d}.npz")
        np.savez(files[-1], embeddings=embeddings.astype(np.float16), labels=labels, epoch=epoch, weight=weight)
    return files


def test_film_has_a_frame_per_snapshot_all_to_one_scale(noise, tmp_path):
    path = tmp_path / "films" / "triangle.gif"
    plotting.triangle_film(snapshots(tmp_path, noise, 4), (0, 1, 3), path, frame_ms=100, last_ms=1000)
    with Image.open(path) as film:
        assert film.n_frames == 4
        frames, times = [], []
        for i in range(4):
            film.seek(i)
            frames.append(np.asarray(film.convert("L")).astype(int))
            times.append(film.info["duration"])
    assert times == [100, 100, 100, 1000]
    # the triangle's edges stay where they are: pixels dark in the first frame are dark in all, but for titles and points
    height = frames[0].shape[0]
    dark = frames[0][int(0.75 * height) :] < 140
    kept = [(frame[int(0.75 * height) :] < 170)[dark].mean() for frame in frames]
    assert min(kept) > 0.9
    assert (frames[0] != frames[3]).any()
    assert list(path.parent.iterdir()) == [path]


def test_film_names_a_file_that_is_no_snapshot(noise, tmp_path):
    good = snapshots(tmp_path, noise, 1)
    other = tmp_path / "other.npz"
    np.savez(other, labels=[1])
    (tmp_path / "text.npz").write_text("text")
    for bad in (other, tmp_path / "text.npz", tmp_path / "missing.npz"):
        with pytest.raises(UserError, match=rf"{bad.name} is no snapshot"):
            plotting.triangle_film([*good, bad], (0, 1, 2), tmp_path / "film.gif")
    with pytest.raises(ValueError, match="no snapshots"):
        plotting.triangle_film([], (0, 1, 2), tmp_path / "film.gif")


# All


def test_save_replaces_a_picture_and_leaves_nothing_else(noise, tmp_path):
    path = tmp_path / "figures" / "spectrum.png"
    for n in (3, 5):
        plotting.save(plotting.spectrum(np.arange(1, n)), path)
    assert [file.name for file in path.parent.iterdir()] == ["spectrum.png"]
    assert Image.open(path).size == (840, 576)


def test_figures_are_unknown_to_pyplot_and_can_be_drawn_in_threads(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    workers = [threading.Thread(target=lambda p=p: plotting.save(plotting.spectrum([3, 2, 1]), p)) for p in paths]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len({path.read_bytes() for path in paths}) == 1
    assert pyplot.get_fignums() == []
