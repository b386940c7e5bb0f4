from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from torchcodec.decoders import decode_image
from torchvision.transforms.v2 import RandomResizedCrop

from etflight.data import decoding
from etflight.data.decoding import center_square, decode_file, draw_part, random_square
from etflight.utils.errors import UserError


def draws(height, width, n=2000):
    return np.array([draw_part(height, width, 0.08, np.random.default_rng([7, i])) for i in range(n)])


@pytest.mark.parametrize(("height", "width"), [(375, 500), (64, 64), (300, 100)])
def test_random_parts_are_distributed_as_torchvisions(height, width):
    torch.manual_seed(0)
    theirs = RandomResizedCrop(224).make_params
    image = torch.empty(3, height, width)
    reference = np.array(
        [[p[name] for name in ("top", "left", "height", "width")] for p in (theirs([image]) for _ in range(2000))]
    )
    for quantity in (lambda d: d[:, 2] * d[:, 3], lambda d: d[:, 3] / d[:, 2], lambda d: d[:, 0], lambda d: d[:, 1]):
        ours, expected = (
            np.quantile(quantity(d), np.linspace(0.05, 0.95, 7)) for d in (draws(height, width), reference)
        )
        np.testing.assert_allclose(ours, expected, rtol=0.1, atol=0.04 * max(height, width))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 1000), (1000, 1), (3, 4), (375, 500)])
@pytest.mark.parametrize("min_scale", [0.001, 0.08, 0.9, 1.0])
def test_a_random_part_lies_inside(height, width, min_scale):
    for i in range(50):
        top, left, h, w = draw_part(height, width, min_scale, np.random.default_rng(i))
        assert 0 <= top <= top + h <= height
        assert 0 <= left <= left + w <= width
        assert min(h, w) >= 1


def test_where_no_part_fits_it_is_the_largest_in_the_middle():
    assert draw_part(100, 1000, 1.0, np.random.default_rng(0)) == (0, 433, 100, 133)
    assert draw_part(1000, 100, 1.0, np.random.default_rng(0)) == (433, 0, 133, 100)


def test_a_random_square_shows_its_part():
    image = torch.arange(40 * 60, dtype=torch.float32).reshape(1, 40, 60).div(10).to(torch.uint8).expand(3, 40, 60)
    top, left, height, width = draw_part(40, 60, 0.1, np.random.default_rng(3))
    square = random_square(image, 8, 0.1, np.random.default_rng(3))
    part = image[:, top : top + height, left : left + width].float()
    expected = torch.nn.functional.interpolate(part[None], (8, 8), mode="bilinear", antialias=True)[0]
    assert (square.float() - expected).abs().max() <= 1


def test_the_middle_of_a_resized_picture():
    image = torch.arange(64, dtype=torch.uint8).expand(3, 32, 64)
    square = center_square(image, 8, 16)  # resized to 16 × 32, of which columns 12 to 19
    assert square.shape == (3, 8, 8)
    assert (square[0, 0].float() - torch.arange(24.5, 40, 2)).abs().max() <= 0.5


@pytest.mark.parametrize("suffix", ["png", "webp", "ppm"])
def test_lossless_files_decode_to_their_pixels(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {}))
    decoded = decode_file(str(tmp_path / f"a.{suffix}"), 8)
    assert (decoded.dtype, decoded.shape) == (torch.uint8, (3, 9, 7))
    assert np.array_equal(decoded.permute(1, 2, 0), pixels)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"8BPS", "its content is none of JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM"),
        (b"<!DOCTYPE html><title>404</title>", "its content is none of JPEG, PNG, WEBP, GIF, BMP, TIFF, PPM"),
        (None, "No such file or directory"),
    ],
)
def test_a_file_that_is_no_image_is_named_with_the_reason(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UserError) as caught:
        decode_file(str(tmp_path / "a.jpg"), 8)
    expected = f"{tmp_path}/a.jpg cannot be read as an image ({reason}): replace it or remove it"
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    "content", [b"P6\n7 9\n255\n", b"P6\n70000 70000\n255\n", b"P6\n0 0\n255\n", b"P6", b"P5\n2 2\n65535\n1"]
)
def test_a_broken_ppm_file_is_named(tmp_path, content):
    (tmp_path / "a.ppm").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.ppm cannot be read as an image") as caught:
        decode_file(str(tmp_path / "a.ppm"), 8)
    assert "\n" not in str(caught.value)


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
def test_the_header_of_a_jpeg_file_tells_what_pillow_tells(name):
    assert decoding._jpeg_header(JPEGS[name]) == ("JPEG", 23, 41, 1)
    assert decoding._any_header(JPEGS[name])[1:] == (23, 41, 1)


@pytest.mark.parametrize("name", JPEGS)
def test_no_picture_is_larger_than_its_header_said_whatever_was_done_to_it(name):
    """Else a file could have a small size looked at and a large one decoded."""
    random, decoded = np.random.default_rng(1), 0
    for _ in range(150):
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
    assert decoded > 5


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"])
@pytest.mark.parametrize("part", [0.5, 0.95])
def test_a_file_that_was_cut_short_is_named(tmp_path, kind, part):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a", kind)
    whole = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(UserError, match=r"/a cannot be read as an image \(.*\): replace it or remove it") as caught:
        decode_file(str(tmp_path / "a"), 8)
    assert "\n" not in str(caught.value)
