"""What the configuration files of a second stage say of the start of the first one."""

import inspect
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from etflight.callbacks import FineTuning
from etflight.cli.argv import FINE_TUNING, EarlyOptions


def leave_out_first_stage(tuning: Any, options: EarlyOptions) -> None:
    """Let a run that starts from another one's checkpoint be fine-tuned by its own files alone.

    A set or a protocol that both stages share may say how the first one starts: from `weights`, or with parts that train from
    `unfreeze_epoch` on. It is known by that, and by its saying nothing of what to `load`. The command line goes before all files.

    Args:
        tuning: The parsed `fine_tuning`, which is changed.
        options: The command line and its files.
    """
    if tuning["checkpoint"] is None:
        return
    said = [content.get("fine_tuning") for content in options.contents if isinstance(content, dict)]
    parts = [part for part in said if isinstance(part, dict)]
    own = [part for part in parts if part.get("load") or not (part.get("weights") or part.get("unfreeze_epoch"))]
    if len(own) == len(parts) or not any(part.get("load") for part in own):
        return
    defaults = inspect.signature(FineTuning).parameters
    for name in FINE_TUNING:
        if options.given[f"fine_tuning.{name}"] is None:
            tuning[name] = next((part[name] for part in reversed(own) if name in part), defaults[name].default)
    rank_zero_info(
        f"a second stage starts from {tuning['checkpoint']}: what its files say of the first one's weights and frozen parts is left out"
    )
