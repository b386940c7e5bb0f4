"""How a data module refuses what it cannot use."""

import pytest

from etflight.data import ImageDataModule
from etflight.utils.errors import UserError


def assert_refused(data: ImageDataModule, stage: str | None, message: str) -> None:
    """`setup` must end with a `UserError` of one line that matches the message."""
    with pytest.raises(UserError, match=message) as caught:
        data.setup(stage)
    assert "\n" not in str(caught.value)
