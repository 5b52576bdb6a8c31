"""Documents: pages as pypdfium2 renders them, their texts, and what a hostile file can do."""

import os
import signal

import numpy as np
import pypdfium2
import pytest

from engine.errors import ContextLengthExceeded, InvalidRequest, MediaError, MediaTooLarge
from engine.media.decode import ImageLimits
from engine.media.documents.limits import DocumentLimits
from engine.media.documents.pages import PageOptions
from engine.media.documents.reader import DocumentReader
from engine.media.source import MediaSource
from engine.preparation import MediaPreparation
from tests.engine.families.opened import media_processor
from tests.engine.families.qwen import make_qwen2_5_vl
from tests.engine.media.pdfs import page, pdf

WHERE = "messages[0].content[0].file.file_data"
LONG = DocumentLimits(seconds=120)

#: A form whose field somebody has filled in; it is shown by its appearance stream.
FIELD = (
    b"<< /Type /Annot /Subtype /Widget /FT /Tx /T (name) /V (x) /Rect [20 20 120 60] /P 4 0 R /F 4 "
    b"/AP << /N 7 0 R >> >>"
)
APPEARANCE = b"0 0 1 rg 0 0 100 40 re f"
FORM = pdf(
    [(b"/MediaBox [0 0 200 100] /Annots [6 0 R]", b"")],
    extra=b"/AcroForm << /Fields [6 0 R] >>",
    objects=[
        FIELD,
        b"<< /Type /XObject /Subtype /Form /BBox [0 0 100 40] /Length %d >>\nstream\n" % len(APPEARANCE)
        + APPEARANCE
        + b"\nendstream",
    ],
)

DOCUMENTS = {
    "texts and colours": pdf([page("Hello", (1, 0.5, 0.5)), page("Two", (0, 1, 0), (300, 150.5))]),
    "rotated": pdf(
        [(b"/MediaBox [0 0 200 100] /Rotate %d" % turn, page("up")[1]) for turn in (90, 180, 270)]
    ),
    "cropped": pdf([(b"/MediaBox [0 0 200 100] /CropBox [10 20 110 90]", page("cut")[1])]),
    "odd boxes": pdf([(b"/MediaBox [100 100 0 0]", b""), (b"", b""), (b"/MediaBox [0 0 0 0]", b"")]),
    "units": pdf([(b"/MediaBox [0 0 200 100] /UserUnit 2", page("big")[1])]),
    "filled form": FORM,
    "no password needed": pdf([page("open", (0, 0, 1))], key=b""),
}


@pytest.fixture(scope="module")
def reader():
    reader = DocumentReader(LONG, processes=2)
    yield reader
    reader.close()


@pytest.mark.parametrize("dpi", [20, 72, 131.5])
@pytest.mark.parametrize("name", DOCUMENTS)
def test_pages_and_texts_are_those_of_pypdfium2(reader, name, dpi):
    data = DOCUMENTS[name]
    reference = pypdfium2.PdfDocument(data)
    reference.init_forms()
    with reader.open(data, WHERE) as document:
        assert document.count == len(reference)
        sizes = document.sizes(range(document.count), dpi)
        for number in range(document.count):
            theirs = reference[number].render(scale=dpi / 72).to_pil().convert("RGB")
            found = document.render(number, dpi)
            assert (np.asarray(found) == np.asarray(theirs)).all()
            assert found.size == sizes[number]
            text = reference[number].get_textpage().get_text_bounded()
            assert document.text(number) == text.replace("\r\n", "\n")
    reference.close()


def test_what_is_filled_into_a_form_is_shown(reader):
    with reader.open(FORM, WHERE) as document:
        assert document.render(0, 72).getpixel((70, 60)) == (0, 0, 255)


def test_texts_are_read_in_lines(reader):
    lines = b"BT /F 12 Tf 20 60 Td (first line) Tj 0 -20 Td (second line) Tj ET"
    # PDFium writes U+0002 for the hyphen and the end of its line.
    cut = b"BT /F 12 Tf 20 60 Td (a well-) Tj 0 -20 Td (known page of 2019-) Tj 0 -20 Td (2020) Tj ET"
    # The font gives letter 2 no meaning.
    unknown = rb"BT /F 12 Tf 20 60 Td (a\002b well-) Tj 0 -20 Td (known) Tj ET"
    box = b"/MediaBox [0 0 200 100]"
    with reader.open(pdf([(box, lines), page(), (box, cut), (box, unknown)]), WHERE) as document:
        assert document.text(0) == "first line\nsecond line"
        assert document.text(1) == ""
        assert document.text(2) == "a well-\nknown page of 2019-\n2020"
        assert document.text(3) == "a\x02b well-\nknown"


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "it is no PDF"),
        (b"hello", "it is no PDF"),
        (pdf([page("x")])[:200], "it is no PDF, or is damaged"),
        (pdf([page("x")], key=b"secret"), "it is encrypted"),
        (pdf([]), "it has no pages"),
    ],
)
def test_files_that_cannot_be_read_say_why(reader, data, why):
    # The fault of the file before doesn't stick to this one.
    for before in (data, pdf([page("x")], key=b"secret")):
        with pytest.raises(MediaError), reader.open(before, WHERE):
            pass
    with pytest.raises(MediaError, match=why) as error, reader.open(data, WHERE):
        pass
    assert error.value.param == WHERE and error.value.message.startswith(WHERE)


def test_a_process_that_dies_or_hangs_is_replaced(reader):
    data = DOCUMENTS["rotated"]
    with pytest.raises(MediaError, match="more memory than allowed"), reader.open(data, WHERE) as document:
        os.kill(document.process_id, signal.SIGKILL)
        document.render(0, 72)
    slow = DocumentReader(DocumentLimits(seconds=0.5), processes=1)
    with pytest.raises(MediaError, match=r"0\.5 seconds"), slow.open(data, WHERE) as document:
        os.kill(document.process_id, signal.SIGSTOP)
        document.render(0, 72)
    slow.close()
    with reader.open(data, WHERE) as document:
        assert document.render(0, 72).size == (100, 200)


def test_a_page_that_takes_too_much_memory_is_refused(reader):
    giant = pdf([page(size=(14400, 14400))])
    with (
        pytest.raises(MediaError, match="fewer pages, or a lower dpi"),
        reader.open(giant, WHERE) as document,
    ):
        document.render(0, 300)


@pytest.fixture(scope="module")
def preparation(tmp_path_factory):
    path = make_qwen2_5_vl(tmp_path_factory.mktemp("model"))
    images = ImageLimits(max_pixels=40_000, max_total_pixels=60_000)
    made = MediaPreparation(media_processor(path), images, documents=LONG, max_tokens=120, readers=1)
    yield made
    made.close()


def source(**asked) -> MediaSource:
    return MediaSource(0, WHERE, "document", pages=PageOptions(**asked))


@pytest.mark.parametrize(
    ("data", "asked", "error", "why"),
    [
        (
            pdf([page()] * 3),
            {"ranges": ((4, 4),)},
            InvalidRequest,
            "there is no page 4; the file has 3 pages",
        ),
        (pdf([page()] * 101), {}, MediaTooLarge, "the file has 101 pages; 100 are allowed"),
        (pdf([page()] * 101), {"max_pages": 101}, MediaTooLarge, "100 are allowed"),
        (pdf([page(), page(size=(500, 100))]), {"dpi": 72.0}, MediaTooLarge, "It has 500 x 100"),
        (pdf([page()]), {"dpi": 700.0}, InvalidRequest, "at most 600"),
    ],
)
def test_budgets_are_checked_before_anything_is_rendered(preparation, data, asked, error, why):
    with pytest.raises(error, match=why) as found:
        preparation.open(source(**asked), data)
    assert found.value.param == WHERE


def test_all_pages_share_the_pixels_and_the_context(preparation):
    def check(count: int, dpi: float) -> int:
        pages = preparation.open(source(dpi=dpi), pdf([page()] * count)).sources
        return preparation.check_pages(preparation.for_prompt(pages), pages)

    assert check(2, 72) == 40_000
    with pytest.raises(MediaTooLarge, match="80000 pixels together"):
        check(4, 72)
    with pytest.raises(ContextLengthExceeded):
        check(100, 12)


def test_many_pages_are_never_listed():
    chosen = PageOptions(((1, None),), max_pages=5).choose(1 << 40, 100, WHERE)
    assert chosen == [0, 1, 2, 3, 4]


def test_long_texts_are_bounded(tmp_path):
    path = make_qwen2_5_vl(tmp_path)
    made = MediaPreparation(
        media_processor(path), documents=DocumentLimits(seconds=120, max_text=10), readers=1
    )
    try:
        assert made.open(source(text=True), pdf([page("short")])).texts == ("short",)
        with pytest.raises(MediaTooLarge, match="more than 10 characters"):
            made.open(source(text=True), pdf([page("shorter")] * 2))
    finally:
        made.close()
