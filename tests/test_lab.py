"""What lessons share: measurements in a process of their own, training, the two tasks, records."""

import os

import pytest
import torch

from nanogptx import lab


def test_a_race_tells_the_slower_from_the_faster():
    seconds = lab.race("from time import sleep\nnap = 0.002", short="sleep(nap)", long="sleep(10 * nap)", rounds=3)
    assert list(seconds) == ["short", "long"]
    assert 0.002 <= seconds["short"] and 0.02 <= seconds["long"]


def test_what_takes_microseconds_is_repeated():
    seconds = lab.race("numbers = list(range(10_000))", find="numbers.index(0)", sum="sum(numbers)", rounds=3)
    assert 0 < seconds["find"] < seconds["sum"] / 10


def test_the_statements_take_turns_after_a_setup_that_runs_once(tmp_path):
    log = tmp_path / "log"
    write = f"open({str(log)!r}, 'a').write"
    lab.race(
        f"import time; write = {write}; write('s')",
        rounds=3,
        a="write('a'); time.sleep(.006)",
        b="write('b'); time.sleep(.006)",
    )
    assert log.read_text() == "s" + "aabb" + 3 * "ab"


def test_a_race_is_run_without_the_lessons_pins(monkeypatch):
    monkeypatch.setenv("NANOGPTX_PINNED", "PIN_ONE PIN_TWO")
    for name in "PIN_ONE", "PIN_TWO", "NO_PIN":
        monkeypatch.setenv(name, "1")
    code = "import os; pins = {name for name in os.environ if name in ('PIN_ONE', 'PIN_TWO', 'NO_PIN')}; assert pins == {'NO_PIN'}, pins"
    lab.race(f"{code}\nprint('a line of its own')", rounds=1, nothing="pass")
    assert os.environ["PIN_ONE"] == "1"


def test_what_fails_in_a_race_is_told():
    with pytest.raises(RuntimeError, match="^ZeroDivisionError: division by zero$"):
        lab.race("x = 0", rounds=1, bad="1 / x")
    with pytest.raises(RuntimeError, match="exit status 3"):
        lab.race("import os", rounds=1, bad="os._exit(3)")


# ----------------------------------------------------------------------------------------------------------------------
# Training, the two tasks, plots, records


def test_training_goes_down_to_the_minimum_at_a_falling_rate():
    place, rates = torch.nn.Parameter(torch.tensor([4.0, -3.0])), []
    model = torch.nn.Module()
    model.place = place

    def loss():
        rates.append(place.detach().clone())
        return (place**2).sum()

    losses = lab.train(model, loss, steps=200, lr=0.1, warmup=10)
    assert len(losses) == 200 and losses[0] == 25 and losses[-1] < 1e-3
    moved = [(b - a).abs().max().item() for a, b in zip(rates, rates[1:])]
    assert moved[0] == pytest.approx(0.01, rel=1e-3)  # the first of ten steps up; Adam's first step is the rate itself
    assert max(moved) < 0.11 and moved[-1] < 0.001


def test_the_two_tasks_by_their_rules():
    idx, near, far = lab.two_tasks(50, 40, torch.Generator().manual_seed(0))
    assert idx.shape == near.shape == far.shape == (50, 40)
    for text, close, distant in zip(idx.tolist(), near.tolist(), far.tolist()):
        assert 16 <= text[0] < 32 and all(token < 16 or token == 32 for token in text[1:])
        for t, token in enumerate(text):
            copied = t >= 5 and token != 32 and text[t - 5] < 16
            assert close[t] == (text[t - 5] if copied else -100)
            assert distant[t] == (text[0] - 16 if token == 32 else -100)
    assert 0.2 < (idx == 32).float().mean() < 0.3


def test_the_tiny_model_stands_where_it_is_told():
    torch.manual_seed(0)
    model, idx = lab.Tiny(33, 16, n_head=4, width=32), torch.randint(33, (2, 9))
    out = model(idx)
    assert out.shape == (2, 9, 16)
    assert not torch.allclose(model(idx, vectors=torch.randn(9, 32)), out, atol=1e-3)
    assert not torch.allclose(model(idx, bias=torch.randn(4, 9, 9)), out, atol=1e-3)
    assert not torch.allclose(model(idx, rotate=lambda q, k: (-q, k)), out, atol=1e-3)
    changed = idx.clone()
    changed[:, -1] = (idx[:, -1] + 1) % 33
    torch.testing.assert_close(model(changed)[:, :-1], out[:, :-1])  # it sees no future
    assert not torch.allclose(model(changed)[:, -1], out[:, -1], atol=1e-3)


def test_errorbars_reach_from_the_lowest_run_to_the_highest():
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    lab.errorbars(ax, [1, 2], [[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]], label="three runs")
    (container,) = ax.containers
    line, _, (bars,) = container
    assert line.get_ydata().tolist() == [3.0, 5.0] and container.get_label() == "three runs"
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[1.0, 6.0], [5.0, 5.0]]


def test_jobs_in_parallel_come_back_in_order():
    assert lab.in_parallel(pow, [(2, 3), (3, 2), (5, 1)]) == [8, 9, 5]


def test_a_record_is_read(monkeypatch, tmp_path):
    (tmp_path / "one.json").write_text('{"command": "...", "results": {"a": [1.5]}}')
    monkeypatch.setattr(lab, "ASSETS", tmp_path)
    assert lab.recorded("one") == {"a": [1.5]}
