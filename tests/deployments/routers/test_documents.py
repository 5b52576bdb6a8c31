"""Documents and image files with several frames over HTTP: each page is an image."""

import base64
import io

import openai
import pypdfium2
import pytest
from PIL import Image

from tests.deployments.pictures import circle, data_url, square
from tests.engine.media.pdfs import page, pdf

pytestmark = pytest.mark.usefixtures("idle_afterwards")

#: Colours of the pages, and a document of them.
SHADES = [(0.86, 0.1, 0.1), (0.1, 0.2, 0.86), (0.1, 0.6, 0.2)]
PDF = pdf([page(f"page {number}", shade) for number, shade in enumerate(SHADES, 1)])
DPI = 60


def rendered(data: bytes = PDF, dpi: float = DPI) -> list[Image.Image]:
    """The pages as pypdfium2 renders them."""
    with pypdfium2.PdfDocument(data) as document:
        return [document[i].render(scale=dpi / 72).to_pil().convert("RGB") for i in range(len(document))]


def url(data: bytes = PDF, kind: str = "application/pdf") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def images(*given: Image.Image) -> list[dict]:
    return [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in given]


def animation(*frames: Image.Image) -> bytes:
    file = io.BytesIO()
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:])
    return file.getvalue()


async def answered(client, *parts: dict, **options):
    content = [*parts, {"type": "text", "text": "What color is it?"}]
    return await client.chat.completions.create(
        model="pocket",
        messages=[{"role": "user", "content": content}],
        temperature=0,
        max_tokens=8,
        logprobs=True,
        extra_body={"include_timings": True, "return_token_ids": True, **options},
    )


def same(answer, other) -> bool:
    """Return whether two answers were given to the same images in the same places."""
    choices = answer.choices[0], other.choices[0]
    found, expected = ([entry.logprob for entry in choice.logprobs.content] for choice in choices)
    return (
        choices[0].message.content == choices[1].message.content
        and answer.prompt_token_ids == other.prompt_token_ids
        and found == pytest.approx(expected, abs=1e-3)
    )


def document_parts(address: str) -> list[dict]:
    """The ways in which clients send a PDF."""
    return [
        {"type": "file", "file": {"file_data": address, "filename": "a.pdf", "dpi": DPI}},
        {"type": "file", "file": {"file_url": address}, "dpi": DPI},
        {"type": "input_file", "file_url": address, "dpi": DPI},
        {"type": "document_url", "document_url": {"url": address, "dpi": DPI}},
        {"type": "document_url", "document_url": address, "dpi": DPI},
        {"type": "document", "document": address, "dpi": DPI},
    ]


async def test_every_way_of_sending_a_document_shows_its_pages_as_pypdfium2_renders_them(client, running):
    (running.pictures / "a.pdf").write_bytes(PDF)
    expected = await answered(client, *images(*rendered()))
    ways = [*document_parts(url()), *document_parts(f"{running.site}/a.pdf")[1:]]
    ways.append(
        {"type": "file", "file": {"file_data": url().partition(",")[2], "filename": "A.PDF", "dpi": DPI}}
    )
    for part in ways:
        found = await answered(client, part)
        assert same(found, expected), part
        # Equal pixels have equal keys.
        assert [item["cached"] for item in found.usage.media] == [True] * 3
    other = await answered(client, *images(*reversed(rendered())))
    assert not same(other, expected)


async def test_documents_stand_between_images_where_their_parts_stand(client):
    red, blue = images(circle("red", (90, 70))), images(square("blue", (60, 80)))
    part = {"type": "file", "file": {"file_data": url(), "dpi": DPI}}
    text = {"type": "text", "text": "and"}
    found = await answered(client, *red, text, part, text, *blue, part)
    pages = images(*rendered())
    assert same(found, await answered(client, *red, text, *pages, text, *blue, *pages))
    sizes = [(item["width"], item["height"]) for item in found.usage.media]
    size = rendered()[0].size
    assert sizes == [(90, 70), size, size, size, (60, 80), size, size, size]


async def test_tenants_share_no_prepared_pages(client, running):
    """Nor images beside them."""
    parts = [{"type": "file", "file": {"file_data": url(), "dpi": 37}}, *images(square("blue", (61, 83)))]
    prepared = running.pocket.preprocessor._items

    async def hits(salt: str) -> int:
        before = prepared.metrics()["cache_hits"]
        await answered(client, *parts, cache_salt=salt)
        return prepared.metrics()["cache_hits"] - before

    assert [await hits(salt) for salt in ("one", "two", "one")] == [0, 0, len(SHADES) + 1]


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"pages": "2"}, [1]),
        ({"pages": "3,1-2"}, [2, 0, 1]),
        ({"pages": "2-"}, [1, 2]),
        ({"pages": " 2 - 9 "}, [1, 2]),
        ({"pages": [1, 3]}, [0, 2]),
        ({"pages": 3}, [2]),
        ({"pages": "all", "max_pages": 2}, [0, 1]),
    ],
)
async def test_pages_are_chosen_in_the_part_or_for_the_request(client, options, wanted):
    expected = await answered(client, *images(*(rendered()[number] for number in wanted)))
    part = {"type": "file", "file": {"file_data": url(), "dpi": DPI, **options}}
    assert same(await answered(client, part), expected)
    plain = {"type": "file", "file": {"file_data": url()}}
    reading = {"document": {"dpi": DPI, **options}}
    assert same(await answered(client, plain, media_io_kwargs=reading), expected)


async def test_the_text_of_pages_follows_their_images(client):
    part = {"type": "file", "file": {"file_data": url(), "dpi": DPI, "text": True, "pages": "1-2"}}
    first, second, _ = images(*rendered())
    texts = [{"type": "text", "text": f"page {number}"} for number in (1, 2)]
    expected = await answered(client, first, texts[0], second, texts[1])
    assert same(await answered(client, part), expected)


async def test_a_document_is_kept_under_its_uuid(client):
    part = {"type": "document_url", "document_url": url(), "uuid": "a-document", "dpi": DPI}
    first = await answered(client, part)
    named = {"type": "document_url", "uuid": "a-document", "dpi": DPI}
    assert same(await answered(client, named), first)
    second = await answered(client, *images(rendered()[1]))
    assert same(await answered(client, named | {"pages": "2"}), second)
    with pytest.raises(openai.APIStatusError) as error:
        await answered(client, named | {"uuid": "another-document"})
    assert (error.value.status_code, error.value.param) == (404, "messages[0].content[0].uuid")


@pytest.mark.parametrize("form", ["TIFF", "PNG", "WEBP", "GIF"])
async def test_frames_of_an_image_are_shown_on_request_only(client, form):
    frames = [circle("red", (80, 60)), circle("blue", (80, 60)), square("green", (80, 60))]
    file = io.BytesIO()
    options = {"lossless": True} if form == "WEBP" else {}
    frames[0].save(file, form, save_all=True, append_images=frames[1:], **options)
    with Image.open(file) as opened:
        exact = []
        for number in range(3):
            opened.seek(number)
            exact.append(opened.convert("RGB"))
    address = url(file.getvalue(), f"image/{form.lower()}")
    image = {"type": "image_url", "image_url": {"url": address}}
    assert same(await answered(client, image), await answered(client, *images(exact[0])))
    chosen = {"type": "image_url", "image_url": {"url": address, "pages": "2-3"}}
    expected = await answered(client, *images(*exact[1:]))
    assert same(await answered(client, chosen), expected)
    assert same(await answered(client, image, media_io_kwargs={"image": {"pages": [2, 3]}}), expected)
    filed = {"type": "file", "file": {"file_data": address, "pages": "2-3"}}
    assert same(await answered(client, filed), expected)


FAULTS = {
    "no PDF": (b"hello", {}, 400, "file.file_data", "no PDF"),
    "empty": (b"", {}, 400, "file.file_data", "no PDF"),
    "cut": (PDF[:150], {}, 400, "file.file_data", "no PDF, or is damaged"),
    "encrypted": (pdf([page()], key=b"secret"), {}, 400, "file.file_data", "encrypted"),
    "no pages": (pdf([]), {}, 400, "file.file_data", "has no pages"),
    "a giant page": (pdf([page(size=(14400, 14400))]), {}, 413, "file.file_data", "28800 x 28800"),
    "a giant resolution": (PDF, {"dpi": 601}, 400, "file.file_data", "dpi may be at most 600"),
    "no such page": (PDF, {"pages": "4"}, 400, "file.file_data", "has 3 pages"),
    "page 0": (PDF, {"pages": "0-2"}, 400, "file.pages", "counted from 1"),
    "a long gap": (PDF, {"pages": f"1-{' ' * 500_000}x"}, 400, "file.pages", "counted from 1"),
    "backwards": (PDF, {"pages": "3-2"}, 400, "file.pages", "counted from 1"),
    "no pages asked for": (PDF, {"pages": []}, 400, "file.pages", "counted from 1"),
    "a bool for a page": (PDF, {"pages": [True]}, 400, "file.pages", "counted from 1"),
    "no count": (PDF, {"max_pages": 0}, 400, "file.max_pages", "integer from 1"),
    "no resolution": (PDF, {"dpi": "high"}, 400, "file.dpi", "above 0"),
    "no text": (PDF, {"text": "yes"}, 400, "file.text", "true or false"),
    "many pages": (pdf([page()] * 9), {"dpi": 20}, 413, "file.file_data", "9 images, pages included"),
    "very many pages": (pdf([page()] * 101), {}, 413, "file.file_data", "101 pages; 100 are allowed"),
}


@pytest.mark.parametrize("case", FAULTS)
async def test_faults_name_the_field_and_say_what_to_change(client, case):
    data, options, status, field, says = FAULTS[case]
    part = {"type": "file", "file": {"file_data": url(data), **options}}
    with pytest.raises(openai.APIStatusError, match=says) as error:
        await answered(client, part)
    assert error.value.status_code == status
    assert error.value.param == f"messages[0].content[0].{field}"


async def test_the_responses_api_takes_files(http):
    async def text(*parts: dict) -> tuple[str, int]:
        content = [*parts, {"type": "input_text", "text": "What color is it?"}]
        body = {"model": "pocket", "input": [{"role": "user", "content": content}], "temperature": 0}
        response = await http.post("/v1/responses", json=body | {"max_output_tokens": 12})
        assert response.status_code == 200, response.text
        usage = response.json()["usage"]
        return response.json()["output"][0]["content"][0]["text"], usage["input_tokens"]

    expected = await text({"type": "input_image", "image_url": data_url(rendered()[1])})
    part = {"type": "input_file", "filename": "a.pdf", "file_data": url(), "pages": "2", "dpi": DPI}
    assert await text(part) == expected


async def test_the_messages_api_takes_documents(http):
    async def message(*blocks: dict) -> dict:
        content = [*blocks, {"type": "text", "text": "What color is it?"}]
        body = {"model": "pocket", "max_tokens": 12, "temperature": 0}
        response = await http.post(
            "/v1/messages", json=body | {"messages": [{"role": "user", "content": content}]}
        )
        return response.json()

    picture = {"type": "base64", "media_type": "image/png", "data": data_url(rendered()[2]).partition(",")[2]}
    expected = await message({"type": "image", "source": picture})
    source = {"type": "base64", "media_type": "application/pdf", "data": url().partition(",")[2]}
    found = await message({"type": "document", "source": source, "pages": "3", "dpi": DPI})
    assert found["content"] == expected["content"]
    tokens = [
        sum(each["usage"][name] for name in ("input_tokens", "cache_read_input_tokens"))
        for each in (found, expected)
    ]
    assert tokens[0] == tokens[1]
    broken = await message({"type": "document", "source": {**source, "data": "AAAA"}})
    assert broken["error"]["type"] == "invalid_request_error"
    assert "messages[0].content[0].source" in broken["error"]["message"]
