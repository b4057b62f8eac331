"""Chapter 02, attention: write the bodies, then `pytest exercises/test_ex02_attention.py`."""

import numpy as np


def softmax(x, axis):
    """Turn scores into weights: positive numbers that sum to 1 along `axis`.

    x: array of floats, any shape. Returns an array of the same shape and dtype. Scores may be large (1000.0): no
    overflow, no NaN. A score of -inf gets the weight 0.

    >>> softmax(np.array([[0.0, 0.0], [1000.0, -np.inf]]), axis=1)
    array([[0.5, 0.5],
           [1. , 0. ]])

    Level 1 of 3, 10 minutes, lesson 02 section 2.
    """
    raise NotImplementedError


def hunt_is_causal(attention):
    """A bug hunt: write the test that catches a mask in the wrong corner.

    `attention(q, k, v)` is somebody's causal attention: q (T, D), k and v (S, D) with S >= T, returns (T, D). The
    queries are the *last* T of the S tokens. With a KV cache T is 1 and S grows, yet fused kernels have drawn the
    triangle from the upper left, so that the newest token saw only the oldest one (pytorch/pytorch issue 103082).

    Call `attention` with inputs of your choice and `assert` what must be true of its output, so that your test passes
    correct versions, however they are written, and fails wrong ones. For example, this test passes everything:

    >>> def hunt_nothing(attention):
    ...     q, k, v = np.ones((2, 4)), np.ones((2, 4)), np.ones((2, 4))
    ...     assert attention(q, k, v).shape == (2, 4)

    Level 2 of 3, 20 minutes, lesson 02 section 4.
    """
    raise NotImplementedError
