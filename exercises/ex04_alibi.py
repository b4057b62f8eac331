"""Chapter 04, alibi: a bias for batches with padding, evaluation in windows, how far a head can look, ALiBi for kernels
without a bias, and a text that is read only as far as it matters.

Write the bodies, in this order, then run `pytest exercises/test_ex04_alibi.py`. Everything is plain NumPy; where the
arguments are float32, so is the result.
"""

from collections.abc import Callable

import numpy as np

# ---- A bias for texts with padding


def key_bias(mask: np.ndarray, slopes: np.ndarray) -> np.ndarray:
    """The bias m * j for a batch of texts with padding, where j counts the real tokens only.

    Texts of different lengths stand in one array, and the free places are padding. It may stand anywhere: on the left,
    on the right, in the middle. A text must get the same bias with padding as without, so its first real token is
    number 0 wherever it stands, the next one is number 1, and so on. (BLOOM in PaddleNLP had to be mended so that its
    ALiBi goes by the mask: PaddlePaddle/PaddleNLP pull request 6496.) Padding gets -inf, in every head, so that nobody
    looks at it.

    mask: (B, S) booleans, True where a real token stands; a row may be all padding. slopes: (H,), float32 or float64.
    Returns the bias, (B, H, 1, S), in the dtype of `slopes`: all queries of a text add the same.

    >>> mask = np.array([[False, True, True], [True, True, True]])
    >>> key_bias(mask, np.array([0.5, 0.25]))[:, :, 0]
    array([[[-inf, 0.  , 0.5 ],
            [-inf, 0.  , 0.25]],
    <BLANKLINE>
           [[0.  , 0.5 , 1.  ],
            [0.  , 0.25, 0.5 ]]])

    Level 1 of 3, 10 minutes, lesson 04 section 3.
    """
    raise NotImplementedError


# ---- A bug hunt: slopes for any number of heads


def hunt_slopes(slopes: Callable) -> None:
    """A bug hunt: write the test that catches wrong slopes, also where H is not a power of two.

    `slopes(H)` is somebody's function for the slopes of H heads, for H from 1 to 128. It returns H positive numbers, as
    a list or an array, of float32 or float64. The right ones are those of section 2: for a power of two the series of
    the paper; for other H the series of the next lower power of two and, behind it, every second slope of the series of
    the next higher one, from the first on, as many as are missing.

    One public library had 2 ** (-8 * h / H) for every H (ml-explore/mlx issue 343, mended by pull request 3071),
    another began one step too early, with 1.0 (paiml/aprender pull request 2143). Neither crashes, and the model still
    writes. That the slopes of 12 heads jump up behind the eighth, to 0.7071, is right, though readers wonder
    (ofirpress/attention_with_linear_biases issue 17).

    Call `slopes` with numbers of heads of your choice and `assert` what must be true of what it returns. Your test must
    pass every correct version, however it is written and also if it computes in float32, and must fail every wrong one.
    This one passes everything:

    >>> def hunt_nothing(slopes):
    ...     assert len(slopes(8)) == 8

    Level 1 of 3, 15 minutes, lesson 04 section 2.
    """
    raise NotImplementedError


# ---- A loss and its stride


def in_windows(losses: np.ndarray, N: int, stride: int) -> tuple[float, int]:
    """The mean loss of a text that is longer than a window, and what it costs, when windows overlap.

    A model reads L tokens at once, and a text has N. Window number w holds the tokens w * stride to w * stride + L, the
    last one not included; where the text ends before, so does the window. The first window scores all its tokens. Each
    later one scores only its new tokens, those that were in no window before, and the others are there as context. The
    last window is the first one that reaches the end of the text.

    The first tokens of a window have little to go by (the early token curse: appendix B of the paper,
    arXiv:2108.12409): as a rule, the smaller the stride, the better the loss and the higher the price. So a loss means
    little without its stride.

    losses: (L,) floats; losses[c] is the loss of a token that has c tokens before it in its window. N: at least 1,
    maybe less than L. Returns the tuple (loss, read): the mean over the N tokens, each scored once, all alike (a mean
    of the windows' means is something else: huggingface/transformers issue 34138), and how many tokens the model reads
    in all windows together. Raises ValueError if `stride` is less than 1 or more than L, since then no window or not
    every token would have its turn.

    >>> losses = np.array([4.0, 2.0, 1.0])
    >>> loss, read = in_windows(losses, 5, stride=2)  # the windows 0 1 2 and 2 3 4, of which the last scores 3 and 4
    >>> float(loss), read
    (2.0, 6)
    >>> loss, read = in_windows(losses, 5, stride=3)  # 0 1 2 and 3 4: no overlap
    >>> float(loss), read
    (2.6, 5)

    Level 2 of 3, 20 minutes, lesson 04 section 5.
    """
    raise NotImplementedError


# ---- How far a head can look


def reach(slope: float, gap: float, eps: float) -> int:
    """How far back a head of this slope can look: the largest distance at which a token may get the weight eps.

    A query stands at distance 0 from itself, and the text begins at distance d, so it sees d + 1 tokens. Of two scores
    q k / sqrt(D) of this query, before the bias, none is larger than the other by more than `gap`. What is the greatest
    weight that softmax can give to the first token of the text, d back? It gets it when its score is larger than all
    others by the whole gap. Then come the bias, -slope * distance, and softmax over all d + 1 tokens.

    slope: greater than 0. gap: 0 or more, also 1000. eps: between 0 and 1.
    Returns the largest whole d for which this greatest weight is at least eps. (It falls when d grows. At d = 0 it is
    1.) The sum over the others is a geometric series, so there is a formula for d. A loop will do, too.

    >>> reach(slope=0.5, gap=0.0, eps=0.01)
    7
    >>> reach(slope=0.5, gap=10.0, eps=0.01)
    27
    >>> reach(slope=2**-8, gap=10.0, eps=0.01)
    2316

    Level 2 of 3, 20 minutes, lesson 04 section 6.
    """
    raise NotImplementedError


# ---- A bug hunt: the bias behind a cache


def hunt_cached_alibi(attention: Callable) -> None:
    """A bug hunt: write the test that catches attention whose linear bias is wrong, above all behind a cache.

    `attention(q, k, v, slopes)` is somebody's causal attention with ALiBi: q (H, T, D), k (H, S, D), v (H, S, E) and
    slopes (H,) are arrays of floats, 1 <= T <= S, and it returns (H, T, E). The T queries are the *last* T of the S
    tokens. The score of query i and key j is q k / sqrt(D) - slope * (i - j), where i and j are places among the S
    tokens.

    Falcon in Keras built its bias for the T new tokens instead of the S of the cache: a model that writes has T = 1, so
    the bias was a single 0 for all keys. Nothing crashed, and it wrote without ALiBi (keras-team/keras-hub pull request
    2977). The examples of attention-gym had the sign turned round (meta-pytorch/attention-gym pull request 86). And
    Falcon adds its bias *before* the division by sqrt(D), which a converter overlooked: its slopes were sqrt(D) times
    too steep (NVIDIA/TensorRT-Model-Connect pull request 32). Here the order of the paper is right: divide first, then
    add.

    Call `attention` with inputs of your choice and `assert` what must be true of what it returns. Your test must pass
    every correct version, however it is written and also if it computes in float32, and must fail every wrong one. Mind
    that a number which is added to *all* scores of a query changes nothing, so such a version is correct (that confused
    readers, too: lucidrains/x-transformers issue 153). This test passes everything:

    >>> def hunt_nothing(attention):
    ...     q, k, v = np.ones((3, 2, 4)), np.ones((3, 5, 4)), np.ones((3, 5, 6))
    ...     assert attention(q, k, v, np.array([0.5, 0.25, 0.125])).shape == (3, 2, 6)

    Level 2 of 3, 25 minutes, lesson 04 section 4.
    """
    raise NotImplementedError


# ---- ALiBi for a kernel that takes no bias


def fold(q: np.ndarray, k: np.ndarray, slopes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Put the linear bias into the queries and keys, for a kernel of causal attention that takes no bias.

    The fast kernels want no table of T * S numbers. ALiBi needs none: a score is a product q k, and a product of longer
    vectors has room for one more term. The kernel, which you cannot change, divides by the square root of the width
    *that it sees*, W, then hides the future and does softmax. Choose new queries and keys of some width W > D such that
    its weights are those of ALiBi: softmax of q k / sqrt(D) - slope * (i - j) over the keys j up to i.

    q: (H, T, D). k: (H_kv, S, D), where H is a multiple of H_kv, and neighbouring query heads share a key head: six
    query heads over three read the heads 0, 0, 1, 1, 2, 2 of k. slopes: (H,), one for each *query* head. The queries
    are the last T of the S tokens. All three have the same dtype, float32 or float64.

    Returns the tuple (new_q, new_k), of shapes (H, T, W) and (H_kv, S, W), in the dtype of the arguments. New keys go
    into a cache and stay there while the text grows: what becomes of key j may depend on that key, on j and on D, but
    not on S, q or the slopes.

    >>> q, k, slopes = np.zeros((2, 1, 1)), np.zeros((1, 3, 1)), np.array([0.5, 0.125])
    >>> new_q, new_k = fold(q, k, slopes)
    >>> scores = new_q @ new_k.swapaxes(1, 2) / np.sqrt(new_q.shape[2])  # what the kernel computes
    >>> scores - scores[:, :, -1:]  # a constant in a row does not matter
    array([[[-1.   , -0.5  ,  0.   ]],
    <BLANKLINE>
           [[-0.25 , -0.125,  0.   ]]])

    Level 2 of 3, 25 minutes, lesson 04 section 4.
    """
    raise NotImplementedError


# ---- A text that is read only as far as it matters


def read_back(q: np.ndarray, read: Callable, S: int, slope: float, norm: float, eps: float) -> np.ndarray:
    """Attention of the newest token over a long text, block by block from the end, until the rest cannot matter.

    With ALiBi, old tokens weigh less and less, whatever they say. So a head need not read them, and can know it in
    time.

    q: (D,), the query of the newest token, in one head. slope: that of the head, greater than 0. S: the number of
    tokens in the text. read(0) gives the last block of the text as a tuple (k, v) of arrays, (n, D) and (n, E), in the
    order of the text: the last row of both is the newest token itself, at distance 0. read(1) gives the block before
    it, and so on. Blocks have various sizes n, at least 1. A token at distance d has the score q k / sqrt(D) - slope *
    d. Scores may be large (1000 or -1000). Keys and values are of the dtype of q.

    No key of the text is longer than `norm` (the square root of the sum of its squares), and a product q k is at most
    the length of q times that of k (Cauchy and Schwarz). So it is known how large a score can be which has not been
    read. After each block, let `rest` be the most that all tokens not read yet could add to the sum of exp(score), as
    if the text went on without a beginning: a geometric series. Stop when rest is at most the part `eps` of all, of the
    sum so far plus rest; or when all S tokens have been read.

    Read the blocks in turn, each once, and none more than this rule asks for: the grader counts. A block and a running
    sum are all that need be kept. Returns attention over the tokens that were read, (E,), in the dtype of q.

    >>> blocks = [(np.zeros((2, 1)), np.array([[5.0], [2.0]])), (np.zeros((3, 1)), np.array([[9.0], [8.0], [7.0]]))]
    >>> q = np.array([0.0])  # so the weights are 1, 1/2, 1/4, ... : after two tokens a quarter of all is left
    >>> read_back(q, lambda b: blocks[b], S=5, slope=np.log(2.0), norm=1.0, eps=0.3)
    array([3.])

    Level 3 of 3, 40 minutes, lesson 04 section 6.
    """
    raise NotImplementedError
