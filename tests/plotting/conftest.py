import numpy as np
import pytest


@pytest.fixture
def noise() -> np.random.Generator:
    return np.random.default_rng(0)
