"""Prompts given as token ids, media expanded, as placeholder tokens, or both."""

import random

import pytest

from engine.errors import InvalidRequest
from engine.families.base import PromptFormat
from engine.inputs.builder import PromptBuilder
from engine.prompt import MediaItem, PlaceholderRun
from engine.text.tokenizer import Tokenizer
from tests.engine.tokenizers import KINDS

TOKENIZER = Tokenizer(KINDS["byte_level"][0](), KINDS["byte_level"][1])
PAD, VIDEO, START = (
    TOKENIZER.token_id(text) for text in ("<|image_pad|>", "<|vision_end|>", "<|vision_start|>")
)


def builder(expand=None, image="<|image_pad|>", **form):
    return PromptBuilder(TOKENIZER, None, PromptFormat(image=image, video="<|vision_end|>", **form), expand)


def item(rows, name="a", kind="image"):
    token = PAD if kind == "image" else VIDEO
    return MediaItem(kind, name, rows, (1, 2, rows * 2), (8, 8), (PlaceholderRun(token, rows, True),))


def places(built):
    return [(span.item.hash, span.offset, span.length) for span in built.spans]


def test_placeholder_tokens_and_expanded_placeholders_give_the_same_prompt():
    items = [item(2, "a"), item(3, "b")]
    marked = builder().from_token_ids([7, PAD, 8, PAD], items)
    whole = builder().from_token_ids([7, PAD, PAD, 8, PAD, PAD, PAD], items)
    assert marked == whole
    assert [span.offset for span in whole.spans] == [1, 4]
    assert builder().from_token_ids([1, 2, 3]).token_ids == [1, 2, 3]


@pytest.mark.parametrize(
    "ids",
    [
        [7, PAD, PAD, 8, PAD, PAD],
        [PAD, 8, PAD, PAD, PAD, 1, PAD],
        [PAD, 8, PAD, 9, PAD],
        [PAD, PAD, PAD, 8, PAD, PAD],
        [7, *[PAD] * 4],
        [1, 2, 3],
    ],
)
def test_items_without_a_place_are_refused(ids):
    with pytest.raises(InvalidRequest) as caught:
        builder().from_token_ids(ids, [item(2, "a"), item(3, "b")])
    assert caught.value.param == "prompt_token_ids"


def test_an_item_without_any_placeholder_token_is_refused():
    """The expanded placeholder of the other one doesn't hold it."""
    runs = tuple(PlaceholderRun(token, 1, token == 8) for token in (START, 8))
    with pytest.raises(InvalidRequest, match="is 1, but"):
        builder(lambda item, index: runs).from_token_ids([7, START, 8, 9], [item(1, "a"), item(1, "b")])


def test_touching_images_of_one_row_are_told_apart():
    items = [item(1, "a"), item(1, "b")]
    assert places(builder().from_token_ids([PAD, PAD], items)) == [("a", 0, 1), ("b", 1, 1)]


def test_touching_placeholder_tokens_are_images_of_their_own():
    items = [item(2, "a"), item(2, "b")]
    assert places(builder().from_token_ids([PAD, PAD], items)) == [("a", 0, 2), ("b", 2, 2)]


@pytest.mark.parametrize("answer", [[PAD], [PAD, PAD], [9, PAD, PAD, PAD, 9, PAD]])
def test_placeholder_tokens_of_an_answer_are_ordinary_tokens(answer):
    items = [item(2, "a"), item(3, "b")]
    ids = [7, PAD, PAD, 8, PAD, PAD, PAD, *answer]
    built = builder().from_token_ids(ids, items)
    assert built.token_ids == ids
    assert places(built) == [("a", 1, 2), ("b", 4, 3)]
    assert builder().from_token_ids([1, *answer]).token_ids == [1, *answer]


def test_a_new_turn_may_add_media_as_placeholder_tokens():
    items = [item(2, "a"), item(3, "b"), item(9, "c")]
    built = builder().from_token_ids([7, PAD, PAD, 8, PAD, 9, PAD], items)
    assert places(built) == [("a", 1, 2), ("b", 4, 3), ("c", 8, 9)]
    assert built.token_ids == [7, PAD, PAD, 8, *[PAD] * 3, 9, *[PAD] * 9]
    # The answer to the first turn held placeholder tokens, one alone and several in a row.
    spoken = [7, PAD, PAD, PAD, PAD, PAD, 5, PAD, 6, PAD, PAD, PAD, 8, PAD, 9]
    built = builder().from_token_ids(spoken, items)
    assert places(built) == [("a", 1, 2), ("b", 3, 3), ("c", 13, 9)]


def test_images_and_videos_may_stand_in_any_order():
    items = [item(2, "a"), item(3, "b"), item(2, "v", "video")]
    ids = [VIDEO, VIDEO, 1, PAD, PAD, 2, PAD, PAD, PAD]
    built = builder().from_token_ids(ids, items)
    assert built.token_ids == ids
    assert places(built) == [("v", 0, 2), ("a", 3, 2), ("b", 6, 3)]
    mixed = builder().from_token_ids([VIDEO, 1, PAD, PAD, 2, PAD], items)
    assert mixed == built


def test_numbered_placeholders_may_stand_in_any_order():
    build = builder(image="<|image_{index}|>", split_at_media=True).from_token_ids
    items = [item(2, "a"), item(4, "b"), item(3, "c")]
    ids = [*[PAD] * 4, 1, *[PAD] * 3, 2, *[PAD] * 2, 3]
    assert places(build(ids, items)) == [("b", 0, 4), ("c", 5, 3), ("a", 9, 2)]
    assert places(build([*ids, PAD, PAD], items)) == [("b", 0, 4), ("c", 5, 3), ("a", 9, 2)]
    with pytest.raises(InvalidRequest):
        build(ids[:8], items)


def test_placeholders_with_text_around_their_rows_are_found():
    """One item is several runs of rows with tokens between them, as in Idefics3."""

    def expand(media, index):
        rows = PlaceholderRun(PAD, media.num_tokens, True)
        return (PlaceholderRun(START, 1, False), rows, PlaceholderRun(40 + index, 1, False))

    items = [item(1, "a"), item(2, "b")]
    build = builder(expand).from_token_ids
    ids = [START, PAD, 40, 7, START, PAD, PAD, 41]
    assert build(ids, items).token_ids == ids
    # One row: the whole placeholder has one placeholder token, which must not be expanded again.
    assert build(ids[:3], items[:1]).token_ids == ids[:3]
    assert build([PAD, 7, PAD], items).token_ids == ids


@pytest.mark.parametrize("seed", range(40))
def test_own_ids_given_back_are_the_same_prompt(seed):
    """The ids of a prompt and its answer, given back with the same media, are not changed."""
    draw = random.Random(seed)
    media, ids, counts = [], [], {"image": 0, "video": 0}
    for _ in range(draw.randint(0, 5)):
        kind = draw.choice(("image", "image", "video"))
        counts[kind] += 1
        media.append(item(draw.randint(2, 6), f"{kind}{counts[kind]}", kind))
        ids += [draw.randint(1, 50), PAD if kind == "image" else VIDEO, draw.randint(1, 50)]
    items = sorted(media, key=lambda one: one.kind)
    first = builder().from_token_ids(ids or [1], items)
    answer = [draw.choice((PAD, VIDEO, 60, 61, 62)) for _ in range(draw.randint(0, 8))]
    again = builder().from_token_ids([*first.token_ids, 59, *answer], items)
    assert again.token_ids == [*first.token_ids, 59, *answer]
    assert places(again) == places(first)
    if "image1" not in {span.item.hash for span in first.spans}:
        return
    later = builder().from_token_ids([*again.token_ids, 63, PAD, 64], [*items, item(9, "new")])
    assert later.token_ids == [*again.token_ids, 63, *[PAD] * 9, 64]
    assert later.spans[-1].item.hash == "new"


FRAME = (PlaceholderRun(START, 1, False), PlaceholderRun(PAD, 2, True))


def frames(item, index):
    """An image, or each frame of a video, as a start and two rows."""
    return FRAME * (item.num_tokens // 2)


@pytest.mark.parametrize("video_first", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_a_video_whose_frames_read_as_images_is_told_by_the_text_before_it(count, video_first):
    made = builder(frames, video_prefix="Frame1: ")
    image, video = item(2, "image"), item(2 * count, "video", "video")
    whole, rows = made.from_text("<|vision_end|>", [video]).token_ids, [START, PAD, PAD]
    parts = [whole, rows] if video_first else [rows, whole]
    built = made.from_token_ids([7, *parts[0], 8, *parts[1]], [image, video])
    before = len(whole) - 3 * count
    found = [("video", 1 + before, 3 * count), ("image", 2 + len(whole), 3)]
    if not video_first:
        found = [("image", 1, 3), ("video", 5 + before, 3 * count)]
    assert places(built) == found


def test_a_video_without_the_text_before_it_is_found_too():
    made = builder(frames, video_prefix="Frame1: ")
    ids = [7, *[START, PAD, PAD] * 2, 8, START, PAD, PAD]
    assert places(made.from_token_ids(ids, [item(2, "image"), item(4, "video", "video")])) == [
        ("video", 1, 6),
        ("image", 8, 3),
    ]


@pytest.mark.parametrize("seed", range(40))
def test_a_placeholder_is_found_where_it_first_stands(seed):
    draw = random.Random(seed)
    pattern = [START, *(draw.choice((START, PAD)) for _ in range(draw.randint(1, 6))), PAD]
    runs = tuple(PlaceholderRun(token, 1, token == PAD) for token in pattern)
    ids = [draw.choice((START, START, PAD)) for _ in range(60)] + [1, *pattern]
    first = next(place for place in range(len(ids)) if ids[place : place + len(pattern)] == pattern)
    built = builder(lambda item, index: runs).from_token_ids(ids, [item(2, "a")])
    assert places(built) == [("a", first, len(pattern))]


@pytest.mark.timeout(20)
def test_many_placeholder_tokens_take_linear_time():
    """Square time would be minutes."""
    ids = [*([PAD] * 10_000 + [7]) * 40, *[PAD] * 10_001]
    assert places(builder().from_token_ids(ids, [item(10_001, "a")])) == [("a", 400_040, 10_001)]
    many = [item(1, f"{index}", kind) for kind in ("image", "video") for index in range(30_000)]
    assert len(builder().from_token_ids([PAD, VIDEO] * 30_000, many).spans) == 60_000
    build = builder(image="<|image_{index}|>", split_at_media=True).from_token_ids
    alike = [item(64, f"{index}") for index in range(3_000)]
    assert len(build([*[PAD] * 64, 7] * 3_000, alike).spans) == 3_000
