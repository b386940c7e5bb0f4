"""Scores equal to NumPy, SciPy and scikit-learn, and to pytorch-ood where it has them; its scores are larger for unknown images."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_ood import detector
from scipy.spatial.distance import cdist
from scipy.special import logsumexp, softmax
from scipy.stats import ortho_group
from sklearn.decomposition import PCA
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import normalize

from etflight.geometry import simplex_etf
from etflight.metrics import ClassStatistics, measures, ood
from etflight.utils.errors import UserError
from tests.metrics.oracle import clusters

K, D = 4, 9


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    # so that each score is put together from several parts
    monkeypatch.setattr(measures.centres, "_MOST_DISTANCES", 300)


@pytest.fixture
def train():
    return clusters(K, D)


@pytest.fixture
def features():
    return clusters(K, D, seed=1, spread=2.0)[0]


@pytest.fixture
def logits():
    return 3 * torch.randn(50, K, generator=torch.Generator().manual_seed(2))


def statistics(features, labels, num_classes=K):
    metric = ClassStatistics(num_classes, features.shape[1])
    metric.update(features, labels)
    return metric.compute()


def close(actual, expected, rtol=1e-9):
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=1e-10)
    assert actual.dtype == torch.float64
    assert actual.ndim == 1


@pytest.mark.parametrize("T", [1.0, 0.2])
def test_scores_of_logits_are_scipys_and_those_of_pytorch_ood(logits, T):
    z = logits.double().numpy()
    close(ood.msp(logits, T), softmax(z / T, axis=1).max(1))
    close(ood.max_logit(logits), z.max(1))
    close(ood.energy(logits, T), T * logsumexp(z / T, axis=1))
    close(ood.msp(logits, T), -detector.MaxSoftmax.score(logits.double(), T))
    close(ood.max_logit(logits), -detector.MaxLogit.score(logits.double()))
    close(ood.energy(logits, T), -detector.EnergyBased.score(logits.double(), T))


def test_scores_of_large_logits_are_finite():
    large = torch.tensor([[1e4, -1e4], [-1e4, -1e4]])
    close(ood.energy(large), [1e4, -1e4 + np.log(2)])
    close(ood.msp(large), [1, 0.5])


def test_mahalanobis_is_the_squared_distance_of_scipy_and_orders_as_pytorch_ood(train, features):
    h, y = train[0].double().numpy(), train[1].numpy()
    means = np.array([h[y == k].mean(0) for k in range(K)])
    covariance = (h - means[y]).T @ (h - means[y]) / len(h)
    distances = cdist(features.double(), means, "mahalanobis", VI=np.linalg.inv(covariance))
    score = ood.mahalanobis(features, statistics(*train))
    close(score, -(distances.min(1) ** 2), rtol=1e-8)
    # theirs is half the distance by the sum of outer products, where the paper has their mean; in float32
    other = -detector.Mahalanobis(None).fit_features(*train).predict_features(features)
    np.testing.assert_allclose(score, 2 * len(h) * other, rtol=1e-4)


def test_mahalanobis_of_one_dimension():
    train, labels = torch.tensor([[0.0], [2.0], [9.0], [11.0]]), torch.tensor([0, 0, 1, 1])
    close(
        ood.mahalanobis(torch.tensor([[1.0], [4.0], [12.0]]), statistics(train, labels, 2)),
        torch.tensor([0.0, -9.0, -4.0]),
    )


def test_mahalanobis_leaves_out_missing_classes_and_directions_without_variance(train, features):
    padded = [torch.cat([part, 0.25 * torch.ones(len(part), 2)], dim=1) for part in (train[0], features)]
    score = ood.mahalanobis(
        padded[1] + torch.tensor([0.0] * D + [0.0, 5.0]), statistics(padded[0], train[1] + 1, K + 2)
    )
    close(score, ood.mahalanobis(features, statistics(*train)), rtol=1e-6)
    with pytest.raises(ValueError, match="scatter"):
        ood.mahalanobis(features, statistics(*train)._replace(within=None))


@pytest.mark.parametrize("k", [1, 5, 98])
def test_knn_is_the_distance_of_scikit_learn_and_that_of_pytorch_ood(train, features, k):
    assert k <= len(train[0])
    normed = [normalize(part.double().numpy()) for part in (train[0], features)]
    distances, _ = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(normed[0]).kneighbors(normed[1])
    score = ood.knn(features, train[0], k)
    close(score, -distances[:, -1], rtol=1e-7)
    other = detector.KNN(None, k=k).fit_features(train[0].double(), train[1]).predict_features(features.double())
    close(score, -other, rtol=1e-7)


@pytest.mark.parametrize("k", [0, 10_000])
def test_a_neighbour_that_does_not_exist_is_refused(train, features, k):
    with pytest.raises(UserError, match=f"no neighbour k = {k} among {len(train[0])} training images"):
        ood.knn(features, train[0], k)


def test_neco_is_the_ratio_of_norms_of_scikit_learns_components(train, features, logits):
    pca = PCA(n_components=3, svd_solver="full").fit(train[0].double().numpy())
    centred = features.double().numpy() - pca.mean_
    ratio = np.linalg.norm(pca.transform(features.double().numpy()), axis=1) / np.linalg.norm(centred, axis=1)
    subspace = ood.principal_subspace(train[0], 3)
    close(ood.neco(features, subspace), ratio)
    close(ood.neco_max_logit(features[:50], logits, subspace), ratio[:50] * logits.double().amax(1).numpy())
    for components in (0, D + 1):
        with pytest.raises(UserError, match=f"no {components} principal components of {D} features: give 1 to {D}"):
            ood.principal_subspace(train[0], components)


def test_scores_of_a_frame_are_norms_of_a_least_squares_fit_and_cosines(features):
    frame = simplex_etf(K, D)
    w, h = frame.double().numpy(), features.double().numpy()
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert len(ood.span_of(simplex_etf(40, 128, dtype=torch.float64).to(dtype)).basis) == 39
    inside = w[:-1].T @ np.linalg.lstsq(w[:-1].T, h.T, rcond=None)[0]
    norms = np.linalg.norm(h, axis=1)
    close(ood.span_norm(features, frame), np.linalg.norm(inside, axis=0) / norms, rtol=1e-6)
    close(
        ood.span_norm(features / features.norm(dim=1, keepdim=True), frame),
        np.linalg.norm(inside, axis=0) / norms,
        1e-6,
    )
    close(ood.largest_cosine(features, frame), (1 - cdist(h, w, "cosine")).max(1), rtol=1e-8)


def test_scores_of_zeros_are_those_of_a_feature_orthogonal_to_all():
    nothing, frame = torch.zeros(1, D), simplex_etf(K, D)
    close(ood.span_norm(nothing, frame), [0])
    close(ood.largest_cosine(nothing, frame), [0])
    close(ood.knn(nothing, frame, 1), [-(2**0.5)])


@settings(max_examples=20)
@given(st.integers(0, 1000), st.floats(0.01, 100))
def test_scores_do_not_depend_on_what_they_must_not(seed, scale):
    g = np.random.default_rng(seed)
    (h, y), x = clusters(K, D, seed=seed, dtype=torch.float64), clusters(K, D, seed=seed + 1, dtype=torch.float64)[0]
    W, z = torch.tensor(g.normal(size=(K, D))), torch.tensor(g.normal(size=(20, K)))
    turn, shift = torch.tensor(ortho_group.rvs(D, random_state=g)), torch.tensor(g.normal(size=D))
    affine = torch.tensor(g.normal(size=(D, D)) + 3 * np.eye(D))
    moved, moved_h = scale * x @ turn + shift, scale * h @ turn + shift
    close(ood.neco(moved, ood.principal_subspace(moved_h, 3)), ood.neco(x, ood.principal_subspace(h, 3)), rtol=1e-6)
    if np.linalg.cond(affine) < 100:
        other = ood.mahalanobis(x @ affine + shift, statistics(h @ affine + shift, y))
        close(other, ood.mahalanobis(x, statistics(h, y)), rtol=1e-5)
    close(ood.knn(scale * x @ turn, h @ turn, 3), ood.knn(x, h, 3), rtol=1e-6)
    close(ood.span_norm(scale * x @ turn, 2 * W @ turn), ood.span_norm(x, W), rtol=1e-7)
    close(ood.largest_cosine(scale * x @ turn, W @ turn), ood.largest_cosine(x, W), rtol=1e-7)
    close(ood.msp(z + scale), ood.msp(z), rtol=1e-7)
    close(ood.energy(z + scale), ood.energy(z) + scale, rtol=1e-7)


# --- how well a score separates ------------------------------------------------------------------------------------------


def scores_of(draw, n, m):
    """Scores with ties, of known images that have larger ones on average."""
    g = np.random.default_rng(draw)
    return torch.tensor(g.normal(1, 1, n)).round(decimals=1), torch.tensor(g.normal(0, 1, m)).round(decimals=1)


@pytest.mark.parametrize(("n", "m"), [(400, 1500), (100, 7), (1, 1)])
@pytest.mark.parametrize("monotone", [lambda s: s, lambda s: 1000 * s - 5000, lambda s: s.exp()])
def test_separation_is_scikit_learns_whatever_the_range_of_the_scores(n, m, monotone):
    known, unknown = scores_of(n, n, m)
    result = ood.separation(monotone(known), monotone(unknown))
    is_known, scores = np.r_[np.ones(n), np.zeros(m)], torch.cat([known, unknown]).numpy()
    false, true, _ = roc_curve(is_known, scores, drop_intermediate=False)
    assert result.auroc == pytest.approx(roc_auc_score(is_known, scores), abs=1e-6)
    assert result.aupr_known == pytest.approx(average_precision_score(is_known, scores), abs=1e-6)
    assert result.aupr_unknown == pytest.approx(average_precision_score(1 - is_known, -scores), abs=1e-6)
    assert result.fpr95 == pytest.approx(false[np.argmax(true >= 0.95)], abs=1e-6)


def test_separation_counts_unknown_images_above_the_threshold_that_keeps_95_per_cent():
    known = torch.arange(20.0)  # the threshold 1 keeps 19 of them
    assert ood.separation(known, torch.tensor([0.5, 1.0, 7.0, -3.0])).fpr95 == 0.5
    assert ood.separation(known, known - 100) == (1, 1, 1, 0)


@pytest.mark.parametrize("unknown", [torch.tensor([]), torch.tensor([float("nan")])])
def test_separation_of_nothing_or_of_no_number_is_refused(unknown):
    with pytest.raises(UserError, match=r"\d+ known and \d+ unknown images.*: give"):
        ood.separation(torch.ones(3), unknown)


# --- what is no number ---------------------------------------------------------------------------------------------------

BROKEN = pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])


def broken(values, value, rows=(3, 4)):
    """The values with one number of some rows replaced."""
    values = values.clone()
    values[list(rows), 1] = value
    return values


def scores_by_name(train):
    """Every score of a row, as a function of that row's vector, which may be its embedding or its logits."""
    stats, subspace, frame = statistics(*train), ood.principal_subspace(train[0], 3), simplex_etf(K, D)
    return {
        "msp": ood.msp,
        "max_logit": ood.max_logit,
        "energy": ood.energy,
        "mahalanobis": lambda h: ood.mahalanobis(h, stats),
        "knn": lambda h: ood.knn(h, train[0], 5),
        "neco": lambda h: ood.neco(h, subspace),
        "neco_max_logit": lambda h: ood.neco_max_logit(h, h[:, :K], subspace),
        "span_norm": lambda h: ood.span_norm(h, frame),
        "largest_cosine": lambda h: ood.largest_cosine(h, frame),
    }


@BROKEN
def test_no_score_of_a_row_that_is_no_number_is_a_number(train, features, value):
    for name, score in scores_by_name(train).items():
        if value < 0 and name in ("msp", "max_logit", "energy"):
            continue  # a class that is ruled out
        assert score(features).isfinite().all()
        with pytest.raises(UserError, match=rf"2 of {len(features)} \w+ are NaN or infinite, the first is row 3: "):
            score(broken(features, value))


def test_a_logit_of_minus_infinity_rules_its_class_out_but_not_all_classes_of_a_row(logits):
    for score in (ood.msp, ood.max_logit, ood.energy):
        without = score(logits[3:4, [0, *range(2, K)]])
        torch.testing.assert_close(score(broken(logits, -torch.inf))[3:4], without)
        with pytest.raises(UserError, match="1 of 2 logits are NaN or infinite, the first is row 1"):
            score(torch.tensor([[0.0, 1.0], [-torch.inf, -torch.inf]]))


@BROKEN
def test_nothing_is_fitted_to_training_features_or_class_vectors_that_are_no_numbers(train, features, value):
    spoilt, weight = broken(train[0], value), broken(simplex_etf(K, D), value, [2])
    for work, what in (
        (lambda: ood.knn(features, spoilt, 5), f"2 of {len(spoilt)} training features"),
        (lambda: ood.principal_subspace(spoilt, 3), f"2 of {len(spoilt)} training features"),
        (lambda: ood.mahalanobis(features, statistics(spoilt, train[1])), "of 4 class means"),
        (lambda: ood.span_norm(features, weight), "1 of 4 class vectors"),
        (lambda: ood.largest_cosine(features, weight), "1 of 4 class vectors"),
    ):
        with pytest.raises(UserError, match=f"{what} are NaN or infinite, the first is row"):
            work()


def test_a_number_whose_square_is_none_is_refused_as_well(features):
    with pytest.raises(UserError, match=r"2 of .* are NaN or infinite"):
        ood.largest_cosine(broken(features.double(), 1e200), simplex_etf(K, D))
