"""Chapter 05, GPT-2: answers to exercises/ex05_gpt2.py."""

import math
from collections.abc import Callable

import numpy as np

# ---- The activation and its slope


def gelu_and_slope(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """GPT-2's GELU, the form with tanh, and its derivative: the backward pass of an MLP needs both.

    gelu(x) = x/2 (1 + tanh(u)) with u = sqrt(2/pi) (x + 0.044715 x^3). What is asked for is the derivative of this
    formula, not of the exact GELU. Programs have mixed them up: nanoGPT runs GPT-2's weights with the exact form since
    karpathy/nanoGPT pull request 274, and OpenAI once ran them with another (openai/automated-interpretability pull
    request 22).

    x: float32 or float64, of any shape with one axis or more. It may be very large (1e30 in float32, 1e200 in float64),
    where x^3 is no float any more; there the derivative is 0 or 1, and must not be NaN. Returns the tuple
    (gelu(x), gelu'(x)), two arrays in the shape and dtype of x. The derivative is wanted to the last digits, so not as
    a quotient of small differences.

    >>> y, slope = gelu_and_slope(np.array([-1.0, 0.0, 1.0, 1e200]))
    >>> y.round(4).tolist(), slope.round(4).tolist()
    ([-0.1588, 0.0, 0.8412, 1e+200], [-0.083, 0.5, 1.083, 1.0])

    Level 1 of 3, 15 minutes, lesson 05 section 2.
    """
    scale = math.sqrt(2 / math.pi)
    with np.errstate(all="ignore"):  # what overflows does so on purpose
        t = np.tanh(scale * (x + 0.044715 * x**3))
        # Product rule, then chain rule: the derivative of tanh(u) is 1 - tanh(u)^2, times that of u by x.
        bend = x / 2 * (1 - t**2) * scale * (1 + 3 * 0.044715 * x**2)
    # Far out tanh is flat, 1 - t^2 is 0, and the last factor may be infinite: 0 * inf is NaN, and stands for 0 here.
    return x / 2 * (1 + t), (1 + t) / 2 + np.nan_to_num(bend)


# ---- Counting, backwards


def widest(budget: int, n_layer: int, vocab_size: int, block_size: int, head_dim: int, tied: bool) -> tuple[int, int]:
    """The largest width that a GPT-2 of at most `budget` parameters can have, and how many parameters it then has.

    The model is GPT-2 in every detail: token embeddings; learned positions for block_size tokens; n_layer blocks, each
    of two LayerNorms, of attention (q, k, v and o) and of an MLP that is four times wider inside; a last LayerNorm. A
    LayerNorm has a gain and a bias; every linear layer has a bias, too, but the head has none. With tied=True the head
    is the embedding matrix again, one matrix with two uses; otherwise it is another matrix of that size.

    The width n_embd is a multiple of head_dim, the width of a head. Returns (n_embd, number of parameters), both exact
    whole numbers; ValueError if even n_embd = head_dim is too much. Budgets are up to ten trillion. (What belongs to
    that number confuses many: karpathy/llama2.c issue 378 counted a tied matrix twice, and in issue 903 of
    TransformerLensOrg/TransformerLens GPT-2 small has 85 million, without its embeddings.)

    >>> widest(124_439_808, n_layer=12, vocab_size=50257, block_size=1024, head_dim=64, tied=True)  # GPT-2 small
    (768, 124439808)
    >>> widest(124_439_807, n_layer=12, vocab_size=50257, block_size=1024, head_dim=64, tied=True)
    (704, 107581760)

    Level 1 of 3, 15 minutes, lesson 05 section 7.
    """

    def parameters(C):
        attention = 4 * (C * C + C)
        mlp = C * 4 * C + 4 * C + 4 * C * C + C
        norm = 2 * C
        embeddings = vocab_size * C + block_size * C
        head = 0 if tied else vocab_size * C
        return embeddings + n_layer * (attention + mlp + 2 * norm) + norm + head

    if parameters(head_dim) > budget:
        raise ValueError(f"{parameters(head_dim)} parameters are the fewest, more than the {budget} that are allowed")
    n_embd = head_dim
    while parameters(n_embd + head_dim) <= budget:
        n_embd += head_dim
    return n_embd, parameters(n_embd)


# ---- A bug hunt: norms and the straight line


def hunt_pre_norm(decoder: Callable) -> None:
    """A bug hunt: write the test that catches a block whose norms or additions are in the wrong place.

    `decoder(x, layers)` is somebody's pre-norm decoder, made small. x is an array (T, C) of floats, with C of 3 or
    more. `layers` is a list of pairs (A, M) of arrays (C, C). It returns (T, C), and changes neither x nor layers. The
    right one does what GPT-2 does,

        for each layer in turn:
            x = x + attention(norm(x))
            x = x + mlp(norm(x))
        the result is norm(x),

    with these parts: norm makes each row (h - mean) / sqrt(variance + 1e-5), without gain and bias; attention(h) weighs
    all visible tokens alike, so that its row t is the mean of the rows 0 to t of h @ A; mlp(h) is max(h @ M, 0).

    Nothing fails when this goes wrong: the model has as many parameters, and learns something. One program added to
    the normalised x (Howuhh/faster-trajectory-transformer issue 3), one added what attention returned to itself
    (kyegomez/BitNet issue 32), one gave several layers the same weights (linkedin/Liger-Kernel pull request 269), and
    one lost its pre-norm in a later change (Modalities/modalities pull request 136).

    Call `decoder` with inputs of your choice and `assert` what must be true of what it returns. Your test must pass
    every correct version, however it is written and also if it computes in float32 (then it may be off by about 1e-4
    for numbers of size one), and must fail every wrong one. This one passes everything:

    >>> def hunt_nothing(decoder):
    ...     assert decoder(np.ones((2, 3)), [(np.eye(3), np.eye(3))]).shape == (2, 3)

    Level 2 of 3, 20 minutes, lesson 05 section 3.
    """

    def norm(h):
        return (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5)

    # Nothing is symmetric here: another order, another layer's weights or a norm more or less changes the result.
    rng = np.random.default_rng(5)
    T, C = 4, 6
    start = 2 * rng.standard_normal((T, C))
    layers = [tuple(rng.standard_normal((2, C, C))) for _ in range(3)]
    x = start
    for A, M in layers:
        heard = norm(x) @ A
        x = x + np.array([heard[: t + 1].mean(0) for t in range(T)])
        x = x + np.maximum(norm(x) @ M, 0)
    off = np.abs(decoder(start, layers) - norm(x)).max()
    assert off < 1e-3, f"off by {off}"


# ---- One matrix with two uses


def embedding_gradients(ids: np.ndarray, dx: np.ndarray, y: np.ndarray, dlogits: np.ndarray, block_size: int) -> tuple:
    """The gradients of GPT-2's two tables, the token embedding (which is also the head) and the positions.

    The model begins with x = embed[ids] + position[:T] and ends with logits = y @ embed.T, where y is what the last
    norm returns. Autograd has gone through all that lies between. What is known:

        ids      (B, T)     the tokens, whole numbers; the same one may come many times
        dx       (B, T, C)  the derivative of the loss by each entry of x, of all that follows from x
        y        (B, T, C)
        dlogits  (B, T, V)  the derivative of the loss by each entry of the logits

    embed is (V, C) and position is (block_size, C), with T up to block_size. Returns the tuple (dembed, dposition), in
    the shapes of the two tables and the dtype of dx. (The bugs are old: a gradient that forgets repeated indices,
    HIPS/autograd issue 39; two halves of the gradient of one matrix that never meet, paiml/entrenar issue 314.)

    >>> ids, dx, y = np.array([[1, 1]]), np.array([[[5.0], [7.0]]]), np.array([[[2.0], [3.0]]])  # C = 1, V = 2
    >>> dembed, dposition = embedding_gradients(ids, dx, y, np.array([[[1.0, 0.0], [0.0, -1.0]]]), block_size=3)
    >>> dembed.tolist(), dposition.tolist()  # 2 * 1; 5 + 7 - 3
    ([[2.0], [9.0]], [[5.0], [7.0], [0.0]])

    Level 2 of 3, 20 minutes, lesson 05 section 6.
    """
    dembed = np.einsum("btv,btc->vc", dlogits, y)  # as the head
    np.add.at(dembed, ids, dx)  # as a table: dembed[ids] += dx would add only one of several equal ids
    dposition = np.zeros((block_size, dx.shape[2]), dx.dtype)
    dposition[: dx.shape[1]] = dx.sum(axis=0)  # all texts of the batch use the same rows
    return dembed, dposition


# ---- A loss in pieces


def loss_in_pieces(scores: Callable, back: Callable, targets: np.ndarray, rows: int) -> float:
    """The mean cross-entropy of N rows of logits and its gradient, a few rows at a time.

    All logits of a step are often its largest tensor, and so are their derivatives. Here neither ever exists as a
    whole. There are two functions to call:

        scores(start, stop)  computes the logits of the rows start to stop - 1, an array (stop - start, V); as with a
                             slice, rows behind the last one are left out. It is expensive: ask for every row only once,
                             and for `rows` rows at most at a time, in any order. You may change the array.
        back(start, slopes)  takes the derivatives of the loss by each logit of some rows, (n, V), the first of which is
                             row number `start`; it adds slopes.T @ x to the gradient of the head, and returns nothing.
                             Hand over the rows of a piece, each once (in several calls, if need be), before you ask
                             for the next piece.

    targets: (N,), for each row the index of the right answer, or -100: then the row is not counted, neither in the sum
    nor in the number by which the mean divides, and its derivatives are 0 (hand them over, or leave such rows out). The
    loss is the mean over all counted rows of the surprise in nats, -log softmax(logits)[target]. If none is counted,
    it is 0.0. Logits are float32 or float64, and the slopes must be the same; logits may be large (1000 or -1000).

    Returns the loss. (In NVIDIA-NeMo/Automodel pull request 3804 the means of the pieces were added up, so that the
    loss grew with their number.)

    >>> logits, seen = np.log([[1.0, 1.0], [1.0, 3.0], [5.0, 5.0]]), []
    >>> loss = loss_in_pieces(
    ...     lambda start, stop: logits[start:stop],
    ...     lambda start, slopes: seen.append((start, slopes.round(4).tolist())),
    ...     targets=np.array([0, 1, -100]),
    ...     rows=2,
    ... )
    >>> print(round(loss, 4), seen[0])
    0.4904 (0, [[-0.25, 0.25], [0.125, -0.125]])

    Level 2 of 3, 25 minutes, lesson 05 section 10.
    """
    number = max((targets != -100).sum(), 1)
    total = 0.0
    for start in range(0, len(targets), rows):
        logits, answers = scores(start, start + rows), targets[start : start + rows]
        counted = np.flatnonzero(answers != -100)
        right = counted, answers[counted]
        logits = logits - logits.max(1, keepdims=True)
        log_sums = np.log(np.exp(logits).sum(1, keepdims=True))
        total += (log_sums[counted, 0] - logits[right]).sum()
        # The derivative of the surprise: softmax, minus 1 at the right answer.
        slopes = np.zeros_like(logits)
        slopes[counted] = np.exp(logits - log_sums)[counted]
        slopes[right] -= 1
        back(start, slopes / logits.dtype.type(number))
    return float(total / number)


# ---- A block from the file


def layer_norm(x: np.ndarray, gain: np.ndarray, bias: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * gain + bias


def gpt2_block(x: np.ndarray, weights: dict[str, np.ndarray], n_head: int) -> np.ndarray:
    """One block of GPT-2 in plain NumPy, from the tensors as they lie in the published files.

    x: (B, T, C), what the block gets. C is a multiple of n_head. `weights` has these tensors of one block:

        ln_1.weight, ln_1.bias, ln_2.weight, ln_2.bias     (C,): gain and bias of the norm before attention, before MLP
        attn.c_attn.weight (C, 3C), attn.c_attn.bias (3C,) q, k and v in one
        attn.c_proj.weight (C, C), attn.c_proj.bias (C,)   what comes after attention
        mlp.c_fc.weight (C, 4C), mlp.c_fc.bias (4C,)       up
        mlp.c_proj.weight (4C, C), mlp.c_proj.bias (C,)    down

    All matrices are (in, out), as for x @ W + b, the other way round than in torch's Linear; a square one that is
    turned round raises no error. The 3C columns are those of q for all heads, then of k for all heads, then of v; of
    each, head 0 has the first C / n_head. (Split by heads first, it gave a perplexity near e^10 instead of 29:
    tensorflow/swift-models pull request 564. Others: BlackSamorez/tensor_parallel pull request 103.)

    The block is that of section 5.3: pre-norm, with eps = 1e-5 in the norms; causal attention, scores divided by the
    square root of a head's width; GELU in the form with tanh. No dropout. Scores may be large (1000).

    Returns (B, T, C) in the dtype of x, float32 or float64; the tensors have it, too. x stays as it was.

    >>> weights = {"ln_1.weight": np.ones(2), "ln_2.weight": np.ones(2)}
    >>> weights |= {name: np.zeros(2) for name in ("ln_1.bias", "ln_2.bias", "attn.c_proj.bias", "mlp.c_proj.bias")}
    >>> weights |= {"attn.c_attn.weight": np.zeros((2, 6)), "attn.c_attn.bias": np.array([0, 0, 0, 0, 1.0, 2.0])}
    >>> weights |= {"attn.c_proj.weight": np.array([[1.0, 0.0], [100.0, 10.0]])}  # v is 1, 2 for every token
    >>> weights |= {"mlp.c_fc.weight": np.zeros((2, 8)), "mlp.c_fc.bias": np.zeros(8)}
    >>> weights |= {"mlp.c_proj.weight": np.zeros((8, 2))}
    >>> gpt2_block(np.array([[[0.5, 0.0]]]), weights, n_head=1)
    array([[[201.5,  20. ]]])

    Level 3 of 3, 35 minutes, lesson 05 section 3.
    """
    B, T, C = x.shape
    D = C // n_head

    def linear(h, name):
        return h @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    h = layer_norm(x, weights["ln_1.weight"], weights["ln_1.bias"])
    # The thirds are outside, the heads inside: (B, T, 3, H, D) -> (3, B, H, T, D).
    q, k, v = linear(h, "attn.c_attn").reshape(B, T, 3, n_head, D).transpose(2, 0, 3, 1, 4)
    scores = np.where(np.tri(T, dtype=bool), q @ k.swapaxes(2, 3) / math.sqrt(D), -np.inf)
    mix = np.exp(scores - scores.max(3, keepdims=True))
    mix /= mix.sum(3, keepdims=True)
    x = x + linear((mix @ v).swapaxes(1, 2).reshape(B, T, C), "attn.c_proj")
    h = layer_norm(x, weights["ln_2.weight"], weights["ln_2.bias"])
    return x + linear(gelu_and_slope(linear(h, "mlp.c_fc"))[0], "mlp.c_proj")


# ---- LayerNorm, backwards


def layer_norm_backward(x: np.ndarray, gain: np.ndarray, dy: np.ndarray, eps: float) -> tuple:
    """The gradients of LayerNorm by hand: every entry of a row moves the row's mean and variance, too.

    The forward pass gave y = gain * (x - mean) / sqrt(variance + eps) + bias, with the mean and the variance of each
    row, over the last axis, of width C; the variance is the mean of the squared distances from the mean (divided by C).

    x, dy: (..., C), with any number of axes before the last, also none; gain, dgain, dbias: (C,). dy is the derivative
    of the loss by each entry of y. eps > 0 may be as large as the variance. A row may lie around a large number (1e6),
    or have only equal entries. Returns the tuple (dx, dgain, dbias), in the shapes of x, gain and bias, and in the
    dtype of x.

    On paper: with n = (x - mean) / sqrt(variance + eps), how does each n_j depend on each x_i of its row? Three ways
    lead from x_i to n_j: directly if i = j, through the mean, and through the variance. (A mean of C numbers has the
    slope 1 / C by each of them; the slope of a / s is (a' - s' a / s) / s.) A kernel that took one of the resulting
    terms off twice trained on, with wrong gradients: tenstorrent/tt-metal issue 53204. Its test had allowed errors up
    to 0.5.

    >>> x, dy = np.array([[1.0, -1.0]]), np.array([[3.0, 0.0]])
    >>> dx, dgain, dbias = layer_norm_backward(x, np.array([1.0, 2.0]), dy, eps=3.0)
    >>> dx.tolist(), dgain.tolist(), dbias.tolist()
    ([[0.5625, -0.5625]], [1.5, 0.0], [3.0, 0.0])

    Level 3 of 3, 40 minutes, lesson 05 section 3.
    """
    centred = x - x.mean(-1, keepdims=True)
    std = np.sqrt((centred * centred).mean(-1, keepdims=True) + eps)
    n = centred / std
    dn = dy * gain
    # Through the mean all of a row move together, through the variance in proportion to n: both parts are taken off.
    dx = (dn - dn.mean(-1, keepdims=True) - n * (dn * n).mean(-1, keepdims=True)) / std
    others = tuple(range(x.ndim - 1))
    return dx, (dy * n).sum(others), dy.sum(others)
