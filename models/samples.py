"""Conversations about images, for training and for held-out evaluation."""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image

from models.questions import (
    SHAPE_ASKERS,
    Turn,
    article,
    ask_caption,
    ask_text,
    color_word,
    letters,
    plural,
)
from models.scenes import (
    HELD_OUT,
    Scene,
    random_pair,
    random_size,
    shapes_scene,
    text_scene,
)

# fmt: off
WORDS = [
    "A", "I", "GO", "UP", "NO", "YES", "CAT", "DOG", "SUN", "SEA", "CAR", "BUS", "HAT", "CUP", "RED",
    "BOX", "TEA", "ICE", "FISH", "BIRD", "TREE", "MOON", "STAR", "BOOK", "DOOR", "HOME", "OPEN", "STOP",
    "EXIT", "SALE", "FREE", "CITY", "PARK", "ROAD", "SHOP", "FOOD", "CAFE", "MUSIC", "HELLO", "WORLD",
    "APPLE", "BREAD", "WATER", "LIGHT", "NIGHT", "HOUSE", "TABLE", "CHAIR", "RIVER", "CLOUD", "STONE",
    "PAPER", "TIGER", "HORSE", "LEMON",
]
# fmt: on

CHATS = [
    (
        ["Hello!", "Hello", "Hi", "Hi there!", "Hey", "Good morning", "hello", "hi"],
        "Hello! Show me a picture and ask me about it.",
    ),
    (
        ["What can you do?", "what can you do", "Who are you?", "Help", "What are you?", "What do you know?"],
        "I look at simple pictures: shapes, colors, counts, positions and short words.",
    ),
    (["Thank you!", "Thanks", "Thanks!", "thank you"], "You are welcome!"),
    (["Bye", "Goodbye", "Bye!", "See you"], "Goodbye!"),
    (["How are you?", "How are you doing?"], "I am fine. Show me a picture!"),
    (
        [
            "What is in this picture?",
            "Describe this image.",
            "What color is the circle?",
            "What does it say?",
        ],
        "I see no picture. Please send one.",
    ),
]


@dataclass(slots=True)
class Sample:
    """Images (none, one or two), and a conversation about them.

    ``shown_at`` says with which turn each image comes; a question is about the latest one unless it names
    several.
    """

    images: list[Image.Image]
    turns: list[Turn]
    shown_at: list[int]


def random_pairs(rng: random.Random, task: str, held_out: bool | None) -> list[tuple[str, str]]:
    """Colours and shapes for a scene on which ``task`` can be asked."""
    if task in ("position", "relation", "size"):
        count = 2 if rng.random() < 0.8 else 3
    elif task == "count":
        count = rng.randint(1, 6)
    elif task == "order":
        count = rng.choice([2, 2, 3, 4])
    elif task in ("color", "shape"):
        count = rng.choice([1, 1, 1, 2, 3])
    else:
        count = rng.choice([1, 1, 2, 2, 3, 4])
    pairs = [random_pair(rng, held_out) for _ in range(count)]
    if task == "count" and rng.random() < 0.6:
        # The same shape again and again, in one colour or several.
        shape, same = pairs[0][1], rng.random() < 0.5
        pairs = [(pairs[0][0] if same else color, shape) for color, _ in pairs]
        if held_out is False:
            pairs = [pair if pair not in HELD_OUT else ("red", shape) for pair in pairs]
    return pairs


def random_text(rng: random.Random, task: str) -> str:
    if task == "number":
        return "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 5)))
    if rng.random() < 0.3:
        return rng.choice(WORDS)
    return "".join(rng.choice("ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(rng.randint(1, 5)))


def make_scene(
    rng: random.Random, task: str, size: tuple[int, int], *, held_out: bool | None = False
) -> tuple[Scene, Turn]:
    """A scene that fits ``task``, and a question of that task."""
    if task in ("word", "number"):
        scene = text_scene(rng, size, random_text(rng, task))
        turn = ask_text(scene, rng)
        assert turn is not None
        return scene, turn
    while True:
        scene = shapes_scene(rng, size, random_pairs(rng, task, held_out))
        turn = rng.choice(SHAPE_ASKERS[task])(scene, rng)
        if turn is not None:
            return scene, turn


TRAINING_TASKS = {
    "word": 28,
    "number": 9,
    "color": 6,
    "shape": 4,
    "count": 17,
    "position": 18,
    "place": 4,
    "order": 7,
    "relation": 6,
    "yes/no": 6,
    "size": 5,
    "caption": 7,
}


#: What is asked after the first question; counts and positions, which take longest to learn, more often.
FOLLOW_UPS = [
    *(asker for group in SHAPE_ASKERS.values() for asker in group),
    *2 * (SHAPE_ASKERS["count"] + SHAPE_ASKERS["position"]),
]


def picture_sample(rng: random.Random, size: tuple[int, int], max_turns: int = 4) -> Sample:
    """One image, and a conversation that starts with any task and follows up with others."""
    task = rng.choices(list(TRAINING_TASKS), list(TRAINING_TASKS.values()))[0]
    scene, first = make_scene(rng, task, size)
    turns = [first]
    askers = FOLLOW_UPS if scene.things else [ask_text, ask_caption]
    for _ in range(max_turns - 1):
        turn = rng.choice(askers)(scene, rng)
        if turn is not None and all(turn.question != t.question for t in turns):
            turns.append(turn)
    return Sample([scene.image], turns, [0])


def album_sample(rng: random.Random, size: tuple[int, int]) -> Sample:
    """An image, some talk about it, then another image."""
    one, two = picture_sample(rng, size, 2), picture_sample(rng, size, 2)
    return Sample(one.images + two.images, one.turns + two.turns, [0, len(one.turns)])


def comparison_sample(rng: random.Random, size: tuple[int, int]) -> Sample:
    """Two images with one thing each."""
    first = random_pair(rng, False)
    second = random_pair(rng, False)
    if rng.random() < 0.6:
        kept = rng.randrange(2)
        for _ in range(20):
            second = random_pair(rng, False)
            if second[kept] == first[kept]:
                break
    scenes = [shapes_scene(rng, size, [pair]) for pair in (first, second)]
    turns = rng.sample(
        [
            _same(rng, "color", first[0], second[0]),
            _same(rng, "shape", first[1], second[1]),
            _which(rng, scenes),
            Turn(
                "two pictures",
                rng.choice(
                    ["Describe both pictures.", "What is in these images?", "What do the pictures show?"]
                ),
                f"The first shows {article(scenes[0].things[0].name)}, "
                f"the second {article(scenes[1].things[0].name)}.",
                f"{scenes[0].things[0].name} the second {article(scenes[1].things[0].name)}",
            ),
        ],
        rng.randint(1, 3),
    )
    return Sample([scene.image for scene in scenes], turns, [0, 0])


def _same(rng: random.Random, what: str, a: str, b: str) -> Turn:
    word = color_word(rng) if what == "color" else what
    question = rng.choice(
        [f"Do both pictures show the same {word}?", f"Is the {word} the same in both?", f"Same {word}?"]
    )
    if a == b:
        return Turn("two pictures", question, f"Yes, both are {a if what == 'color' else plural(a)}.", "yes")
    return Turn("two pictures", question, f"No, first {a}, then {b}.", "no")


def _which(rng: random.Random, scenes: list[Scene]) -> Turn:
    place = rng.randrange(2)
    thing = scenes[place].things[0]
    order = ("first", "second")[place]
    question = rng.choice([f"What is in the {order} picture?", f"What does the {order} image show?"])
    return Turn("two pictures", question, f"The {order} picture shows {article(thing.name)}.", thing.name)


def chat_sample(rng: random.Random) -> Sample:
    """No image at all."""
    questions, answer = rng.choice(CHATS)
    return Sample([], [Turn("chat", rng.choice(questions), answer, letters(answer))], [])


EVALUATION_TASKS = (
    "color",
    "shape",
    "count",
    "position",
    "word",
    "number",
    "yes/no",
    "size",
    "caption",
    "two pictures",
    "new pairs",
    "chat",
)
_EVALUATION_SEED = 1 << 40


def evaluation_set(task: str, count: int, seed: int = 0) -> list[Sample]:
    """``count`` samples of one turn; the same for every call, and never drawn in training."""
    samples = []
    for index in range(count):
        rng = random.Random(_EVALUATION_SEED + hash((EVALUATION_TASKS.index(task), seed, index)))
        if task == "two pictures":
            sample = comparison_sample(rng, random_size(rng))
            samples.append(Sample(sample.images, sample.turns[:1], [0, 0]))
        elif task == "chat":
            samples.append(chat_sample(rng))
        elif task == "new pairs":
            scene, turn = make_scene(rng, rng.choice(["color", "shape"]), random_size(rng), held_out=True)
            samples.append(Sample([scene.image], [turn], [0]))
        else:
            # Any colour and shape: one pair in twelve was never seen in training.
            scene, turn = make_scene(rng, task, random_size(rng), held_out=None)
            samples.append(Sample([scene.image], [turn], [0]))
    return samples
