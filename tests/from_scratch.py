"""The collapse measures of embeddings, by the slow oracle."""

import pytest

from tests.metrics import oracle


def measure(embeddings, labels, weight=None):
    """The measures of torch tensors by name, those of class vectors only with `weight`; and the oracle's class statistics."""
    o = oracle.two_pass(embeddings.double(), labels, int(labels.max()) + 1)
    values = {"nc1": oracle.nc1(o), "nc1_ratio": oracle.nc1_ratio(o), "cdnv": oracle.cdnv(o)}
    if weight is not None:
        means, vectors = oracle.centred(o), oracle.vectors(o, weight)
        aligned = oracle.alignments(means, vectors)
        values |= {"alignment": aligned.mean(), "alignment_std": aligned.std(), "nc3": oracle.nc3(means, vectors)}
    return values, o


def assert_measures(found, expected, rel=1e-6):
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=rel, abs=1e-9), name
