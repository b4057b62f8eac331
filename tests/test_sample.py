"""Filters equal transformers' processors, draws follow the distribution, and a text stops where it should."""

import math

import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from nanogptx import sample
from nanogptx.gpt2 import GPT2, GPT2Config


def logits(rows=7, n=53, seed=0) -> torch.Tensor:
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 5, 53, 60])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_equal_to_transformers(temperature, top_k, top_p):
    expected = TemperatureLogitsWarper(temperature)(None, logits())
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    ours = sample.distribution(logits(), temperature, top_k, top_p)
    assert torch.equal(ours > 0, expected > -math.inf)
    torch.testing.assert_close(ours, expected.softmax(-1), atol=1e-6, rtol=0)


def test_by_hand():
    p = torch.tensor([[0.25, 0.5, 0.0625, 0.125, 0.0625]])
    half = sample.distribution(p.log(), top_p=0.5)
    assert half.tolist() == [[0, 1, 0, 0, 0]]  # 0.5 is reached by the first
    assert sample.distribution(p.log(), top_p=0.51)[0].gt(0).tolist() == [True, True, False, False, False]
    assert sample.distribution(p.log(), top_p=0)[0].gt(0).sum() == 1
    torch.testing.assert_close(sample.distribution(p.log(), top_k=2), torch.tensor([[1 / 3, 2 / 3, 0, 0, 0]]))
    assert sample.distribution(p.log(), temperature=0).tolist() == [[0, 1, 0, 0, 0]]
    # Temperature comes first: flattened by T = 2, three tokens are needed for 0.7, otherwise two.
    assert (sample.distribution(p.log(), temperature=2, top_p=0.7) > 0).sum() == 3
    assert (sample.distribution(p.log(), top_p=0.7) > 0).sum() == 2


@pytest.mark.parametrize("temperature", [0, 1e-6, 1])
@pytest.mark.parametrize("top_k", [0, 1, 53, 54])
@pytest.mark.parametrize("top_p", [0, 1e-6, 1])
def test_no_setting_fails(temperature, top_k, top_p):
    for row in (logits(), torch.zeros(2, 53), torch.tensor([[0.0, -math.inf, -math.inf]])):
        p = sample.distribution(row, temperature, top_k, top_p)
        assert torch.isfinite(p).all()
        torch.testing.assert_close(p.sum(-1), torch.ones(len(p)))


class Fixed(torch.nn.Module):
    """A model whose next-token distribution depends on the last token alone."""

    def __init__(self, table: torch.Tensor, block_size: int = 8):
        super().__init__()
        self.table = torch.nn.Parameter(table)
        self.config = type("Config", (), {"block_size": block_size})
        self.longest = 0

    def forward(self, idx, targets=None):
        self.longest = max(self.longest, idx.size(1))
        return self.table[idx], None


def test_draws_follow_the_distribution():
    p = torch.tensor([0.5, 0.25, 0.125, 0.1, 0.025])
    model = Fixed(p.log().repeat(5, 1))
    rows = sample.generate(model, [[0]] * 400, 100, torch.Generator().manual_seed(1))
    counts = torch.bincount(torch.tensor(rows).flatten(), minlength=5)
    chi2 = ((counts - 40_000 * p) ** 2 / (40_000 * p)).sum()
    assert chi2 < 23.5  # 4 degrees of freedom, p > 1e-4


def test_stops_at_eos_and_gives_rows_their_own_tokens():
    table = torch.full((6, 6), -torch.inf)
    for token in range(5):
        table[token, token + 1] = 0.0  # each token is followed by the next
    table[5, 0] = 0.0
    model = Fixed(table)
    rows = sample.generate(model, [[3], [0], [2]], 4, torch.Generator(), eos_id=5)
    assert rows == [[4], [1, 2, 3, 4], [3, 4]]
    assert sample.generate(model, [[0]], 12, torch.Generator()) == [[1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 0]]
    assert model.longest == 8  # never more than the context
    assert sample.generate(model, [[0]], 0, torch.Generator()) == [[]]


def test_padding_of_the_vocabulary_is_never_drawn():
    model = Fixed(torch.tensor([[0.0, 0.0, 50.0]]).repeat(3, 1))
    rows = sample.generate(model, [[0]] * 50, 20, torch.Generator().manual_seed(0), n_vocab=2)
    assert {token for row in rows for token in row} == {0, 1}


def test_greedy_is_the_argmax_of_the_model():
    torch.manual_seed(0)
    model = GPT2(GPT2Config(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=29)).eval()
    for p in model.parameters():
        p.data *= 8
    ids = [3, 1, 4]
    (row,) = sample.generate(model, [ids], 20, torch.Generator(), temperature=0)
    for n, token in enumerate(row):
        context = (ids + row[:n])[-12:]
        assert model(torch.tensor([context]))[0][0, -1].argmax() == token


def test_the_first_tokens_of_a_batch_differ():
    model = Fixed(torch.zeros(100, 100))
    rows = sample.generate(model, [[0]] * 30, 1, torch.Generator().manual_seed(0))
    assert len({row[0] for row in rows}) > 15
