import math

import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge
from sklearn.neighbors import NearestCentroid
from torch import Tensor

from etflight import closed_form
from etflight.closed_form import lda, nearest_class_mean, nearest_frame, plain, ridge, standardization, whitening
from etflight.geometry import simplex_etf
from etflight.metrics import ClassStatistics, Moments
from etflight.utils.errors import UserError

K, D = 5, 12


def sample(seed: int = 0, per_class: tuple[int, ...] = (40, 25, 13, 7, 3)) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.repeat_interleave(torch.arange(len(per_class)), torch.tensor(per_class))
    mix = torch.randn(D, D, generator=draw, dtype=torch.float64)
    means = 1.5 * torch.randn(len(per_class), D, generator=draw, dtype=torch.float64) + 2
    features = means[labels] + torch.randn(len(labels), D, generator=draw, dtype=torch.float64) @ mix
    order = torch.randperm(len(labels), generator=draw)
    return features[order], labels[order]


def moments_of(features: Tensor, labels: Tensor, *, balanced: bool = False) -> Moments:
    counts = labels.bincount(minlength=K) if balanced else None
    statistics = ClassStatistics(K, features.shape[1], class_counts=counts)
    statistics.update(features, labels)
    return statistics.compute()


def same_up_to_a_number_per_row(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    apart = ours - theirs
    return bool((apart - apart.mean(dim=1, keepdim=True)).abs().max() <= tolerance * theirs.abs().max())


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("has_prior", [True, False])
def test_lda_is_that_of_scikit_learn(shrinkage: float, has_prior: bool) -> None:
    features, labels = sample()
    prior = labels.bincount().double() / len(labels) if has_prior else None
    theirs = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(features.numpy(), labels.numpy())
    expected = torch.from_numpy(theirs.decision_function(features.numpy()))
    if not has_prior:
        expected = expected - torch.from_numpy(theirs.priors_).log()
    ours = lda(moments_of(features, labels), shrinkage, prior)
    assert same_up_to_a_number_per_row(ours(features), expected, 1e-9)


@pytest.mark.parametrize("balanced", [True, False])
def test_ridge_is_that_of_scikit_learn(balanced: bool) -> None:
    features, labels = sample()
    weights = 1 / labels.bincount()[labels].double() if balanced else torch.ones(len(labels), dtype=torch.float64)
    theirs = Ridge(0.7 * float(weights.sum()), solver="cholesky")
    theirs.fit(features.numpy(), torch.eye(K)[labels].numpy(), sample_weight=weights.numpy())
    ours = ridge(moments_of(features, labels, balanced=balanced), 0.7)(features)
    torch.testing.assert_close(ours, torch.from_numpy(theirs.predict(features.numpy())), rtol=0, atol=1e-9)


def test_ridge_to_the_vertices_of_a_simplex_decides_as_ridge_to_one_hot_targets() -> None:
    features, labels = sample()
    frame = simplex_etf(K, D, dtype=torch.float64)
    centred = features - features.mean(0)
    targets = frame[labels] - frame[labels].mean(0)
    scatter = centred.T @ centred / len(centred) + 0.7 * torch.eye(D, dtype=torch.float64)
    A = torch.linalg.solve(scatter, centred.T @ targets / len(centred)).T
    to_vertices = (centred @ A.T + frame[labels].mean(0)) @ frame.T
    ours = ridge(moments_of(features, labels), 0.7)(features)
    assert same_up_to_a_number_per_row(to_vertices * (K - 1) / K, ours, 1e-9)


def test_the_nearest_class_mean_is_that_of_scikit_learn() -> None:
    features, labels = sample()
    theirs = NearestCentroid().fit(features.numpy(), labels.numpy()).predict(features.numpy())
    ours = nearest_class_mean(moments_of(features, labels), plain(D, unit_features=False))
    assert ours(features).argmax(1).tolist() == theirs.tolist()


def test_by_angle_logits_are_cosines_to_the_means_of_unit_features() -> None:
    features, labels = sample()
    unit = torch.nn.functional.normalize(features, dim=1)
    means = torch.stack([unit[labels == k].mean(0) for k in range(K)])
    head = nearest_class_mean(moments_of(unit, labels), plain(D, normalize=True), scale=3.0)
    cosines = torch.nn.functional.cosine_similarity(features[:, None], means[None], dim=2)
    torch.testing.assert_close(head(features), 3 * cosines)


@pytest.mark.parametrize("shrinkage", [0.0, 0.4])
def test_whitened_features_have_the_identity_as_their_shrunk_covariance(shrinkage: float) -> None:
    features, labels = sample(per_class=(40, 25, 30, 37, 33))
    moments = moments_of(features, labels)
    white = whitening(moments, shrinkage, unit_features=False, normalize=False)
    within = moments_of(white(features), labels).covariance()
    extra = shrinkage * moments.covariance().diagonal().mean() * white.matrix @ white.matrix.T
    torch.testing.assert_close((1 - shrinkage) * within + extra, torch.eye(D, dtype=torch.float64))
    class_means = torch.stack([features[labels == k].mean(0) for k in range(K)])
    torch.testing.assert_close(white.shift, class_means.mean(0))


def test_the_nearest_whitened_mean_by_distance_is_lda() -> None:
    features, labels = sample()
    moments = moments_of(features, labels)
    white = whitening(moments, 0.3, unit_features=False, normalize=False)
    assert same_up_to_a_number_per_row(nearest_class_mean(moments, white)(features), lda(moments, 0.3)(features), 1e-9)


def test_standardised_features_have_mean_0_and_variance_1_and_a_constant_one_is_0() -> None:
    features, labels = sample()
    features[:, 3] = 7.0
    scaled = standardization(moments_of(features, labels))(features)
    torch.testing.assert_close(scaled.mean(0), torch.zeros(D, dtype=torch.float64))
    expected = torch.ones(D, dtype=torch.float64)
    expected[3] = 0
    torch.testing.assert_close(scaled.var(0, correction=0), expected)


def test_no_simplex_is_nearer_to_the_mapped_means_than_the_nearest_frame() -> None:
    features, labels = sample()
    unit = torch.nn.functional.normalize(features, dim=1)
    moments = moments_of(unit, labels)
    white = whitening(moments, 0.1)
    head = nearest_frame(moments, white, scale=2.0)
    gram = head.weight @ head.weight.T
    torch.testing.assert_close(gram, (K * torch.eye(K).double() - 1) / (K - 1))
    assert "weight" in dict(head.named_buffers())
    means = nearest_class_mean(moments, white).weight
    reached = (head.weight * means).sum()
    for seed in range(50):
        assert (simplex_etf(K, D, seed=seed, dtype=torch.float64) * means).sum() < reached


def test_any_linear_head_is_exact_behind_a_frame() -> None:
    draw = torch.Generator().manual_seed(0)
    W = torch.randn(K, D, generator=draw, dtype=torch.float64)
    frame = simplex_etf(K, 7, dtype=torch.float64)
    A = closed_form.behind_frame(W, frame, scale=4.0)
    features = torch.randn(9, D, generator=draw, dtype=torch.float64)
    assert same_up_to_a_number_per_row(4 * features @ A.T @ frame.T, features @ W.T, 1e-12)
    centred = W - W.mean(0)
    torch.testing.assert_close(A.norm() * math.sqrt(K / (K - 1)) * 4, centred.norm())


def test_statistics_of_folds_together_give_the_head_of_all_samples() -> None:
    features, labels = sample()
    parts = [ClassStatistics(K, D) for _ in range(3)]
    for fold, part in enumerate(parts):
        part.update(features[fold::3], labels[fold::3])
    for part in parts[1:]:
        parts[0].merge_state(part)
    merged, whole = parts[0].compute(), moments_of(features, labels)
    for head in (lambda m: lda(m, 0.2), lambda m: ridge(m, 0.1), lambda m: nearest_frame(m, whitening(m, 0.1))):
        torch.testing.assert_close(head(merged)(features), head(whole)(features), rtol=1e-9, atol=1e-9)


def test_what_has_no_answer_is_refused() -> None:
    features, labels = sample()
    moments = moments_of(features, labels)
    without = moments_of(features[labels != 2], labels[labels != 2])
    for refused, word in (
        (lambda: lda(without, 0.1), "class 2"),
        (lambda: lda(moments, 1.1), "shrinkage"),
        (lambda: lda(moments, 0.1, torch.zeros(K)), "prior"),
        (lambda: ridge(moments, 0.0), "penalty"),
        (lambda: standardization(ClassStatistics(K, D).compute()), "no samples"),
    ):
        with pytest.raises(UserError, match=word):
            refused()
