import pytest
from PIL import Image

from engine.errors import InvalidRequest, MediaTooLarge
from engine.inputs.messages import parse_messages
from engine.media.source import MediaSource, check_media_limits
from engine.prompt import MediaPart, Message, TextPart

PICTURE = Image.new("RGB", (2, 2))


def user(*parts):
    return [{"role": "user", "content": list(parts)}]


def url(address, **detail):
    return {"type": "image_url", "image_url": {"url": address, **detail}}


def test_texts_and_media_keep_their_order():
    messages, sources = parse_messages(
        [
            {"role": "system", "content": "be kind"},
            *user(
                url("http://a/1.png", detail="low"),
                {"type": "text", "text": "and"},
                {"type": "image_url", "image_url": "http://a/2.png"},
                {"type": "input_image", "image_url": "http://a/3.png", "detail": "original"},
                {"type": "input_text", "text": "then"},
                {"type": "image", "image": PICTURE},
                {"type": "image", "url": "http://a/4.png"},
                {"type": "image", "image": b"bytes"},
                {"type": "video", "video": [PICTURE, "http://a/5.png"]},
                "plain",
            ),
        ]
    )
    assert messages[0] == Message("system", [TextPart("be kind")])
    assert messages[1].parts == [
        MediaPart(0),
        TextPart("and"),
        MediaPart(1),
        MediaPart(2),
        TextPart("then"),
        MediaPart(3),
        MediaPart(4),
        MediaPart(5),
        MediaPart(6, "video"),
        TextPart("plain"),
    ]
    assert [s.index for s in sources] == list(range(7))
    assert [s.url for s in sources[:3]] == ["http://a/1.png", "http://a/2.png", "http://a/3.png"]
    assert [s.detail for s in sources[:3]] == ["low", "auto", "original"]
    assert sources[0].where == "messages[1].content[0].image_url.url"
    assert sources[3].image is PICTURE
    assert (sources[4].url, sources[5].data) == ("http://a/4.png", b"bytes")
    assert sources[6].kind == "video"
    assert sources[6].frames[1] == MediaSource(6, "messages[1].content[8].video[1]", url="http://a/5.png")


def test_tool_calls_keep_what_templates_print():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
    messages, _ = parse_messages(
        [
            {"role": "assistant", "content": None, "tool_calls": [call], "annotations": []},
            {"role": "tool", "content": "7", "tool_call_id": "c1"},
            {"role": "developer", "content": [{"type": "text", "text": "x"}], "name": "n"},
        ]
    )
    assert messages[0].parts == []
    assert messages[0].extra == {"tool_calls": [{**call, "function": {"name": "f", "arguments": {"a": [1]}}}]}
    assert messages[1].extra == {"tool_call_id": "c1"}
    assert messages[2].extra == {"name": "n"}


def test_function_calls_in_the_older_form_are_tool_calls():
    function = {"name": "f", "arguments": '{"a": [1]}'}
    older, _ = parse_messages(
        [
            {"role": "assistant", "content": None, "function_call": function},
            {"role": "function", "name": "f", "content": "7"},
        ]
    )
    newer, _ = parse_messages(
        [
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "function0", "type": "function", "function": function}],
            },
            {"role": "tool", "name": "f", "tool_call_id": "function0", "content": "7"},
        ]
    )
    assert older == newer


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        ([], "messages"),
        (None, "messages"),
        ("hello", "messages"),
        ([{"role": "user", "content": "x"}] * 5000, "messages"),
        ([7], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "root", "content": "x"}], "messages[0].role"),
        ([{"role": ["user"], "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "assistant"}], "messages[0].content"),
        ([{"role": "user", "content": {"type": "text"}}], "messages[0].content"),
        ([{"role": "user", "content": "x", "name": 1}], "messages[0].name"),
        (user({"type": "text", "text": "a"}, {"type": "text"}), "messages[0].content[1].text"),
        (user({"texts": "a"}), "messages[0].content[0].type"),
        # Whatever is taken, the other one would be lost.
        (user({"text": "a", "image_url": "http://a"}), "messages[0].content[0].type"),
        (user({"image_url": "http://a", "document": "http://a"}), "messages[0].content[0].type"),
        (user({"text": None}), "messages[0].content[0].text"),
        (user({"text": 7}), "messages[0].content[0].text"),
        (user({"type": ["text"]}), "messages[0].content[0].type"),
        (user(None), "messages[0].content[0].type"),
        (user({"type": "audio"}), "messages[0].content[0].type"),
        (user({"type": "image_url"}), "messages[0].content[0].image_url"),
        (user({"type": "image_url", "image_url": {"url": 1}}), "messages[0].content[0].image_url.url"),
        (user(url("")), "messages[0].content[0].image_url.url"),
        (
            user({"type": "image", "source": {"type": "url", "url": "http://a"}}),
            "messages[0].content[0].source",
        ),
        (user({"type": "input_image", "file_id": "f"}), "messages[0].content[0].file_id"),
        (user({"type": "file", "file": {"file_id": "f"}}), "messages[0].content[0].file.file_id"),
        (user({"type": "file", "file": {"filename": 1}}), "messages[0].content[0].file.filename"),
        ([{"role": "assistant", "content": "a", "audio": {"id": "x"}}], "messages[0].audio"),
        ([{"role": "assistant", "content": "a", "refusal": 1}], "messages[0].refusal"),
        (user(url("http://a", detail="most")), "messages[0].content[0].image_url.detail"),
        (user(url("http://a", detail=["low"])), "messages[0].content[0].image_url.detail"),
        (
            user({"type": "input_image", "image_url": "http://a", "detail": "most"}),
            "messages[0].content[0].detail",
        ),
        (user({"type": "video", "video": []}), "messages[0].content[0].video"),
        (user({"type": "video", "video": ""}), "messages[0].content[0].video"),
        (user({"type": "video", "video": [1]}), "messages[0].content[0].video[0]"),
        (user(*["x"] * 5000), "messages[0].content"),
        ([{"role": "system", "content": [url("http://a")]}], "messages[0].content[0]"),
        ([{"role": "assistant", "content": "", "tool_calls": [{}]}], "messages[0].tool_calls[0].function"),
        ([{"role": "assistant", "content": "", "tool_calls": [7]}], "messages[0].tool_calls[0]"),
        ([{"role": "assistant", "function_call": "f"}], "messages[0].function_call"),
        (
            [{"role": "assistant", "function_call": {"name": "f", "arguments": [1]}}],
            "messages[0].function_call.arguments",
        ),
        (
            [
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [{"function": {"name": "f", "arguments": ["a"]}}],
                }
            ],
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_faults_are_named(raw, param):
    with pytest.raises(InvalidRequest) as caught:
        parse_messages(raw)
    assert caught.value.param == param
    assert caught.value.status == 400


def test_limits_are_checked_before_anything_is_fetched():
    _, sources = parse_messages(user(*[url("http://a")] * 3, {"type": "video", "video": [PICTURE] * 4}))
    check_media_limits(sources, {"image": 3, "video": 1}, max_frames=4)
    with pytest.raises(MediaTooLarge, match="3 images, but limit_mm_per_prompt allows 2") as caught:
        check_media_limits(sources, {"image": 2})
    assert caught.value.param == "messages[0].content[2].image_url.url"
    with pytest.raises(MediaTooLarge, match="1 videos"):
        check_media_limits(sources, {"video": 0})
    with pytest.raises(MediaTooLarge, match="4 video frames"):
        check_media_limits(sources, {}, max_frames=3)


@pytest.mark.parametrize("arguments", ["[", '{"a": ', "plain", "[1]", r'{"a": "\ud83d"}'])
def test_arguments_that_a_model_has_broken_off_stay_text(arguments):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    (message,), _ = parse_messages([{"role": "assistant", "content": None, "tool_calls": [call]}])
    assert message.extra["tool_calls"][0]["function"]["arguments"] == arguments


def test_a_part_without_a_type_is_what_its_field_says():
    """vLLM's server takes such parts."""
    url = "https://example.com/a"
    parts = [
        {"text": "x"},
        {"image_url": {"url": url}},
        {"image_url": url, "uuid": "u", "text": None, "image": None},
        {"video_url": url, "image_url": None},
        # These name a kept image, and ask for a document's texts.
        {"image_url": None, "uuid": "u", "text": None},
        {"document_url": url, "text": True},
    ]
    typed = [{"type": next(iter(part)), **part} for part in parts]
    found, wanted = (parse_messages([{"role": "user", "content": each}]) for each in (parts, typed))
    assert found == wanted
    assert [source.kind for source in found[1]] == ["image", "image", "video", "image", "document"]


def test_a_thought_is_taken_under_both_of_its_names():
    def kept(**fields) -> dict:
        messages, _ = parse_messages([{"role": "assistant", "content": "a", **fields}])
        return messages[0].extra

    assert kept(reasoning="x") == kept(reasoning_content="x") == {"reasoning_content": "x"}
    assert kept(reasoning="x", reasoning_content="y") == {"reasoning_content": "y"}
    assert kept(reasoning=None) == kept(reasoning="") == {}
    with pytest.raises(InvalidRequest) as refused:
        kept(reasoning=1)
    assert refused.value.param == "messages[0].reasoning"
