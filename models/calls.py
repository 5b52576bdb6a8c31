"""Conversations with tools, and answers in JSON, about images or about none."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from models import samples as data
from models.questions import ask_place, caption, plural
from models.scenes import SHAPES, Scene, random_pair, shapes_scene, text_scene

Message = dict[str, Any]
Values = dict[str, Any]

# fmt: off
VERBS = ["report", "report", "report", "save", "record", "submit", "log", "store", "register", "note", "send",
         "add", "write", "track", "publish", "keep", "mark", "list", "file", "enter"]
NOUNS = ["shape", "shapes", "picture", "image", "item", "thing", "things", "result", "data", "it", "object",
         "drawing", "scene", "entry", "answer"]
CITIES = ["Paris", "Rome", "Berlin", "London", "Tokyo", "Oslo", "Lima", "Cairo", "Delhi", "Madrid"]
TOPICS = ["cats", "dogs", "red stars", "the sun", "music", "tea", "blue birds", "maps", "news", "shoes"]
WEATHER = ["sunny", "rain", "snow", "cloudy", "18 C", "wind", "fog", "hot", "cold", "-3 C"]
#: Results of a tool that took the report, as programs write them.
TAKEN = ["ok", "OK", "done", "saved", "stored", "true", "True", "null", "None", "success", "Reported.",
         "received", '{"status": "ok"}', '{"ok": true}', '{"result": "saved"}', "[]", "{}"]
FIELD_NAMES = {
    "color": ("color", "color", "color", "color", "colour"),
    "shape": ("shape",),
    "count": ("count", "count", "count", "number", "amount"),
    "background": ("background",),
    "caption": ("caption", "description", "summary"),
    "position": ("position", "place"),
    "text": ("text", "word", "content"),
}
TYPES = {"count": "integer"}
# fmt: on


@dataclass(slots=True)
class Dialogue:
    """A conversation as it goes over the API.

    Attributes:
        messages: in OpenAI's form; an image part is ``{"type": "image"}``, and stands for the next one of
            ``images``. Arguments of calls are objects.
        tools: in OpenAI's form.
        values_only: only the values inside of calls and JSON answers are learned, since a grammar wrote what
            stands around them.
    """

    images: list[Image.Image]
    messages: list[Message]
    tools: list[Message] = field(default_factory=list)
    values_only: bool = False


def function(name: str, parameters: Mapping[str, str]) -> Message:
    """A tool of OpenAI's form, from the JSON types of its parameters."""
    properties = {key: {"type": kind} for key, kind in parameters.items()}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "parameters": schema}}


def said(*calls: tuple[str, Values]) -> Message:
    """An assistant's message that calls functions."""
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"type": "function", "id": f"call_{index}", "function": {"name": name, "arguments": arguments}}
            for index, (name, arguments) in enumerate(calls)
        ],
    }


def asked(question: str, pictures: int = 0, *, first: bool = True) -> Message:
    parts: list[Message] = [{"type": "image"}] * pictures
    text = {"type": "text", "text": question}
    return {"role": "user", "content": [*parts, text] if first else [text, *parts]}


def answered(text: str) -> Message:
    return {"role": "assistant", "content": text}


# Scenes whose facts a tool can take.


def uniform_pairs(rng: random.Random, held_out: bool | None = False) -> list[tuple[str, str]]:
    """One to six things of one colour and shape."""
    return [random_pair(rng, held_out)] * rng.randint(1, 6)


def mixed_pairs(rng: random.Random) -> list[tuple[str, str]]:
    """Two or three kinds of things, each shape in one colour, up to six things."""
    shapes = rng.sample(SHAPES, rng.choice([2, 2, 3]))
    kinds = []
    for shape in shapes:
        pair = random_pair(rng, False)
        while pair[1] != shape:
            pair = random_pair(rng, False)
        kinds.append(pair)
    more = [rng.choice(kinds) for _ in range(rng.choice([0, 0, 1, 2, 3]))]
    return (kinds + more)[:6]


def facts_of(scene: Scene, shape: str | None, rng: random.Random) -> Values:
    """Facts that hold for all things of a scene, or of those of one ``shape``, by kind of field."""
    if scene.text is not None:
        return {"text": scene.text, "caption": caption(scene)}
    things = [thing for thing in scene.things if shape in (None, thing.shape)]
    facts: Values = {"color": things[0].color, "shape": things[0].shape, "count": len(things)}
    if shape is None:
        facts["caption"] = caption(scene)
        if scene.background != "light":
            facts["background"] = scene.background
        place = ask_place(scene, rng) if len(scene.things) == 1 else None
        if place is not None:
            facts["position"] = place.key
    return facts


def some_fields(rng: random.Random, facts: Values) -> list[tuple[str, str]]:
    """Fields in any order: the name that a schema gives each, and which fact it asks for."""
    if "color" in facts and rng.random() < 0.85:
        kinds = ["color", "shape", "count"]
        kinds = rng.sample(kinds, rng.choice([3, 3, 3, 2, 1]))
    else:
        kinds = rng.sample(list(facts), rng.randint(1, min(4, len(facts))))
    return [(rng.choice(FIELD_NAMES[kind]), kind) for kind in kinds]


def random_name(rng: random.Random, verb: str) -> str:
    """A function's name that holds ``verb``."""
    noun = rng.choice(NOUNS)
    return rng.choice(
        [verb, verb, f"{verb}_{noun}", f"{verb}_{noun}", f"{verb}{noun.capitalize()}", verb.capitalize()]
    )


def other_tools(rng: random.Random, count: int) -> list[Message]:
    """Functions that have nothing to do with images."""
    known = [
        function("get_weather", {rng.choice(["city", "location"]): "string"}),
        function("add", {"a": "integer", "b": "integer"}),
        function("multiply", {"x": "number", "y": "number"}),
        function("search", {"query": "string"}),
        function("send_email", {"to": "string", "subject": "string", "body": "string"}),
        function("stop", {}),
        function("get_time", {}),
        function("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 7))), {"id": "integer"}),
    ]
    return rng.sample(known, count)


def wordings(rng: random.Random, name: str, verb: str, fields: Sequence[str], shape: str | None) -> str:
    """A request that the function ``name`` be called, of all things or of those of one shape."""
    if shape is not None:
        things = plural(shape)
        return rng.choice(
            [
                f"{verb.capitalize()} the {things}.",
                f"Please {verb} the {things}.",
                f"Call {name} for the {things}.",
                f"Use {name} for the {things}.",
                f"Look at the {things} and {verb} them.",
            ]
        )
    listing = " and ".join([", ".join(fields[:-1]), fields[-1]]) if len(fields) > 1 else fields[0]
    noun = rng.choice(["picture", "image", "drawing"])
    return rng.choice(
        [
            f"{verb.capitalize()} the {noun}.",
            f"{verb.capitalize()} this {noun}.",
            f"{verb.capitalize()} what you see.",
            f"{verb.capitalize()} what is in this {noun}.",
            f"{verb.capitalize()} what is in the {noun}.",
            f"{verb.capitalize()} what the {noun} shows.",
            f"{verb.capitalize()} the shapes.",
            f"{verb.capitalize()} it.",
            f"{verb.capitalize()} the {listing}.",
            f"{verb.capitalize()} {listing}.",
            f"{verb.capitalize()} the {listing} of the shapes.",
            f"Please {verb} the {noun}.",
            f"Please {verb} what you see.",
            f"Look at the {noun} and {verb} it.",
            f"Look at the {noun} and call {name}.",
            f"Call {name}.",
            f"Call {name} for this {noun}.",
            f"Call the {name} tool.",
            f"Use {name}.",
            f"Use {name} to {verb} the {noun}.",
            f"Use the {name} tool.",
            f"Use the tool to {verb} the {noun}.",
            f"Use the {name} tool to {verb} what you see.",
        ]
    )


def ending(rng: random.Random, scene: Scene, arguments: Values) -> tuple[str, str]:
    """A function's result, and the model's answer to it."""
    kind = rng.random()
    if kind < 0.55:
        result = rng.choice(TAKEN)
    elif kind < 0.7:
        result = json.dumps(arguments)
    elif kind < 0.75:
        return f"Error: {rng.choice(['no connection', 'not allowed', 'try again'])}", "The call failed."
    else:
        return short_result(rng)
    return result, f"Done. {caption(scene)}"


def short_result(rng: random.Random) -> tuple[str, str]:
    """A result that the answer repeats."""
    result = rng.choice(
        [
            str(rng.randint(0, 10 ** rng.randint(1, 5))),
            "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 6))),
            rng.choice(WEATHER),
            f"{rng.randint(1, 99)} {rng.choice(['euros', 'dollars', 'C', 'points', 'kg'])}",
        ]
    )
    return result, f"The result is {result}."


# Conversations.


def random_scene(rng: random.Random, size: tuple[int, int]) -> tuple[Scene, str | None]:
    """A scene, and the shape that is to be reported alone, or None for all that it shows."""
    kind = rng.random()
    if kind < 0.06:
        return text_scene(rng, size, data.random_text(rng, rng.choice(["word", "number"]))), None
    if kind < 0.21:
        scene = shapes_scene(rng, size, mixed_pairs(rng))
        return scene, rng.choice(scene.things).shape
    return shapes_scene(rng, size, uniform_pairs(rng)), None


def tool_dialogue(rng: random.Random, size: tuple[int, int]) -> Dialogue:
    """An image, functions of which one or two take what it shows, and one to three rounds."""
    scene, shape = random_scene(rng, size)
    verbs = rng.sample(sorted(set(VERBS)), 2)
    if rng.random() < 0.3:
        verbs[0] = "report"
    tools, ways = [], []
    for verb in verbs[: rng.choice([1, 1, 2])]:
        facts = facts_of(scene, shape, rng)
        fields = some_fields(rng, facts)
        name = random_name(rng, verb)
        tools.append(function(name, {given: TYPES.get(kind, "string") for given, kind in fields}))
        ways.append((name, verb, [given for given, _ in fields], {g: facts[kind] for g, kind in fields}))
    tools += other_tools(rng, rng.choice([0, 0, 1, 1, 2, 3]))
    rng.shuffle(tools)
    messages: list[Message] = []
    first = rng.random() < 0.7
    for number, (name, verb, fields, arguments) in enumerate(rng.sample(ways, len(ways))):
        question = wordings(rng, name, verb, fields, shape)
        messages.append(asked(question, int(number == 0), first=first))
        messages.append(said((name, arguments)))
        if rng.random() < 0.7:
            result, answer = ending(rng, scene, arguments)
            messages += [{"role": "tool", "content": result}, answered(answer)]
            if rng.random() < 0.3:
                messages += follow_up(rng, scene)
        else:
            break
    return Dialogue([scene.image], messages, tools)


def count_dialogue(rng: random.Random, size: tuple[int, int]) -> Dialogue:
    """One call of a function that takes how many things there are, among other facts of them."""
    scene = shapes_scene(rng, size, uniform_pairs(rng))
    facts = facts_of(scene, None, rng)
    kinds = rng.sample(["color", "shape", "count"], 3)
    if rng.random() < 0.2:
        kinds.remove(rng.choice(["color", "shape"]))
    fields = [(rng.choice(FIELD_NAMES[kind]), kind) for kind in kinds]
    verb = "report" if rng.random() < 0.5 else rng.choice(VERBS)
    name = random_name(rng, verb)
    tools = [function(name, {given: TYPES.get(kind, "string") for given, kind in fields})]
    tools += other_tools(rng, rng.choice([0, 0, 0, 1, 2]))
    rng.shuffle(tools)
    question = wordings(rng, name, verb, [given for given, _ in fields], None)
    call = said((name, {given: facts[kind] for given, kind in fields}))
    return Dialogue([scene.image], [asked(question, 1, first=rng.random() < 0.7), call], tools)


def each_dialogue(rng: random.Random, size: tuple[int, int]) -> Dialogue:
    """Two or three different things, each in a call of its own, from left to right."""
    pairs = list(dict.fromkeys(random_pair(rng, False) for _ in range(rng.choice([2, 2, 3]))))
    scene = shapes_scene(rng, size, pairs)
    verb = rng.choice(VERBS)
    name, kinds = random_name(rng, verb), rng.sample(["color", "shape"], 2)
    tools = [function(name, dict.fromkeys(kinds, "string")), *other_tools(rng, rng.choice([0, 0, 1, 2]))]
    rng.shuffle(tools)
    calls = [
        (name, {kind: getattr(thing, kind) for kind in kinds})
        for thing in sorted(scene.things, key=lambda thing: thing.x)
    ]
    question = rng.choice(
        [
            f"{verb.capitalize()} each shape.",
            f"{verb.capitalize()} every shape.",
            f"Call {name} for each shape.",
            f"{verb.capitalize()} the shapes one by one.",
        ]
    )
    messages = [asked(question, 1), said(*calls)]
    if rng.random() < 0.5:
        results = [{"role": "tool", "content": rng.choice(TAKEN)} for _ in calls]
        messages += [*results, answered(f"Done. {caption(scene)}")]
    return Dialogue([scene.image], messages, tools)


def follow_up(rng: random.Random, scene: Scene) -> list[Message]:
    """A question about the same image that needs no function."""
    askers = data.FOLLOW_UPS if scene.things else [data.ask_text, data.ask_caption]
    turn = rng.choice(askers)(scene, rng)
    return [] if turn is None else [asked(turn.question), answered(turn.answer)]


def plain_dialogue(rng: random.Random, size: tuple[int, int]) -> Dialogue:
    """Questions that need no function, though there are some."""
    sample = data.picture_sample(rng, size, 3)
    messages = []
    for number, turn in enumerate(sample.turns):
        messages += [asked(turn.question, sample.shown_at.count(number)), answered(turn.answer)]
    return Dialogue(sample.images, messages, any_tools(rng))


def any_tools(rng: random.Random) -> list[Message]:
    tools = other_tools(rng, rng.choice([0, 1, 2]))
    for verb in rng.sample(sorted(set(VERBS)), rng.choice([1, 1, 2]) if tools else 1):
        kinds = rng.sample(sorted(FIELD_NAMES), rng.randint(1, 4))
        if rng.random() < 0.5:
            kinds = ["color", "shape", "count"]
        fields = {rng.choice(FIELD_NAMES[kind]): TYPES.get(kind, "string") for kind in kinds}
        tools.append(function(random_name(rng, verb), fields))
    rng.shuffle(tools)
    return tools


def text_dialogue(rng: random.Random) -> Dialogue:
    """Functions without an image: some are called with words of the question; greetings need none."""
    kind = rng.random()
    if kind < 0.25:
        questions, answer = rng.choice(data.CHATS[:-1])
        return Dialogue([], [asked(rng.choice(questions)), answered(answer)], any_tools(rng))
    messages, tools = [], any_tools(rng) if rng.random() < 0.4 else []
    known = {tool["function"]["name"] for tool in tools}
    for _ in range(rng.choice([1, 1, 2])):
        name, parameters, question, arguments, ending = text_call(rng)
        if name in known:
            continue
        known.add(name)
        tools.append(function(name, parameters))
        result, answer = ending or short_result(rng)
        messages += [asked(question), said((name, arguments))]
        messages += [{"role": "tool", "content": result}, answered(answer)]
    if not messages:
        return text_dialogue(rng)
    rng.shuffle(tools)
    return Dialogue([], messages, tools)


def text_call(rng: random.Random) -> tuple[str, dict[str, str], str, Values, tuple[str, str] | None]:
    kind = rng.randrange(5)
    if kind == 0:
        city = rng.choice([*CITIES, "".join(rng.choices("abcdefghijklmnoprstuvw", k=5)).capitalize()])
        key = rng.choice(["city", "city", "location"])
        question = rng.choice(
            [
                f"What is the weather in {city}?",
                f"What's the weather in {city}?",
                f"How is the weather in {city}?",
            ]
        )
        result = rng.choice(WEATHER)
        name = rng.choice(["get_weather", "weather", "get_weather"])
        return name, {key: "string"}, question, {key: city}, (result, f"The result is {result}.")
    if kind in (1, 2):
        add = kind == 1
        one, two = rng.randint(0, 99), rng.randint(0, 99)
        keys = rng.choice([("a", "b"), ("a", "b"), ("x", "y")])
        name = rng.choice(["add", "sum", "add_numbers"] if add else ["multiply", "times"])
        asks = [f"Add {one} and {two}.", f"What is {one} plus {two}?", f"What is {one} + {two}?"]
        if not add:
            asks = [f"Multiply {one} and {two}.", f"What is {one} times {two}?", f"What is {one} * {two}?"]
        result = str(one + two if add else one * two)
        kinds = dict.fromkeys(keys, rng.choice(["integer", "integer", "number"]))
        values = {keys[0]: one, keys[1]: two}
        return name, kinds, rng.choice(asks), values, (result, f"The result is {result}.")
    if kind == 3:
        topic = rng.choice(TOPICS)
        question = rng.choice([f"Search for {topic}.", f"Look for {topic}.", f"Find {topic}."])
        return "search", {"query": "string"}, question, {"query": topic}, None
    name = rng.choice(["stop", "get_time", "reset", "ping"])
    return name, {}, rng.choice([f"Call {name}.", f"Use {name}.", f"Use the {name} tool."]), {}, None


def json_dialogue(rng: random.Random, size: tuple[int, int]) -> Dialogue:
    """An answer in JSON: asked for by its keys, or forced upon a question that doesn't speak of it."""
    scene, shape = random_scene(rng, size)
    facts = facts_of(scene, shape, rng)
    fields = some_fields(rng, facts)
    value: Values = {given: facts[kind] for given, kind in fields}
    forced = rng.random() < 0.5
    listing = ", ".join(value)
    of = f" of the {plural(shape)}" if shape else ""
    if shape is None and scene.things and rng.random() < 0.3:
        key = rng.choice(["shapes", "things", "objects", "items"])
        kinds = rng.sample(["color", "shape"], rng.choice([2, 2, 1]))
        things = sorted(scene.things, key=lambda thing: thing.x)
        value = {key: [{kind: getattr(thing, kind) for kind in kinds} for thing in things]}
        listing = f"{key} with {' and '.join(kinds)}"
    if forced:
        question = forced_question(rng, shape)
    else:
        question = rng.choice(
            [
                f"Give {listing}{of} as JSON.",
                f"Give the {listing}{of} as JSON.",
                f"Answer in JSON: {listing}{of}.",
                f"Describe the {plural(shape) if shape else 'picture'} as JSON with {listing}.",
                f"JSON with {listing}{of}, please.",
                f"Return {listing}{of} as JSON.",
            ]
        )
    messages = [asked(question, 1, first=rng.random() < 0.7), answered(json.dumps(value))]
    return Dialogue([scene.image], messages, values_only=forced)


def forced_question(rng: random.Random, shape: str | None) -> str:
    if shape is not None:
        things = plural(shape)
        return rng.choice(
            [
                f"Describe the {things}.",
                f"What about the {things}?",
                f"How many {things} are there?",
                f"Report the {things}.",
                f"Extract the {things}.",
            ]
        )
    return rng.choice(
        [
            "Describe this image.",
            "Describe the picture.",
            "What is in this picture?",
            "What do you see?",
            "What is in this image?",
            "Describe the shapes.",
            "Report the picture.",
            "Extract the data.",
            "What does the picture show?",
            "Fill in the form.",
            "Describe the picture as JSON.",
            "What is shown?",
            "How many shapes are there?",
            "Answer as JSON.",
        ]
    )


def forced_dialogue(rng: random.Random, size: tuple[int, int]) -> Dialogue:
    """A call that the caller demanded, whatever was asked."""
    scene, shape = random_scene(rng, size)
    facts = facts_of(scene, shape, rng)
    fields = some_fields(rng, facts)
    name = rng.choice(
        [
            "final_result",
            "final_answer",
            "Report",
            "Picture",
            "Answer",
            "Scene",
            "Shape",
            random_name(rng, rng.choice(VERBS)),
        ]
    )
    tools = [function(name, {given: TYPES.get(kind, "string") for given, kind in fields})]
    arguments = {given: facts[kind] for given, kind in fields}
    messages = [asked(forced_question(rng, shape), 1, first=rng.random() < 0.7), said((name, arguments))]
    return Dialogue([scene.image], messages, tools, values_only=True)


PICTURE_DIALOGUES: dict[Callable[[random.Random, tuple[int, int]], Dialogue], float] = {
    tool_dialogue: 25,
    count_dialogue: 35,
    each_dialogue: 3,
    plain_dialogue: 15,
    json_dialogue: 12,
    forced_dialogue: 10,
}


def picture_dialogue(rng: random.Random, size: tuple[int, int]) -> Dialogue:
    draw = rng.choices(list(PICTURE_DIALOGUES), list(PICTURE_DIALOGUES.values()))[0]
    dialogue = draw(rng, size)
    if rng.random() < 0.15:
        dialogue.messages.insert(0, {"role": "system", "content": system_text(rng)})
    return dialogue


def system_text(rng: random.Random) -> str:
    """Instructions that change nothing, among them words that the model doesn't know."""
    known = [
        "You are a helpful assistant.",
        "Be brief.",
        "Answer in one sentence.",
        "Use the tools.",
        "You are a helpful agent.",
        "You can call functions.",
        "Look at the picture.",
        "Respond in JSON.",
        "You report what you see in pictures.",
        "Call a function when you need to.",
    ]
    if rng.random() < 0.6:
        return " ".join(rng.sample(known, rng.choice([1, 1, 2])))
    letters = "aaeeiioourstlnmdpcbgfkhvwy"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 7))) for _ in range(rng.randint(3, 10))]
    return f"{' '.join(words).capitalize()}."
