"""Short names for tests that only train."""

from tests.training import QUIET as FLAGS  # noqa: F401
from tests.training import new_trainer as trainer  # noqa: F401
