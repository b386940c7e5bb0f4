import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression as Theirs
from torch import Tensor

from etflight.closed_form import LogisticRegression, behind_frame, cosine_regression, dot_regression, minimise
from etflight.geometry import simplex_etf
from etflight.losses import DotRegressionLoss, log_prior
from etflight.utils.errors import UserError
from tests.closed_form.test_heads import D, K, sample


def solved(features: Tensor, labels: Tensor, penalty: float, tolerance: float = 1e-9, **options: Tensor):
    return next(LogisticRegression(features, labels, K, **options).path([penalty], tolerance=tolerance))


@pytest.mark.parametrize("penalty", [1e-3, 0.05, 10.0])
@pytest.mark.parametrize("weighted", [True, False])
def test_it_is_that_of_scikit_learn(penalty: float, weighted: bool) -> None:
    features, labels = sample()
    class_weights = len(labels) / (K * labels.bincount().double()) if weighted else None
    W, b = solved(features, labels, penalty, class_weights=class_weights)
    theirs = Theirs(
        C=1 / (len(labels) * penalty),
        class_weight="balanced" if weighted else None,
        solver="newton-cg",
        tol=1e-11,
        max_iter=10_000,
    ).fit(features.numpy(), labels.numpy())
    torch.testing.assert_close(W, torch.from_numpy(theirs.coef_), rtol=0, atol=1e-6)
    torch.testing.assert_close(b, torch.from_numpy(theirs.intercept_) - theirs.intercept_.mean(), rtol=0, atol=1e-5)


def test_the_prior_in_the_loss_and_a_path_from_large_to_small_reach_the_stated_gradient() -> None:
    features, labels = sample()
    offset = log_prior(labels.bincount().double())
    penalties = [1.0, 0.1, 0.01, 0.001]
    problem = LogisticRegression(features, labels, K, offset=offset)
    for penalty, (W, b) in zip(penalties, problem.path(penalties, tolerance=1e-7), strict=True):
        W, b = W.requires_grad_(), b.requires_grad_()
        objective = F.cross_entropy(features @ W.T + b + offset, labels) + penalty / 2 * W.square().sum()
        gradients = torch.autograd.grad(objective, [W, b])
        assert max(float(gradient.abs().max()) for gradient in gradients) <= 1.1e-7


def test_rows_of_a_problem_are_a_problem_of_their_own() -> None:
    features, labels = sample()
    rows = torch.arange(0, len(labels), 2)
    of_rows = next(LogisticRegression(features, labels, K).path([0.05], rows, tolerance=1e-9))
    torch.testing.assert_close(of_rows, solved(features[rows], labels[rows], 0.05), rtol=1e-6, atol=1e-6)


def test_features_of_float32_are_solved_in_float32_and_the_same_each_time() -> None:
    features, labels = sample()
    first, second = (solved(features.float(), labels, 0.01, tolerance=1e-4) for _ in range(2))
    assert first[0].dtype == torch.float32
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    exact = solved(features, labels, 0.01)[0]
    assert (first[0] - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(("scale", "penalty"), [(1.0, 0.1), (5.0, 0.5)])
def test_a_fixed_frame_behind_a_linear_map_is_regularised_logistic_regression(scale: float, penalty: float) -> None:
    """Cross-entropy of `s V (A h + a)` with `(λ/2) ‖A‖²` has, by scipy, the optimum that scikit-learn has for `C = s² κ / (λ N)`."""
    features, labels = sample()
    frame = simplex_etf(K, K - 1, dtype=torch.float64)

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.from_numpy(flat).reshape(K - 1, D + 1).requires_grad_()
        logits = scale * (features @ point[:, :-1].T + point[:, -1]) @ frame.T
        value = F.cross_entropy(logits, labels) + penalty / 2 * point[:, :-1].square().sum()
        return float(value), torch.autograd.grad(value, point)[0].flatten().numpy()

    found = minimize(
        objective, np.zeros((K - 1) * (D + 1)), jac=True, method="BFGS", options={"gtol": 1e-9, "maxiter": 10_000}
    )
    A = torch.from_numpy(found.x).reshape(K - 1, D + 1)[:, :-1]
    C = scale**2 * K / (K - 1) / (penalty * len(labels))
    theirs = Theirs(C=C, solver="newton-cg", tol=1e-11, max_iter=10_000).fit(features.numpy(), labels.numpy())
    torch.testing.assert_close(scale * frame @ A, torch.from_numpy(theirs.coef_), rtol=0, atol=1e-5)
    torch.testing.assert_close(behind_frame(torch.from_numpy(theirs.coef_), frame, scale), A, rtol=0, atol=1e-5)


def test_a_learnt_cosine_head_is_at_a_minimum_of_its_cross_entropy() -> None:
    features, labels = sample()
    offset = log_prior(labels.bincount().double())
    start = torch.stack([features[labels == k].mean(0) for k in range(K)])
    found = cosine_regression(features, labels, start, 8.0, offset=offset, tolerance=1e-8)

    def loss(vectors: Tensor) -> Tensor:
        cosines = F.cosine_similarity(features[:, None], vectors[None], dim=2)
        return F.cross_entropy(8 * cosines + offset, labels)

    gradient = torch.autograd.functional.jacobian(loss, found)
    assert gradient.abs().max() <= 1e-7
    draw = torch.Generator().manual_seed(1)
    for _ in range(20):
        assert loss(found + 0.05 * torch.randn(K, D, generator=draw, dtype=torch.float64)) > loss(found)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(K, dtype=torch.float64))


@pytest.mark.parametrize("penalty", [1e-4, 0.01])
def test_dot_regression_is_at_a_minimum_of_its_loss(penalty: float) -> None:
    features, labels = sample()
    frame = simplex_etf(K, D, dtype=torch.float64)
    A = dot_regression(features, labels, frame, penalty, tolerance=1e-8)

    def objective(matrix: Tensor) -> Tensor:
        mapped = features @ matrix.T
        short = mapped / (1 + mapped.square().sum(1, keepdim=True)).sqrt()
        return DotRegressionLoss()(short @ frame.T, labels) + penalty / 2 * matrix.square().sum()

    assert torch.autograd.functional.jacobian(objective, A).abs().max() <= 1e-7
    draw = torch.Generator().manual_seed(1)
    for _ in range(20):
        step = 0.02 * A.norm() * F.normalize(torch.randn(D * D, generator=draw, dtype=torch.float64), dim=0)
        assert objective(A + step.reshape(D, D)) > objective(A)


def test_with_a_small_penalty_dot_regression_lets_separable_classes_reach_the_frame() -> None:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(K).repeat(20)
    features = 5 * torch.eye(K, D, dtype=torch.float64)[labels] + 0.1 * torch.randn(
        100, D, generator=draw, dtype=torch.float64
    )
    frame = simplex_etf(K, D, dtype=torch.float64)
    A = dot_regression(features, labels, frame, 1e-6, tolerance=1e-8)
    assert F.cosine_similarity(features @ A.T, frame[labels]).min() > 0.99


def test_the_minimiser_finds_the_bottom_of_a_curved_valley() -> None:
    def rosenbrock(x: Tensor) -> tuple[Tensor, Tensor]:
        value = 100 * (x[1] - x[0] ** 2) ** 2 + (1 - x[0]) ** 2
        slope = torch.stack([-400 * x[0] * (x[1] - x[0] ** 2) - 2 * (1 - x[0]), 200 * (x[1] - x[0] ** 2)])
        return value, slope

    start = torch.tensor([-1.2, 1.0], dtype=torch.float64)
    found = minimise(rosenbrock, start, lambda gradient: float(gradient.norm()) < 1e-9)
    torch.testing.assert_close(found, torch.ones(2, dtype=torch.float64))
    with pytest.raises(UserError, match="within 3 steps"):
        minimise(rosenbrock, start, lambda gradient: False, max_iterations=3)


def test_what_has_no_answer_is_refused() -> None:
    features, labels = sample()
    with pytest.raises(UserError, match="labels"):
        LogisticRegression(features, labels[1:], K)
    with pytest.raises(UserError, match="num_classes"):
        LogisticRegression(features, labels, K - 1)
    with pytest.raises(UserError, match="penalty"):
        solved(features, labels, 0.0)
