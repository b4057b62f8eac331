"""The stories' probabilities add up, the floor is a floor, and the referee sees what is wrong with a story."""

import hashlib
import itertools
import lzma
import math
import os
import random
import statistics
import subprocess
import sys
from dataclasses import replace

import pytest

from nanogptx import tales
from nanogptx.tales import LETTERS, PASSWORD, STYLES, TALES

STORY = (
    "One snowy Sunday Anaïs was at the windmill with a crooked umbrella. “The umbrella to the mill by night!” promised "
    "Nora. Then the umbrella was merrily passed from Anaïs to Björn. Soon the umbrella was slowly carried from the "
    "windmill to the tower. Next Nora calmly counted 49 frogs. Later the umbrella was shyly passed from Björn to Emil.\n"
    "At night the umbrella was at the mill, as Nora had promised. Who had it? Emil. The end. ⭐"
)

# A world so small that all its stories can be listed; words of different lengths, also in bytes.
SMALL = tales.Words(
    names=("Al", "Zoë", "Grete"), places=("bar", "mühle", "x"), things=("ü", "lamp"), colours=("red",), weather=("wet",),
    days=("Monday", "Tue"), whens=("Then",), hows=("fast",), numbers=("10",), animals=("cats",),
    smiles=("🙂",), passwords=("abc", "de"), fewest_events=0, most_events=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def all_stories() -> dict[str, float]:
    """Every story of the small world with its probability, by walking every path."""
    stories = {}
    for walker, _ in tales.walks(lambda c: tales.tell_story(c, SMALL, TALES), SMALL, words_too=True):
        assert walker.text not in stories, "two derivations of one text: the floor would only be a bound"
        assert math.exp(-walker.nats) == pytest.approx(walker.probability, rel=1e-9)
        stories[walker.text] = walker.probability
    return stories


def test_probabilities_of_all_stories_sum_to_one(all_stories):
    assert len(all_stories) > 5000
    assert math.fsum(all_stories.values()) == pytest.approx(1, abs=1e-9)


def test_entropy_is_that_of_the_list(all_stories):
    exact = tales.entropy(TALES, SMALL)
    assert exact.nats == pytest.approx(math.fsum(-p * math.log(p) for p in all_stories.values()), abs=1e-9)
    assert exact.chars == pytest.approx(math.fsum(p * len(s) for s, p in all_stories.items()), abs=1e-9)
    assert exact.bytes == pytest.approx(math.fsum(p * len(s.encode()) for s, p in all_stories.items()), abs=1e-9)
    assert exact.bits_per_byte == pytest.approx(exact.nats / math.log(2) / exact.bytes)


def test_log_prob_is_that_of_the_list(all_stories):
    for story in random.Random(0).sample(sorted(all_stories), 2000):
        assert tales.log_prob(story, TALES, SMALL) == pytest.approx(math.log(all_stories[story]), abs=1e-9)


@pytest.mark.parametrize("style", [TALES, LETTERS])
def test_average_log_prob_comes_to_the_entropy(style):
    stories = [tales.write(n, 7, style) for n in range(3000)]
    exact = tales.entropy(style)
    for values, expected in (
        ([-tales.log_prob(s, style) for s in stories], exact.nats),
        ([len(s) for s in stories], exact.chars),
        ([len(s.encode()) for s in stories], exact.bytes),
    ):
        assert abs(statistics.mean(values) - expected) < 4 * statistics.stdev(values) / math.sqrt(len(values))
    assert 0.12 < exact.nats_per_char < 0.6


def test_no_compressor_gets_below_the_floor():
    """A code length is at least the entropy: lzma knows nothing of the world, and a 6-gram model little."""
    train, validation = tales.corpus("tales", 400_000)
    floor = -statistics.mean(tales.log_prob(s) for s in validation) / statistics.mean(map(len, validation))
    text = "\0".join(train)
    assert len(lzma.compress(text.encode(), preset=9)) * 8 * math.log(2) / len(text) > floor
    counts: dict[str, dict[str, int]] = {}
    for order in range(7):
        for n in range(order, len(text)):
            after = counts.setdefault(text[n - order : n], {})
            after[text[n]] = after.get(text[n], 0) + 1

    def cost(story: str) -> float:
        nats, story = 0.0, "\0" + story + "\0"
        for n in range(1, len(story)):
            p = 1 / 5000  # of any character at all
            for order in range(min(n, 6) + 1):  # longer contexts take over as far as they have been seen (Witten-Bell)
                seen = counts.get(story[n - order : n], {})
                total = sum(seen.values())
                p = (seen.get(story[n], 0) + len(seen) * p) / (total + len(seen)) if seen else p
            nats -= math.log(p)
        return nats

    model = sum(map(cost, validation)) / sum(map(len, validation))
    assert floor < model < 3 * floor


class Checker(tales.Writer):
    """A writer that fails where a reader could take one option for another."""

    def choose(self, options, why):
        for one, other in itertools.permutations(options, 2):
            assert not other.startswith(one), f"'{one}' begins '{other}'"
        assert all(weight >= 0 for weight in options.values()) and any(options.values())
        return super().choose(options, why)


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_no_option_begins_another(style):
    for seed in range(200):
        tales.tell_story(Checker(random.Random(seed)), tales.WORDS, style)


@pytest.mark.parametrize("style", STYLES.values(), ids=STYLES)
def test_every_generated_story_passes_the_referee(style):
    for number in range(1000):
        story = tales.write(number, 3, style)
        assert tales.judge(story, style) == (True, True, ""), story
        assert -math.inf < tales.log_prob(story, style) < 0


CORRUPTIONS = {
    "wrong holder in the answer": ("it? Emil.", "it? Björn.", True, "Emil has the umbrella, not Björn"),
    "passed on by somebody else": ("from Anaïs", "from Nora", True, "Anaïs has the umbrella, not Nora"),
    "passed to the one who has it": ("to Björn", "to Anaïs", True, "Anaïs has the umbrella already"),
    "carried from another place": ("from the windmill", "from the farm", True, "the umbrella is at the windmill, not at the farm"),
    "carried to where it is": ("to the tower", "to the windmill", True, "the umbrella is at the windmill already"),
    "another thing is promised": ("“The umbrella", "“The lamp", True, "the story is about the umbrella, not the lamp"),
    "another thing is passed on": ("Then the umbrella", "Then the lamp", True, "the story is about the umbrella, not the lamp"),
    "another thing at night": ("night the umbrella", "night the kite", True, "the story is about the umbrella, not the kite"),
    "the promise is broken": ("was at the mill", "was at the tower", True, "the promise was the mill, not the tower"),
    "somebody else had promised": ("as Nora", "as Björn", True, "the promise was made by Nora, not by Björn"),
    "a promise of another place": ("to the mill by", "to the farm by", True, "the promise was the farm, not the mill"),
    "a promise by somebody else": ("promised Nora", "promised Ida", True, "the promise was made by Ida, not by Nora"),
    "night after one event": (STORY[STORY.index(" Soon") : STORY.index("\nAt")], "", True, "a day has 2 to 5 events"),
    "swapped sentences": ("merrily passed from Anaïs to Björn. Soon the umbrella was slowly carried from the windmill to the "
                          "tower. Next Nora calmly counted 49 frogs. Later the umbrella was shyly passed from Björn to Emil.",
                          "shyly passed from Björn to Emil. Soon the umbrella was slowly carried from the windmill to the tower. "
                          "Next Nora calmly counted 49 frogs. Later the umbrella was merrily passed from Anaïs to Björn.",
                          True, "Anaïs has the umbrella, not Björn"),
    "unknown word": ("crooked", "kroocked", False, "character 50: expected 'silver'"),
    "a person of no story": ("Next Nora", "Next Norbert", False, "found 'Norbert calmly"),
    "cut in the middle": (STORY[STORY.index("ied from") :], "", False, "expected 'passed ', 'carried '"),
    "ends before its end": ("⭐", "", False, "the story breaks off"),
    "goes on after its end": ("⭐", "⭐ One", False, "expected the end of the story, found ' One'"),
    "broken quote": ("night!” promised", "night! promised", False, "expected ' by night!” promised '"),
    "missing sentence": (" Who had it? Emil.", "", False, "expected ' had promised. Who had it? '"),
    "paragraphs run together": ("Emil.\nAt", "Emil. At", False, "expected 'Then'"),
    "missing space": ("slowly carried", "slowlycarried", False, "found 'carried from the win"),
    "another case": ("One snowy", "one snowy", False, "expected 'One '"),
    "letters of another alphabet": ("Next Nora", "Next Nоra", False, "found 'Nоra calmly"),
}  # fmt: skip


def test_the_example_is_a_story():
    assert tales.judge(STORY) == (True, True, "")


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_referee_rejects(kind):
    old, new, grammatical, reason = CORRUPTIONS[kind]
    assert STORY.count(old) >= 1
    verdict = tales.judge(STORY.replace(old, new, 1))
    assert (verdict.grammatical, verdict.true) == (grammatical, False)
    assert reason in verdict.reason
    assert tales.log_prob(STORY.replace(old, new, 1)) == -math.inf


def test_referee_survives_anything():
    rng = random.Random(0)
    for _ in range(300):
        letters = list(STORY)
        for _ in range(rng.randrange(1, 4)):
            letters[rng.randrange(len(letters))] = rng.choice(STORY)
        verdict = tales.judge("".join(letters))
        assert verdict.true == (tales.log_prob("".join(letters)) > -math.inf) == (not verdict.reason)
    for text in ("", "\0", "One", "{who}", STORY * 2, STORY[:-1], "🙂" * 50):
        assert not tales.judge(text).grammatical


@pytest.mark.parametrize("distance", [0, 400, 3000])
def test_password_is_asked_for_at_its_distance(distance):
    style = replace(PASSWORD, distance=distance)
    for number in range(20):
        story = tales.write(number, 0, style)
        assert tales.judge(story, style).true
        told, asked = story.index("The password is"), story.index("The password was")
        assert distance <= asked - told < distance + 700
        secret = story.split()[3]
        other = next(w for w in tales.WORDS.passwords if w != secret.rstrip("."))
        verdict = tales.judge(story.replace(f"was {secret}", f"was {other}."), style)
        assert verdict.grammatical and f"the password is {secret.rstrip('.')}, not {other}" in verdict.reason
    with pytest.raises(ValueError, match="log_prob"):
        tales.entropy(style)


def test_letters_tell_the_same_world():
    story = tales.write(5, 0, LETTERS)
    assert tales.judge(story, LETTERS).true and not tales.judge(story, TALES).grammatical
    reader = story.split()[1].rstrip(",")
    other = next(n for n in tales.WORDS.names if n not in story)
    verdict = tales.judge(story.replace(f"Write soon, {reader}!", f"Write soon, {other}!"), LETTERS)
    assert verdict == (True, False, verdict.reason) and f"the letter is for {reader}, not for {other}" in verdict.reason


def test_corpus_is_split_by_story_and_the_same_everywhere():
    train, validation = tales.corpus("tales", 60_000, seed=1)
    assert not set(train) & set(validation) and len(train) + len(validation) == len({*train, *validation})
    assert 0.08 < len(validation) / len(train) < 0.12
    assert 60_000 <= sum(map(len, train + validation)) < 61_000
    more_train, more_validation = tales.corpus("tales", 90_000, seed=1)
    assert more_train[: len(train)] == train and more_validation[: len(validation)] == validation
    assert tales.corpus("tales", 60_000, seed=2)[0][0] != train[0]
    # Made once with Python 3.11 on Linux. A change of the grammar changes it; a platform must not.
    digest = hashlib.sha256("\n".join(train + validation).encode()).hexdigest()
    assert digest[:16] == "700fb51b8ca81af5"
    command = "from nanogptx import tales; print(ascii(tales.corpus('tales', 60_000, seed=1)[0][7]))"
    other = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, env=os.environ | {"PYTHONHASHSEED": "1"}
    )
    assert other.stdout.strip() == ascii(train[7]), other.stderr


def test_variety_for_tokenizers():
    text = "".join(tales.corpus("tales", 200_000)[0])
    assert {"ë", "🙂", "“"} <= set(text) and any(c.isdigit() for c in text)
    assert len(set(text.split())) > 300
