"""Image files of every kind and mode, against the pixels that were written into them; broken and hostile ones; squares."""

import re
import struct
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torchcodec.decoders import decode_image

from etflight.data import decoding
from etflight.data.decoding import decode_file, fit_to, random_square
from etflight.utils.errors import UserError

Pixels = NDArray[np.uint8]
H, W = 9, 7
NOISE = np.random.default_rng(0)
COLOUR: Pixels = NOISE.integers(0, 256, (H, W, 3), np.uint8)
GREY: Pixels = NOISE.integers(0, 256, (H, W), np.uint8)
OPACITY: Pixels = NOISE.integers(0, 256, (H, W), np.uint8)
BITS: Pixels = NOISE.integers(0, 2, (H, W), np.uint8)
DEEP = NOISE.integers(0, 65536, (H, W), np.uint16)
INK: Pixels = NOISE.integers(0, 256, (H, W, 4), np.uint8)
PALETTE: Pixels = NOISE.integers(0, 256, (8, 3), np.uint8)
INDICES: Pixels = NOISE.integers(0, 8, (H, W), np.uint8)


def grey(pixels: Pixels) -> Pixels:
    return np.repeat(pixels[..., None], 3, 2)


def indexed() -> Image.Image:
    image = Image.fromarray(INDICES, "P")
    image.putpalette(PALETTE.tobytes())
    return image


def with_alpha(pixels: Pixels) -> Image.Image:
    return Image.fromarray(np.dstack([pixels, OPACITY]), "LA" if pixels.ndim == 2 else "RGBA")


def saved(image: Image.Image, kind: str, **options: object) -> Callable[[Path], None]:
    return lambda path: image.save(path, kind, **options)


def written(content: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(content) and None


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn clockwise
    return exif


def tiff(width: int, height: int, bits: int = 8, pixels: bytes = b"", order: str = "<") -> bytes:
    """By hand, since Pillow writes one byte order only."""
    values = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: max(len(pixels), 4)}
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in values.items())
    directory = struct.pack(f"{order}H", len(values)) + entries + bytes(4)
    return {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", 8 + len(pixels)) + pixels + directory


def tiff_16_bits(order: str) -> bytes:
    return tiff(W, H, 16, DEEP.astype(f"{order}u2").tobytes(), order)


FEW = Image.fromarray(COLOUR)
OTHER = Image.fromarray(255 - COLOUR)
LOSSLESS_ANIMATION = {"save_all": True, "append_images": [OTHER], "lossless": True}
PRINTED: Pixels = np.rint((255.0 - INK[..., :3]) * (255 - INK[..., 3:]) / 255).astype(np.uint8)
# name: (writes the file, its pixels as RGB)
KINDS: dict[str, tuple[Callable[[Path], None], Pixels]] = {
    "png": (saved(FEW, "PNG"), COLOUR),
    "webp": (saved(FEW, "WEBP", lossless=True), COLOUR),
    "ppm": (saved(FEW, "PPM"), COLOUR),
    "bmp": (saved(FEW, "BMP"), COLOUR),
    "bmp, palette": (saved(indexed(), "BMP"), PALETTE[INDICES]),
    "bmp, 1 bit": (saved(Image.fromarray(BITS * 255).convert("1"), "BMP"), grey(BITS * 255)),
    "gif, palette": (saved(indexed(), "GIF"), PALETTE[INDICES]),
    "gif, a colour transparent": (saved(indexed(), "GIF", transparency=3), PALETTE[INDICES]),
    "gif, animated": (saved(indexed(), "GIF", save_all=True, append_images=[OTHER]), PALETTE[INDICES]),
    "png, palette": (saved(indexed(), "PNG"), PALETTE[INDICES]),
    "png, a colour transparent": (saved(indexed(), "PNG", transparency=3), PALETTE[INDICES]),
    "png, 1 bit": (saved(Image.fromarray(BITS * 255).convert("1"), "PNG"), grey(BITS * 255)),
    "png, 16 bits": (saved(Image.fromarray(DEEP), "PNG"), grey(np.rint(DEEP / 257).astype(np.uint8))),
    "png, transparent": (saved(with_alpha(COLOUR), "PNG"), COLOUR),
    "png, grey transparent": (saved(with_alpha(GREY), "PNG"), grey(GREY)),
    "png, animated": (saved(FEW, "PNG", save_all=True, append_images=[OTHER]), COLOUR),
    "png, turned": (saved(FEW, "PNG", exif=turned()), np.rot90(COLOUR, -1)),
    "webp, animated": (saved(FEW, "WEBP", **LOSSLESS_ANIMATION), COLOUR),
    "webp, transparent": (saved(with_alpha(COLOUR), "WEBP", lossless=True, exact=True), COLOUR),
    "tiff": (saved(FEW, "TIFF"), COLOUR),
    "tiff, grey": (saved(Image.fromarray(GREY), "TIFF", compression="tiff_lzw"), grey(GREY)),
    "tiff, transparent": (saved(with_alpha(COLOUR), "TIFF", compression="tiff_adobe_deflate"), COLOUR),
    "tiff, grey transparent": (saved(with_alpha(GREY), "TIFF"), grey(GREY)),
    "tiff, palette": (saved(indexed(), "TIFF"), PALETTE[INDICES]),
    "tiff, 1 bit": (saved(Image.fromarray(BITS * 255).convert("1"), "TIFF"), grey(BITS * 255)),
    "tiff, cmyk": (saved(Image.fromarray(INK, "CMYK"), "TIFF"), PRINTED),
    "tiff, 16 bits, little end first": (written(tiff_16_bits("<")), grey(np.rint(DEEP / 257).astype(np.uint8))),
    "tiff, 16 bits, big end first": (written(tiff_16_bits(">")), grey(np.rint(DEEP / 257).astype(np.uint8))),
    "tiff, several pages": (saved(FEW, "TIFF", save_all=True, append_images=[OTHER]), COLOUR),
    "tiff, turned": (saved(FEW, "TIFF", exif=turned()), np.rot90(COLOUR, -1)),
    "pgm": (written(b"P5 7 9 255\n" + GREY.tobytes()), grey(GREY)),
    "pgm, 16 bits": (written(b"P5 7 9 65535\n" + DEEP.astype(">u2").tobytes()), grey(np.rint(DEEP / 257).astype(np.uint8))),
    "pbm": (written(b"P4 7 9\n" + np.packbits(1 - BITS, axis=1).tobytes()), grey(BITS * 255)),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_a_file_decodes_to_its_pixels(name, tmp_path):
    """Luma (ITU-R BT.601) of them for grey; of inks and luma decoders round differently."""
    write, expected = KINDS[name]
    path = tmp_path / "a"  # the content counts, not the ending
    write(path)
    decoded = decode_file(str(path), 8)
    assert decoded.dtype == torch.uint8
    found = decoded.permute(1, 2, 0).numpy().astype(int)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() <= (1 if "cmyk" in name else 0)
    luma = decode_file(str(path), 8, "GRAY")
    assert luma.shape == (1, *expected.shape[:2])
    assert np.abs(luma[0].numpy() - expected @ np.array([0.299, 0.587, 0.114])).max() <= 1.6


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_a_jpeg_decodes_to_nearly_its_pixels_and_upright(mode, tmp_path):
    smooth = np.linspace(30, 220, 32 * 40).reshape(32, 40).astype(np.uint8)
    Image.fromarray(smooth).convert(mode).save(tmp_path / "a.jpg", quality=95, exif=turned())
    decoded = decode_file(str(tmp_path / "a.jpg"), 8)
    assert decoded.shape == (3, 40, 32)
    assert np.abs(decoded.numpy().astype(int) - np.rot90(smooth, -1)).max() <= 6


def test_only_decoded_frames_count_towards_the_pixel_limit(tmp_path, monkeypatch):
    """All of an animation, but only the first of a JPEG as phones write them; the second is for other screens."""
    FEW.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[OTHER])
    FEW.save(tmp_path / "a.webp", **LOSSLESS_ANIMATION)
    monkeypatch.setattr("etflight.data.decoding.MAX_PIXELS", 2 * H * W - 1)
    assert decode_file(str(tmp_path / "a.jpg"), 1).shape == (3, H, W)
    with pytest.raises(UserError, match="2 pictures of 7×9 pixels are more than"):
        decode_file(str(tmp_path / "a.webp"), 1)


def bmp(width: int, height: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + 8, 0, 0, 54) + header + bytes(8)


def gif(width: int, height: int) -> bytes:
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\x02\x02\x4c\x01\x00;"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + frame


def png(width: int, height: int) -> bytes:
    chunks = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT"
    parts = (struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) for chunk in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def jpeg_header(width: int, height: int) -> bytes:
    content = jpeg()
    start = content.index(b"\xff\xc0") + 5
    return content[:start] + struct.pack(">HH", height, width) + content[start + 4 : start + 14]


@pytest.mark.parametrize("make", [bmp, gif, tiff, png, jpeg_header])
# the last has few pixels, until its shorter side is resized
@pytest.mark.parametrize("size", [(10_000, 10_000), (60_000, 60_000), (65_000, 1)])
def test_a_bomb_is_refused_by_its_header(make, size, tmp_path):
    (tmp_path / "a").write_bytes(make(*size))
    with pytest.raises(UserError, match="pixels"):
        decode_file(str(tmp_path / "a"), 64)
    (tmp_path / "a").write_bytes(make(100, 100))  # were it decoded, the missing content would be the complaint
    with pytest.raises(UserError, match=r"cannot be read as an image \((?!.*pixels)"):
        decode_file(str(tmp_path / "a"), 8)


NUMBERS = BytesIO()
Image.fromarray(np.zeros((H, W), np.float32)).save(NUMBERS, "TIFF")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "its content is none of JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM"),
        (NUMBERS.getvalue(), "its pixels are numbers of 32 bits without a range"),
        (None, "No such file or directory"),
    ],
)
def test_a_file_that_is_no_image_is_named_with_the_reason(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "a.jpg").write_bytes(content)
    message = re.escape(f"{tmp_path}/a.jpg cannot be read as an image ({reason}): replace it or remove it")
    with pytest.raises(UserError, match=f"^{message}$"):
        decode_file(str(tmp_path / "a.jpg"), 8)


def jpeg(mode="RGB", size=(23, 41), **options):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), np.uint8)
    content = BytesIO()
    Image.fromarray(pixels).convert(mode).save(content, **{"format": "JPEG", **options})
    return content.getvalue()


EXIF = Image.Exif()
EXIF[0x010E] = "a description " * 500
JPEGS = {
    "plain": jpeg(), "grey": jpeg("L"), "four colours": jpeg("CMYK"), "progressive": jpeg(progressive=True), "exif": jpeg(exif=EXIF),
    "tables of its own": jpeg(optimize=True, qtables=[list(range(1, 65))]), "restarts": jpeg(restart_marker_blocks=2),
    "a comment": jpeg(comment=b"\xff\xc0" * 40), "a thumbnail": jpeg(exif=b"Exif\0\0" + jpeg(size=(2, 3))),
    "a colour profile": jpeg(icc_profile=bytes(90_000)),
    "two pictures": jpeg(format="MPO", save_all=True, append_images=[Image.new("RGB", (9, 9))]),
}  # fmt: skip


@pytest.mark.parametrize("name", JPEGS)
def test_no_picture_is_larger_than_its_header_said_whatever_was_done_to_it(name):
    """Else a file could have a small size looked at and a large one decoded."""
    assert decoding._jpeg_header(JPEGS[name]) == ("JPEG", 23, 41, 1)
    random, decoded = np.random.default_rng(1), 0
    for _ in range(60):
        content = bytearray(JPEGS[name])
        for at in random.integers(0, min(len(content), 700), random.integers(1, 4)):
            content[at] = random.choice([0, 2, 0x40, 0xC0, 0xC2, 0xC4, 0xD9, 0xE0, 0xFF])
        header = decoding._jpeg_header(bytes(content))
        try:
            shape = decode_image(bytes(content), mode="RGB").shape
        except Exception:
            continue
        decoded += 1
        assert header is None or (shape[2], shape[1]) == header[1:3]
    assert decoded > 1


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("part", [0.01, 0.95])
def test_a_file_that_was_cut_short_is_named(tmp_path, kind, part):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a", kind)
    whole = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(UserError, match=r"/a cannot be read as an image \(.*\): replace it or remove it") as caught:
        decode_file(str(tmp_path / "a"), 8)
    assert "\n" not in str(caught.value)


def test_the_middle_of_a_resized_picture():
    image = torch.arange(64, dtype=torch.uint8).expand(3, 32, 64)
    square = fit_to(image, [8, 8], [16, 16])  # resized to 16 × 32, of which columns 12 to 19
    assert square.shape == (3, 8, 8)
    assert (square[0, 0].float() - torch.arange(24.5, 40, 2)).abs().max() <= 0.5


def test_random_squares_show_parts_of_at_least_the_least_area():
    """A part's extent, in an image whose columns and rows count."""
    image = torch.stack([torch.arange(200).expand(200, 200), torch.arange(200).view(-1, 1).expand(200, 200)])
    squares = torch.stack([random_square(image.to(torch.uint8), 64, 0.25) for _ in range(300)]).float()
    wide = (squares[:, 0, 0, -1] - squares[:, 0, 0, 0]) / 200
    high = (squares[:, 1, -1, 0] - squares[:, 1, 0, 0]) / 200
    assert ((wide * high).min() - 0.25).abs() < 0.03
    assert (wide * high).max() > 0.9
    assert 0.7 < (wide / high).min() < 0.8 < 1.25 < (wide / high).max() < 1.4


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 500), (500, 1)])
def test_a_random_square_of_an_extreme_picture_is_one_too(height, width):
    assert random_square(torch.zeros(3, height, width, dtype=torch.uint8), 8, 1.0).shape == (3, 8, 8)
