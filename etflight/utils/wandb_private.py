"""Private names of Weights & Biases' packages."""

from typing import Any


def as_sent(made: Any) -> Any:
    """Return a workspace or report of `wandb-workspaces` as the plain data that would be sent to the server. Touches `_to_model`."""
    return made._to_model().model_dump(mode="json", by_alias=True, exclude_none=True)
