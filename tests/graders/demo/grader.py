"""Grades exercises/ex02_attention.py."""

import numpy as np

from exercises.grading import exercise, expect, hunt, says


def weights(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


@exercise(
    points=1,
    hints=(
        "exp makes every score positive; what must each be divided by so that they sum to 1 along the axis?",
        "Adding a constant to all scores of a row changes nothing, so subtract one that keeps exp small.",
        "Subtract x.max(axis=axis, keepdims=True), take exp, divide by the sum along the same axis with keepdims=True.",
    ),
)
def test_softmax(answer):
    x = np.random.default_rng(0).normal(size=(2, 3, 4))
    for axis in (1, 0, -1):
        e = np.exp(x)
        got = answer(x, axis=axis)
        mistakes = {
            "the weights sum to 1 over the whole array, not along `axis`": e / e.sum(),
            "these are the logarithms of the weights: take exp": np.log(weights(x, axis)),
            "it ignores `axis`: the weights sum to 1 along another one": weights(x, 2 if axis != -1 else 0),
            "scores are divided by their sum: negative weights; take exp first": x / x.sum(axis, keepdims=True),
        }
        expect(got, weights(x, axis), what="the weights", mistakes=mistakes)
    large = np.array([[1000.0, 1001.0], [-1000.0, -1001.0]])
    got = answer(large, axis=1)
    says(not np.isnan(got).any(), "scores of 1000 make exp overflow: subtract the largest score of each row first")
    expect(got, weights(large, 1), what="the weights of large scores")
    masked = np.array([0.0, -np.inf, 0.0])
    expect(answer(masked, axis=0), np.array([0.5, 0.0, 0.5]), what="the weights beside a score of -inf")
    small = x.astype(np.float32)
    expect(answer(small, axis=2), weights(small, 2), what="the weights of float32 scores")


def attention(q, k, v, offset=None, scale=None):
    (T, D), S = q.shape, len(k)
    visible = np.tri(T, S, S - T if offset is None else offset, dtype=bool)
    scores = q @ k.T * (D**-0.5 if scale is None else scale)
    return weights(np.where(visible, scores, -np.inf), 1) @ v


def attention_by_loops(q, k, v):
    rows = []
    for t in range(len(q)):
        seen = len(k) - len(q) + t + 1
        rows.append(weights(k[:seen] @ q[t] / np.sqrt(q.shape[1]), 0) @ v[:seen])
    return np.stack(rows)


@exercise(
    points=2,
    hints=(
        "With T = S every version agrees. Which T and S does a model with a cache use?",
        "Choose keys that make all visible tokens weigh the same: what is the output then?",
        "With zero keys the output of query t is the mean of v[: S - T + t + 1]. Compare, with T = 1 < S.",
    ),
)
def test_hunt_is_causal(answer):
    hunt(
        answer,
        right={
            "the formula with a mask": attention,
            "a loop over the queries": attention_by_loops,
            "a version in float32": lambda q, k, v: attention(*(x.astype(np.float32) for x in (q, k, v))),
        },
        wrong={
            "the version whose triangle starts in the upper left corner": lambda q, k, v: attention(q, k, v, 0),
            "the version that hides nothing": lambda q, k, v: attention(q, k, v, len(k)),
            "the version in which a token does not see itself unless it is the first": lambda q, k, v: attention(
                q, k, v, max(len(k) - len(q) - 1, 0)
            ),
        },
    )
