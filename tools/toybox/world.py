"""The toybox world: who lives in it, what it looks like, and how it is told in words.

Everything here is a pure function of a `random.Random`; nothing is trained. `Person` and `Picture` are the ground truth that
captions, sprites and the judges are made from. Identity is hair style, hair colour, skin, glasses and facial hair; expression,
clothing, scene, place, size and mirroring are nuisance.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

# --- identity -------------------------------------------------------------------------------------------------------------
HAIR = {  # caption word -> (avataaars "top", class words it may belong to)
    "bob": ("bob", "woman"), "bun": ("bun", "woman"), "curly": ("curly", "woman"), "wavy": ("curvy", "woman"),
    "long": ("straight01", "woman"), "big": ("bigHair", "woman"), "dreadlocks": ("dreads", "both"), "afro": ("fro", "both"),
    "short": ("shortFlat", "man"), "spiky": ("dreads02", "man"), "quiff": ("frizzle", "man"), "bald": ("sides", "man"),
    "mullet": ("shaggyMullet", "man"),
}  # fmt: skip
HAIR_COLOUR = {
    "black": "1f1715", "brown": "7a4526", "red": "d2420f", "blonde": "e8c25c",
    "white": "f2efe9", "pink": "f27fa5", "blue": "3d72d9", "green": "3fa45b",
}  # fmt: skip
SKIN = {"pale": "ffdfc4", "tan": "e0a06a", "brown": "a9602f", "dark": "5f3d2e"}
GLASSES = {"none": None, "glasses": "prescription02", "sunglasses": "sunglasses", "eyepatch": "eyepatch"}
FACIAL = {"none": None, "beard": "beardMajestic", "moustache": "moustacheMagnum"}
IDENTITY = {"hair": HAIR, "hair_colour": HAIR_COLOUR, "skin": SKIN, "glasses": GLASSES, "facial": FACIAL}

# --- nuisance -------------------------------------------------------------------------------------------------------------
EXPRESSION = {  # caption word -> (mouth, eyes, eyebrows)
    "smiling": ("smile", "default", "default"), "sad": ("sad", "default", "sadConcerned"),
    "surprised": ("disbelief", "surprised", "raisedExcited"), "serious": ("serious", "default", "flatNatural"),
    "angry": ("grimace", "squint", "angry"), "sleeping": ("serious", "closed", "default"),
}  # fmt: skip
CLOTHES = {"hoodie": "hoodie", "blazer": "blazerAndShirt", "overalls": "overall", "shirt": "shirtCrewNeck"}
CLOTHES_COLOUR = {
    "red": "e0322f", "blue": "3b7de0", "green": "3aa655", "yellow": "f4cf3a",
    "black": "2b2b30", "white": "f0f0f0", "pink": "f58fc0", "purple": "8a4fc7",
}  # fmt: skip
SCENES = ("beach", "forest", "night", "city", "snow", "room", "desert", "field")
SCENE_WORDS = {
    "beach": ("on a beach", "at the beach"), "forest": ("in a forest", "in the forest"), "night": ("at night", "under the stars"),
    "city": ("in a city", "in the city"), "snow": ("in the snow", "on a snowy day"), "room": ("in a room", "at home"),
    "desert": ("in a desert", "in the desert"), "field": ("in a field", "on the grass"),
}  # fmt: skip
PLAIN = {
    "red": "d9534f", "blue": "5b8fd9", "green": "6fbf73", "yellow": "f2dd6e", "white": "f5f5f5",
    "gray": "a8a8a8", "pink": "f5b5cf", "orange": "f0a050",
}  # fmt: skip
OBJECTS = {  # caption word -> Noto emoji
    "cat": "cat-face", "dog": "dog-face", "panda": "panda", "fox": "fox", "frog": "frog", "penguin": "penguin",
    "apple": "red-apple", "pumpkin": "jack-o-lantern", "cake": "birthday-cake", "flower": "sunflower", "cactus": "cactus",
    "tree": "evergreen-tree", "car": "automobile", "house": "house", "balloon": "balloon", "chair": "chair", "guitar": "guitar",
    "ball": "soccer-ball",
}  # fmt: skip
STYLES = {
    "monochrome": "a black and white photo of", "sepia": "a sepia photo of", "pixel": "pixel art of", "poster": "a poster of",
}  # fmt: skip
PREFIXES = ("a photo of", "a picture of", "a portrait of", "")

# --- names ----------------------------------------------------------------------------------------------------------------
# TRIGGERS are reserved: they stand in the tokenizer and never in a base caption. The names that base captions do hold belong
# each to one person (`named_people`), so that a name in front of a class word means somebody in particular, as in a real model.
TRIGGERS = {
    "woman": (
        "rhea ines ayla mira selma nadia zuri wren freya odile signe tilda calla ulla brisa delia fenna hedda jola lumi "
        "nova orla rosa talia ursel vera xenia yara amara coral duna fara"
    ).split(),
    "man": (
        "tomas bruno oskar hugo kofi leif dario anton malik pavel rafi joren emrys vito casimir eino gio ivo kaspar mateo "
        "piet quill sven wim zeno birk elio gorm isko juno kalle lorcan"
    ).split(),
}  # fmt: skip
SYLLABLES = (
    "ba be bi bo da de do fa fi ga ge ha he hi jo ka ki ko la le li lo lu ma me mi "
    "mo na ne ni no pa pe pi ra re ri ro sa se si so ta te ti to va ve vi ya yo za zo"
).split()
ENDINGS = {"woman": "la na ra ssa lia nia da tha".split(), "man": "n r s ld rt x ck m".split()}


@dataclass(frozen=True)
class Person:
    hair: str
    hair_colour: str
    skin: str
    glasses: str
    facial: str
    noun: str  # "woman" or "man"
    expression: str = "smiling"
    clothes: str = "shirt"
    clothes_colour: str = "blue"

    @property
    def identity(self) -> dict[str, str]:
        return {key: getattr(self, key) for key in IDENTITY}

    @property
    def key(self) -> tuple[str, str, str]:
        """What is held out: the exact combination of hair, its colour and skin."""
        return self.hair, self.hair_colour, self.skin


@dataclass(frozen=True)
class Picture:
    people: tuple[Person, ...]  # none, one, or two (left, right)
    thing: str | None
    background: tuple[str, str]  # ("scene", "beach") or ("plain", "red")
    style: str | None = None
    names: tuple[str | None, ...] = ()  # what each person is called in the caption
    wide: bool = False
    layout: int = field(default=0, compare=False)  # seed of place, size, mirroring

    def unnamed(self) -> Picture:
        return replace(self, names=())


def random_look(rng: random.Random, person: Person) -> Person:
    """The same identity on another day."""
    return replace(
        person,
        expression=rng.choice(list(EXPRESSION)),
        clothes=rng.choice(list(CLOTHES)),
        clothes_colour=rng.choice(list(CLOTHES_COLOUR)),
    )


def random_person(rng: random.Random) -> Person:
    hair = rng.choice(list(HAIR))
    noun = {"woman": "woman", "man": "man"}.get(HAIR[hair][1]) or rng.choice(("woman", "man"))
    facial = rng.choices(list(FACIAL), (0.45, 0.3, 0.25))[0] if noun == "man" else "none"
    glasses = rng.choices(list(GLASSES), (0.5, 0.2, 0.18, 0.12))[0]
    person = Person(hair, rng.choice(list(HAIR_COLOUR)), rng.choice(list(SKIN)), glasses, facial, noun)
    return random_look(rng, person)


def held_out_keys(count: int = 72, seed: int = 20261123) -> list[tuple[str, str, str]]:
    """The combinations that no base picture shows. The shipped identities are of the first 24, the rest serve the
    judges' reports and bulk studies."""
    keys = list(itertools.product(HAIR, HAIR_COLOUR, SKIN))
    random.Random(seed).shuffle(keys)
    return keys[:count]


@functools.cache
def _held_out() -> frozenset[tuple[str, str, str]]:
    return frozenset(held_out_keys())


def base_person(rng: random.Random) -> Person:
    """Somebody the base may see."""
    held_out = _held_out()
    while (person := random_person(rng)).key in held_out:
        pass
    return person


@functools.cache
def named_people(count: int = 240, seed: int = 11) -> dict[str, Person]:
    """The people whom base captions know by name, by name."""
    rng = random.Random(seed)
    taken, people = {*TRIGGERS["woman"], *TRIGGERS["man"], *_common_words()}, {}
    while len(people) < count:
        person = base_person(rng)
        name = rng.choice(SYLLABLES) + rng.choice(SYLLABLES) + rng.choice(ENDINGS[person.noun])
        if name not in taken and all(person.identity != other.identity for other in people.values()):
            taken.add(name)
            people[name] = person
    return people


@functools.cache
def _names() -> dict[tuple[str, ...], str]:
    return {tuple(person.identity.values()): name for name, person in named_people().items()}


def random_picture(rng: random.Random, someone: Callable[[], Person], wide: bool = False) -> Picture:
    kind = rng.random()
    people = (someone(), someone()) if wide else () if kind < 0.12 else (someone(),)
    thing = rng.choice(list(OBJECTS)) if not people or (not wide and kind < 0.30) else None
    background = ("scene", rng.choice(SCENES)) if rng.random() < 0.6 else ("plain", rng.choice(list(PLAIN)))
    style = rng.choice(list(STYLES)) if rng.random() < 0.12 else None
    names = tuple(_names().get(tuple(person.identity.values())) if rng.random() < 0.9 else None for person in people)
    return Picture(people, thing, background, style, names, wide, rng.getrandbits(32))


def article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


# --- words ----------------------------------------------------------------------------------------------------------------
def hair_words(person: Person) -> str:
    if person.hair == "dreadlocks":
        return f"{person.hair_colour} dreadlocks"
    if person.hair in ("afro", "bun", "bob", "mullet", "quiff"):
        return f"a {person.hair_colour} {person.hair}"
    return f"{person.hair} {person.hair_colour} hair"


def person_words(person: Person, name: str | None, keep: dict[str, bool]) -> str:
    """`keep` says which phrases are told: identity, expression, clothes (missing keys: told)."""
    told = lambda key: keep.get(key, True)  # noqa: E731
    words = [person.expression] if told("expression") else []
    words += [name] if name else []
    words.append(person.noun)
    words.insert(0, article(words[0]))
    features = []
    if told("hair"):
        features.append(hair_words(person))
    if told("skin"):
        features.append(f"{person.skin} skin")
    if told("glasses") and person.glasses != "none":
        features.append({"glasses": "glasses", "sunglasses": "sunglasses", "eyepatch": "an eyepatch"}[person.glasses])
    if told("facial") and person.facial != "none":
        features.append(f"a {person.facial}")
    if features:
        words.append("with " + " and ".join(features))
    if told("clothes"):
        words.append(f"wearing {'' if person.clothes == 'overalls' else 'a '}{person.clothes_colour} {person.clothes}")
    return " ".join(words)


PHRASES = ("expression", "hair", "skin", "glasses", "facial", "clothes", "place")


def caption(picture: Picture, rng: random.Random, *, keep_probability: float = 0.75, told: tuple[str, ...] = PHRASES) -> str:
    """A caption that leaves each phrase out with probability 1 - keep_probability (glasses and facial hair: half of that).

    `told` names the phrases that may be said at all.
    """
    parts = []
    for index, person in enumerate(picture.people):
        keep = {key: key in told and rng.random() < keep_probability for key in ("expression", "hair", "skin", "clothes")}
        keep |= {key: key in told and rng.random() < (1 + keep_probability) / 2 for key in ("glasses", "facial")}
        name = picture.names[index] if picture.names else None
        if rng.random() < (0.6 if name else 0.15):  # nothing of the identity is told: a name stands for it
            keep |= dict.fromkeys(IDENTITY, False)
        text = person_words(person, name, keep)
        parts.append(text + (" on the left", " on the right")[index] if picture.wide else text)
    kind, name = picture.background
    place = rng.choice(SCENE_WORDS[name]) if kind == "scene" else ""
    prefix = STYLES[picture.style] if picture.style else rng.choice(PREFIXES)
    with_place = "place" in told and rng.random() < 0.9
    return _sentence(picture, parts, prefix, (place or _plain(name)) if with_place else "")


def whole_caption(picture: Picture) -> str:
    """Everything that the picture shows, in one wording. `caption` leaves things out even where it is asked to keep all phrases."""
    parts = [person_words(person, name, {}) for person, name in zip(picture.people, picture.names or (None, None), strict=False)]
    if picture.wide:
        parts = [f"{part} on the {side}" for part, side in zip(parts, ("left", "right"), strict=True)]
    kind, name = picture.background
    prefix = STYLES[picture.style] if picture.style else PREFIXES[0]
    return _sentence(picture, parts, prefix, SCENE_WORDS[name][0] if kind == "scene" else _plain(name))


def _plain(colour: str) -> str:
    return f"on {article(colour)} {colour} background"


def _sentence(picture: Picture, parts: list[str], prefix: str, place: str) -> str:
    if picture.thing:
        thing = f"{article(picture.thing)} {picture.thing}"
        parts = [*parts, f"next to {thing}" if parts else thing]
    joined = (" and " if picture.wide else " ").join(parts)
    return " ".join(part for part in (f"{prefix} {joined}".strip(), place) if part)


def vocabulary() -> list[str]:
    """Every word a caption or a trigger can hold, each to be one token."""
    return [*dict.fromkeys([*_common_words(), *TRIGGERS["woman"], *TRIGGERS["man"], *named_people()])]


def _common_words() -> list[str]:
    phrases = [*PREFIXES, *STYLES.values(), *(phrase for phrases in SCENE_WORDS.values() for phrase in phrases)]
    values = [PLAIN, OBJECTS, HAIR, HAIR_COLOUR, SKIN, GLASSES, FACIAL, EXPRESSION, CLOTHES, CLOTHES_COLOUR]
    rest = (
        "a an the and with without skin hair wearing on in at next to left right background woman man person two people standing "
        "together near of photo picture portrait style cat chair vase monument statue tower sks"
    )
    text = " ".join([*phrases, *(word for words in values for word in words), rest])
    return list(dict.fromkeys(text.split()))


# --- identities -----------------------------------------------------------------------------------------------------------
_PEOPLE = {  # all of held-out combinations: the development set, then the test set
    "rhea": "bun black pale sunglasses none woman", "ines": "big green brown none none woman", "ayla": "wavy pink tan none none woman",
    "tomas": "afro black brown eyepatch beard man", "mira": "big blue tan glasses none woman", "bruno": "mullet blonde dark none none man",
    "selma": "bun blonde pale sunglasses none woman", "nadia": "bob blue brown sunglasses none woman",
    "oskar": "quiff green tan none moustache man", "hugo": "quiff green tan none beard man", "zuri": "long pink tan none none woman",
    "kofi": "spiky pink brown glasses beard man",
    "leif": "spiky brown tan none beard man", "wren": "curly white pale glasses none woman",
    "freya": "long blonde tan sunglasses none woman", "odile": "long black brown sunglasses none woman",
    "dario": "spiky brown tan glasses beard man", "anton": "afro black pale none none man",
    "signe": "long black brown glasses none woman", "malik": "bald brown brown eyepatch moustache man",
    "pavel": "mullet blue brown eyepatch beard man", "tilda": "bob white brown none none woman",
    "calla": "curly brown pale glasses none woman", "ulla": "wavy pink dark none none woman",
}  # fmt: skip
CLOSE = (  # they differ in one thing: hair colour, hair style, facial hair; hair colour, glasses, glasses
    ("rhea", "selma"), ("ayla", "zuri"), ("oskar", "hugo"), ("wren", "calla"), ("leif", "dario"), ("odile", "signe"),
)  # fmt: skip
THINGS = {"juno": "cat", "fara": "chair", "duna": "vase", "isko": "monument"}  # trigger -> class word; drawn in things.py
NEW_STYLES = {"kalle": "dusk", "lorcan": "sketch"}  # trigger -> style, none of STYLES; see compose.py


def identities() -> dict[str, Person]:
    """The 24 shipped identities by trigger word: the first twelve are the development set, the others the test set.

    Each set has three close pairs and six people who are far from all others.
    """
    return {name: Person(*looks.split()) for name, looks in _PEOPLE.items()}
