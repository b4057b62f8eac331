# Built by lessons/src/00_tales.md: change it there, then run python lessons/build.py build 00
"""Tales: a small world of stories whose entropy is known exactly.

A language model needs text, and to judge the model you would like to know how well a perfect one could do. Real text
keeps that secret. Here the text comes from a short program that draws words with known probabilities: a thing is
passed from hand to hand and carried from place to place, and at night somebody asks where it is, and with whom.

The program is written once, as functions that tell a story to a `Teller`, and read in three ways:

    Writer   draws every word at random                -> a story
    Reader   finds every word in a given story         -> its exact log-probability, and what is wrong with it
    Walker   takes one given path, and notes the forks -> the exact entropy; every story of a smaller world

It works because a choice is spoken as soon as it is made, and because no word that may stand at a place is the
beginning of another one that may stand there. So a story has one derivation only, and its probability is a product.

Entropy as the floor of any code: Shannon, "A Mathematical Theory of Communication" (1948), sections 6, 7 and 9.
"""

import functools
import itertools
import math
import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

# ----------------------------------------------------------------------------------------------------------------------
# The words and the sentences


@dataclass(frozen=True)
class Words:
    """The vocabulary of the world; a smaller one makes a world small enough to list all its stories.

    In one list no word may begin another one: a reader must know where a word ends.
    """

    names: tuple[str, ...] = tuple(
        "Mira Tomás Zoë Björn Anaïs Oskar Lucía Pavel Nora Hugo Emil Sofie Karim Yuki Ida Felix "
        "Greta Jonas Leila Mateo Noémi Otto Petra Rosa Samir Theo Uma Viktor Wanda Xavi Inés Amir".split()
    )
    places: tuple[str, ...] = tuple(
        "mill harbour market lighthouse bakery library river castle orchard bridge "
        "school tower garden station windmill theatre bookshop beach farm fountain".split()
    )
    things: tuple[str, ...] = tuple(
        "lamp kite teapot drum basket snowglobe raincoat honeycake notebook umbrella flute clock ladder blanket "
        "compass button candle mirror puppet postcard toothbrush pillow kettle violin whistle suitcase telescope "
        "hammer spoon marble feather scarf".split()
    )
    colours: tuple[str, ...] = tuple("silver golden paper red tiny wooden broken spotted blue shiny crooked".split())
    weather: tuple[str, ...] = tuple("rainy sunny windy snowy foggy stormy chilly cloudy frosty misty mild".split())
    days: tuple[str, ...] = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
    whens: tuple[str, ...] = tuple("Then Soon Later Next Afterwards Meanwhile Suddenly Presently".split())
    hows: tuple[str, ...] = tuple("quickly slowly gladly quietly proudly bravely kindly shyly calmly merrily".split())
    numbers: tuple[str, ...] = tuple(str(n) for n in range(10, 100))
    animals: tuple[str, ...] = tuple(
        "geese goats ducks foxes owls hedgehogs kittens beetles snails horses frogs".split()
    )
    smiles: tuple[str, ...] = ("🙂", "🌙", "⭐", "❤", "🎈", "🌻", "🍎", "🐝")
    passwords: tuple[str, ...] = tuple(
        "bluebird candlestick dragonfly earthquake firework grasshopper horseshoe icebreaker jellyfish keyhole "
        "ladybird moonlight nightfall oatmeal pineapple quicksand rainbow sunflower toadstool waterfall".split()
    )
    fewest_events: int = 2  # what happens between morning and night
    most_events: int = 5


WORDS = Words()


@dataclass(frozen=True)
class Style:
    """The sentences of one way of telling. Every style fills the same `{slots}`, so it tells the same facts."""

    opening: str = "One {weather} {day} {who} was at the {place} with a {colour} {thing}."
    promise: str = " “The {thing} to the {place} by night!” promised {who}."
    event: str = "{when} {what}"  # what: `thing`, or somebody who `counts`
    counts: str = " {how} counted {number} {animals}."
    thing: str = "the "
    moves: str = "{thing} was {how} {move}"  # move: the beginning of one of these two, which then goes on
    passed: tuple[str, str] = ("passed ", "from {who} to {to}.")
    carried: tuple[str, str] = ("carried ", "from the {place} to the {to}.")
    night: str = (
        "At night the {thing} was at the {place}, as {who} had promised. Who had it? {holder}. The end. {smile}"
    )
    told: str = ""  # a password, told before all else ...
    asked: str = ""  # ... and asked for at the end
    distance: int = 0  # how many characters lie between the two, at least


TALES = Style()
PASSWORD = Style(told="The password is {password}. ", asked=" The password was {password}.", distance=400)
LETTERS = Style(
    opening="Dear {reader},\nall is well this {weather} {day}. Your {who}, at the {place}, found one {colour} {thing}!",
    promise=" It must go to the {place} before dark: so swore {who}.",
    counts=" has {how} drawn {number} {animals} for you.",
    thing="our ",
    moves="{thing} has {how} {move}",
    passed=("left ", "{who} for {to}."),
    carried=("crossed ", "from the {place} to the {to}."),
    night="Now {holder} keeps the {thing}. It is at the {place}; so {who} spoke true. {smile} Write soon, {reader}!",
)
STYLES = {"tales": TALES, "letters": LETTERS, "password": PASSWORD}


# ----------------------------------------------------------------------------------------------------------------------
# What may stand in a slot, besides a tuple (any of its words, all equally likely)


class Other(NamedTuple):
    """One of `words`, all equally likely, but not `than`."""

    words: tuple[str, ...]
    than: str
    why: str


class Choice(NamedTuple):
    """Options with weights, after which the story may go on differently.

    Weight 0 marks what the grammar allows and the world forbids; `why` then tells the reason (`{}` is the option).
    """

    weights: dict[str, float]
    why: str = ""


def fact(truth: str, words: tuple[str, ...], why: str) -> Choice:
    """A slot in which only `truth` is true: it has probability 1 and carries no information."""
    return Choice(dict.fromkeys(words, 0.0) | {truth: 1.0}, why)


# ----------------------------------------------------------------------------------------------------------------------
# The world, and the program that tells a story of it


class World(NamedTuple):
    """Who has the thing, where it is, and who promised where it will be at night."""

    thing: str
    holder: str
    place: str
    promise: tuple[str, str]  # a place, and who said so
    reader: str = ""  # of a letter
    password: str = ""
    events: int = 0


def tell_opening(teller: "Teller", words: Words, style: Style) -> World:
    """Somebody has a thing at a place, and somebody promises where it will be at night."""
    password = teller.tell(style.told, password=words.passwords).get("password", "")
    lists = {"weather": words.weather, "day": words.days, "colour": words.colours, "thing": words.things}
    got = teller.tell(style.opening, reader=words.names, who=words.names, place=words.places, **lists)
    world = World(got["thing"], got["who"], got["place"], ("", ""), got.get("reader", ""), password)
    got = teller.tell(style.promise, thing=the_thing(world, words), place=words.places, who=words.names)
    return world._replace(promise=(got["place"], got["who"]))


def the_thing(world: World, words: Words) -> Choice:
    return fact(world.thing, words.things, f"the story is about the {world.thing}, not the {{}}")


def the_holder(world: World, words: Words) -> Choice:
    return fact(world.holder, words.names, f"{world.holder} has the {world.thing}, not {{}}")


def tell_event(teller: "Teller", world: World, words: Words, style: Style) -> World:
    """The thing is passed on or carried on (two times in three), or somebody counts animals."""
    anybody = dict.fromkeys(words.names, 1 / len(words.names))
    what = teller.tell(style.event, when=words.whens, what=Choice({style.thing: 2.0} | anybody))["what"]
    if what == style.thing:
        world = tell_move(teller, world, words, style)
    else:
        teller.tell(style.counts, how=words.hows, number=words.numbers, animals=words.animals)
    return world._replace(events=world.events + 1)


def tell_move(teller: "Teller", world: World, words: Words, style: Style) -> World:
    move = Choice({style.passed[0]: 1.0, style.carried[0]: 1.0})
    move = teller.tell(style.moves, thing=the_thing(world, words), how=words.hows, move=move)["move"]
    if move == style.passed[0]:
        to = Other(words.names, world.holder, f"{world.holder} has the {world.thing} already")
        return world._replace(holder=teller.tell(style.passed[1], who=the_holder(world, words), to=to)["to"])
    place = fact(world.place, words.places, f"the {world.thing} is at the {world.place}, not at the {{}}")
    to = Other(words.places, world.place, f"the {world.thing} is at the {world.place} already")
    return world._replace(place=teller.tell(style.carried[1], place=place, to=to)["to"])


def tell_night(teller: "Teller", world: World, words: Words, style: Style) -> None:
    """The promise is kept, and somebody asks who has the thing."""
    (place, who), reader, password = world.promise, world.reader, world.password
    facts = {
        "thing": the_thing(world, words),
        "holder": the_holder(world, words),
        "place": fact(place, words.places, f"the promise was the {place}, not the {{}}"),
        "who": fact(who, words.names, f"the promise was made by {who}, not by {{}}"),
        "reader": fact(reader, words.names, f"the letter is for {reader}, not for {{}}"),
        "password": fact(password, words.passwords, f"the password is {password}, not {{}}"),
    }
    teller.tell(style.night + style.asked, smile=words.smiles, **facts)


def tell_step(teller: "Teller", world: World, words: Words, style: Style) -> World | None:
    """One more event, or a new line and the night (then there is no world left to go on with)."""
    low, high = words.fewest_events, words.most_events
    if style.told:
        stop, why = float(teller.at >= style.distance), f"the night comes after {style.distance} characters"
    else:  # every number of events from low to high is equally likely
        stop = 0.0 if world.events < low else 1 / max(1, high - world.events + 1)  # max: a false story may go on
        why = f"a day has {low} to {high} events"
    if teller.pick(Choice({" ": 1 - stop, "\n": stop}, why)) == "\n":
        return tell_night(teller, world, words, style)
    return tell_event(teller, world, words, style)


def tell_story(teller: "Teller", words: Words, style: Style) -> None:
    world = tell_opening(teller, words, style)
    while world is not None:
        world = tell_step(teller, world, words, style)


# ----------------------------------------------------------------------------------------------------------------------
# Tellers: what to do with a fixed piece of text (`say`) and with a choice (`choose`)


class Teller:
    """What the program tells its story to; subclasses decide what becomes of the words."""

    def __init__(self):
        self.at = 0  # characters told so far
        self.nats = 0.0  # -ln of the probability of the choices so far

    def say(self, text: str) -> None:
        """Take a piece of text that holds no information."""
        self.at += len(text)

    def choose(self, options: dict[str, float], why: str) -> str:
        """Settle on one of the weighted options, say it and return it."""
        raise NotImplementedError

    def pick(self, slot: tuple[str, ...] | Other | Choice) -> str:
        """Fill one slot; returns its word."""
        if isinstance(slot, Choice):
            return self.choose(*slot)
        words, than, why = slot if isinstance(slot, Other) else (slot, "", "")
        return self.choose({word: float(word != than) for word in words}, why)

    def tell(self, sentence: str, **slots) -> dict[str, str]:
        """Say a sentence and fill its `{slots}` from left to right; returns the word that each one got."""
        got = {}
        for literal, slot, _, _ in string.Formatter().parse(sentence):
            self.say(literal)
            if slot:
                got[slot] = self.pick(slots[slot])
        return got


class Writer(Teller):
    """Draws every choice. `random.Random` seeded with a text gives the same numbers on every platform."""

    def __init__(self, rng: random.Random):
        super().__init__()
        self.rng, self.pieces = rng, []

    def say(self, text: str) -> None:
        super().say(text)
        self.pieces.append(text)

    def choose(self, options: dict[str, float], why: str) -> str:
        total = sum(options.values())
        left = self.rng.random() * total
        for option in (option for option, weight in options.items() if weight):
            if left < options[option]:  # walk along the weights until the drawn point is reached
                break
            left -= options[option]
        self.nats -= math.log(options[option] / total)
        self.say(option)
        return option


def write(number: int, seed: int = 0, style: Style = TALES, words: Words = WORDS) -> str:
    """Story `number` of the endless series `seed`, the same on every platform."""
    writer = Writer(random.Random(f"tales {seed} {number}"))
    tell_story(writer, words, style)
    return "".join(writer.pieces)


class Ungrammatical(ValueError):
    """The text is not a story of this style."""


class Reader(Teller):
    """Follows a given story, and notes every choice that the world forbids."""

    def __init__(self, story: str):
        super().__init__()
        self.story, self.untrue = story, []

    def say(self, text: str) -> None:
        if not self.story.startswith(text, self.at):
            self.fail(f"'{text}'")
        super().say(text)

    def choose(self, options: dict[str, float], why: str) -> str:
        option = next((option for option in options if self.story.startswith(option, self.at)), None)
        if option is None:
            self.fail(", ".join(f"'{option}'" for option in itertools.islice(options, 4)) + " or the like")
        chance = options[option] / sum(options.values())
        if not chance:
            self.untrue.append(f"{why.format(option)} (character {self.at})")
        self.nats += -math.log(chance) if chance else math.inf
        self.say(option)
        return option

    def fail(self, expected: str) -> None:
        found = self.story[self.at : self.at + 20]
        found = f"found '{found}'" if found else "the story breaks off"
        raise Ungrammatical(f"character {self.at}: expected {expected}, {found}")


class Verdict(NamedTuple):
    grammatical: bool  # it follows the sentences of the style to its end
    true: bool  # and says nothing that its own world contradicts
    reason: str  # what is wrong first, "" when nothing is


def read(story: str, style: Style, words: Words) -> tuple[Reader, str]:
    """A reader at the end of the story, and what is ungrammatical about it ("" when nothing is)."""
    reader = Reader(story)
    try:
        tell_story(reader, words, style)
        if reader.at < len(story):
            reader.fail("the end of the story")
    except Ungrammatical as error:
        return reader, str(error)
    return reader, ""


def judge(story: str, style: Style = TALES, words: Words = WORDS) -> Verdict:
    """The referee: is it a story of this style, and is it true to its own world? If not, why."""
    reader, error = read(story, style, words)
    reasons = [error] if error else reader.untrue
    return Verdict(not error, not reasons, reasons[0] if reasons else "")


def log_prob(story: str, style: Style = TALES, words: Words = WORDS) -> float:
    """The exact natural logarithm of the probability of a whole story (text and end); -inf if it cannot occur."""
    reader, error = read(story, style, words)
    return -math.inf if error else -reader.nats


class Walker(Teller):
    """Takes the path `script` (the number of the option at each fork, after it always 0) and notes the other ones.

    With `words_too` every choice is a fork. Without, only a `Choice` is: a word from a tuple or an `Other` changes
    only letters in what follows, so a stand-in takes its place, which counts as long as these words are on average.
    """

    def __init__(self, words: Words, script: tuple[int, ...] = (), words_too: bool = False):
        super().__init__()
        self.lists = [value for value in vars(words).values() if isinstance(value, tuple)]
        self.script, self.words_too, self.forks = script, words_too, 0
        self.untried: list[tuple[int, ...]] = []  # scripts that turn off from this path
        self.probability = 1.0  # of the turns at the forks
        self.chars, self.bytes, self.text = 0.0, 0.0, ""

    def say(self, text: str) -> None:
        super().say(text)
        self.text += text
        for char in text:
            words = self.lists[ord(char) - STAND_IN] if 0 <= ord(char) - STAND_IN < len(self.lists) else (char,)
            self.chars += sum(map(len, words)) / len(words)
            self.bytes += sum(len(word.encode()) for word in words) / len(words)

    def pick(self, slot) -> str:
        if self.words_too or isinstance(slot, Choice):
            return super().pick(slot)
        words, one_less = (slot.words, 1) if isinstance(slot, Other) else (slot, 0)
        self.nats += math.log(len(words) - one_less)
        stand_in = chr(STAND_IN + self.lists.index(words))
        self.say(stand_in)
        return stand_in

    def choose(self, options: dict[str, float], why: str) -> str:
        possible = [option for option, weight in options.items() if weight]
        if self.forks == len(self.script):
            self.untried += [self.script + (n,) for n in range(1, len(possible))]
            self.script += (0,)
        option = possible[self.script[self.forks]]
        self.forks += 1
        self.probability *= options[option] / sum(options.values())
        self.nats -= math.log(options[option] / sum(options.values()))
        self.say(option)
        return option


STAND_IN = 0xE000  # Unicode's private use area: a stand-in for each list of words


def walks(part: Callable[[Walker], object], words: Words, words_too: bool = False) -> Iterator[tuple[Walker, object]]:
    """Every way through one part of the program, each with what the part returned."""
    scripts = [()]
    while scripts:
        walker = Walker(words, scripts.pop(), words_too)
        result = part(walker)
        scripts += walker.untried
        yield walker, result


# ----------------------------------------------------------------------------------------------------------------------
# The floor


class Entropy(NamedTuple):
    """What a story of a style holds on average: information, and length."""

    nats: float
    chars: float
    bytes: float

    @property
    def nats_per_char(self) -> float:
        return self.nats / self.chars

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes


def entropy(style: Style = TALES, words: Words = WORDS) -> Entropy:
    """The exact entropy and mean length of a story: the floor that no model's average loss gets below.

    By the chain rule a part costs what its own choices cost, plus the average cost of what follows. What follows
    depends on the world alone, so every world is worked out once. (Shannon 1948, section 6.)
    """
    if style.told:
        raise ValueError("how a password story goes on depends on its letters: average -log_prob over stories instead")

    def average(part: Callable[[Walker], World | None]) -> tuple[float, ...]:
        total = (0.0, 0.0, 0.0)
        for walker, world in walks(part, words):
            later = rest(world) if world else (0.0, 0.0, 0.0)
            own = (walker.nats, walker.chars, walker.bytes)
            total = tuple(t + walker.probability * (o + n) for t, o, n in zip(total, own, later, strict=True))
        return total

    @functools.cache
    def rest(world: World) -> tuple[float, ...]:
        return average(lambda teller: tell_step(teller, world, words, style))

    return Entropy(*average(lambda teller: tell_opening(teller, words, style)))


# ----------------------------------------------------------------------------------------------------------------------
# The corpus


def corpus(style: str = "tales", size: int = 6_000_000, seed: int = 0) -> tuple[list[str], list[str]]:
    """About `size` characters of different stories, (training, validation): every tenth one is for validation."""
    stories: dict[str, None] = {}
    chars = 0
    for number in itertools.count():
        if chars >= size:
            break
        story = write(number, seed, STYLES[style])
        if story not in stories:
            chars += len(story)
            stories[story] = None
    return [s for n, s in enumerate(stories) if n % 10 < 9], [s for n, s in enumerate(stories) if n % 10 == 9]
