"""Chapter 02, attention: softmax in other clothes, masks, grouped heads, pieces put together, and all of it backwards.

Write the bodies, in this order, then run `pytest exercises/test_ex02_attention.py`. Everything is plain NumPy; where
the arguments are float32, so is the result.
"""

from collections.abc import Callable

import numpy as np

# ---- The logarithm of softmax


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
    raise NotImplementedError


# ---- A mask with a window


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
    raise NotImplementedError


# ---- Attention that may look at nothing


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
    raise NotImplementedError


# ---- A bug hunt: the triangle in the wrong corner


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
    raise NotImplementedError


# ---- Grouped heads without copies


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
    raise NotImplementedError


# ---- Pieces of attention, put together


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
    raise NotImplementedError


# ---- Attention, backwards


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
    raise NotImplementedError
