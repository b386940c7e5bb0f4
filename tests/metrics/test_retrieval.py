"""Retrieval scores, against scikit-learn."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score
from sklearn.metrics.pairwise import cosine_similarity

from etflight.metrics import retrieval
from etflight.metrics.retrieval import retrieval_scores
from etflight.utils.errors import UserError


def embedded(seed, size, classes=4, dim=6):
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.normal(size=(size, dim))), torch.tensor(rng.integers(0, classes, size))


def expected(queries, query_labels, gallery, gallery_labels, *, same_images=False):
    """R@1 and mAP of a loop over the queries."""
    cosines, first, precision = cosine_similarity(queries, gallery), [], []
    for i, label in enumerate(query_labels.tolist()):
        others = np.arange(len(gallery)) != i if same_images else np.ones(len(gallery), bool)
        relevant = gallery_labels.numpy()[others] == label
        if relevant.any():
            first.append(relevant[cosines[i][others].argmax()])
            precision.append(average_precision_score(relevant, cosines[i][others]))
    return np.mean(first), np.mean(precision)


@given(seed=st.integers(0, 2**32 - 1), size=st.integers(2, 40), classes=st.integers(1, 6))
def test_scores_are_those_of_scikit_learn_query_by_query(seed, size, classes):
    queries, gallery = embedded(seed, size, classes), embedded(seed + 1, 30, classes)
    if not np.isin(queries[1], gallery[1]).any():
        return
    assert retrieval_scores(*queries, *gallery) == pytest.approx(expected(*queries, *gallery), abs=1e-12)


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_an_image_does_not_find_itself_whatever_the_chunks(chunk, monkeypatch):
    monkeypatch.setattr(retrieval, "_CHUNK", chunk)
    queries, labels = embedded(0, 25)
    other = queries + 0.01 * embedded(1, 25)[0]  # the same images embedded by another model
    for gallery in (queries, other):
        found = retrieval_scores(queries, labels, gallery, labels, same_images=True)
        assert found == pytest.approx(expected(queries, labels, gallery, labels, same_images=True), abs=1e-12)
        assert found < retrieval_scores(queries, labels, gallery, labels)


@given(seed=st.integers(0, 2**32 - 1))
def test_scores_do_not_depend_on_lengths_or_on_a_common_rotation(seed):
    (queries, labels), (gallery, others) = embedded(seed, 20, 2), embedded(seed + 1, 20, 2)
    turn = torch.linalg.qr(embedded(seed + 2, 6)[0]).Q
    lengths = torch.linspace(0.5, 2, 20, dtype=torch.float64)[:, None]
    found = retrieval_scores(queries, labels, gallery, others)
    assert retrieval_scores(lengths * queries @ turn, labels, gallery @ turn, others) == pytest.approx(found, abs=1e-12)


def test_collapsed_classes_are_found_completely():
    labels = torch.arange(30) % 3
    assert retrieval_scores(torch.eye(3)[labels], labels, torch.eye(3)[labels], labels, same_images=True) == (1.0, 1.0)


def test_what_cannot_be_compared_is_refused():
    queries, labels = embedded(0, 5)
    with pytest.raises(UserError, match=r"got \[5, 6\] and \[5, 3\]"):
        retrieval_scores(queries, labels, queries[:, :3], labels)
    with pytest.raises(UserError, match="no query has an image of its class"):
        retrieval_scores(queries, labels, queries, labels + 9)
    with pytest.raises(UserError, match="5 queries and 4 gallery images"):
        retrieval_scores(queries, labels, queries[:4], labels[:4], same_images=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
@pytest.mark.parametrize("which", ["query", "gallery"])
def test_embeddings_that_are_no_numbers_have_no_scores(value, which):
    (queries, labels), (gallery, others) = embedded(0, 9, 2), embedded(1, 20, 2)
    {"query": queries, "gallery": gallery}[which][5, 2] = value
    with pytest.raises(UserError, match=rf"1 of \d+ {which} embeddings are NaN or infinite, the first is row 5: "):
        retrieval_scores(queries, labels, gallery, others)
