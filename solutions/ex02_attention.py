"""Chapter 02, attention: answers to exercises/ex02_attention.py."""

from collections.abc import Callable

import numpy as np


def log_softmax(x: np.ndarray, axis: int) -> np.ndarray:
    """The logarithms of the softmax weights along `axis`. A loss needs them, and they say more than the weights do.

    A score 1000 below the largest has the weight exp(-1000), which is rounded to 0, but the logarithm of that weight is
    an ordinary number, -1000. So the way does not lead through the weights.

    x: scores, float32 or float64, of any shape. Along `axis` the largest score is finite; others may be -inf, and have
    the logarithm -inf. Scores may be large (5000) in one line and small (-5000) in the next.
    Returns an array of the same shape and dtype.

    >>> log_softmax(np.array([[0.0, -1000.0], [7.0, -np.inf]]), axis=1)
    array([[    0., -1000.],
           [    0.,   -inf]])

    Level 1 of 3, 10 minutes, lesson 02 section 3.
    """
    x = x - x.max(axis=axis, keepdims=True)
    # The largest score is 0 now, so the sum is at least 1: its logarithm is never that of 0.
    return x - np.log(np.exp(x).sum(axis=axis, keepdims=True))


def visible(T: int, S: int, window: int) -> np.ndarray:
    """Who sees whom in sliding-window attention: each token sees `window` tokens, itself and those just before it.

    There are S tokens, and the T queries are the last T of them. A token with fewer than `window` tokens up to itself
    sees all of these. (Does a window of 128 hold 128 tokens or 129? Programs have disagreed: huggingface/transformers
    issue 39408. Here it is 128, and the token itself is one of them.)

    Returns (T, S) booleans: True where query t may look at token s. Raises ValueError if T is larger than S, or if
    `window` is smaller than 1, since then a query would see nothing.

    >>> visible(3, 5, window=2).astype(int)
    array([[0, 1, 1, 0, 0],
           [0, 0, 1, 1, 0],
           [0, 0, 0, 1, 1]])

    Level 1 of 3, 10 minutes, lesson 02 section 5.
    """
    if T > S or window < 1:
        raise ValueError(f"{T} queries, {S} tokens, a window of {window}: some query would see nothing")
    # How far back each token lies, seen from each query: 0 is the query itself, negative is the future.
    back = np.arange(S - T, S)[:, None] - np.arange(S)
    return (back >= 0) & (back < window)


def softmax_with_sink(scores: np.ndarray, sink: np.ndarray) -> np.ndarray:
    """Softmax over the last axis with one score more, the sink, which takes weight and has no value.

    The weights of plain softmax have the sum 1, so a head that finds nothing must still mix something. Here every head
    has one more score, its sink, a learned number (gpt-oss has them). The sink takes part in softmax as if it were one
    more key. Then its weight is thrown away: the other weights stay as they are, and their sum is less than 1.

    scores: (H, T, S), may hold -inf, even whole rows of it: there no key gets any weight. sink: (H,), finite, in the
    same dtype. Both may be large (1000 or -1000). Returns the weights of the keys, (H, T, S), in the same dtype.

    >>> softmax_with_sink(np.array([[[0.0, 0.0], [-np.inf, -np.inf]]]), np.array([np.log(2.0)]))
    array([[[0.25, 0.25],
            [0.  , 0.  ]]])

    Level 2 of 3, 15 minutes, lesson 02 section 10.
    """
    sink = sink[:, None, None]  # one score a head, the same for all of its queries
    # The sink is one of the scores, also when the largest is looked for: so a row of -inf has a finite one.
    largest = np.maximum(scores.max(-1, keepdims=True), sink)
    exps = np.exp(scores - largest)
    return exps / (exps.sum(-1, keepdims=True) + np.exp(sink - largest))


def hunt_is_causal(attention: Callable) -> None:
    """A bug hunt: write the test that catches a causal mask in the wrong place.

    `attention(q, k, v)` is somebody's causal attention for one head: q (T, D), k (S, D) and v (S, E) with
    1 <= T <= S are arrays of floats, and it returns (T, E). The T queries are the *last* T of the S tokens.

    With T = S most programs agree. A model that writes has T = 1, and one that reads a long text in pieces has T
    between 1 and S. There many were wrong: with is_causal=True, torch puts the triangle into the upper left corner, so
    that the newest token sees only the oldest one (pytorch/pytorch issues 103082 and 144858). Some mended it for T = 1
    alone (pytorch/executorch pull request 21749).

    Call `attention` with inputs of your choice and `assert` what must be true of what it returns. Your test must pass
    every correct version, however it is written and also if it computes in float32, and must fail every wrong one. This
    one passes everything:

    >>> def hunt_nothing(attention):
    ...     q, k, v = np.ones((2, 4)), np.ones((2, 4)), np.ones((2, 3))
    ...     assert attention(q, k, v).shape == (2, 3)

    Level 2 of 3, 20 minutes, lesson 02 section 5.
    """
    # Keys of 0 weigh all tokens alike. With the rows of the identity as values, attention returns its own weights.
    S = 5
    for T in (1, 3, S):
        weights = attention(np.ones((T, 2)), np.zeros((S, 2)), np.eye(S))
        for t in range(T):
            seen = S - T + t + 1
            right = [1 / seen] * seen + [0] * (S - seen)
            assert np.allclose(weights[t], right, atol=1e-6), f"of {T} queries, number {t} weighs {weights[t]}"


def grouped_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Causal attention in NumPy with fewer key/value heads than query heads, and no key or value copied.

    q: (B, H, T, D). k, v: (B, H_kv, S, D), where H is a multiple of H_kv and 1 <= T <= S. The queries are the last T of
    the S tokens. Neighbouring query heads share a key/value head: with H = 6 and H_kv = 3, the six read the heads 0, 0,
    1, 1, 2, 2 of k and v. (The other order, 0, 1, 2, 0, 1, 2, was a bug of apple/axlearn, pull request 842.) Scores may
    be large (1000).

    Grouped heads are there to save memory, so do not repeat the keys and values: the grader has 640 query heads for one
    key head. A matrix product can repeat an axis of length 1 for itself.

    Returns (B, H, T, D), in the dtype of the arguments.

    >>> q, k = np.zeros((1, 4, 1, 1)), np.zeros((1, 2, 3, 1))
    >>> v = np.array([[[[1.0], [2.0], [3.0]], [[10.0], [20.0], [30.0]]]])
    >>> grouped_attention(q, k, v)[0, :, 0, 0]
    array([ 2.,  2., 20., 20.])

    Level 2 of 3, 25 minutes, lesson 02 section 6.
    """
    (B, H, T, D), (H_kv, S) = q.shape, k.shape[1:3]
    # Neighbours share a key head: so the group is the inner one of the two axes into which the heads are cut.
    q = q.reshape(B, H_kv, H // H_kv, T, D)
    k, v = k[:, :, None], v[:, :, None]  # (B, H_kv, 1, S, D): the 1 is repeated by the product, without a copy
    scores = q @ k.swapaxes(-1, -2) * D**-0.5  # (B, H_kv, group, T, S)
    scores = np.where(np.tri(T, S, S - T, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (weights @ v).reshape(B, H, T, D)


def join(a: tuple, b: tuple) -> tuple:
    """Put together attention over two separate sets of keys, without looking at the keys again.

    When the keys are too many for one processor, each gets a set of them and attends to these alone (flash-decoding,
    ring attention). What it hands back, for each of T queries, is a part, a tuple of three arrays:

        largest  (T,)    the largest score of the query with these keys
        total    (T,)    the sum of exp(score - largest) over these keys
        mix      (T, E)  the sum of exp(score - largest) * value over these keys

    Where a query may see none of the keys, largest is -inf, and total and mix are 0.

    a, b: two parts, of the same queries and different keys. Returns the part of all these keys together, in the same
    form. It can be joined with further parts, in any order; at the end attention is mix / total. Scores may be large
    (1000), and both parts may have seen nothing: then so has the result (flashinfer-ai/flashinfer issue 4051 is about
    the NaN that they got).

    >>> a = np.array([5.0]), np.array([1.0]), np.array([[10.0]])
    >>> b = np.array([5.0]), np.array([2.0]), np.array([[50.0]])
    >>> join(a, b)
    (array([5.]), array([3.]), array([[60.]]))
    >>> nothing = np.array([-np.inf]), np.array([0.0]), np.array([[0.0]])
    >>> join(nothing, b)
    (array([5.]), array([2.]), array([[50.]]))

    Level 2 of 3, 25 minutes, lesson 02 section 7.
    """
    (largest_a, total_a, mix_a), (largest_b, total_b, mix_b) = a, b
    largest = np.max([largest_a, largest_b], axis=0)
    with np.errstate(invalid="ignore"):  # -inf - -inf is NaN, where both parts saw nothing: they weigh 0
        shrink_a, shrink_b = (np.nan_to_num(np.exp(part - largest)) for part in (largest_a, largest_b))
    total = total_a * shrink_a + total_b * shrink_b
    mix = mix_a * shrink_a[:, None] + mix_b * shrink_b[:, None]
    return largest, total, mix


def attention_backward(q: np.ndarray, k: np.ndarray, v: np.ndarray, dy: np.ndarray) -> tuple:
    """The gradients of causal attention, by hand: what autograd does behind the formula of section 2.4.

    q: (T, D), k: (S, D), v: (S, E), with 1 <= T <= S; the queries are the last T of the S tokens. The forward pass gave
    y, (T, E). A loss was computed from y, and dy, (T, E), holds its derivative by each entry of y. Scores may be large
    (1000). Returns the tuple (dq, dk, dv): its derivatives by each entry of q, k and v, in their shapes and dtype.

    Go through the forward pass backwards, one line at a time. For a product Y = A @ B the rules are dA = dY @ B.T and
    dB = A.T @ dY. The line that takes thought is softmax: a weight depends on *every* score of its row, since it is
    divided by the sum. Work out the derivative of weight i by score j, for i = j and for i != j, on paper.

    >>> q, k = np.array([[2.0]]), np.array([[0.0], [0.0]])  # one query, two keys: the weights are 1/2 and 1/2
    >>> dq, dk, dv = attention_backward(q, k, v=np.array([[1.0], [5.0]]), dy=np.array([[1.0]]))
    >>> dk.tolist(), dv.tolist()  # more score for the second key means less of the 1 and more of the 5
    ([[-2.0], [2.0]], [[0.5], [0.5]])

    Level 3 of 3, 40 minutes, lesson 02 section 4.
    """
    T, S, scale = len(q), len(k), q.shape[1] ** -0.5
    scores = np.where(np.tri(T, S, S - T, dtype=bool), q @ k.T * scale, -np.inf)
    weights = np.exp(scores - scores.max(1, keepdims=True))
    weights /= weights.sum(1, keepdims=True)  # (T, S)

    dweights = dy @ v.T  # (T, S)
    # The derivative of weight i by score j is w_i (1 - w_i) if i = j, else -w_i w_j. Summed over i, that is: w_j times
    # what j brings more than the mean. A hidden token has the weight 0, so the mask needs no line of its own.
    dscores = weights * (dweights - (weights * dweights).sum(1, keepdims=True))
    return dscores @ k * scale, dscores.T @ q * scale, weights.T @ dy
