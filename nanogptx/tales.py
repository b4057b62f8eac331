"""Tales: a small world of stories whose entropy is known exactly.

A language model needs text, and to judge the model you would like to know how well a perfect one could do. Real text
keeps that secret. Here the text comes from a short program that draws words with known probabilities: three people
walk between three places and hand two things to each other, and at night somebody asks who has what, and where.

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

    In one list no word may begin another one, nor (for `names`) be the same: a reader must know where a word ends.
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
    colours: tuple[str, ...] = tuple(
        "silver golden paper red tiny wooden broken spotted blue green "
        "heavy shiny dusty striped velvet painted crooked yellow purple warm".split()
    )
    weather: tuple[str, ...] = tuple(
        "rainy sunny windy snowy foggy stormy chilly bright cloudy frosty misty gloomy mild damp calm warm".split()
    )
    days: tuple[str, ...] = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())
    whens: tuple[str, ...] = tuple("Then Soon Later Next Afterwards Meanwhile Suddenly Presently".split())
    hows: tuple[str, ...] = tuple(
        "quickly slowly gladly quietly proudly bravely kindly shyly calmly boldly "
        "sleepily cheerfully carefully politely secretly merrily gently wisely lazily eagerly".split()
    )
    moods: tuple[str, ...] = tuple(
        "lovely strange perfect terrible wonderful funny splendid curious charming dreadful "
        "marvellous pretty clever noble peculiar magnificent beautiful silly fine grand".split()
    )
    numbers: tuple[str, ...] = tuple(str(n) for n in range(10, 100))
    animals: tuple[str, ...] = tuple(
        "geese goats ducks foxes rabbits owls hedgehogs kittens beetles butterflies "
        "snails horses puppies frogs swans robins squirrels donkeys lambs mice".split()
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

    opening: str = "One {weather} {day} "
    owner: str = "{who} was at the {place} with a {colour} {thing}"
    idler: str = "{who} was at the {place} with {number} {animals}"
    joins: tuple[str, str, str] = (", ", " and ", ".")
    promise: str = " “To the {place} by night!” promised {who}."
    event: str = "{when} {who} {how} "
    walk: str = "walked to the "
    give: str = "gave the "
    count: str = "counted "
    met: str = " and met "
    praise: str = ". “A {mood} {thing}!” said {whom}."
    counted: str = "{number} {animals}."
    night: str = "At night {who} came to the {place}."
    question: str = " Who had the {thing}? {who}, at the {place}."
    closing: str = " The end. {smile}"
    told: str = ""  # a password, told before all else ...
    asked: str = ""  # ... and asked for at the end
    distance: int = 0  # how many characters lie between the two, at least


TALES = Style()
PASSWORD = Style(told="The password is {password}. ", asked=" The password was {password}.", distance=400)
LETTERS = Style(
    opening="Dear {reader},\nall is well this {weather} {day}! ",
    owner="Your friend {who} waits at the {place}, holding one {colour} {thing}",
    idler="your friend {who} waits at the {place}, feeding {number} {animals}",
    joins=(". ", "; ", "."),
    promise=" To the {place} before dark: so swore {who}.",
    event="{when} {who} has {how} ",
    walk="gone over to the ",
    give="handed on the ",
    count="drawn ",
    met=", finding ",
    praise=", calling “Oh {mood} {thing}!” to {whom}.",
    counted="{number} {animals} for you.",
    night="It is dark now, and {who} is at the {place}.",
    question=" You ask for the {thing}? It is {who}'s, at the {place}.",
    closing=" {smile} Write soon, {reader}!",
)
STYLES = {"tales": TALES, "letters": LETTERS, "password": PASSWORD}


# ----------------------------------------------------------------------------------------------------------------------
# What may stand in a slot, besides a plain string (which is said) and a tuple (any of its words, equally likely)


class New(NamedTuple):
    """One of `words` that is not yet `taken`, all equally likely."""

    words: tuple[str, ...]
    taken: tuple[str, ...]


class Choice(NamedTuple):
    """Options with weights, after which the story may go on differently.

    Weight 0 marks what the grammar allows and the world forbids; `why` then tells the reason (`{}` is the option).
    """

    weights: dict[str, float]
    why: str = ""


def fact(truth: str, options: tuple[str, ...], why: str) -> Choice:
    """A slot in which only `truth` is true: it has probability 1 and carries no information."""
    return Choice({option: float(option == truth) for option in options}, why)


def equal(options: tuple[str, ...]) -> Choice:
    return Choice(dict.fromkeys(options, 1.0))


# ----------------------------------------------------------------------------------------------------------------------
# The world, and the program that tells a story of it


class World(NamedTuple):
    """Who is where, with what. People, places and things are numbered in the order in which the story names them."""

    people: tuple[str, ...]
    places: tuple[str, ...]
    things: tuple[str, ...]
    at: tuple[int, ...]  # at[person] is a place
    holder: tuple[int, ...]  # holder[thing] is a person
    promise: tuple[int, int]  # who will be where at night
    reader: str = ""  # of a letter
    password: str = ""
    events: int = 0

    def move(self, person: int, place: int) -> "World":
        return self._replace(at=self.at[:person] + (place,) + self.at[person + 1 :])

    def hand(self, thing: int, person: int) -> "World":
        return self._replace(holder=self.holder[:thing] + (person,) + self.holder[thing + 1 :])

    def beside(self, person: int) -> list[int]:
        return [p for p in range(len(self.people)) if p != person and self.at[p] == self.at[person]]


def tell_opening(c: "Teller", words: Words, style: Style) -> World:
    """Three people, each at a place of their own, two of them with a thing; one promises where to be at night."""
    password = c.tell(style.told, password=words.passwords).get("password", "")
    got = c.tell(style.opening, reader=New(words.names, ()), weather=words.weather, day=words.days)
    reader = got.get("reader", "")
    taken = (reader,) if reader else ()
    people, places, things = (), (), ()
    for sentence, join in zip((style.owner, style.owner, style.idler), style.joins, strict=True):
        got = c.tell(
            sentence + join,
            who=New(words.names, taken + people),
            place=New(words.places, places),
            colour=words.colours,
            thing=New(words.things, things),
            number=words.numbers,
            animals=words.animals,
        )
        people, places = people + (got["who"],), places + (got["place"],)
        things += (got["thing"],) if "thing" in got else ()
    got = c.tell(style.promise, place=equal(places), who=equal(people))
    promise = (people.index(got["who"]), places.index(got["place"]))
    return World(people, places, things, (0, 1, 2), (0, 1), promise, reader, password)


def tell_event(c: "Teller", world: World, words: Words, style: Style) -> World:
    """Somebody walks, gives a thing to somebody at the same place, or counts animals."""
    name = c.tell(style.event, when=words.whens, who=equal(world.people), how=words.hows)["who"]
    who = world.people.index(name)
    can_give = who in world.holder and world.beside(who)
    weights = {style.walk: 2.0, style.give: 3.0 * bool(can_give), style.count: 2.0}
    did = c.pick(Choice(weights, f"{name} has nothing to give, or nobody to give it to"))
    if did == style.walk:
        world = tell_walk(c, world, who, style)
    elif did == style.give:
        world = tell_give(c, world, who, words, style)
    else:
        c.tell(style.counted, number=words.numbers, animals=words.animals)
    return world._replace(events=world.events + 1)


def tell_walk(c: "Teller", world: World, who: int, style: Style) -> World:
    name, here = world.people[who], world.at[who]
    place = c.pick(Choice({p: float(i != here) for i, p in enumerate(world.places)}, f"{name} is already at the {{}}"))
    world = world.move(who, world.places.index(place))
    others = [p for p in world.people if p != name]
    meetings = ["nobody."] + [
        " and ".join(some) + "." for n in range(1, len(others) + 1) for some in itertools.combinations(others, n)
    ]
    truth = " and ".join(world.people[p] for p in world.beside(who)) or "nobody"
    c.say(style.met)
    c.pick(fact(truth + ".", tuple(meetings), f"{name} meets {truth} at the {place}, not {{}}"))
    return world


def tell_give(c: "Teller", world: World, who: int, words: Words, style: Style) -> World:
    name, beside = world.people[who], world.beside(who)
    held = {thing: float(world.holder[i] == who) for i, thing in enumerate(world.things)}
    thing = c.pick(Choice(held, f"the {{}} is not with {name}"))
    c.say(" to ")
    near = {person: float(i in beside) for i, person in enumerate(world.people)}
    whom = c.pick(Choice(near, f"{{}} is not at the {world.places[world.at[who]]} with {name}"))
    c.tell(
        style.praise,
        mood=words.moods,
        thing=fact(thing, world.things, f"{name} gave the {thing}, not the {{}}"),
        whom=fact(whom, world.people, f"{name} gave the {thing} to {whom}, not to {{}}"),
    )
    return world.hand(world.things.index(thing), world.people.index(whom))


def tell_night(c: "Teller", world: World, words: Words, style: Style) -> None:
    """The promise is kept, and somebody asks who has one of the things, and where."""
    who, where = world.promise
    name, place = world.people[who], world.places[where]
    c.tell(
        style.night,
        who=fact(name, world.people, f"the promise was made by {name}, not by {{}}"),
        place=fact(place, world.places, f"{name} promised to be at the {place}, not at the {{}}"),
    )
    world = world.move(who, where)
    before, after = style.question.split("{thing}")
    c.say(before)
    thing = c.pick(equal(world.things))
    holder = world.holder[world.things.index(thing)]
    name, place = world.people[holder], world.places[world.at[holder]]
    c.tell(
        after,
        who=fact(name, world.people, f"the {thing} is with {name}, not with {{}}"),
        place=fact(place, world.places, f"{name} is at the {place}, not at the {{}}"),
    )
    password = fact(world.password, words.passwords, f"the password is {world.password}, not {{}}")
    c.tell(style.asked, password=password)
    reader = fact(world.reader, (world.reader, *words.names), f"the letter is for {world.reader}, not for {{}}")
    c.tell(style.closing, smile=words.smiles, reader=reader)


def tell_step(c: "Teller", world: World, words: Words, style: Style) -> World | None:
    """One more event, or a new line and the night (then there is no world left to go on with)."""
    low, high = words.fewest_events, words.most_events
    if style.told:
        stop, why = float(c.at >= style.distance), f"the night comes after {style.distance} characters"
    else:  # every number of events from low to high is equally likely
        stop = 0.0 if world.events < low else 1 / max(1, high - world.events + 1)
        why = f"a day has {low} to {high} events"
    if c.pick(Choice({" ": 1 - stop, "\n": stop}, why)) == "\n":
        return tell_night(c, world, words, style)
    return tell_event(c, world, words, style)


def tell_story(c: "Teller", words: Words, style: Style) -> None:
    world = tell_opening(c, words, style)
    while world is not None:
        world = tell_step(c, world, words, style)


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

    def pick(self, slot: "str | tuple[str, ...] | New | Choice") -> str:
        """Fill one slot; returns its word."""
        if isinstance(slot, Choice):
            return self.choose(*slot)
        words, taken = slot if isinstance(slot, New) else (slot, ())
        return self.choose({word: float(word not in taken) for word in words}, "{} is in this story already")

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
        if not options[option]:
            self.untrue.append(f"{why.format(option)} (character {self.at})")
        self.nats -= math.log(options[option] / sum(options.values())) if options[option] else -math.inf
        self.say(option)
        return option

    def fail(self, expected: str) -> None:
        found = self.story[self.at : self.at + 20]
        found = f"found '{found}'" if found else "the story breaks off"
        raise Ungrammatical(f"character {self.at}: expected {expected}, {found}")


class Walker(Teller):
    """Takes the path `script` (the number of the option at each fork, after it always 0) and notes the other ones.

    With `words_too` every choice is a fork. Without, only a `Choice` is: a word from a tuple or a `New` changes nothing
    in what follows but letters, so a stand-in takes its place, which counts as long as these words are on average.
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
            words = self.lists[(ord(char) - STAND_IN) // 64] if STAND_IN <= ord(char) < STAND_IN + 6400 else (char,)
            self.chars += sum(map(len, words)) / len(words)
            self.bytes += sum(len(word.encode()) for word in words) / len(words)

    def pick(self, slot) -> str:
        if self.words_too or isinstance(slot, Choice):
            return super().pick(slot)
        words, taken = slot if isinstance(slot, New) else (slot, ())
        self.nats += math.log(len(words) - len(taken))
        stand_in = chr(STAND_IN + 64 * self.lists.index(words) + len(taken))
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


STAND_IN = 0xE000  # Unicode's private use area: 64 stand-ins for each list of words


def walks(part: Callable[[Walker], object], words: Words, words_too: bool = False) -> Iterator[tuple[Walker, object]]:
    """Every way through one part of the program, each with what the part returned."""
    scripts = [()]
    while scripts:
        walker = Walker(words, scripts.pop(), words_too)
        result = part(walker)
        scripts += walker.untried
        yield walker, result


# ----------------------------------------------------------------------------------------------------------------------
# What the rest of the book uses


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
            later = rest(world._replace(promise=(0, 0))) if world else (0.0, 0.0, 0.0)  # all promises cost the same
            own = (walker.nats, walker.chars, walker.bytes)
            total = tuple(t + walker.probability * (o + n) for t, o, n in zip(total, own, later, strict=True))
        return total

    @functools.cache
    def rest(world: World) -> tuple[float, ...]:
        return average(lambda c: tell_step(c, world, words, style))

    return Entropy(*average(lambda c: tell_opening(c, words, style)))


def write(number: int, seed: int = 0, style: Style = TALES, words: Words = WORDS) -> str:
    """Story `number` of the endless series `seed`, the same on every platform."""
    writer = Writer(random.Random(f"tales {seed} {number}"))
    tell_story(writer, words, style)
    return "".join(writer.pieces)


def log_prob(story: str, style: Style = TALES, words: Words = WORDS) -> float:
    """The exact natural logarithm of the probability of a whole story (text and end); -inf if it cannot occur."""
    reader = Reader(story)
    try:
        read_story(reader, words, style)
    except Ungrammatical:
        return -math.inf
    return -reader.nats


class Verdict(NamedTuple):
    grammatical: bool  # it follows the sentences of the style to its end
    true: bool  # and says nothing that its own world contradicts
    reason: str  # what is wrong first, "" when nothing is


def judge(story: str, style: Style = TALES, words: Words = WORDS) -> Verdict:
    """The referee: is it a story of this style, and is it true to its own world? If not, why."""
    reader = Reader(story)
    try:
        read_story(reader, words, style)
    except Ungrammatical as error:
        return Verdict(False, False, str(error))
    return Verdict(True, not reader.untrue, reader.untrue[0] if reader.untrue else "")


def read_story(reader: Reader, words: Words, style: Style) -> None:
    tell_story(reader, words, style)
    if reader.at < len(reader.story):
        reader.fail("the end of the story")


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
    every = list(stories)
    return [s for n, s in enumerate(every) if n % 10 < 9], [s for n, s in enumerate(every) if n % 10 == 9]
