"""Every kind of sample that the formats define decodes to the colours that an image viewer shows."""

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, PngImagePlugin

from engine.errors import MediaError
from engine.media.decode import ImageLimits, decode_image, read_size, upright_rgb
from tests.engine.media.files import bmp, chunk, cmyk_profile, gif, png, tiff

LIMITS = ImageLimits(max_pixels=1_000_000, max_side=5000)
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6


def shown(data):
    assert read_size(data, LIMITS) == decode_image(data, LIMITS).size
    return np.asarray(decode_image(data, LIMITS)).astype(int)


def near(found, wanted, tolerance=1):
    """Rounding differs: 16-bit colours are cut to their higher byte."""
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= tolerance


def encoded(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def samples(bits, channels, seed=0):
    """Random samples ``(5, 7, channels)``, of which the first two pixels are alike."""
    drawn = np.random.default_rng(seed).integers(0, 2**bits, (5, 7, channels))
    drawn[0, 1] = drawn[0, 0]
    return drawn


@pytest.mark.parametrize(
    ("kind", "channels", "bits"),
    [*((GREY, 1, bits) for bits in (1, 2, 4, 8, 16)), (RGB, 3, 8), (RGB, 3, 16)],
)
@pytest.mark.parametrize("keyed", [False, True])
def test_pngs_with_a_transparent_colour(kind, channels, bits, keyed):
    drawn = samples(bits, channels)
    # Its neighbour differs from the transparent colour in the lowest bit alone.
    drawn[1, 1] = drawn[0, 0]
    drawn[1, 1, -1] ^= 1
    key = drawn[0, 0]
    data = png(drawn, bits, kind, *[chunk(b"tRNS", struct.pack(f">{channels}H", *key))] * keyed)
    wanted = np.rint(np.broadcast_to(drawn, (5, 7, 3)) * 255 / (2**bits - 1))
    if keyed:
        wanted[(drawn == key).all(axis=2)] = 255
        assert (shown(data)[0, :2] == 255).all()
    near(shown(data), wanted)
    with Image.open(io.BytesIO(data)) as opened:
        near(np.asarray(upright_rgb(opened)).astype(int), wanted)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_pngs_with_a_palette(bits):
    drawn = samples(bits, 1)
    colours = np.random.default_rng(1).integers(0, 256, (2**bits, 3))
    alphas = np.random.default_rng(2).integers(0, 256, 2**bits)
    palette = chunk(b"PLTE", colours.astype(np.uint8).tobytes())
    transparency = chunk(b"tRNS", alphas.astype(np.uint8).tobytes())
    near(shown(png(drawn, bits, PALETTE, palette)), colours[drawn[..., 0]])
    alpha = (alphas[drawn[..., 0]] / 255)[..., None]
    wanted = np.rint(colours[drawn[..., 0]] * alpha + 255 * (1 - alpha))
    near(shown(png(drawn, bits, PALETTE, palette, transparency)), wanted)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("kind", "channels"), [(GREY_ALPHA, 2), (RGBA, 4)])
def test_pngs_with_alpha(kind, channels, bits):
    drawn = samples(bits, channels)
    white = 2**bits - 1
    alpha = drawn[..., -1:] / white
    colours = np.broadcast_to(drawn[..., :-1], (5, 7, 3)) * 255 / white
    near(shown(png(drawn, bits, kind)), np.rint(colours * alpha + 255 * (1 - alpha)), 2)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
def test_grey_tiffs(bits, photometric, order):
    if (order, bits) == (">", 12):
        pytest.skip("Pillow doesn't know it")
    drawn = samples(bits, 1)[..., 0]
    data = tiff(drawn, bits, photometric, order=order)
    wanted = np.rint(drawn * 255 / (2**bits - 1))
    wanted = np.repeat((wanted if photometric else 255 - wanted)[..., None], 3, axis=2)
    near(shown(data), wanted)


@pytest.mark.parametrize("order", ["<", ">"])
def test_grey_tiffs_of_other_numbers(order):
    fractions = np.linspace(0, 1, 35).reshape(5, 7)
    grey = np.rint(fractions * 255)
    for photometric, wanted in ((1, grey), (0, 255 - grey)):
        data = tiff(fractions, 32, photometric, order=order, sample_format=3)
        near(shown(data)[..., 0], wanted)
    whole = (fractions * (2**32 - 1)).astype(np.uint64)
    if order == "<":
        near(shown(tiff(whole, 32, 1, order=order))[..., 0], np.floor(fractions * 255 + 0.5))
    near(shown(tiff(grey, 32, 1, order=order, sample_format=2))[..., 0], grey)
    with pytest.raises(MediaError):
        shown(tiff(-grey, 16, 1, order=order, sample_format=2))


def test_grey_of_integers_is_that_of_bytes_or_of_16_bits():
    grey = np.arange(35).reshape(5, 7)
    for values, wanted in ((grey * 7, grey * 7), (grey * 1927, grey * 1927 / 257)):
        image = Image.fromarray(values.astype(np.int32))
        assert image.mode == "I"
        near(np.asarray(upright_rgb(image))[..., 0].astype(int), np.rint(wanted), 0)
    dark = Image.fromarray((grey * 7).astype(np.uint16))
    assert np.asarray(upright_rgb(dark)).max() <= 1


@pytest.mark.parametrize("alpha", [0, 128, 255])
def test_bmps_without_alpha_are_opaque(alpha):
    """An alpha channel that is 0 everywhere is ignored; any other counts."""
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3))
    data = bmp(pixels, np.full((5, 7), alpha))
    share = (alpha or 255) / 255
    near(shown(data), np.rint(pixels * share + 255 * (1 - share)))
    mixed = np.zeros((5, 7), int)
    mixed[0, 0] = 255
    wanted = np.full((5, 7, 3), 255)
    wanted[0, 0] = pixels[0, 0]
    near(shown(bmp(pixels, mixed)), wanted)


@pytest.mark.parametrize("transparent", [False, True])
def test_gifs_show_nothing_around_their_frame(transparent):
    found = shown(gif((6, 5), (1, 2, 3, 2), transparent=transparent))
    wanted = np.full((5, 6, 3), 255)
    wanted[2:4, 1:4] = (255, 0, 0)
    near(found, wanted, 0)
    whole = shown(gif((3, 2), (0, 0, 3, 2), transparent=transparent))
    near(whole, np.full((2, 3, 3), (255, 0, 0)), 0)


RED = Image.new("RGB", (8, 8), (200, 30, 40))


def with_chunk(data, extra):
    """A PNG with a chunk more behind its header."""
    return data[:33] + extra + data[33:]


def big_profile():
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile += np.random.default_rng(0).bytes(1_200_000)
    profile[:4] = struct.pack(">I", len(profile))
    return bytes(profile)


def big_text():
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 1_200_000, zip=True)
    return info


@pytest.mark.parametrize(
    "data",
    [
        encoded(RED, "PNG", icc_profile=big_profile()),
        encoded(RED, "PNG", pnginfo=big_text()),
        with_chunk(encoded(RED, "PNG"), chunk(b"tEXt", b"Comment\0x", checksum=0)),
        with_chunk(encoded(RED, "PNG"), chunk(b"iCCP", b"name\0\0no zlib data")),
        with_chunk(encoded(RED, "PNG"), chunk(b"zTXt", b"name\0\0no zlib data")),
        with_chunk(encoded(RED, "PNG"), chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0no zlib data")),
        with_chunk(encoded(RED, "PNG"), chunk(b"tRNS", struct.pack(">3H", 200, 30, 40), checksum=0)),
        with_chunk(encoded(RED, "PNG"), chunk(b"gAMA", b"")),
        with_chunk(encoded(RED, "PNG"), chunk(b"pHYs", b"\0")),
        with_chunk(encoded(RED, "PNG"), chunk(b"mine", b"private")),
        encoded(RED, "PNG")[:-12],
        encoded(RED, "PNG") + b"behind the end",
        encoded(RED, "PNG").replace(b"IEND\xaeB`\x82", b"IEND\0\0\0\0"),
    ],
    ids=lambda data: str(len(data)),
)
def test_pngs_with_unusable_metadata(data):
    near(shown(data), np.full((8, 8, 3), (200, 30, 40)), 0)


def test_pngs_with_broken_content_are_damaged():
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), "PNG")
    for broken in (data[:-60], data.replace(b"IDAT", b"IDaT"), data[:40], data[:16] + bytes(8) + data[24:]):
        with pytest.raises(MediaError):
            decode_image(broken, LIMITS)


@pytest.mark.parametrize("orientation", [6, 8])
def test_a_png_keeps_the_orientation_that_its_metadata_tells(orientation):
    image = Image.new("RGB", (16, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    extra = chunk(b"tEXt", b"Comment\0x", checksum=0)
    assert decode_image(with_chunk(encoded(image, "PNG", exif=exif), extra), LIMITS).size == (8, 16)
    xmp = f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="{orientation}"/></x:xmpmeta>'
    told = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp.encode())
    assert decode_image(with_chunk(encoded(image, "PNG"), told), LIMITS).size == (8, 16)


@pytest.mark.parametrize(
    ("form", "orientation"), itertools.product(["JPEG", "PNG", "WEBP"], [0, 9, 10, 65535])
)
def test_orientations_out_of_range_turn_nothing(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.new("RGB", (16, 8)), form, exif=exif)
    assert read_size(data, LIMITS) == decode_image(data, LIMITS).size == (16, 8)


@pytest.mark.parametrize("orientation", range(10))
def test_sizes_of_turned_tiffs(orientation):
    data = tiff(samples(8, 1)[..., 0], 8, 1, orientation=orientation)
    assert read_size(data, LIMITS) == decode_image(data, LIMITS).size
    assert decode_image(data, LIMITS).size == ((5, 7) if 5 <= orientation <= 8 else (7, 5))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_without_their_end_marker(mode, options):
    noise = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise).convert(mode), "JPEG", quality=90, **options)
    whole = shown(data)
    for cut in (1, 2):
        near(shown(data[:-cut]), whole, 0)
    with pytest.raises(MediaError):
        decode_image(data[: len(data) // 4], LIMITS)


def test_lab_is_shown_as_colours():
    """White, grey, red and blue of sRGB in CIELAB under D50."""
    lab = [(100, 0, 0), (53, 0, 0), (54, 81, 70), (30, 68, -112)]
    wanted = [(255, 255, 255), (127, 127, 127), (255, 0, 0), (0, 0, 255)]
    values = np.array([[(round(light * 2.55), a % 256, b % 256) for light, a, b in lab]])
    near(shown(tiff(values, 8, 8))[0], np.array(wanted), 26)


def inks(c, m, y, k):
    """Corners in Lab bytes: more ink is darker; cyan goes to green, magenta to red."""
    light = 255 * (1 - k) * (1 - 0.3 * c) * (1 - 0.3 * m) * (1 - 0.1 * y)
    return int(light), 128 - 50 * c + 50 * m, 128 + 50 * y


@pytest.mark.parametrize("form", ["JPEG", "TIFF"])
def test_cmyk_is_shown_by_its_profile(form):
    image = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    options = {"quality": 100} if form == "JPEG" else {}
    naive = shown(encoded(image, form, **options))
    near(naive, np.full((8, 8, 3), (0, 255, 255)), 3)
    profile = cmyk_profile(inks)
    managed = shown(encoded(image, form, icc_profile=profile, **options))
    lab = Image.new("LAB", (1, 1), inks(1, 0, 0, 0))
    target = ImageCms.createProfile("sRGB")
    wanted = ImageCms.profileToProfile(lab, ImageCms.createProfile("LAB"), target, outputMode="RGB")
    near(managed, np.full((8, 8, 3), wanted.getpixel((0, 0))), 4)
    assert np.abs(managed - naive).max() > 50
    for unusable in (b"no profile", ImageCms.ImageCmsProfile(target).tobytes()):
        near(shown(encoded(image, form, icc_profile=unusable, **options)), naive, 0)


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA", "RGBX", "HSV", "YCbCr", "1"])
def test_modes_that_a_caller_may_have_made(mode):
    red = Image.new("RGB", (3, 2), (255, 0, 0))
    if mode == "La":
        image = Image.new("LA", (3, 2), (100, 128)).convert("La")
        near(np.asarray(upright_rgb(image)).astype(int), np.full((2, 3, 3), 177))
    elif mode == "RGBa":
        image = Image.new("RGBA", (3, 2), (255, 0, 0, 128)).convert("RGBa")
        near(np.asarray(upright_rgb(image)).astype(int), np.full((2, 3, 3), (255, 127, 127)))
    elif mode == "1":
        assert upright_rgb(Image.new("1", (3, 2), 1)).getpixel((0, 0)) == (255, 255, 255)
    else:
        image = red.convert("P").convert("PA") if mode == "PA" else red.convert(mode)
        near(np.asarray(upright_rgb(image)).astype(int), np.full((2, 3, 3), (255, 0, 0)), 2)


def test_a_bomb_in_the_metadata_is_not_unpacked():
    """A small chunk that unpacks to gigabytes is never unpacked."""
    packer = zlib.compressobj(9)
    text = b"".join([packer.compress(bytes(1 << 24)) for _ in range(8)]) + packer.flush()
    data = with_chunk(encoded(RED, "PNG"), chunk(b"zTXt", b"name\0\0" + text))
    near(shown(data), np.full((8, 8, 3), (200, 30, 40)), 0)
