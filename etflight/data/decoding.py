"""Image files to tensors: decoding, and the square that is cut out of a picture."""

import math
import re
import warnings
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from etflight.utils.errors import UserError

MAX_PIXELS = 89_478_485  # Pillow's limit, from where on it suspects a bomb: 256 MiB as RGB
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_BY_PILLOW = ("GIF", "BMP", "TIFF", "PPM")  # torchcodec knows but GIF, where it paints what is transparent
_FRAMES_OF_JPEG = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers that begin with the size
_SEGMENTS_OF_JPEG = {0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE}  # tables, what applications add, comments
_PLACE_IN_SOURCE = re.compile(r"\w+, \S+\.(?:cpp|h):\d+, ")  # of the decoder, in its messages
_ASPECT_RATIOS = (3 / 4, 4 / 3)
_ATTEMPTS = 10


def decode_file(path: str, side: int, mode: Literal["RGB", "GRAY"] = "RGB") -> Tensor:
    """Decode an image file (JPEG, PNG, WebP, GIF, BMP, TIFF, PPM), of whatever mode, to RGB or grey, upright as its EXIF data says.

    Transparency is dropped; 16 bits are scaled to 8.

    Args:
        path: The file.
        side: Pixels to which the shorter side will be resized.
        mode: Colours to decode to.

    Returns:
        uint8 `[3, H, W]`, or `[1, H, W]` for grey, of an animation or of several pages the first picture.

    Raises:
        UserError: The file is missing, is no image, has more than `MAX_PIXELS` or would have, resized; names its path.
    """
    # takes a second, which sets in memory and `--help` need not wait for
    from torchcodec.decoders import decode_image  # type: ignore[attr-defined]

    try:
        content = Path(path).read_bytes()
        format_name, width, height = _header(content)
        shorter, longer = sorted((width, height))
        if side**2 * longer // max(shorter, 1) > max(MAX_PIXELS, 4 * side**2):
            raise UserError(
                f"{path} has {width}×{height} pixels, too long and thin for a square: crop it, or remove it"
            )
        image = _by_pillow(content, mode) if format_name in _BY_PILLOW else decode_image(content, mode=mode)
    except UserError:
        raise
    except Exception as error:  # readers of broken files raise all kinds
        reason = _PLACE_IN_SOURCE.sub("", str(getattr(error, "strerror", None) or error))
        raise UserError(f"{path} cannot be read as an image ({reason}): replace it or remove it") from None
    return image[0] if image.ndim == 4 else image


def _header(content: bytes) -> tuple[str | None, int, int]:
    """Format, width and height of an image file, without decoding it."""
    name, width, height, frames = _jpeg_header(content) or _any_header(content)
    if width * height * frames > MAX_PIXELS:
        count = f"{frames} pictures of " if frames > 1 else ""
        raise ValueError(f"{count}{width}×{height} pixels are more than {MAX_PIXELS}")
    return name, width, height


def _jpeg_header(content: bytes) -> tuple[str, int, int, int] | None:
    """That of a JPEG file whose segments follow each other as the standard has it; None for any other, to be looked at more closely.

    Pillow takes a tenth of the time of decoding for it.
    """
    at = 2 if content.startswith(b"\xff\xd8") else len(content)
    while at + 9 <= len(content) and content[at] == 0xFF:
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4])
        if marker in _FRAMES_OF_JPEG:
            height, width = int.from_bytes(content[at + 5 : at + 7]), int.from_bytes(content[at + 7 : at + 9])
            return ("JPEG", width, height, 1) if width and height else None
        if marker not in _SEGMENTS_OF_JPEG or length < 2:
            return None
        at += 2 + length
    return None


def _any_header(content: bytes) -> tuple[str | None, int, int, int]:
    """Format, width, height and number of pictures."""
    from PIL import Image, UnidentifiedImageError

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            # by content, whatever the name: Pillow would run Ghostscript for a PostScript file that is called .png
            with Image.open(BytesIO(content), formats=FORMATS) as file:
                width, height = file.size
                # torchcodec decodes all of an animation; the second pictures of a JPEG file (MPO) it passes over
                frames = getattr(file, "n_frames", 1) if file.format in ("PNG", "WEBP") else 1
                return file.format, width, height, frames
        except UnidentifiedImageError:  # which names an object in memory
            raise ValueError(f"its content is none of {', '.join(FORMATS)}" if content else "it is empty") from None


def _by_pillow(content: bytes, mode: Literal["RGB", "GRAY"]) -> Tensor:
    """As `decode_image`, of the first picture."""
    from PIL import Image

    with Image.open(BytesIO(content), formats=_BY_PILLOW) as file:
        picture: Image.Image = file
        sixteen_bits = file.mode.startswith("I;16") or (file.mode, file.format) == ("I", "PPM")
        if sixteen_bits:  # which `convert` would clip
            picture = Image.fromarray(np.rint(np.asarray(file) / 257).astype(np.uint8))
        elif file.mode in ("I", "F"):
            raise ValueError("its pixels are numbers of 32 bits without a range")
        pixels = np.atleast_3d(np.array(picture.convert("RGB" if mode == "RGB" else "L")))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def fit_to(image: Tensor, size: Sequence[int], covered: Sequence[int]) -> Tensor:
    """Resize an image until it just covers a size, and crop another at its centre.

    Args:
        image: uint8 `[C, h, w]`.
        size: H and W of what comes out.
        covered: H and W to cover, at least those.

    Returns:
        uint8 `[C, H, W]`.
    """
    # torchvision takes seconds, too
    from torchvision.transforms.v2.functional import center_crop, resize  # type: ignore[attr-defined]

    (height, width), (tall, wide) = image.shape[-2:], covered
    # the side that needs the larger factor, and the other in proportion
    fitted = [tall, tall * width // height] if tall * width >= wide * height else [wide * height // width, wide]
    return center_crop(resize(image, fitted, antialias=True), list(size))


def center_square(image: Tensor, size: int, side: int) -> Tensor:
    """Resize the shorter side to `side`, and crop the centre: uint8 `[3, H, W]` to `[3, size, size]`."""
    return fit_to(image, [size, size], [side, side])


def random_square(image: Tensor, size: int, min_scale: float, random: np.random.Generator) -> Tensor:
    """Resize a random part of an image to a square (Inception's crop, Szegedy et al. 2015; torchvision's RandomResizedCrop).

    Args:
        image: uint8 `[3, H, W]`.
        size: Of the square.
        min_scale: Least part of the image's area, in (0, 1].
        random: Chooses the part.

    Returns:
        uint8 `[3, size, size]`.
    """
    from torchvision.transforms.v2.functional import resized_crop  # type: ignore[attr-defined]

    top, left, height, width = draw_part(image.shape[-2], image.shape[-1], min_scale, random)
    return resized_crop(image, top, left, height, width, [size, size], antialias=True)


def draw_part(height: int, width: int, min_scale: float, random: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw top, left, height and width of a part of an image.

    Its area is uniform in [min_scale, 1] of the image's, the logarithm of its aspect ratio (width / height) uniform from that of 3/4 to
    that of 4/3, its place uniform. A draw that does not fit is repeated, ten times at most; then it is the largest part in the
    middle of an allowed aspect ratio.
    """
    low, high = _ASPECT_RATIOS
    scales = random.uniform(min_scale, 1, _ATTEMPTS)
    ratios = np.exp(random.uniform(math.log(low), math.log(high), _ATTEMPTS))
    heights = np.rint(np.sqrt(height * width * scales / ratios)).astype(int)
    widths = np.rint(np.sqrt(height * width * scales * ratios)).astype(int)
    fits = np.flatnonzero((heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width))
    if len(fits):
        h, w = int(heights[fits[0]]), int(widths[fits[0]])
        return int(random.integers(height - h + 1)), int(random.integers(width - w + 1)), h, w
    h, w = min(height, round(width / low)), min(width, round(height * high))
    return (height - h) // 2, (width - w) // 2, max(h, 1), max(w, 1)
