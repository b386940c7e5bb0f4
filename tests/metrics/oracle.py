"""Neural collapse the slow way: NumPy, float64, two passes, pseudo-inverses, all pairs. Shares no code with etflight."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist


def clusters(K, d, *, counts=None, spread=0.5, seed=0, dtype=torch.float32, offset=1.0):
    """Shuffled features `[N, d]` around random, not centred class means, and their labels `[N]`."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.as_tensor(counts if counts is not None else [20 + 3 * (k % 5) for k in range(K)])
    labels = torch.repeat_interleave(torch.arange(K), counts)
    labels = labels[torch.randperm(len(labels), generator=g)]
    centres = torch.randn(K, d, generator=g, dtype=torch.float64) + offset
    noise = torch.randn(len(labels), d, generator=g, dtype=torch.float64)
    noise *= torch.linspace(0.2, 1.0, d, dtype=torch.float64)  # anisotropic: NC1 is not the trace quotient
    return (centres[labels] + spread * noise).to(dtype), labels


def two_pass(features, labels, num_classes, *, class_weighted=False):
    h, y = np.asarray(features, dtype=np.float64), np.asarray(labels)
    own = [h[y == k] for k in range(num_classes)]
    counts = np.array([len(rows) for rows in own])
    present = counts > 0
    means = np.array([rows.mean(0) if len(rows) else np.full(h.shape[1], np.nan) for rows in own])
    scatters = np.array([np.atleast_2d(np.cov(rows.T, bias=True)) if len(rows) else 0 * h.T @ h for rows in own])
    share = np.where(present, 1 / present.sum(), 0) if class_weighted else counts / counts.sum()
    variances = np.where(present, np.trace(scatters, axis1=1, axis2=2), np.nan)
    within = np.einsum("k,kij->ij", share, scatters)
    return SimpleNamespace(
        counts=counts, means=means, variances=variances, within=within, present=present, K=present.sum()
    )


def centred(o, global_mean="class"):
    m, n = o.means[o.present], o.counts[o.present]
    return m - (m.mean(0) if global_mean == "class" else np.average(m, axis=0, weights=n))


def vectors(o, weight, center=True):
    w = np.asarray(weight, dtype=np.float64)[o.present]
    return w - w.mean(0) if center else w


def variances(o, correction=0):
    v, n = o.variances[o.present], o.counts[o.present]
    kept = n > correction
    return v[kept] * n[kept] / (n[kept] - correction), kept


def nc1(o, divide_by_classes=True, global_mean="class", correction=0):
    m = centred(o, global_mean)
    between = m.T @ m / o.K
    n = o.counts.sum()
    within = o.within * n / (n - correction * o.K)
    trace = np.trace(within @ np.linalg.pinv(between, rcond=1e-11, hermitian=True))
    return trace / o.K if divide_by_classes else trace


def nc1_ratio(o, weighting="class", global_mean="class", correction=0):
    v, kept = variances(o, correction)
    weights = None if weighting == "class" else o.counts[o.present][kept]
    m = centred(o, global_mean)
    return np.average(v, weights=weights) / np.trace(m.T @ m / o.K)


def nc1_per_class(o, global_mean="class"):
    m = centred(o, global_mean)
    return o.variances / np.trace(m.T @ m / o.K)


def cdnv(o, exponent=2, correction=0):
    v, kept = variances(o, correction)
    m = o.means[o.present][kept]
    return off_diagonal((v[:, None] + v) / (2 * cdist(m, m) ** exponent)).mean()


def off_diagonal(matrix):
    return matrix[~np.eye(len(matrix), dtype=bool)]


def equinorm(rows):
    norms = np.linalg.norm(rows, axis=1)
    return norms.std() / norms.mean()


def cosines(left, right):
    return off_diagonal(1 - cdist(left, right, "cosine"))


def equiangularity(rows, deviation="etf"):
    c = cosines(rows, rows)
    return np.abs(c + 1 / (len(rows) - 1)).mean() if deviation == "etf" else c.std()


def etf_distance(rows):
    """By Procrustes on an explicit frame: the nearest of all rotations of one simplex."""
    K, d = rows.shape
    if K > d + 1:
        return np.nan
    frame = np.linalg.qr(np.eye(K) - 1 / K)[0][:, : K - 1]  # orthonormal columns, orthogonal to the ones vector
    u, _, vt = np.linalg.svd(frame.T @ (rows - rows.mean(0)), full_matrices=False)
    nearest = frame @ u @ vt
    unit = (rows - rows.mean(0)) / np.linalg.norm(rows - rows.mean(0))
    return np.linalg.norm(unit - nearest / np.linalg.norm(nearest)) ** 2


def alignments(m, w):
    return np.diag(1 - cdist(m, w, "cosine"))


def nc3(m, w, squared=True):
    return np.linalg.norm(m / np.linalg.norm(m) - w / np.linalg.norm(w)) ** (2 if squared else 1)


def structure_error(left, right):
    K = len(left)
    gram = left @ right.T
    return np.linalg.norm(gram / np.linalg.norm(gram) - (np.eye(K) - np.ones((K, K)) / K) / np.sqrt(K - 1))


def nearest_centre(o, features):
    return np.nanargmin(cdist(np.asarray(features, dtype=np.float64), o.means), axis=1)


def effective_rank(matrix):
    s = np.linalg.svd(matrix, compute_uv=False)
    p = s / s.sum()
    p = p[p > 1e-14]
    return np.exp(-(p * np.log(p)).sum())


def measure(embeddings, labels, weight=None):
    """The measures of torch tensors by name, those of class vectors only with `weight`; and the oracle's class statistics."""
    o = two_pass(embeddings.double(), labels, int(labels.max()) + 1)
    values = {"nc1": nc1(o), "nc1_ratio": nc1_ratio(o), "cdnv": cdnv(o)}
    if weight is not None:
        means, rows = centred(o), vectors(o, weight)
        aligned = alignments(means, rows)
        values |= {"alignment": aligned.mean(), "alignment_std": aligned.std(), "nc3": nc3(means, rows)}
    return values, o


def assert_measures(found, expected, rel=1e-6):
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=rel, abs=1e-9), name
