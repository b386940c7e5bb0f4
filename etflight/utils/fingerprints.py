"""The fingerprint of training images: read from what somebody else may have written, and its two parts."""

import re
from collections.abc import Mapping


def fingerprint_in(known: object) -> str | None:
    """The fingerprint of the training images in a checkpoint or in a run's record of its data; None if there is none."""
    facts = known if isinstance(known, Mapping) else {}
    found = facts.get("fingerprint")
    return found if isinstance(found, str) and re.fullmatch(r"[\w.-]{1,80}", found) else None


def content_of(fingerprint: str | None) -> str | None:
    """The part of a data module's fingerprint that identifies the set."""
    return fingerprint and fingerprint.partition("-")[0]


def choice_of(fingerprint: str | None) -> str | None:
    """The part of a fingerprint that identifies the choice of training images within the set."""
    return fingerprint and fingerprint.partition("-")[2]
