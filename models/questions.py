"""Questions about scenes, and their answers."""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from models.scenes import COLORS, SHAPES, Scene, random_pair

_RELATION = re.compile(r"The (.+) is (above|below|to the left of|to the right of) the (.+)\.")
NUMBER_WORDS = {1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its answer. ``key`` is the part of the answer that must be right."""

    task: str
    question: str
    answer: str
    key: str


def is_correct(turn: Turn, answer: str) -> bool:
    """Return whether ``answer`` says what it must: the key's words in a row, in any sentence."""
    if turn.task in ("word", "number"):
        return f" {turn.key} " in f" {letters(answer)} "
    return f" {turn.key.lower()} " in f" {letters(answer).lower()} "


def letters(text: str) -> str:
    return " ".join("".join(c if c.isalnum() else " " for c in text).split())


def color_word(rng: random.Random) -> str:
    return rng.choice(["color", "color", "colour"])


def article(name: str) -> str:
    return ("an " if name[0] in "aeiou" else "a ") + name


def plural(shape: str) -> str:
    return shape + ("es" if shape.endswith("s") else "s")


def _listing(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def caption(scene: Scene) -> str:
    """One sentence about a whole scene, things from left to right."""
    ground = "" if scene.background in ("light",) else f" on a {scene.background} background"
    if scene.text is not None:
        return f'The text "{scene.text}"{ground}.'
    names = [article(t.name) for t in sorted(scene.things, key=lambda t: t.x)]
    kinds = {t.name for t in scene.things}
    if len(kinds) == 1 and len(names) > 1:
        (name,) = kinds
        return f"{NUMBER_WORDS[len(names)].capitalize()} {plural(name)}{ground}."
    text = _listing(names)
    return f"{text[0].upper()}{text[1:]}{ground}."


def ask_color(scene: Scene, rng: random.Random) -> Turn | None:
    shapes = [t.shape for t in scene.things]
    single = [t for t in scene.things if shapes.count(t.shape) == 1]
    if not single:
        return None
    thing = rng.choice(single)
    word = color_word(rng)
    questions = [
        f"What {word} is the {thing.shape}?",
        f"What is the {word} of the {thing.shape}?",
        f"Which {word} does the {thing.shape} have?",
        f"Tell me the {word} of the {thing.shape}.",
    ]
    if len(scene.things) == 1:
        questions += [f"What {word} is it?", f"What {word} is the shape?", f"What {word} is this?"]
        if rng.random() < 0.3:
            questions = questions[-3:]
    return Turn("color", rng.choice(questions), f"The {thing.shape} is {thing.color}.", thing.color)


def ask_shape(scene: Scene, rng: random.Random) -> Turn | None:
    colors = [t.color for t in scene.things]
    single = [t for t in scene.things if colors.count(t.color) == 1]
    if not single:
        return None
    thing = rng.choice(single)
    questions = [
        f"What shape is {thing.color}?",
        f"Which shape is {thing.color}?",
        f"What is the {thing.color} shape?",
    ]
    if len(scene.things) == 1:
        questions += [
            "What shape is this?",
            "What shape is it?",
            "Which shape is shown?",
            "What shape do you see?",
        ]
        if rng.random() < 0.5:
            questions = questions[3:]
    return Turn("shape", rng.choice(questions), f"It is a {thing.shape}.", thing.shape)


def ask_count(scene: Scene, rng: random.Random) -> Turn | None:
    if not scene.things:
        return None
    kinds = sorted({t.shape for t in scene.things})
    if rng.random() < 0.4:
        count = len(scene.things)
        question = rng.choice(
            [
                "How many shapes are there?",
                "How many shapes do you see?",
                "Count the shapes.",
                "How many objects are in the picture?",
            ]
        )
        noun = "shape"
    else:
        noun = rng.choice(kinds)
        count = sum(t.shape == noun for t in scene.things)
        question = rng.choice(
            [
                f"How many {plural(noun)} are there?",
                f"How many {plural(noun)} do you see?",
                f"Count the {plural(noun)}.",
                f"How many {plural(noun)} are in the picture?",
            ]
        )
    verb, name = ("is", noun) if count == 1 else ("are", plural(noun))
    return Turn("count", question, f"There {verb} {count} {name}.", str(count))


def ask_position(scene: Scene, rng: random.Random) -> Turn | None:
    if len(scene.things) < 2:
        return None
    a, b = rng.sample(scene.things, 2)
    shapes, names = [t.shape for t in scene.things], [t.name for t in scene.things]
    if names.count(a.name) > 1 or names.count(b.name) > 1:
        return None
    dx, dy = a.x - b.x, a.y - b.y
    if max(abs(dx), abs(dy)) < 1.6 * min(abs(dx), abs(dy)):
        return None
    if abs(dx) > abs(dy):
        key = "left of" if dx < 0 else "right of"
        relation = f"to the {key}"
    else:
        relation = key = "above" if dy < 0 else "below"
    one = a.shape if shapes.count(a.shape) == 1 else a.name
    two = b.shape if shapes.count(b.shape) == 1 else b.name
    question = rng.choice(
        [
            f"Where is the {one} relative to the {two}?",
            f"Where is the {one} compared to the {two}?",
            f"Is the {one} left of, right of, above or below the {two}?",
            f"Where is the {one}, seen from the {two}?",
        ]
    )
    return Turn("position", question, f"The {one} is {relation} the {two}.", key)


def ask_place(scene: Scene, rng: random.Random) -> Turn | None:
    """Ask for one thing's third of the image; only things well within a third qualify."""
    names = [t.name for t in scene.things]
    single = [t for t in scene.things if names.count(t.name) == 1]
    if not single:
        return None
    thing = rng.choice(single)
    width, height = scene.image.size
    places = []
    thirds = (
        (thing.y / height, ("top", "middle", "bottom")),
        (thing.x / width, ("left", "middle", "right")),
    )
    for part, words in thirds:
        if min(abs(part - 1 / 3), abs(part - 2 / 3)) < 0.04:
            return None
        places.append(words[int(part * 3)])
    place = " ".join(dict.fromkeys(places)).removesuffix(" middle")
    one = thing.shape if sum(t.shape == thing.shape for t in scene.things) == 1 else thing.name
    question = rng.choice(
        [f"Where is the {one}?", f"Where is the {one} in the picture?", f"Where do you see the {one}?"]
    )
    relation = "in" if place == "middle" else "at"
    return Turn("place", question, f"The {one} is {relation} the {place}.", place)


def ask_order(scene: Scene, rng: random.Random) -> Turn | None:
    """All things in a row, across or down; only where no two are about as far."""
    across = rng.random() < 0.3
    things = sorted(scene.things, key=lambda t: t.x if across else t.y)
    places = [t.x if across else t.y for t in things]
    if not 2 <= len(things) <= 4 or min(map(operator.sub, places[1:], places)) < 0.06 * max(scene.image.size):
        return None
    backwards = rng.random() < 0.3
    way = ("left", "right") if across else ("top", "bottom")
    if backwards:
        things, way = things[::-1], way[::-1]
    question = rng.choice(["Name the shapes from {} to {}.", "What is there, from {} to {}?"]).format(*way)
    answer = _listing([article(t.name) for t in things])
    return Turn("order", question, f"{answer[0].upper()}{answer[1:]}.", letters(answer))


def ask_relation(scene: Scene, rng: random.Random) -> Turn | None:
    """Return whether one thing is left of, right of, above or below another."""
    turn = ask_position(scene, rng)
    if turn is None:
        return None
    one, relation, two = _RELATION.fullmatch(turn.answer).groups()  # type: ignore[union-attr]
    opposite = {"above": "below", "below": "above", "left": "right", "right": "left"}
    key = turn.key.removesuffix(" of")
    asked = key if rng.random() < 0.5 else opposite[key]
    named = asked if asked in ("above", "below") else f"to the {asked} of"
    question = rng.choice([f"Is the {one} {named} the {two}?", f"Is the {one} {named} the {two}, yes or no?"])
    if asked == key:
        return Turn("yes/no", question, f"Yes, the {one} is {relation} the {two}.", "yes")
    return Turn("yes/no", question, f"No, the {one} is {relation} the {two}.", "no")


def ask_side(scene: Scene, rng: random.Random) -> Turn | None:
    if len(scene.things) != 2:
        return None
    a, b = scene.things
    if max(abs(a.x - b.x), abs(a.y - b.y)) < 1.6 * min(abs(a.x - b.x), abs(a.y - b.y)):
        return None
    if abs(a.x - b.x) > abs(a.y - b.y):
        side, found = rng.choice([("left", min), ("right", max)])
        thing = found((a, b), key=lambda t: t.x)
        words = f"on the {side}"
    else:
        side, found = rng.choice([("top", min), ("bottom", max)])
        thing = found((a, b), key=lambda t: t.y)
        words = f"at the {side}"
    question = rng.choice([f"Which shape is {words}?", f"What is {words}?", f"What shape is {words}?"])
    return Turn("position", question, f"The {thing.name} is {words}.", thing.name)


def ask_presence(scene: Scene, rng: random.Random) -> Turn | None:
    if not scene.things:
        return None
    present = {(t.color, t.shape) for t in scene.things}
    if rng.random() < 0.5:
        color, shape = rng.choice(sorted(present))
    else:
        thing = rng.choice(scene.things)
        # Near misses: the right shape in another colour, or the other way round.
        color, shape = rng.choice(
            [
                (rng.choice(list(COLORS)), thing.shape),
                (thing.color, rng.choice(SHAPES)),
                random_pair(rng, False),
            ]
        )
    name = f"{color} {shape}"
    question = rng.choice(
        [
            f"Is there {article(name)}?",
            f"Is there {article(name)} in the picture?",
            f"Do you see {article(name)}?",
            f"Does the image show {article(name)}?",
        ]
    )
    if (color, shape) in present:
        return Turn("yes/no", question, f"Yes, there is {article(name)}.", "yes")
    return Turn("yes/no", question, f"No, there is no {name}.", "no")


def ask_size(scene: Scene, rng: random.Random) -> Turn | None:
    if len(scene.things) != 2:
        return None
    a, b = sorted(scene.things, key=lambda t: t.radius)
    if b.radius < 1.35 * a.radius or a.name == b.name:
        return None
    word, thing = rng.choice([("smaller", a), ("larger", b), ("bigger", b)])
    question = rng.choice([f"Which shape is {word}?", f"What is {word}?", f"Which one is {word}?"])
    return Turn("size", question, f"The {thing.name} is {word}.", thing.name)


def ask_caption(scene: Scene, rng: random.Random) -> Turn | None:
    question = rng.choice(
        [
            "Describe this image.",
            "Describe the picture.",
            "What is in this picture?",
            "What's in this image?",
            "What is in this image?",
            "What do you see?",
            "What does the picture show?",
            "What is the content of this image?",
            "What is shown in this image?",
        ]
    )
    answer = caption(scene)
    return Turn("caption", question, answer, letters(answer))


def ask_text(scene: Scene, rng: random.Random) -> Turn | None:
    if scene.text is None:
        return None
    task = "number" if scene.text.isdigit() else "word"
    questions = ["What does it say?", "Read the text.", "What is written here?", "What does the text say?"]
    questions += (
        ["What number is shown?", "Which number is this?", "Read the number."]
        if task == "number"
        else ["What word is shown?", "Which word is this?", "Read the word.", "What is the word?"]
    )
    return Turn(task, rng.choice(questions), f'It says "{scene.text}".', scene.text)


Asker = Callable[[Scene, random.Random], Turn | None]
SHAPE_ASKERS: dict[str, list[Asker]] = {
    "color": [ask_color],
    "shape": [ask_shape],
    "count": [ask_count],
    "position": [ask_position, ask_side],
    "place": [ask_place],
    "order": [ask_order],
    "relation": [ask_relation],
    "yes/no": [ask_presence],
    "size": [ask_size],
    "caption": [ask_caption],
}
