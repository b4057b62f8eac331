"""Chapter 06, TinyLlama: parameters counted, heads merged and split, gains moved, and two gradients by hand.

Write the bodies, in this order, then run `pytest exercises/test_ex06_tinyllama.py`. Plain NumPy is enough; where the
arguments are float32, so is the result.
"""

from collections.abc import Callable

import numpy as np


def count_parameters(params: dict, vocab_size: int, tied: bool = False) -> int:
    """The number of weights of any LLaMA, exactly, from the file params.json that Meta puts beside them.

    params: what the file holds. These entries matter: `dim` (the width of the model), `n_layers`, `n_heads`,
    `multiple_of`, `n_kv_heads` and `ffn_dim_multiplier`. The last two may be missing or None: then there are as many
    key/value heads as query heads, and the multiplier is 1. All other entries change nothing. vocab_size comes
    beside the file, because the files of Llama and Llama 2 say -1 there (ggml-org/llama.cpp pull request 4258). tied:
    is the head the same matrix as the embedding?

    The model is the one of the lesson, with dim / n_heads channels to a head. The inner width of its MLP is found in
    three steps: 8/3 of dim, rounded down to a whole number; that times ffn_dim_multiplier, rounded down again; and then
    up to the next multiple of `multiple_of`, unless it is one.

    Returns the number. (A reader who forgot what grouped heads save made Llama 2 70B one of 78 billion:
    meta-llama/llama issue 1111.)

    >>> llama_2_7b = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "vocab_size": -1}
    >>> count_parameters(llama_2_7b, 32000)
    6738415616

    Level 1 of 3, 15 minutes, lesson 06 section 6.
    """
    raise NotImplementedError


def pool_heads(weight: np.ndarray, n_head: int, n_kv_head: int) -> np.ndarray:
    """Give a trained model fewer key or value heads: each new head is the mean of a group of old ones.

    So a model with many heads becomes one with grouped heads, which a little more training makes nearly as good
    (Ainslie et al. 2023, arXiv:2305.13245, section 2.1). The query heads stay as they are, and neighbours share: with 6
    heads and n_kv_head = 3, query heads 0 and 1 will read one key head, the mean of the old key heads 0 and 1. (This
    was asked for in huggingface/transformers issue 28425.)

    weight: (n_head * D, C), the matrix of the linear layer that makes the keys, or the values, as torch keeps it: the D
    rows of head 0 come first, then those of head 1. It may also be the bias of that layer, (n_head * D,). dtype
    float16, float32 or float64; a sum of float16 numbers may be too large for float16 (65504 is the largest) though
    their mean is not.

    Returns (n_kv_head * D, C), or (n_kv_head * D,) for a bias, in the same dtype. Raises ValueError if n_head is no
    multiple of n_kv_head, or the number of rows no multiple of n_head.

    >>> pool_heads(np.array([[1.0], [2.0], [3.0], [6.0], [10.0], [20.0], [30.0], [60.0]]), n_head=4, n_kv_head=2)
    array([[ 2.],
           [ 4.],
           [20.],
           [40.]])

    Level 1 of 3, 15 minutes, lesson 06 section 5.
    """
    raise NotImplementedError


def split_qkv(fused: np.ndarray, n_head: int, n_kv_head: int) -> tuple:
    """Take apart the one matrix in which some files keep queries, keys and values, group by group.

    One large matrix product is faster than three small ones, so many programs make q, k and v with one linear layer.
    With grouped heads there is a choice of where their rows go. TinyLLaMA was trained with code of LitGPT, which at
    that time kept groups together: first all query heads of group 0, then the key head of group 0, then its value head,
    then the same for group 1, and so on. Group 0 is the first n_head / n_kv_head query heads, group 1 the next ones.
    Such splits go wrong where heads are grouped: vllm-project/vllm issue 13686 is about equal thirds, and
    epfLLM/Megatron-LLM pull request 45 mended a converter that had been right for ungrouped heads alone.

    fused: ((n_head + 2 * n_kv_head) * D, C), the matrix of that layer as torch keeps it, D rows to a head; or its bias,
    ((n_head + 2 * n_kv_head) * D,). Any dtype.

    Returns the tuple (q, k, v) of what three separate layers would have: (n_head * D, C), and twice (n_kv_head * D, C),
    without the C for a bias; heads in order, and the same dtype. Raises ValueError if n_head is no multiple of
    n_kv_head, or if the rows cannot be so many heads.

    >>> split_qkv(np.arange(8), n_head=4, n_kv_head=2)  # heads with a single row
    (array([0, 1, 4, 5]), array([2, 6]), array([3, 7]))

    Level 2 of 3, 15 minutes, lesson 06 section 5.
    """
    raise NotImplementedError


def hunt_rms_norm(norm: Callable) -> None:
    """A bug hunt: write the test that catches an RMSNorm which is nearly right.

    `norm(x, gain, eps)` is somebody's RMSNorm: x (..., C) with one to three axes, gain (C,) of the same dtype, eps a
    float. It returns y = gain * x / sqrt(r + eps), where r is the mean of the squares of each row, in x's shape and
    dtype.

    An error in it raises no exception. Some public ones: division by what was one over the root already
    (mosaicml/llm-foundry issue 371), eps outside the root (allenai/OLMo issue 281), the variance for the mean square
    (keras-team/keras pull request 22393), an eps of its own (apache/tvm pull request 15856), a gain that means
    something else (linkedin/Liger-Kernel issue 74). Many tests cannot see some of them: with eps = 1e-5 and numbers
    around 1, all that is done to eps changes the fifth digit after the point, if any.

    x may also be float16, where squares are too large from 256 on: a correct version computes them in a wider dtype.
    Your test must pass every correct version, however it is written: they may compute in float32, whatever x is, and
    with float16 they round before the gain or after it, so that results differ by a thousandth. It must fail every
    wrong version by `assert`. This one passes everything:

    >>> def hunt_nothing(norm):
    ...     assert norm(np.ones((2, 3)), np.ones(3), 1e-5).shape == (2, 3)

    Level 2 of 3, 25 minutes, lesson 06 section 2.
    """
    raise NotImplementedError


def fold_gains(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Make every gain of a LLaMA 1 without changing its results, by moving the gains into matrices.

    Some methods that make models smaller begin so (SliceGPT, QuaRot, SpinQuant): a norm without gain does not care
    whether the channels are turned, so a rotation can then be moved past it.

    weights: the parameters by the names that the lesson's model gives them, with blocks numbered from 0:

        embed.weight (V, C), norm.weight (C,) and, unless it is tied, head.weight (V, C)
        blocks.0.attention_norm.weight (C,), blocks.0.attention.q.weight, and k, v and o
        blocks.0.mlp_norm.weight (C,), blocks.0.mlp.gate.weight, and up and down

    Matrices are (outputs, inputs), as torch keeps them; there may be 0 to 20 blocks, and gains may be 0 or negative.
    Without head.weight the model is tied: the head is the embedding. Then the new model cannot be tied any more, and
    gets a head of its own, as the embedding must go on looking up what it did (ModelCloud/GPTQModel pull request 1550
    and spcl/QuaRot pull request 17 are about this).

    Returns a new dict with new weights under these names and head.weight, in the dtypes of the old: all gains 1, and
    the results of the model the same for every input.

    >>> new = fold_gains({"embed.weight": np.array([[1.0, 10.0]]), "norm.weight": np.array([2.0, 3.0])})
    >>> for name in sorted(new):
    ...     print(name, new[name].tolist())
    embed.weight [[1.0, 10.0]]
    head.weight [[2.0, 30.0]]
    norm.weight [1.0, 1.0]

    Level 2 of 3, 25 minutes, lesson 06 section 2.
    """
    raise NotImplementedError


def swiglu_backward(x: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray, dy: np.ndarray) -> tuple:
    """The gradients of SwiGLU by hand, from those of its result.

    The forward pass was y = down(silu(gate(x)) * up(x)), with silu(z) = z / (1 + exp(-z)) = z * sigmoid(z). x: (B, T,
    C). gate, up: (F, C) and down: (C, F), matrices as torch keeps them, so gate(x) = x @ gate.T. A loss was computed
    from y, and dy, (B, T, C), holds its derivative by each entry of y. All float32 or all float64.

    Returns the tuple (dx, dgate, dup, ddown): the derivatives of the loss by each entry of x, gate, up and down, in
    their shapes and dtype. Nothing of the forward pass was kept: compute it again.

    Two things to watch: x is read twice, and gate(x) may be 1000 or -1000, where exp overflows in a formula that is
    right on paper. An unstable formula gave NaN for the derivative of silu in Lightning-AI/lightning-thunder (pull
    request 2624).

    >>> x, one, zero = np.array([[[2.0]]]), np.array([[1.0]]), np.array([[0.0]])
    >>> dx, dgate, dup, ddown = swiglu_backward(x, zero, one, one, dy=np.array([[[1.0]]]))
    >>> print(dx, dgate, dup, ddown)  # a closed gate, where silu is 0 and its slope is 1/2
    [[[0.]]] [[2.]] [[0.]] [[0.]]

    Level 3 of 3, 30 minutes, lesson 06 section 3.
    """
    raise NotImplementedError


def rms_norm_backward(x: np.ndarray, gain: np.ndarray, eps: float, dy: np.ndarray) -> tuple:
    """The gradients of RMSNorm by hand, also where float16 is too small for the numbers on the way.

    The forward pass was y = gain * x / sqrt(mean of x squared + eps), with the mean over the last axis. x: (..., C),
    with any number of axes before the last, also none. gain: (C,). A loss was computed from y, and dy, in the shape of
    x, holds its derivative by each entry of y. All three have one dtype: float16, float32 or float64.

    Returns the tuple (dx, dgain): the derivatives of the loss by each entry of x and gain, in their shapes and dtype.
    For float16 compute in float32 and round at the end: squares overflow from 256 on, and when thousands of small
    numbers are added up in float16 the sum stops growing.

    What takes thought: each x of a row changes the root mean square of the whole row. One program had the gain twice in
    just this term (NVIDIA/Megatron-LM pull request 6859), which nobody can see as long as the gains are 1.

    >>> dx, dgain = rms_norm_backward(np.array([3.0, 4.0]), np.array([1.0, 1.0]), 0.0, dy=np.array([3.0, 4.0]))
    >>> print(np.abs(dx) < 1e-9, dgain.round(4))  # a longer row has the same result: nothing is gained along x
    [ True  True] [2.5456 4.5255]

    Level 3 of 3, 35 minutes, lesson 06 section 2.
    """
    raise NotImplementedError
