"""Chapter 03, rope: pairs, angles and frequencies, backwards and in other orders, and what goes wrong with them.

Write the bodies, in this order, then run `pytest exercises/test_ex03_rope.py`. Everything is plain NumPy; where the
arguments are float32, so is the result. The answers are yours alone: `nanogptx.rope` cannot be imported here.
"""

from collections.abc import Callable

import numpy as np

# ---- A few channels, in neighbouring pairs


def rotate_first(x: np.ndarray, positions: np.ndarray, r: int, base: float) -> np.ndarray:
    """Rotate only the first r channels of every head, in neighbouring pairs, as GPT-J does with 64 of its 256.

    Pair i, for i = 0 ... r/2 - 1, is the channels 2i and 2i + 1. At position m it is turned by the angle m * f_i with
    f_i = base^(-2i/r), counter-clockwise: from (1, 0) towards (0, 1). The frequencies are those of a head with r
    channels; with the whole width D in place of r, a program was right at position 0 only (pie-project/pie issue 602).
    The channels from r on stay as they are.

    x: (B, H, T, D), float32 or float64; r is even and 2 <= r <= D. positions: (T,), whole numbers, in any order: behind
    a cache they do not begin with 0. They may be large (100,000), so compute the angles in float64 even if x is
    float32. Returns an array of the same shape and dtype as x.

    >>> x = np.array([[[[1.0, 0.0, 0.0, 1.0, 5.0]]]])  # two pairs, (1, 0) and (0, 1), and a channel that stays
    >>> rotate_first(x, positions=np.array([3]), r=4, base=100.0).round(3)  # by 3 and by 0.3
    array([[[[-0.99 ,  0.141, -0.296,  0.955,  5.   ]]]])

    Level 1 of 3, 15 minutes, lesson 03 section 4.
    """
    raise NotImplementedError


# ---- What a long text shows for the first time


def new_angles(head_dim: int, trained: int, length: int, base: float) -> np.ndarray:
    """Count, for every pair, at how many distances of a long text it comes to an angle that training never showed.

    Attention sees distances. Between two tokens m apart, pair i is turned by the angle m * f_i, with frequency f_i =
    base^(-2i/head_dim). A model was trained with texts of `trained` tokens, in which distances go from 0 to
    trained - 1, and now reads one of `length` tokens, length >= trained.

    Say that a pair knows all the angles from 0 to the one at the largest distance of training. After each full turn
    the same angles come again. So an angle is new to the pair if, less all its full turns, it is larger than those
    that the pair knows; and a pair that has made a full turn in training knows every angle.

    Returns (head_dim/2,) int64: how many of the distances trained, trained + 1, ..., length - 1 have a new angle.

    >>> new_angles(8, trained=64, length=1000, base=10000.0)  # the third pair makes more than a turn, the last does not
    array([  0,   0, 873, 936])

    Level 1 of 3, 15 minutes, lesson 03 section 6.
    """
    raise NotImplementedError


# ---- Keys in a cache, turned once more


def turn_again(k: np.ndarray, was: np.ndarray, now: np.ndarray, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Turn keys that lie rotated in a cache from the angles that they have to the angles that they should have.

    The cache holds no others. There are two reasons to turn them again. A program that throws away the oldest tokens
    moves the rest to lower positions (in llama.cpp a second move made it forget the first: ggml-org/llama.cpp issue
    3825). And dynamic scaling changes all frequencies when a text grows, while the keys in the cache keep the old ones
    (huggingface/transformers issue 25104). Turning them again mends the rotation, not what deeper layers made of it.

    k: (B, H_kv, T, D), float32 or float64. Channel i makes a pair with channel i + D/2. In row b the pair i of token t
    has been turned by the angle was[b, t] * old[i], counter-clockwise: from channel i towards channel i + D/2.
    was, now: (B, T), whole numbers, the positions at first and now. old, new: (D/2,), float64, the frequencies at first
    and now. Positions may be large (100,000), so compute angles in float64 even if k is float32.

    Returns the keys turned by now[b, t] * new[i] instead, of the same shape and dtype.

    >>> k = np.array([[[[1.0, 0.0]]]])  # was turned by 2 * 0.5 = 1, should be by 6 * 0.25 = 1.5
    >>> turn_again(k, np.array([[2]]), np.array([[6]]), old=np.array([0.5]), new=np.array([0.25])).round(3)
    array([[[[0.878, 0.479]]]])

    Level 2 of 3, 20 minutes, lesson 03 section 10.
    """
    raise NotImplementedError


# ---- A bug hunt: positions behind a cache


def hunt_rotation(rotate: Callable) -> None:
    """A bug hunt: write the test that catches rotary positions that go wrong behind a cache.

    `rotate(q, k, v, start)` is somebody's. q is (B, H, T, D), k and v are (B, H_kv, T, D), arrays of floats: T tokens
    that stand at the positions start, start + 1, ..., start + T - 1, where start is from 0 to 5000. It returns the
    tuple (q, k, v): q and k turned, v as it was. Channels i and i + D/2 make pair i, and at position m it is turned by
    the angle m * 10000^(-2i/D). Which way it turns is free, as long as it is the same way for q and k and in every
    call: a model learns with either (karpathy/nanochat pull request 489).

    With start = 0 most programs agree. Behind a cache, one gave every new token position 0 (Blaizzy/mlx-vlm issue
    1983), one gave all tokens of a call the same position (jundot/omlx pull request 2363), one kept the tables of its
    first call for every later start (lucidrains/rotary-embedding-torch issue 11), one had its positions in bfloat16,
    which cannot tell 256 from 257 (EleutherAI/gpt-neox pull request 1016), and one had too short a table
    (karpathy/nanochat pull request 520).

    Call `rotate` with inputs of your choice, of at most 3,000 numbers in all, and `assert` what must be true. Your test
    must pass every correct version, also one that computes in float32, so that around position 5000 its angles are off
    by up to 0.001, and must fail every wrong one. This one passes everything:

    >>> def hunt_nothing(rotate):
    ...     q, k, v = np.ones((3, 1, 2, 4, 6))
    ...     assert len(rotate(q, k, v, 0)) == 3

    Level 2 of 3, 25 minutes, lesson 03 section 3.
    """
    raise NotImplementedError


# ---- One model's rows in another's order


def to_halves(weight: np.ndarray, n_head: int, n_kv_head: int, r: int) -> np.ndarray:
    """Reorder the rows of a fused q, k, v projection, from a model with neighbouring pairs to one with half-split ones.

    In each head, the model rotates the first r channels in neighbouring pairs, channel 2i with 2i + 1, and leaves the
    rest. A program that is to run it pairs channel i with i + r/2, by the same angles, and leaves the rest, too. The
    scores are the same if in each head of q and of k channel 2i goes to place i and channel 2i + 1 to place i + r/2,
    for i = 0 ... r/2 - 1. Nothing else moves.

    weight: (rows, C), or a bias, (rows,), in any dtype. The rows make, one below the other: q with n_head heads, k with
    n_kv_head heads, v with n_kv_head heads. Each head is D rows, so rows = (n_head + 2 * n_kv_head) * D. r is even and
    2 <= r <= D. Returns an array of the same shape and dtype.

    Converters went wrong on the heads of k, which are fewer than those of q (ggml-org/llama.cpp pull request 3364, from
    TinyLlama, and huggingface/transformers issue 31766).

    >>> to_halves(np.arange(24), n_head=1, n_kv_head=1, r=6).reshape(3, 8)
    array([[ 0,  2,  4,  1,  3,  5,  6,  7],
           [ 8, 10, 12,  9, 11, 13, 14, 15],
           [16, 17, 18, 19, 20, 21, 22, 23]])

    Level 2 of 3, 20 minutes, lesson 03 section 4.
    """
    raise NotImplementedError


# ---- A base for every pair that needs one


def ntk_base(head_dim: int, base: float, trained: int, factor: float) -> float:
    """Find the smallest base that keeps every pair from new angles in texts `factor` times as long as in training.

    NTK-aware scaling, section 7, takes the base that slows the last pair by exactly the factor; then every pair before
    it is slowed by less. But several of these made less than one turn in training, too, and still come to angles that
    they do not know ("out of bound", says the YaRN paper, https://arxiv.org/abs/2309.00071). Find the base that is
    enough for all.

    Pair i has the frequency f_i = base^(-2i/head_dim), and in `trained` tokens it makes trained * f_i / (2 pi) turns. A
    pair with at least one turn knows every angle and needs nothing. One with less than a turn needs a new frequency of
    at most f_i / factor. First work out, on paper, by how much a new base slows pair i down. Which pair asks for most?

    head_dim is even, base and factor are more than 1. Returns the new base, a float: `base` itself if no pair needs
    anything. Raises ValueError if pair 0 makes less than one turn: no base changes its frequency, which is always 1.

    >>> round(ntk_base(8, 10000.0, trained=64, factor=4.0))  # pairs 2 and 3 make less than a turn
    160000

    Level 3 of 3, 25 minutes, lesson 03 section 7.
    """
    raise NotImplementedError


# ---- A bug hunt: YaRN


def hunt_yarn(tables: Callable) -> None:
    """A bug hunt: write the test that catches YaRN done wrong, whichever ramp it has.

    `tables(positions, head_dim, base, trained, factor)` is somebody's YaRN for a model trained with `trained` tokens
    that is to read `factor` times as many. It returns the tuple (cos, sin), two arrays (T, head_dim/2): for each of the
    positions, (T,) whole numbers, the cosine and the sine of every pair's angle, both multiplied by 0.1 ln(factor) + 1.
    The angle is the position times the pair's frequency. Let f = base^(-2i/head_dim) be the frequency of pair i in
    training, and turns = trained * f / (2 pi). Now its frequency is

        f                           if turns is more than 32
        f / factor                  if turns is less than 1
        less than f, more than f / factor, in between: and of two such pairs, the slower one is divided by more

    How much in between, is left open: the paper has a ramp over the turns, its authors' code one over the index i. Both
    are right. None of this depends on the positions, so a short text has the same frequencies as a long one. head_dim
    is 8 to 128, trained 256 to 32,768, base 500 or more, factor 1.5 to 32, and positions are 0 to 10,000, in any order.

    One program had the ramp upside down (Lightning-AI/litgpt pull request 2202). One divided the positions instead of
    the slow frequencies, and cut them off at the end of training (rasbt/LLMs-from-scratch issue 939). One began with
    the base of NTK-aware scaling (paiml/aprender pull request 2161), one multiplied by 0.1 ln(factor) + 1 twice
    (sgl-project/sglang pull request 33558).

    Call `tables` with inputs of your choice, at most 3,000 positions, and `assert` what must be true. Your test must
    pass every correct version, also one that computes in float32, so that around position 10,000 its angles are off by
    up to 0.002, and must fail every wrong one. This one passes everything:

    >>> def hunt_nothing(tables):
    ...     cos, sin = tables(np.arange(3), 8, 10000.0, 2048, 4.0)
    ...     assert cos.shape == sin.shape == (3, 4)

    Level 3 of 3, 40 minutes, lesson 03 section 7.
    """
    raise NotImplementedError
