"""What a checkpoint or a record knows of the images that a model was trained on, compared with others."""


def content_of(fingerprint: str | None) -> str | None:
    """The part of a data module's fingerprint that tells one set from another; None of one from before fingerprints had it."""
    content, dash, _ = (fingerprint or "").rpartition("-")
    return content if dash else None


def choice_of(fingerprint: str | None) -> str | None:
    """The part that tells one choice of a set's training images from another."""
    return fingerprint and fingerprint.rpartition("-")[2]


def same_images(one: object, other: object) -> bool:
    """Whether two fingerprints are of the same training images; where one does not know its set, whether they are the same choice."""
    if not isinstance(one, str) or not isinstance(other, str):
        return one == other
    unknown = None in (content_of(one), content_of(other))
    return choice_of(one) == choice_of(other) if unknown else one == other
