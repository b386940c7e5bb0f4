import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import orthogonal_procrustes
from torch.testing import assert_close

from etflight import class_code, geometry, largest_cosine, nearest_etf, simplex_etf
from etflight.geometry import orthant_code, simplex_equiangular_tight_frame
from etflight.utils.errors import UserError
from tests.tensors import LargestTensor


def assert_simplex(W, tolerance=1e-12):
    """Unit rows, equal angles, and so the centre zero."""
    K = len(W)
    gram = (K * torch.eye(K, dtype=torch.float64) - 1) / (K - 1)
    assert_close(W.double() @ W.double().T, gram, rtol=0, atol=tolerance)


def assert_centred_unit_rows(W):
    assert_close(W.norm(dim=1), torch.ones(len(W), dtype=W.dtype), rtol=0, atol=1e-12)
    assert_close(W.sum(0), torch.zeros(W.shape[1], dtype=W.dtype), rtol=0, atol=1e-10)


def brute_force(W):
    return (W @ W.T - 2 * torch.eye(len(W), dtype=W.dtype)).max().item()


# --- the simplex -------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(2, 24).flatmap(lambda K: st.tuples(st.just(K), st.integers(K - 1, 40))), st.integers(0, 2**31 - 1))
def test_a_simplex_for_every_size_and_seed(size, seed):
    W = simplex_etf(*size, seed=seed, dtype=torch.float64)
    assert W.shape == size
    assert_simplex(W)
    assert torch.equal(W, simplex_etf(*size, seed=seed, dtype=torch.float64))


@settings(max_examples=30)
@given(st.integers(2, 24).flatmap(lambda K: st.tuples(st.just(K), st.integers(K, 60))), st.integers(0, 2**31 - 1))
def test_an_orthant_code_is_orthonormal_without_negative_entries_and_centred_a_simplex(size, seed):
    W = orthant_code(*size, seed=seed, dtype=torch.float64)
    assert_close(W @ W.T, torch.eye(size[0], dtype=torch.float64))
    assert bool((W >= 0).all())
    assert bool((W > 0).any(0).all())
    centred = W - W.mean(0)
    assert_simplex(centred / centred.norm(dim=1, keepdim=True))


@pytest.mark.parametrize(("K", "d"), [(2, 1), (65, 64), (300, 400)])
def test_extreme_sizes_keep_their_accuracy_in_both_dtypes(K, d):
    assert_simplex(simplex_etf(K, d, dtype=torch.float64))
    assert simplex_etf(K, d).dtype == torch.float32
    assert_simplex(simplex_etf(K, d), 1e-6)


def test_rotation_is_haar_so_the_first_coordinate_has_mean_zero():
    first = torch.stack([simplex_etf(2, 3, seed=s, dtype=torch.float64)[0] for s in range(4000)])
    # coordinates of a uniform point of the sphere: mean 0, variance 1/3; five standard errors
    assert first.mean(0).abs().max() < 5 * (1 / 3 / 4000) ** 0.5
    assert_close(first.T @ first / 4000, torch.eye(3, dtype=torch.float64) / 3, rtol=0, atol=5 * (4 / 45 / 4000) ** 0.5)


def test_the_numpy_frame_is_the_same_frame():
    M = simplex_equiangular_tight_frame(5, 7, seed=2)
    assert M.dtype == np.float64
    np.testing.assert_array_equal(M, simplex_etf(5, 7, seed=2, dtype=torch.float64).numpy())


@pytest.mark.parametrize(
    ("make", "arguments", "reason"),
    [
        (simplex_etf, (12, 10), r"K = 12 .*d = 10 .*projection_dim=11.*code=\"sphere\""),
        (simplex_etf, (1, 8), "at least two classes"),
        (orthant_code, (9, 8), "no 9 orthogonal class vectors exist in 8 dimensions.*projection_dim=9"),
        (class_code, (-3, 8), "at least two classes"),
        (class_code, (3, 0), "feature_dim"),
        (class_code, (3, 1), "K = 3"),
        *(
            (make, size, "seed of a frame is -1")
            for make, size in ((simplex_etf, (4, 8)), (orthant_code, (4, 8)), (class_code, (12, 8)))
        ),
        (class_code, (100, 8), "seed of a frame is -1"),
    ],
)
def test_impossible_sizes_are_refused_with_ways_out(make, arguments, reason):
    with pytest.raises(UserError, match=reason):
        make(*arguments, seed=-1 if "seed" in reason else 0)


# --- the nearest one ---------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.integers(2, 10), st.integers(0, 12), st.integers(0, 10**6))
def test_nearest_etf_agrees_with_procrustes(K, extra, seed):
    d = K - 1 + extra
    M = torch.randn(K, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    W, score = nearest_etf(M)
    assert_simplex(W, 1e-10)
    centred = M - M.mean(0)
    # independent oracle: rotate the regular simplex of R^K (standard basis, centred) onto the rows with SciPy
    simplex = np.sqrt(K / (K - 1)) * (np.eye(K) - 1 / K)
    wide = np.pad(centred.numpy(), ((0, 0), (0, max(0, K - d))))
    _, nuclear = orthogonal_procrustes(np.pad(simplex, ((0, 0), (0, wide.shape[1] - K))), wide)
    assert (W * centred).sum().item() == pytest.approx(nuclear, rel=1e-9)
    assert score.item() == pytest.approx(nuclear / np.linalg.norm(wide) / np.sqrt(K), rel=1e-9)
    distance = ((W / W.norm() - centred / centred.norm()) ** 2).sum()
    assert_close(distance, 2 - 2 * score, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "M",
    [
        torch.randn(5, 3),
        torch.ones(4, 6),
        torch.cat([torch.eye(4), torch.eye(4)[:1]]),
        torch.full((3, 4), torch.nan),
        torch.randn(8).repeat(5, 1),
        torch.randn(4, 8)[[0, 0, 1, 2, 3]] + 100,
    ],
)
def test_nearest_etf_refuses_what_has_no_unique_answer(M):
    with pytest.raises(UserError):
        nearest_etf(M)


# --- codes of more classes ---------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(2, 16).flatmap(lambda d: st.tuples(st.integers(2, 2 * d), st.just(d))), st.integers(0, 1000))
def test_a_class_code_with_a_closed_form_reaches_rankins_bound(size, seed):
    K, d = size
    W = class_code(K, d, seed=seed, dtype=torch.float64)
    assert_centred_unit_rows(W)
    bound = -1 / (K - 1) if K <= d + 1 else np.cos(2 * np.pi / K) if d == 2 else 0.0
    assert brute_force(W) == pytest.approx(bound, abs=1e-12)


# of optimal codes whose centre is zero: regular polygon, the nine points of Schütte and van der Waerden (1951), icosahedron, 24-cell
# (Musin 2008), roots of E8 (Levenshtein 1979)
BEST = {(100, 2): np.cos(2 * np.pi / 100), (9, 3): 1 / 3, (12, 3): 1 / np.sqrt(5), (24, 4): 1 / 2, (240, 8): 1 / 2}


@pytest.mark.parametrize(("size", "best"), BEST.items(), ids=str)
def test_class_code_finds_the_best_codes_known(size, best):
    W = class_code(*size, dtype=torch.float64)
    assert_centred_unit_rows(W)
    assert best - 1e-9 < brute_force(W) < best + 5e-4
    assert largest_cosine(W) == pytest.approx(brute_force(W), abs=1e-12)


def test_an_optimised_code_is_far_better_than_a_random_one_with_any_number_of_threads(caplog):
    def with_threads(n):
        torch.set_num_threads(n)
        try:
            return class_code(170, 80, seed=1), torch.get_num_threads()
        finally:
            torch.set_num_threads(1)

    with caplog.at_level("INFO", logger="etflight"):
        (W, _), (again, left) = with_threads(1), with_threads(3)
    assert torch.equal(W, again)
    assert left == 3
    random = torch.nn.functional.normalize(torch.randn(170, 80), dim=1)
    assert 0 <= largest_cosine(W) < 0.75 * largest_cosine(random)  # Rankin: not below 0 for K > d + 1
    message = f"170 class vectors in 80 dimensions: largest cosine {largest_cosine(W):.4f}"
    assert [record.getMessage() for record in caplog.records] == [message] * 2


def test_the_descent_follows_the_gradient_of_the_softened_largest_cosine(monkeypatch):
    monkeypatch.setattr(geometry, "_COSINES_AT_ONCE", 40 * 7)  # blocks of 7 rows, the last one smaller
    W = torch.nn.functional.normalize(torch.randn(2, 40, 5, dtype=torch.float64), dim=-1).requires_grad_()
    upper = torch.ones(40, 40).triu(1).bool()
    for temperature in (1.0, 0.1, 0.001):
        objective = (temperature * ((W @ W.mT)[:, upper] / temperature).logsumexp(1)).sum()
        (expected,) = torch.autograd.grad(objective, W)
        assert_close(geometry._gradient(W.detach(), temperature), expected, rtol=0, atol=1e-10)


@pytest.fixture(scope="module")
def many():
    return class_code(20_000, 24, seed=3)


def test_a_code_of_very_many_classes_is_random_centred_and_seeded(many):
    assert_close(many.norm(dim=1), torch.ones(20_000), rtol=0, atol=1e-6)
    assert many.double().mean(0).abs().max() < 1e-7
    # uniform on the sphere: the covariance is I/d, up to five standard errors
    assert_close(many.T @ many / 20_000, torch.eye(24) / 24, rtol=0, atol=5 / 24 / 20_000**0.5 * 2**0.5)
    assert not torch.equal(class_code(20_000, 24, seed=4), many)
    assert_close(class_code(20_000, 24, seed=3, dtype=torch.float64).float(), many, rtol=0, atol=1e-6)


def test_the_largest_cosine_of_some_rows_is_a_lower_bound(many):
    code = many[:3000]
    assert largest_cosine(code) == pytest.approx(brute_force(code), abs=1e-6)
    rows = torch.linspace(0, 2999, 100).round().long()
    some = (code[rows] @ code.T).scatter(1, rows[:, None], -2).max().item()
    assert largest_cosine(code, rows=100) == pytest.approx(some, abs=1e-6)


@pytest.mark.parametrize("work", [lambda W: geometry._gradient(W[None], 0.1), lambda W: largest_cosine(W, rows=500)])
def test_no_tensor_of_all_cosines_is_ever_made(work, monkeypatch, many):
    monkeypatch.setattr(geometry, "_COSINES_AT_ONCE", 2**18)
    W = many[:4000].clone()
    with LargestTensor() as largest:
        work(W)
    assert 4 * 2**17 < largest.nbytes <= 4 * 2**18  # all of them would be 2**24
