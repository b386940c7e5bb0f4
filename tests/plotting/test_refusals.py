import numpy as np
import pytest
import torch

from etflight import plotting, simplex_etf

W = simplex_etf(4, 8).numpy()
LINE = np.outer([0.0, 1.0, 2.0], np.ones(3))
IMAGES = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("draw", "arguments", "reason"),
    [
        (plotting.cosine_heatmap, (np.zeros((3, 4)), np.zeros((4, 4))), r"\[3, 4\] and \[4, 4\]"),
        (plotting.spectrum, ([],), "two classes"),
        (plotting.reliability_diagram, ({},), "needs bins"),
        (plotting.confusion_matrix, (torch.ones(2, 3),), r"\[2, 3\]"),
        (plotting.accuracy_by_size, ([0.5], [1, 2]), "1 accuracies for 2 class counts"),
        (plotting.class_histogram, ([1, 2, 3], ["a", "b"]), "2 class names for 3 class counts"),
        (plotting.contact_sheet, (IMAGES, torch.tensor([0]), ["a"], [1]), "2 images for 1 places"),
        (plotting.contact_sheet, (IMAGES, torch.tensor([0, 1]), ["a"], [1]), "rows 0 to 1 for 1 names"),
        (plotting.triangle, (W, range(4), W, (0, 1, 1)), "three different labels from 0 to 3"),
        (plotting.triangle, (W, range(4), W, (0, 1, 4)), "three different labels"),
        (plotting.triangle, (LINE, range(3), LINE, (1, 0, 2)), "one line"),
        (plotting.triangle, (W[:2], [0, 1, 2], W, (0, 1, 2)), "2 embeddings for 3 labels"),
        (plotting.triangle_film, ([], (0, 1, 2), "film.gif"), "no snapshots"),
        (plotting.collapse_curves, ({"val/acc": [1.0]}, [0]), "nothing to draw"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        draw(*arguments)
