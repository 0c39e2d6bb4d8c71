"""Every kind of image file, made here, through `decode_image`."""

from __future__ import annotations

import contextlib
import errno
import io
import pickle
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

from volo.data import decode
from volo.data.decode import MAX_PIXELS, BadImageError, decode_image, decode_mask, reading


def scene(height: int = 30, width: int = 40) -> np.ndarray:
    """uint8 [height, width, 3] without any symmetry."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 255 // height, columns * 255 // width, (rows * columns) % 256], axis=2).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    """Decoded bytes as int [H, W, 3]."""
    image = decode_image(data)
    assert image.dtype == torch.uint8
    assert image.shape[0] == 3
    return image.permute(1, 2, 0).numpy().astype(int)


def png(header: tuple[int, int, int, int], rows: bytes) -> bytes:
    """A PNG file from (width, height, bit depth, colour type) and filtered rows."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", *header, 0, 0, 0))
    return start + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff16(values: np.ndarray) -> bytes:
    """An uncompressed 16-bit TIFF file from uint16 [H, W, C]."""
    H, W, C = values.shape
    body = values.astype("<u2").tobytes()
    tags = [(256, 3, 1, W), (257, 3, 1, H), (258, 3, C, 16), (259, 3, 1, 1), (262, 3, 1, 2 if C == 3 else 1)]
    tags += [(273, 4, 1, 8), (277, 3, 1, C), (278, 3, 1, H), (279, 4, 1, len(body))]
    directory = 8 + len(body)
    extra = directory + 2 + 12 * len(tags) + 4
    if C == 3:
        tags[2] = (258, 3, 3, extra)  # three depths do not fit into the entry
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    end = struct.pack("<I", 0) + struct.pack("<HHH", 16, 16, 16)
    return b"II*\0" + struct.pack("<I", directory) + body + struct.pack("<H", len(tags)) + entries + end


def test_rgb_is_exact_and_channels_come_first() -> None:
    assert (pixels(encoded(Image.fromarray(scene()), "PNG")) == scene()).all()


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P", "RGBA"])
def test_opaque_modes_give_what_pillow_shows(mode: str) -> None:
    image = Image.fromarray(scene()).convert(mode)
    assert (pixels(encoded(image, "PNG")) == np.asarray(image.convert("RGB"))).all()


def test_transparent_parts_lie_on_white() -> None:
    rgba = np.dstack([scene(), np.full((30, 40), 255, np.uint8)])
    rgba[:10, :, 3] = 0
    rgba[10:20, :, 3] = 128
    shown = pixels(encoded(Image.fromarray(rgba), "PNG"))
    assert (shown[:10] == 255).all()
    assert (shown[20:] == scene()[20:]).all()
    assert np.abs(shown[10:20] - (scene()[10:20] * (128 / 255) + 127)).max() <= 1
    grey_alpha = np.dstack([scene()[..., 0], rgba[..., 3]])
    assert (pixels(encoded(Image.fromarray(grey_alpha), "PNG"))[:10] == 255).all()


def test_palette_and_colour_key_transparency() -> None:
    indices = np.arange(12, dtype=np.uint8).reshape(3, 4) % 3
    image = Image.fromarray(indices)
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    for transparency in (1, bytes([255, 0, 255])):
        shown = pixels(encoded(image, "PNG", transparency=transparency))
        assert (shown[indices == 1] == 255).all()
        assert (shown[indices == 2] == [70, 80, 90]).all()
    rgb = scene()
    rgb[0, 0] = [1, 2, 3]
    shown = pixels(encoded(Image.fromarray(rgb), "PNG", transparency=(1, 2, 3)))
    assert (shown[0, 0] == 255).all()
    assert (shown[1:] == rgb[1:]).all()


def test_cmyk_jpeg_has_the_colours_of_the_picture() -> None:
    image = Image.fromarray(scene()).convert("CMYK")
    shown = pixels(encoded(image, "JPEG", quality=100, subsampling=0))
    assert np.abs(shown - np.asarray(image.convert("RGB")).astype(int)).mean() < 3
    assert (pixels(encoded(image, "TIFF")) == np.asarray(image.convert("RGB"))).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind: str) -> None:
    values = np.linspace(0, 65535, 30 * 40).reshape(30, 40).astype(np.uint16)
    shown = pixels(encoded(Image.fromarray(values), kind))
    assert np.abs(shown - values[..., None] / 257).max() <= 0.5 + 1e-9
    assert (shown[0, 0] == 0).all()
    assert (shown[-1, -1] == 255).all()


def test_16_bit_rgb_png_and_tiff_are_scaled_and_not_clipped() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    for data in (png((7, 5, 16, 2), rows), tiff16(values)):
        assert np.abs(pixels(data) - values / 257).max() <= 1


def test_32_bit_values_need_a_known_range() -> None:
    unit = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    assert np.abs(pixels(encoded(Image.fromarray(unit), "TIFF")) - unit[..., None] * 255).max() <= 0.5 + 1e-4
    assert np.abs(pixels(encoded(Image.fromarray(unit * 200), "TIFF")) - unit[..., None] * 200).max() <= 0.5 + 1e-4
    for values in (unit * 1000, unit - 0.5, np.full((3, 4), np.nan, np.float32), (unit * 1e9).astype(np.int32)):
        with pytest.raises(BadImageError, match="32-bit values"):
            decode_image(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG"])
def test_exif_orientation(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(scene()), kind, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB")).astype(int)
    assert upright.shape == ((40, 30, 3) if orientation > 4 else (30, 40, 3))
    assert (pixels(data) == upright).all()


def test_broken_exif_does_not_cost_the_picture() -> None:
    data = encoded(Image.fromarray(scene()), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff\0\0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert pixels(data).shape == (30, 40, 3)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_first_frame_of_an_animation(kind: str) -> None:
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue", "green")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    assert np.abs(pixels(data) - [255, 0, 0]).max() <= 2


def test_content_decides_and_not_the_ending(tmp_path: Path) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(encoded(Image.fromarray(scene()), "PNG"))
    assert (decode_image(path).permute(1, 2, 0).numpy() == scene()).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_truncated_files_are_named(kind: str, tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    path = tmp_path / "cut.jpg"
    for share in (0.5, 0.9):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(BadImageError) as error:
            decode_image(path, "class/cut.jpg")
        assert error.value.name == "class/cut.jpg"
        assert str(error.value).startswith("class/cut.jpg: ")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"hello, I am text", "not an image"),
        (bytes(500), "zeros only"),
        (b"<!DOCTYPE html><html>404</html>", "HTML"),
        (b"\n <svg xmlns='http://www.w3.org/2000/svg'></svg>", "SVG"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        (b"PK\x03\x04" + bytes(50), "ZIP"),
        (b"%PDF-1.7", "PDF"),
        (b"\0\0\0\x18ftypheic" + bytes(50), "HEIC"),
        (b"\xff\xd8\xff\xe0", "damaged|not an image"),
        (b"\x89PNG\r\n\x1a\n", "damaged|not an image"),
    ],
)
def test_what_is_no_picture_is_told(data: bytes, reason: str) -> None:
    with pytest.raises(BadImageError, match=reason):
        decode_image(data, "x.jpg")


@pytest.mark.parametrize("side", [14_000, 60_000])
def test_decompression_bombs_are_refused_before_decoding(side: int, tmp_path: Path) -> None:
    data = png((side, side, 8, 2), b"")
    assert side * side > MAX_PIXELS
    path = tmp_path / "bomb.png"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(BadImageError, match="bomb.png: .*pixels"):
            decode_image(path, "bomb.png")


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(BadImageError, match="none.jpg: no such file"):
        decode_image(tmp_path / "none.jpg")
    with pytest.raises(BadImageError, match="directory"):
        decode_image(tmp_path)


def test_the_error_survives_a_process_border() -> None:
    error = pickle.loads(pickle.dumps(BadImageError("a.jpg", "bad")))
    assert (error.name, error.reason, str(error)) == ("a.jpg", "bad", "a.jpg: bad")


JPEG, PNG = encoded(Image.fromarray(scene()), "JPEG"), encoded(Image.fromarray(scene()).convert("P"), "PNG")
GIF, TIFF = encoded(Image.fromarray(scene()), "GIF"), encoded(Image.fromarray(scene()), "TIFF", compression="tiff_lzw")


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([JPEG, PNG, GIF, TIFF]), st.data())
def test_damaged_bytes_decode_or_are_named_and_nothing_else(data: bytes, draw: st.DataObject) -> None:
    damaged = bytearray(data[: draw.draw(st.integers(0, len(data)))])
    for _ in range(draw.draw(st.integers(0, 5))):
        if damaged:
            damaged[draw.draw(st.integers(0, len(damaged) - 1))] = draw.draw(st.integers(0, 255))
    with warnings.catch_warnings(), contextlib.suppress(BadImageError):
        warnings.simplefilter("ignore")
        assert decode_image(bytes(damaged)).dtype == torch.uint8


def test_a_png_with_large_texts_and_profile_is_an_image_like_others() -> None:
    """Pillow refuses texts above a megabyte; EXIF that lies in such a text is applied all the same."""
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "a" * (2 << 20), zip=True)
    data = encoded(Image.fromarray(scene()), "PNG", pnginfo=info)
    assert (pixels(data) == scene()).all()
    exif = Image.Exif()
    exif[0x0112] = 3
    data = encoded(Image.fromarray(scene()), "PNG", pnginfo=info, exif=exif)
    assert (pixels(data) == scene()[::-1, ::-1]).all()
    profile = encoded(Image.fromarray(scene()), "PNG", icc_profile=b"\0" * (3 << 20))
    assert (pixels(profile) == scene()).all()


def low_bit_png(values: np.ndarray, bits: int) -> bytes:
    rows = []
    for row in values:
        text = "".join(f"{value:0{bits}b}" for value in row)
        text += "0" * (-len(text) % 8)
        rows.append(b"\0" + bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8)))
    return png((values.shape[1], values.shape[0], bits, 0), b"".join(rows))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_of_few_bits(bits: int) -> None:
    """An image is scaled to 8 bits, a mask holds the numbers that are stored."""
    values = np.random.default_rng(0).integers(0, 1 << bits, (5, 11), dtype=np.uint8)
    data = low_bit_png(values, bits)
    assert (pixels(data)[..., 0] == values.astype(int) * 255 // ((1 << bits) - 1)).all()
    assert (decode_mask(data, "mask.png")[0] == values).all()
    pgm = b"P5\n# a comment\n11 5\n%d\n" % ((1 << bits) - 1) + values.tobytes()
    assert (decode_mask(pgm, "mask.pgm")[0] == values).all()


def test_masks_of_16_bits_and_in_the_order_of_other_processors() -> None:
    values = np.random.default_rng(0).integers(0, 200, (5, 7)).astype(np.uint16)
    for kind in ("PNG", "TIFF"):
        assert (decode_mask(encoded(Image.fromarray(values), kind), "mask")[0] == values).all()
    big_endian = Image.frombytes("I;16B", (7, 5), values.astype(">u2").tobytes())
    assert (decode_mask(encoded(big_endian, "TIFF"), "mask")[0] == values).all()
    with pytest.raises(BadImageError, match="mask: values from 0 to 300"):
        decode_mask(
            encoded(Image.fromarray(np.full((2, 2), 300, np.uint16) * np.eye(2, dtype=np.uint16)), "PNG"), "mask"
        )
    for mode in ("LA", "RGB", "F"):
        with pytest.raises(BadImageError, match=f"mask: a mask has one channel of class numbers, this is {mode}"):
            decode_mask(encoded(Image.new(mode, (3, 3)), "TIFF"), "mask")


def test_32_bit_integers_are_not_taken_for_16_bits() -> None:
    with pytest.raises(BadImageError, match="32-bit values from 0 to 200"):
        decode_image(encoded(Image.fromarray(np.array([[0, 200]], np.int32)), "TIFF"))


def test_a_read_that_fails_for_a_moment_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failures = [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale file handle")]

    def read() -> bytes:
        if failures:
            raise failures.pop()
        return b"here"

    monkeypatch.setattr(decode, "PAUSES", (0.01, 0.01, 0.01))
    assert reading(read, "a.png") == b"here"
    failures += [OSError(errno.EIO, "Input/output error")] * 4
    with pytest.raises(BadImageError, match=r"a\.png: input/output error"):
        reading(read, "a.png")
