"""AVIF, HEIF and JPEG XL, high dynamic range, YCCK, files that end too early, and files with several frames:
each as an image viewer shows it."""

import io

import numpy as np
import pytest
from PIL import Image, features

from engine.errors import MediaError, MediaTooLarge
from engine.media.decode import ImageLimits, decode, decode_image, read_size
from engine.media.frames import count_frames, decode_frames, frame_sizes
from engine.media.jxl import jxl_size
from tests.engine.media.files import chunk, png, tiff

LIMITS = ImageLimits(max_pixels=1_000_000, max_side=10_000, max_total_pixels=3_000_000)
WHERE = "messages[0].content[0].image_url.url"
RED, BLUE, WHITE = (200, 30, 40), (20, 30, 240), (255, 255, 255)


def encoded(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def corners(size=(64, 48)):
    """White with a red quarter at the upper left, and a blue one at the lower right."""
    image = Image.new("RGB", size, WHITE)
    image.paste(RED, (0, 0, size[0] // 2, size[1] // 2))
    image.paste(BLUE, (size[0] // 2, size[1] // 2, *size))
    return image


def near(found, wanted, tolerance):
    found, wanted = (np.asarray(each).astype(int) for each in (found, wanted))
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= tolerance


def exif(orientation):
    given = Image.Exif()
    given[0x112] = orientation
    return given


@pytest.fixture(params=["AVIF", "HEIF", "JXL"])
def form(request):
    """A format whose package is installed, ready to be written."""
    if request.param == "AVIF" and not features.check("avif"):
        pytest.skip("this build of Pillow has no AVIF")
    if request.param == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    if request.param == "JXL":
        pytest.importorskip("pillow_jxl")
    return request.param


#: Options of a nearly lossless file.
FINE = {
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
    "HEIF": {"quality": 100, "chroma": 444},
    "JXL": {"lossless": True},
}


def test_newer_formats_show_their_colours(form):
    for image in (corners(), corners((63, 47)), Image.new("L", (20, 30), 100)):
        data = encoded(image, form, **FINE[form])
        near(decode_image(data, LIMITS), image.convert("RGB"), 6)
        assert read_size(data, LIMITS) == image.size
    translucent = corners().convert("RGBA")
    translucent.putalpha(128)
    found = decode_image(encoded(translucent, form, **FINE[form]), LIMITS)
    near(found.getpixel((4, 4)), (227, 142, 147), 4)


def test_newer_formats_are_turned_once(form):
    """Pillow and libheif write the format's own orientation; a JPEG XL with EXIF alone isn't turned."""
    for orientation, size, first in ((1, (64, 48), RED), (3, (64, 48), BLUE), (6, (48, 64), WHITE)):
        data = encoded(corners(), form, exif=exif(orientation).tobytes(), **FINE[form])
        if form == "JXL":
            size, first = (64, 48), RED
        found = decode_image(data, LIMITS)
        assert found.size == read_size(data, LIMITS) == size
        near(found.getpixel((3, 3)), first, 6)


def test_newer_formats_are_bounded_and_their_faults_named(form):
    data = encoded(corners(), form, **FINE[form])
    small = ImageLimits(max_pixels=3000)
    for read in (decode_image, read_size):
        with pytest.raises(MediaTooLarge, match="64 x 48"):
            read(data, small, where=WHERE)
        for cut in (0.3, 0.9):
            with pytest.raises(MediaError) as error:
                decode_image(data[: int(len(data) * cut)], LIMITS, where=WHERE)
            assert error.value.param == WHERE
    with pytest.raises(MediaError, match="not an image in one of the formats PNG"):
        decode_image(data, ImageLimits(formats=("PNG",)), where=WHERE)


JXL_SIZES = [(1, 1), (8, 8), (256, 256), (257, 255), (513, 512), (8200, 3), (3, 8200), (160, 90), (1000, 500)]


@pytest.mark.parametrize("size", JXL_SIZES, ids=str)
def test_sizes_of_jpeg_xl_by_the_header(size):
    """The plugin unpacks an image as soon as it opens it, so bounds need the header."""
    pytest.importorskip("pillow_jxl")
    image = Image.new("RGB", size, RED)
    assert jxl_size(encoded(image, "JXL", lossless=True)) == size
    assert jxl_size(encoded(image, "JXL", lossless=True, exif=exif(1).tobytes())) == size


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_jpeg_packed_as_jpeg_xl_is_shown_as_before(orientation, tmp_path):
    pytest.importorskip("pillow_jxl")
    path = tmp_path / "photo.jpg"
    corners().save(path, "JPEG", quality=95, exif=exif(orientation))
    with Image.open(path) as photo:
        data = encoded(photo, "JXL", lossless_jpeg=True)
    expected = decode_image(path.read_bytes(), LIMITS)
    near(decode_image(data, LIMITS), expected, 0)
    assert read_size(data, LIMITS) == expected.size


def test_beginnings_of_jpeg_xl_are_never_misread():
    for data in (
        b"",
        b"\xff\x0a",
        b"\0\0\0\x0cJXL \r\n\x87\n",
        b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\0jxlc",
        b"\xff\x0b",
    ):
        found = jxl_size(data)
        assert found is None or min(found) >= 1


def pq(luminance):
    """The signal of a luminance in cd/m² (SMPTE ST 2084, from 0 to 1)."""
    powered = (luminance / 10_000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * powered) / (1 + 18.6875 * powered)) ** 78.84375


def hlg(light):
    """The signal of scene light (ITU-R BT.2100, from 0 to 1)."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(light <= 1 / 12, np.sqrt(3 * light), a * np.log(np.maximum(12 * light - b, 1e-9)) + c)


#: Linear sRGB to BT.2020 (ITU-R BT.2087).
TO_BT2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("transfer", [16, 18])
def test_pngs_of_high_dynamic_range_have_the_colours_of_a_usual_screen(transfer, bits):
    wanted = np.array(
        [[[255, 255, 255], [186, 186, 186], [220, 60, 50], [40, 160, 70], [0, 0, 0], [90, 90, 200]]]
    )
    light = (
        np.where(wanted <= 10, wanted / 255 / 12.92, ((wanted / 255 + 0.055) / 1.055) ** 2.4) @ TO_BT2020.T
    )
    luminance = 203 * light
    if transfer == 16:
        signal = pq(luminance)
    else:
        brightness = luminance @ np.array([0.2627, 0.6780, 0.0593])
        scale = np.power(np.maximum(brightness, 1e-9) / 1000, -1 / 6)[..., None]
        signal = hlg(luminance / 1000 * scale)
    samples = np.rint(signal * (2**bits - 1)).astype(int)
    data = png(samples, bits, 2, chunk(b"cICP", bytes([9, transfer, 0, 1])))
    # Pillow reads 8 bits of each sample.
    near(decode_image(data, LIMITS), wanted, 8)
    plain = png(samples, bits, 2)
    assert np.abs(np.asarray(decode_image(plain, LIMITS)).astype(int) - wanted).max() > 40
    near(
        decode_image(png(samples, bits, 2, chunk(b"cICP", bytes([1, 13, 0, 1]))), LIMITS),
        decode_image(plain, LIMITS),
        0,
    )


def test_highlights_are_white():
    samples = np.full((2, 2, 3), round(255 * pq(1000.0)))
    data = png(samples, 8, 2, chunk(b"cICP", bytes([9, 16, 0, 1])))
    near(decode_image(data, LIMITS), np.full((2, 2, 3), 255), 0)


@pytest.mark.parametrize(
    "inks", [(0, 0, 0, 0), (255, 0, 0, 0), (30, 200, 90, 0), (0, 0, 0, 128), (120, 10, 60, 40)]
)
def test_jpegs_of_ycck(inks):
    """Three inks as luminance and chrominance, as Photoshop writes them."""
    cyan, magenta, yellow, black = inks
    coded = Image.new("RGB", (1, 1), (cyan, magenta, yellow)).convert("YCbCr").getpixel((0, 0))
    stored = Image.new("CMYK", (16, 16), (*(255 - value for value in coded), black))
    data = bytearray(encoded(stored, "JPEG", quality=100))
    data[data.index(b"Adobe") + 11] = 2
    expected = Image.new("CMYK", (16, 16), inks).convert("RGB")
    near(decode_image(bytes(data), LIMITS), expected, 4)


def picture(size=(320, 240)):
    """A picture with details everywhere."""
    down, across = np.mgrid[0 : size[1], 0 : size[0]]
    waves = 40 * np.sin(across / 3) * np.cos(down / 4)
    layers = [across * 255 / size[0], down * 255 / size[1], 128 + waves]
    return Image.fromarray(np.stack(layers, -1).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("share", [0.6, 0.8, 0.97])
def test_a_cut_jpeg_shows_what_it_holds(mode, share):
    data = encoded(picture().convert(mode), "JPEG", quality=90, exif=exif(1))
    whole = np.asarray(decode_image(data, LIMITS))
    found = decode(data[: int(len(data) * share)], LIMITS, where=WHERE)
    lost = (np.asarray(found.image) != whole).any(axis=(1, 2))
    first = int(lost.argmax())
    assert 0.5 * len(lost) <= first < len(lost)
    assert found.note.startswith(f"The file ends too early; {1 - first / 240:.0%} of the image")
    assert decode(data, LIMITS).note == decode(data[:-2], LIMITS).note == ""


def test_a_cut_jpeg_is_turned_like_a_whole_one():
    data = encoded(picture(), "JPEG", quality=90, exif=exif(6))
    cut = data[: int(len(data) * 0.7)]
    whole, found = decode_image(data, LIMITS), decode(cut, LIMITS)
    assert found.image.size == whole.size == read_size(cut, LIMITS) == (240, 320)
    assert "of the image are missing" in found.note
    # The upper rows, which the file holds, are at the right.
    near(found.image.crop((140, 0, 240, 320)), whole.crop((140, 0, 240, 320)), 0)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_cut_progressive_jpeg_lacks_details(mode):
    data = encoded(picture().convert(mode), "JPEG", quality=90, progressive=True)
    whole = decode_image(data, LIMITS)
    found = decode(data[: int(len(data) * 0.97)], LIMITS)
    assert found.note == "The file ends too early; the image lacks its last details."
    near(found.image, whole, 60)
    with pytest.raises(MediaError):
        decode(data[: int(len(data) * 0.2)], LIMITS)


@pytest.mark.parametrize("share", [0.02, 0.2, 0.4])
def test_too_little_of_a_jpeg_is_damaged(share):
    data = encoded(picture(), "JPEG", quality=90)
    with pytest.raises(MediaError, match="damaged or incomplete") as error:
        decode(data[: int(len(data) * share)], LIMITS, where=WHERE)
    assert error.value.param == WHERE


def test_a_thumbnail_in_the_metadata_is_not_the_image():
    """A cut file whose EXIF holds a whole JPEG."""
    data, content = encoded(picture(), "JPEG", quality=90), b"Exif\0\0" + encoded(picture((16, 16)), "JPEG")
    data = data[:2] + b"\xff\xe1" + (len(content) + 2).to_bytes(2) + content + data[2:]
    assert decode(data[: int(len(data) * 0.8)], LIMITS).note
    with pytest.raises(MediaError):
        decode(data[: int(len(data) * 0.3)], LIMITS)


def frames_of(data, numbers):
    return [np.asarray(image).astype(int) for image in decode_frames(data, numbers, LIMITS, where=WHERE)]


def gif_frame(box, colour, disposal):
    """A frame of one colour of the palette, which covers ``box`` (left, top, width, height)."""
    left, top, width, height = box
    control = bytes([0x21, 0xF9, 4, disposal << 2, 0, 0, 0, 0])
    place = b"".join(value.to_bytes(2, "little") for value in (left, top, width, height))
    # Codes of 3 bits for 2 bits of colour: a clear code (4) before each pixel keeps them so.
    codes = [code for _ in range(width * height) for code in (4, colour)] + [5]
    number = sum(code << 3 * place for place, code in enumerate(codes))
    packed = number.to_bytes(-(-3 * len(codes) // 8), "little")
    blocks = b"".join(
        bytes([len(packed[i : i + 255])]) + packed[i : i + 255] for i in range(0, len(packed), 255)
    )
    return control + b"\x2c" + place + b"\0\2" + blocks + b"\0"


def test_frames_of_an_animation_are_what_is_on_the_screen():
    """Pixels of earlier frames stay, go away, or come back, as each frame says."""
    colours = [(10, 10, 10), (250, 0, 0), (0, 250, 0), (0, 0, 250)]
    head = (
        b"GIF89a"
        + (8).to_bytes(2, "little")
        + (6).to_bytes(2, "little")
        + b"\xf1\0\0"
        + bytes(sum(colours, ()))
    )
    keep, previous = 1, 3
    data = head + b"".join(
        [
            gif_frame((0, 0, 8, 6), 1, keep),
            gif_frame((0, 0, 4, 3), 2, previous),
            gif_frame((4, 3, 4, 3), 3, keep),
        ]
    )
    data += b"\x3b"
    assert count_frames(data, LIMITS, where=WHERE) == 3
    red = np.full((6, 8, 3), (250, 0, 0))
    second, third = red.copy(), red.copy()
    second[:3, :4], third[3:, 4:] = (0, 250, 0), (0, 0, 250)
    for numbers in ([0, 1, 2], [2, 0, 1], [1]):
        for found, number in zip(frames_of(data, numbers), numbers, strict=True):
            near(found, (red, second, third)[number], 0)


def pages(*made):
    """Pages of a TIFF, each of which was made as a file of its own."""
    file, last = bytearray(made[0]), 4
    for page in made[1:]:
        shift = len(file)
        file[last : last + 4] = file[last : last + 4]
        start = int.from_bytes(page[4:8], "little")
        file += page
        last = _link(file, int.from_bytes(file[4:8], "little"), shift + start)
        _moved(file, shift + start, shift)
    return bytes(file)


def _link(file, directory, target):
    """Write the place of the next directory behind the last one."""
    while True:
        count = int.from_bytes(file[directory : directory + 2], "little")
        place = directory + 2 + 12 * count
        following = int.from_bytes(file[place : place + 4], "little")
        if not following:
            file[place : place + 4] = target.to_bytes(4, "little")
            return place
        directory = following


def _moved(file, directory, shift):
    """Move the places that a directory names."""
    count = int.from_bytes(file[directory : directory + 2], "little")
    for place in range(directory + 2, directory + 2 + 12 * count, 12):
        tag, kind, number = (
            int.from_bytes(file[place + a : place + b], "little") for a, b in ((0, 2), (2, 4), (4, 8))
        )
        size = {3: 2, 4: 4}[kind] * number
        if tag == 273 or size > 4:
            moved = int.from_bytes(file[place + 8 : place + 12], "little") + shift
            file[place + 8 : place + 12] = moved.to_bytes(4, "little")


def test_pages_of_a_tiff_have_their_own_sizes_and_meanings():
    grey = np.arange(35).reshape(5, 7)
    made = [
        tiff(grey * 7, 8, 1),
        tiff(grey[:4] * 1800, 16, 0),
        tiff(grey[:3] * 1800, 16, 1),
        tiff(grey * 7, 8, 0, orientation=6),
    ]
    data = pages(*made)
    assert count_frames(data, LIMITS, where=WHERE) == 4
    numbers = [3, 1, 0, 2]
    expected = [decode_image(made[number], LIMITS) for number in numbers]
    assert frame_sizes(data, numbers, LIMITS, where=WHERE) == [image.size for image in expected]
    for found, image in zip(frames_of(data, numbers), expected, strict=True):
        near(found, image, 0)


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP"])
def test_frames_far_behind_are_bounded(form):
    frames = [Image.new("RGB", (1000, 900), colour) for colour in (RED, BLUE, WHITE, (0, 0, 0))]
    data = encoded(frames[0], form, save_all=True, append_images=frames[1:])
    assert frame_sizes(data, [2], LIMITS, where=WHERE) == [(1000, 900)]
    with pytest.raises(MediaTooLarge, match="3600000 pixels together") as error:
        frame_sizes(data, [3], LIMITS, where=WHERE)
    assert error.value.param == WHERE
