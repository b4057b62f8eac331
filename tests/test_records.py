"""What lessons recorded can be made again: a shortened part of each record, by the experiment's own code.

The record of another seed than the one that the lesson trains live; loosely compared, since training magnifies rounding.
"""

import functools
import json

import numpy as np
import pytest
import torch
from test_lessons import ROOT, build

from nanogptx import checkpoint, tales

LESSONS = {lesson.number: lesson for lesson in build.load()}


@functools.cache
def experiment(number):
    """The names that the experiment of a lesson defines."""
    names = {"__name__": "experiment"}
    exec(compile(build.experiment(LESSONS[number]), LESSONS[number].source, "exec"), names)
    return names


def recorded(number):
    return json.loads((ROOT / LESSONS[number].results).read_text(encoding="utf-8"))["results"]


def test_every_record_is_made_again_here():
    here = {name.split("_")[1] for name in globals() if name.startswith("test_") and name.split("_")[1].isdigit()}
    assert {number for number, lesson in LESSONS.items() if build.experiment(lesson)} == here


@pytest.mark.parametrize(
    "lesson", [lesson for lesson in LESSONS.values() if build.experiment(lesson)], ids=lambda x: x.number
)
def test_a_record_is_small_and_says_how_it_was_made(lesson):
    text = (ROOT / lesson.results).read_text(encoding="utf-8")
    assert len(text) < 100_000 and json.loads(text)["command"] == f"python lessons/build.py record {lesson.number}"


def test_03_rope():
    new, old = experiment("03"), recorded("03")["1"]
    model, losses = new["trained"](1)
    np.testing.assert_allclose(losses[::10], old["losses"], atol=0.05)
    for kind, scaling in new["scalings"](8.0).items():
        again = new["near_and_far"](model, 128, scaling)
        np.testing.assert_allclose(again, old["lengths"][kind][new["LENGTHS"].index(128)], rtol=0.2, atol=0.05)


def test_04_alibi():
    new, old = experiment("04"), recorded("04")
    model, losses = new["trained"]("alibi", 1, steps=100)
    np.testing.assert_allclose(losses[::10], old["ALiBi, 100 steps"][1]["losses"], atol=0.05)
    again = new["near_and_far"](model, 128)
    np.testing.assert_allclose(again, old["ALiBi, 100 steps"][1]["lengths"][new["LENGTHS"].index(128)], atol=0.05)


def test_06_tinyllama():
    new, old = experiment("06"), recorded("06")
    assert {arm: new["fitting"](parts) for arm, parts in new["ARMS"].items()} == old["hidden"]
    for arm, seed in (("rotary", 1), ("SwiGLU", 2)):
        _, losses = new["train_arm"](arm, seed, stop=41)
        # Other kernels change the last recorded digit; gate and up exchanged, the loss at step 30 by 0.02.
        np.testing.assert_allclose(losses[::10], old["loss"][arm][seed][:5], atol=0.003)


def test_the_trained_model_is_nearly_as_good_as_can_be():
    """assets/tales, which lessons from 06 on use: it fits its budget, and knows the stories that it was not trained on."""
    folder = ROOT / "nanogptx/assets/tales"
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 4_000_000
    model, tokenizer, _ = checkpoint.load_run(folder, warn=pytest.fail)
    surprise, floor, characters = 0.0, 0.0, 0
    with torch.no_grad():
        for story in tales.corpus(size=300_000)[1][:20]:
            ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(story), tokenizer.eos_id]])
            surprise += model(ids[:, :-1], ids[:, 1:])[1].item() * (ids.shape[1] - 1)
            floor, characters = floor - tales.log_prob(story), characters + len(story)
    assert 0 < (surprise - floor) / characters < 0.005  # nats a character, where the floor is 0.16
