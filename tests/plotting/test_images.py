import numpy as np
import pytest
import torch

from etflight import plotting
from etflight.plotting.canvas import BLUE, GREEN, VERMILION


def hexadecimal(patch):
    return "#" + "".join(f"{round(255 * value):02X}" for value in patch.get_facecolor()[:3])


def test_bars_go_from_the_most_frequent_class_to_the_rarest_in_the_colours_of_their_groups():
    axes = plotting.class_histogram([19, 101, 20, 100], ["a", "b", "c", "d"]).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [101, 100, 20, 19]
    assert [hexadecimal(bar) for bar in axes.patches] == [BLUE, GREEN, GREEN, VERMILION]
    assert [text.get_text() for text in axes.get_yticklabels()] == list("bdca")
    assert [text.get_text() for text in axes.texts] == ["101", "100", "20", "19"]
    top, bottom = axes.transData.transform([(0, 0), (0, 3)])[:, 1]
    assert top > bottom


def test_of_many_classes_the_counts_are_one_curve():
    counts = np.random.default_rng(0).permutation(np.arange(1, 201))
    axes = plotting.class_histogram(torch.tensor(counts)).axes[0]
    assert axes.get_yscale() == "log"
    steps = [part.get_data() for part in axes.patches]
    np.testing.assert_array_equal(np.concatenate([step.values for step in steps]), np.arange(200, 0, -1))
    assert [(step.edges[0], step.edges[-1]) for step in steps] == [(0.5, 100.5), (100.5, 181.5), (181.5, 200.5)]
    assert [hexadecimal(part) for part in axes.patches] == [BLUE, GREEN, VERMILION]
    assert plotting.class_histogram([3] * 100).axes[0].get_yscale() == "linear"


@pytest.mark.parametrize("channels", [2, 5])
def test_the_sheet_shows_pixels_as_they_are(channels):
    images = torch.randint(0, 256, (3, channels, 4, 4), dtype=torch.uint8)
    (axes,) = plotting.contact_sheet(images, torch.tensor([1, 0, 1]), ["one", "two"], [1, 2]).axes
    sheet = axes.images[0].get_array()
    assert sheet.shape == (10, 10, 3)
    for image, row, column in ((0, 1, 0), (1, 0, 0), (2, 1, 1)):
        pixels = images[image].double().numpy()
        expected = pixels[:3] if channels > 2 else np.broadcast_to(pixels.mean(0), (3, 4, 4))
        shown = sheet[5 * row :][:4, 5 * column :][:, :4].transpose(2, 0, 1)
        np.testing.assert_array_equal(shown, np.floor(expected))
    assert (sheet[:4, 5:9] == 255).all()  # class "one" has one image


def test_large_images_are_shown_by_their_means():
    images = torch.randint(0, 256, (1, 3, 192, 96), dtype=torch.uint8)
    (axes,) = plotting.contact_sheet(images, torch.tensor([0]), ["one"], [1]).axes
    sheet = axes.images[0].get_array()[:96, :48].transpose(2, 0, 1)
    blocks = images[0].double().numpy().reshape(3, 96, 2, 48, 2).mean((2, 4))
    np.testing.assert_allclose(sheet, blocks, atol=0.51)


def test_a_dollar_in_a_title_is_a_dollar():
    title = "d$_^$"
    for figure in (
        plotting.class_histogram([1, 2], title=title),
        plotting.contact_sheet(torch.zeros(1, 3, 4, 4), torch.tensor([0]), ["one"], [1], title=title),
        plotting.score_histograms({title: ([0.1, 0.2], [0.3, 0.4])}, title, title),
    ):
        plotting.render(figure)
