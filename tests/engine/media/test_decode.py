import inspect
import io
import struct
import zlib

import numpy as np
import pytest
import transformers
from PIL import Image, ImageOps
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from engine.errors import MediaError, MediaTooLarge
from engine.media.decode import ImageLimits, check_total, decode_image, read_size, to_rgb, upright_rgb

LIMITS = ImageLimits(max_pixels=1_000_000, max_side=5000)
WHERE = "messages[0].content[0].image_url.url"


def noise(mode="RGB", size=(13, 7), seed=0):
    bands = len(Image.new(mode, (1, 1)).getbands())
    shape = (size[1], size[0], bands) if bands > 1 else (size[1], size[0])
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8), mode)


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def same(image, reference):
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), np.asarray(reference.convert("RGB")))


def on_white(rgba):
    """Composition written out: c·a + 255·(1 − a), to the nearest."""
    pixels = np.asarray(rgba).astype(np.float64)
    alpha = pixels[..., 3:] / 255
    return pixels[..., :3] * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
    ],
)
@pytest.mark.parametrize("size", [(1, 1), (1, 300), (4000, 30), (13, 7)])
def test_lossless_formats(form, options, size):
    picture = noise(size=size)
    same(decode_image(encoded(picture, form, **options), LIMITS), picture)


def test_jpegs_are_those_of_pillow():
    for mode in ("RGB", "L", "CMYK"):
        data = encoded(noise(mode, (64, 48)), "JPEG", quality=90)
        same(decode_image(data, LIMITS), Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_opaque_grey_and_palettes(mode):
    picture = noise().convert(mode)
    same(decode_image(encoded(picture, "PNG"), LIMITS), picture)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_transparency_shows_white(form):
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    picture = noise("RGBA")
    shown = np.asarray(decode_image(encoded(picture, form, **options), LIMITS)).astype(float)
    assert np.abs(shown - on_white(picture)).max() <= 1
    clear = Image.new("RGBA", (3, 3), (9, 9, 9, 0))
    same(decode_image(encoded(clear, form, **options), LIMITS), Image.new("RGB", (3, 3), "white"))


def test_grey_with_alpha():
    picture = noise("LA")
    shown = np.asarray(decode_image(encoded(picture, "PNG"), LIMITS)).astype(float)
    assert np.abs(shown - on_white(picture.convert("RGBA"))).max() <= 1


@pytest.mark.parametrize(
    ("mode", "transparency", "colour"), [("L", 7, 7), ("RGB", (7, 8, 9), (7, 8, 9)), ("P", 1, 1)]
)
def test_a_transparent_colour_shows_white(mode, transparency, colour):
    picture = Image.new(mode, (4, 2), 0)
    if mode == "P":
        picture.putpalette([0, 0, 0, 200, 10, 10])
    picture.putpixel((1, 1), colour)
    for form in ("PNG", "GIF") if mode == "P" else ("PNG",):
        shown = decode_image(encoded(picture, form, transparency=transparency), LIMITS)
        assert shown.getpixel((1, 1)) == (255, 255, 255)
        assert shown.getpixel((0, 0)) == (0, 0, 0)


def test_sixteen_bits_are_scaled():
    values = np.array([[0, 128, 129, 32768, 65535]], dtype=np.uint16)
    wanted = np.rint(values / 257).astype(np.uint8)
    for form in ("PNG", "TIFF"):
        shown = np.asarray(decode_image(encoded(Image.fromarray(values), form), LIMITS))
        np.testing.assert_array_equal(shown, np.repeat(wanted[..., None], 3, axis=2))


def test_floats_are_fractions_or_bytes():
    for values, wanted in (([[0, 0.5, 1]], [[0, 128, 255]]), ([[0, 0.5, 254.6]], [[0, 0, 255]])):
        data = encoded(Image.fromarray(np.array(values, dtype=np.float32)), "TIFF")
        np.testing.assert_array_equal(np.asarray(decode_image(data, LIMITS))[..., 0], wanted)
    for values in ([[-1.0, 0]], [[256.0, 0]], [[np.nan, 0]], [[np.inf, 0]]):
        data = encoded(Image.fromarray(np.array(values, dtype=np.float32)), "TIFF")
        with pytest.raises(MediaError) as caught:
            decode_image(data, LIMITS, where=WHERE)
        assert caught.value.param == WHERE


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_images_are_turned_upright(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(noise(size=(16, 8)), form, exif=exif, **options)
    reference = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    shown = decode_image(data, LIMITS)
    assert shown.size == ((16, 8) if orientation < 5 else (8, 16))
    same(shown, reference)


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"", b"Exif\0\0II*\0\xff\xff\xff\xff"])
def test_unreadable_exif_turns_nothing(exif):
    picture = noise()
    same(decode_image(encoded(picture, "PNG", exif=exif), LIMITS), picture)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_shown(form):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if form == "WEBP" else {}
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:], **options)
    same(decode_image(data, LIMITS), frames[0])


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_cut_files_are_damaged(form):
    data = encoded(noise(size=(64, 64)), form)
    # Of a JPEG that ends late, what is there is shown.
    for share in (0.3, 0.4 if form == "JPEG" else 0.9):
        with pytest.raises(MediaError) as caught:
            decode_image(data[: int(len(data) * share)], LIMITS, where=WHERE)
        assert caught.value.status == 400
        assert caught.value.param == WHERE


@pytest.mark.parametrize(
    "data", [b"", b"no picture", b"<svg/>", b"%PDF-1.7", b"\x89PNG\r\n\x1a\n", b"II*\0" * 9]
)
def test_data_that_is_not_an_image(data):
    with pytest.raises(MediaError) as caught:
        decode_image(data, LIMITS)
    assert "0x" not in caught.value.message
    assert "BytesIO" not in caught.value.message


@pytest.mark.parametrize("form", ["ICO", "PPM", "TGA", "PCX", "ICNS", "SGI", "EPS", "PDF", "JPEG2000"])
def test_other_formats_are_not_read(form):
    data = encoded(Image.new("RGB", (32, 32)), form)
    with pytest.raises(MediaError, match="PNG, JPEG"):
        decode_image(data, LIMITS)


def png(width, height):
    """A PNG whose header announces any size, over a body that unpacks to 16 MB."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1 << 24), 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("size", [(1001, 1000), (5001, 1), (1, 5001), (12_000, 12_000), (60_000, 60_000)])
def test_bombs_are_refused_by_their_header(size, monkeypatch):
    monkeypatch.setattr(Image.core, "zip_decoder", lambda *_: pytest.fail("unpacked"))
    with pytest.raises(MediaTooLarge) as caught:
        decode_image(png(*size), LIMITS, where=WHERE)
    assert caught.value.status == 413


@pytest.mark.parametrize("form", ["GIF", "WEBP", "BMP", "TIFF", "JPEG"])
def test_every_format_has_its_bounds(form):
    data = encoded(Image.new("RGB", (1001, 1000)), form)
    with pytest.raises(MediaTooLarge, match="1001 x 1000"):
        decode_image(data, LIMITS)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "CMYK", "YCbCr"])
def test_opaque_images_are_those_of_transformers(mode):
    picture = noise().convert(mode)
    same(to_rgb(picture), convert_to_rgb(picture))


def transparent(mode):
    if mode != "P":
        return noise(mode)
    picture = noise().convert("P")
    picture.info["transparency"] = 3
    return picture


@pytest.mark.skipif(
    "return_numpy" not in inspect.signature(convert_to_rgb).parameters,
    reason="this release of Transformers shows the colours under transparent pixels",
)
@pytest.mark.parametrize("mode", ["LA", "PA", "P", "RGBA"])
def test_transparent_images_are_those_of_transformers(mode):
    picture = transparent(mode)
    np.testing.assert_array_equal(
        np.asarray(to_rgb(picture)), convert_to_rgb(picture.copy(), return_numpy=True)
    )


@pytest.mark.skipif(
    "return_numpy" not in inspect.signature(convert_to_rgb).parameters,
    reason="this release of Transformers shows the colours under transparent pixels",
)
@pytest.mark.parametrize("family", ["CLIP", "LlavaOnevision", "Qwen2VL", "Idefics3", "SmolVLM"])
def test_every_familys_processor_composes_on_white(family):
    processor = getattr(transformers, f"{family}ImageProcessorPil")()
    picture = noise("RGBA", (56, 40))
    wanted = processor(picture, return_tensors="np")["pixel_values"]
    found = processor(to_rgb(picture), return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(found, wanted)
    assert not np.array_equal(processor(picture.convert("RGB"), return_tensors="np")["pixel_values"], wanted)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("loaded", [False, True])
def test_opened_images_are_turned_as_transformers_turns_them(form, loaded):
    exif = Image.Exif()
    exif[0x0112] = 8
    data = encoded(noise(size=(16, 8)), form, exif=exif)
    with Image.open(io.BytesIO(data)) as theirs, Image.open(io.BytesIO(data)) as ours:
        wanted = load_image(theirs)
        if loaded:
            ours.load()
        same(upright_rgb(ours), wanted)
        # One that was turned already is left as it is.
        same(upright_rgb(ImageOps.exif_transpose(ours)), wanted)
    assert wanted.size == (8, 16)


def test_rgb_is_not_copied():
    picture = noise()
    assert to_rgb(picture) is picture


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_sizes_by_the_header_are_those_of_decoding(orientation):
    for size in ((7, 13), (40, 8)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        data = encoded(noise(size=size), "JPEG", exif=exif)
        assert read_size(data, LIMITS) == decode_image(data, LIMITS).size


def test_unreadable_headers_fail_as_in_decoding():
    for data in (b"", b"hello", encoded(noise(), "PNG")[:20]):
        with pytest.raises(MediaError) as decoding:
            decode_image(data, LIMITS, where="here")
        with pytest.raises(MediaError) as measuring:
            read_size(data, LIMITS, where="here")
        assert measuring.value.message == decoding.value.message


def test_many_images_are_bounded_together():
    limits = ImageLimits(max_total_pixels=100)
    check_total([(5, 10), (10, 5)], limits)
    with pytest.raises(MediaTooLarge, match="101 pixels together; 100 are allowed"):
        check_total([(5, 10), (51, 1)], limits)
