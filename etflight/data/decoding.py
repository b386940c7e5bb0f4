"""Turns image files into tensors: decodes them, and cuts a square out of a picture."""

import re
import warnings
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from etflight.utils.errors import UserError, let_through, warn
from etflight.utils.ranks import world

MAX_PIXELS = 89_478_485  # above this limit Pillow suspects a bomb: 256 MiB as RGB
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_BY_PILLOW = ("GIF", "BMP", "TIFF", "PPM")  # torchcodec knows only GIF of these, and paints its transparent pixels
_FRAMES_OF_JPEG = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # markers of the segment that has the size
_OTHERS_OF_JPEG = {0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE}  # tables, what applications add, comments
_PLACE_IN_SOURCE = re.compile(r"\w+, \S+\.(?:cpp|h):\d+, ")  # of the decoder, as its messages have it


def decode_file(path: str, side: int, mode: Literal["RGB", "GRAY"] = "RGB") -> Tensor:
    """Decode an image file (JPEG, PNG, WebP, GIF, BMP, TIFF, PPM) of any mode to RGB or grey, turned upright by its EXIF data.

    Transparency is dropped; 16 bits are scaled to 8, 65535 to 255, whatever the largest value (see `warn_of_few_levels_in_files`).

    Args:
        path: The file.
        side: Pixels to which the shorter side will be resized.
        mode: Colours to decode to.

    Returns:
        Uint8 `[3, H, W]`, or `[1, H, W]` for grey; the first picture of an animation or of a file with several pages.

    Raises:
        UserError: The file is missing, is no image, or has more than `MAX_PIXELS`, before or after resizing; the message has its path.
    """
    # its import takes a second, which sets in memory and `--help` need not wait for
    from torchcodec.decoders import decode_image  # type: ignore[attr-defined]

    try:
        content = Path(path).read_bytes()
        format_name, width, height = _checked_format(content)
        shorter, longer = sorted((width, height))
        if side**2 * longer // max(shorter, 1) > max(MAX_PIXELS, 4 * side**2):
            raise UserError(
                f"{path} has {width}×{height} pixels, too long and thin for a square: crop it, or remove it"
            )
        image = _by_pillow(content, mode) if format_name in _BY_PILLOW else decode_image(content, mode=mode)
    except UserError:
        raise
    except Exception as error:  # readers of broken files raise all kinds
        let_through(error)
        reason = _PLACE_IN_SOURCE.sub("", str(getattr(error, "strerror", None) or error))
        raise UserError(f"{path} cannot be read as an image ({reason}): replace it or remove it") from None
    return image[0] if image.ndim == 4 else image


def _checked_format(content: bytes) -> tuple[str | None, int, int]:
    """Format, width and height of an image file, without decoding it.

    Raises:
        ValueError: The file is no image, or has too many pixels.
    """
    name, width, height, frames = _jpeg_header(content) or _any_header(content)
    if width * height * frames > MAX_PIXELS:
        count = f"{frames} pictures of " if frames > 1 else ""
        raise ValueError(f"{count}{width}×{height} pixels are more than {MAX_PIXELS}")
    return name, width, height


def _jpeg_header(content: bytes) -> tuple[str, int, int, int] | None:
    """As `_any_header`, for a JPEG file whose segments follow each other as in the standard; None for any other file.

    Pillow would need 6 % of the time that reading a photograph takes.
    """
    at = 2 if content.startswith(b"\xff\xd8") else len(content)
    while at + 9 <= len(content) and content[at] == 0xFF:
        marker, length = content[at + 1], int.from_bytes(content[at + 2 : at + 4])
        if marker in _FRAMES_OF_JPEG:
            height, width = int.from_bytes(content[at + 5 : at + 7]), int.from_bytes(content[at + 7 : at + 9])
            return ("JPEG", width, height, 1) if width and height else None
        if marker not in _OTHERS_OF_JPEG or length < 2:
            return None
        at += 2 + length
    return None


def _any_header(content: bytes) -> tuple[str | None, int, int, int]:
    """Format, width, height and number of pictures."""
    try:
        # by content, whatever the name: Pillow would run Ghostscript for a PostScript file that is called .png
        with warnings.catch_warnings(action="ignore"), Image.open(BytesIO(content), formats=FORMATS) as file:
            # torchcodec decodes all of an animation, but only the first picture of a JPEG file with several (MPO)
            frames = getattr(file, "n_frames", 1) if file.format in ("PNG", "WEBP") else 1
            return file.format, *file.size, frames
    except UnidentifiedImageError:  # its message names an object in memory
        raise ValueError(f"its content is none of {', '.join(FORMATS)}" if content else "it is empty") from None


def _by_pillow(content: bytes, mode: Literal["RGB", "GRAY"]) -> Tensor:
    """As `decode_image`, for the first picture."""
    with Image.open(BytesIO(content), formats=_BY_PILLOW) as file:
        return from_pillow(file, mode)


def from_pillow(picture: Image.Image, mode: Literal["RGB", "GRAY"] = "RGB") -> Tensor:
    """Turn a picture that Pillow has opened into what `decode_file` makes of its file.

    Args:
        picture: The picture, of any mode.
        mode: The colours of the result.

    Returns:
        Uint8 `[3, H, W]`, or `[1, H, W]` for grey.

    Raises:
        ValueError: Its pixels are numbers without a range.
    """
    sixteen_bits = picture.mode.startswith("I;16") or (picture.mode, picture.format) == ("I", "PPM")
    if not sixteen_bits and picture.mode in ("I", "F"):
        raise ValueError("its pixels are numbers of 32 bits without a range")
    picture = ImageOps.exif_transpose(picture)
    if sixteen_bits:  # which `convert` would clip
        picture = Image.fromarray(np.rint(np.asarray(picture) / 257).astype(np.uint8))
    pixels = np.atleast_3d(np.array(picture.convert("RGB" if mode == "RGB" else "L")))
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


_FEW_LEVELS = 2**14  # images of 12 or 14 bits that are stored in 16 have no value from here on
_FILES_CHECKED = 8


def warn_of_few_levels_in_files(what: object, count: int, path_of: Callable[[int], str]) -> None:
    """Warn in one line if grey files of 16 bits use only the lower of them, looking at a few evenly chosen ones.

    Args:
        what: The images, for the warning.
        count: The number of files, at least 1.
        path_of: A function that returns the path of a file by its number.
    """
    chosen = np.linspace(0, count - 1, min(count, _FILES_CHECKED)).astype(int).tolist()
    warn_of_few_levels(what, max(_largest_of_16_bits(path_of(i)) for i in chosen))


def warn_of_few_levels(what: object, largest: int) -> None:
    """Warn in one line if `largest`, the largest value of pixels of 16 bits, is so small that 8 bits keep little; 0 if it is unknown."""
    if 0 < largest < _FEW_LEVELS and world()[1] == 0:
        warn(
            f"{what}: the largest value found in images of 16 bits is {largest}, of which 8 bits keep {round(largest / 257) + 1} levels: "
            "multiply their pixels beforehand, so that white is 65535"
        )


def _largest_of_16_bits(path: str) -> int:
    """The largest value of a grey file of 16 bits; 0 for any other, and for one that cannot be read, which reading it will tell."""
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=FORMATS) as file:
            deep = file.mode.startswith("I;16") and file.width * file.height <= MAX_PIXELS
            return int(np.asarray(file).max()) if deep else 0
    except Exception:  # readers of broken files raise all kinds
        return 0


def fit_to(image: Tensor, size: Sequence[int], covered: Sequence[int]) -> Tensor:
    """Resize an image until it just covers one size, and crop another size at its centre.

    Args:
        image: Uint8 `[…, C, h, w]`.
        size: H and W of the result.
        covered: H and W to cover, at least `size`.

    Returns:
        Uint8 `[…, C, H, W]`.
    """
    # the import of torchvision takes seconds, too
    from torchvision.transforms.v2.functional import center_crop, resize  # type: ignore[attr-defined]

    (height, width), (tall, wide) = image.shape[-2:], covered
    # one side is scaled by the larger factor that is needed, and the other in proportion
    fitted = [tall, tall * width // height] if tall * width >= wide * height else [wide * height // width, wide]
    return center_crop(resize(image, fitted, antialias=True), list(size))


def with_channels(image: Tensor, channels: int, what: str) -> Tensor:
    """Convert images, grey or RGB, perhaps with transparency, which is dropped, to grey or RGB.

    Args:
        image: `[…, c, H, W]`.
        channels: The number of channels C of the result.
        what: The name of the images, for the error.

    Returns:
        `[…, C, H, W]`.

    Raises:
        UserError: The channels are neither those of grey nor of RGB, and not C.
    """
    own = image.shape[-3]
    if own == channels:
        return image
    if own > 4 or channels not in (1, 3):
        raise UserError(f"{what}: {own} channels, but the model takes {channels}: give images of as many")
    if own < 3 or channels == 3:
        kept = image[..., : 1 if own < 3 else 3, :, :]
        return kept.expand(*kept.shape[:-3], channels, -1, -1)
    # the import of torchvision takes seconds, which `--help` need not wait for
    from torchvision.transforms.v2.functional import rgb_to_grayscale  # type: ignore[attr-defined]

    return rgb_to_grayscale(image[..., :3, :, :].float()).round().to(image.dtype)


def random_square(image: Tensor, size: int, min_scale: float) -> Tensor:
    """Resize a random part of an image to a square (Inception's crop, Szegedy et al. 2015), drawn from torch's generator.

    Args:
        image: Uint8 `[3, H, W]`.
        size: The side of the square.
        min_scale: Least part of the image's area, in (0, 1].

    Returns:
        Uint8 `[3, size, size]`.
    """
    from torchvision.transforms import RandomResizedCrop
    from torchvision.transforms.v2.functional import resized_crop  # type: ignore[attr-defined]

    part = RandomResizedCrop.get_params(image, [min_scale, 1], [3 / 4, 4 / 3])
    return resized_crop(image, *part, [size, size], antialias=True)
