"""Truth table of exercises/test_ex02_attention.py: answers that must pass, and answers that must not.

An answer is HEAD and, behind it, the code with its indentation taken off (textwrap.dedent).
"""

HEAD = "import math\nimport numpy as np\n"

RIGHT = {
    "log_softmax": {
        "logaddexp adds up exponentials by itself": """
            def log_softmax(x, axis):
                return x - np.logaddexp.reduce(x, axis=axis, keepdims=True)
        """,
        "line by line": """
            def log_softmax(x, axis):
                def line(scores):
                    total = sum(math.exp(score - max(scores)) for score in scores)
                    return np.array([score - max(scores) - math.log(total) for score in scores])

                return np.apply_along_axis(line, axis, x).astype(x.dtype)
        """,
        "torch": """
            import torch

            def log_softmax(x, axis):
                return torch.from_numpy(x).log_softmax(axis).numpy()
        """,
    },
    "visible": {
        "loops": """
            def visible(T, S, window):
                if not T <= S:
                    raise ValueError("more queries than tokens")
                if window <= 0:
                    raise ValueError("an empty window")
                seen = np.zeros((T, S), dtype=bool)
                for t in range(T):
                    here = S - T + t
                    seen[t, max(here - window + 1, 0) : here + 1] = True
                return seen
        """,
        "two triangles": """
            def visible(T, S, window):
                if T > S or window < 1:
                    raise ValueError
                past = np.tri(T, S, S - T, dtype=bool)
                return past & ~np.tri(T, S, S - T - window, dtype=bool)
        """,
        "the last rows of a square": """
            def visible(T, S, window):
                if T > S or window < 1:
                    raise ValueError("no")
                ones = np.ones((S, S), dtype=bool)
                return np.tril(np.triu(ones, 1 - window))[S - T :]
        """,
    },
    "softmax_with_sink": {
        "a column more, cut off again, as in gpt-oss": """
            def softmax_with_sink(scores, sink):
                H, T, S = scores.shape
                column = np.broadcast_to(sink[:, None, None], (H, T, 1))
                x = np.concatenate([scores, column], axis=2)
                x = np.exp(x - x.max(axis=2, keepdims=True))
                return (x / x.sum(axis=2, keepdims=True))[:, :, :S]
        """,
        "by logarithms": """
            def softmax_with_sink(scores, sink):
                everything = np.logaddexp(np.logaddexp.reduce(scores, axis=-1), sink[:, None])
                return np.exp(scores - everything[:, :, None])
        """,
        "query by query": """
            def softmax_with_sink(scores, sink):
                weights = np.zeros_like(scores)
                for h in range(scores.shape[0]):
                    for t in range(scores.shape[1]):
                        top = max(sink[h], *scores[h, t])
                        exps = np.exp(scores[h, t] - top)
                        weights[h, t] = exps / (exps.sum() + np.exp(sink[h] - top))
                return weights
        """,
    },
    "hunt_is_causal": {
        "against a mask of its own, with random numbers": """
            def hunt_is_causal(attention):
                rng = np.random.default_rng(3)
                for T, S in ((1, 1), (1, 6), (4, 6), (6, 6)):
                    q, k, v = rng.normal(size=(T, 3)), rng.normal(size=(S, 3)), rng.normal(size=(S, 2))
                    scores = q @ k.T / np.sqrt(3)
                    for t in range(T):
                        for s in range(S):
                            if s > t + S - T:
                                scores[t, s] = -np.inf
                    weights = np.exp(scores - scores.max(1, keepdims=True))
                    y = weights / weights.sum(1, keepdims=True) @ v
                    np.testing.assert_allclose(attention(q, k, v), y, rtol=1e-4, atol=1e-5)
        """,
        "by its properties: change one token, see who notices": """
            def hunt_is_causal(attention):
                rng = np.random.default_rng(4)
                S = 5
                for T in range(1, S + 1):
                    q, k, v = rng.normal(size=(T, 3)), rng.normal(size=(S, 3)), rng.normal(size=(S, 2))
                    before = attention(q, k, v)
                    for s in range(S):
                        changed = v.copy()
                        changed[s] += 10.0
                        moved = np.abs(attention(q, k, changed) - before).max(axis=1) > 1e-3
                        for t in range(T):
                            assert moved[t] == (s <= S - T + t), (T, t, s)
        """,
        "the last queries against all queries": """
            def hunt_is_causal(attention):
                rng = np.random.default_rng(5)
                q, k, v = rng.normal(size=(3, 7, 4))
                full = attention(q, k, v)
                assert np.allclose(full[0], v[0], atol=1e-5)
                assert np.allclose(full[1], attention(q[1:2], k[:2], v[:2])[0], atol=1e-5)
                for T in range(1, 7):
                    assert np.allclose(attention(q[-T:], k, v), full[-T:], atol=1e-5)
                changed = v.copy()
                changed[-1] += 1
                assert np.allclose(attention(q, k, changed)[:-1], full[:-1], atol=1e-5)
        """,
    },
    "grouped_attention": {
        "einsum with an axis for the group": """
            def grouped_attention(q, k, v):
                B, H, T, D = q.shape
                G, S = k.shape[1], k.shape[2]
                q = q.reshape(B, G, H // G, T, D)
                scores = np.einsum("bgrtd,bgsd->bgrts", q, k) / math.sqrt(D)
                future = np.arange(S) > np.arange(T)[:, None] + S - T
                scores[..., future] = -np.inf
                scores -= scores.max(axis=-1, keepdims=True)
                weights = np.exp(scores)
                weights = weights / weights.sum(axis=-1, keepdims=True)
                return np.einsum("bgrts,bgsd->bgrtd", weights, v).reshape(B, H, T, D)
        """,
        "head by head": """
            def grouped_attention(q, k, v):
                y = np.empty_like(q)
                (B, H, T, D), (H_kv, S) = q.shape, k.shape[1:3]
                for b in range(B):
                    for h in range(H):
                        keys, values = k[b, h * H_kv // H], v[b, h * H_kv // H]
                        for t in range(T):
                            n = S - T + t + 1
                            scores = keys[:n] @ q[b, h, t] / math.sqrt(D)
                            weights = np.exp(scores - scores.max())
                            y[b, h, t] = weights @ values[:n] / weights.sum()
                return y
        """,
        "the group as more queries of one head": """
            def grouped_attention(q, k, v):
                (B, H, T, D), (H_kv, S) = q.shape, k.shape[1:3]
                rows = q.reshape(B, H_kv, -1, D)  # the queries of a whole group, one below the other
                scores = (rows @ k.transpose(0, 1, 3, 2)).reshape(B, H, T, S) / math.sqrt(D)
                scores = np.where(np.tri(T, S, S - T, dtype=bool), scores, np.finfo(scores.dtype).min)
                weights = np.exp(scores - scores.max(-1, keepdims=True))
                weights /= weights.sum(-1, keepdims=True)
                return (weights.reshape(B, H_kv, -1, S) @ v).reshape(B, H, T, D)
        """,
        "views that repeat without a copy": """
            def grouped_attention(q, k, v):
                (B, H, T, D), (H_kv, S) = q.shape, k.shape[1:3]
                y = np.zeros_like(q)
                for h in range(H):
                    g = h // (H // H_kv)
                    scores = np.matmul(q[:, h], np.swapaxes(k[:, g], 1, 2)) / D**0.5 + np.triu(np.full((T, S), -np.inf), S - T + 1).astype(q.dtype)
                    e = np.exp(scores - scores.max(2, keepdims=True))
                    y[:, h] = np.matmul(e / e.sum(2, keepdims=True), v[:, g])
                return y
        """,
    },
    "join": {
        "by the sums' logarithms": """
            def join(a, b):
                largest = np.where(a[0] > b[0], a[0], b[0])
                total, mix = np.zeros_like(a[1]), np.zeros_like(a[2])
                for m, t, x in (a, b):
                    seen = m > -np.inf
                    factor = np.zeros_like(m)
                    factor[seen] = np.exp(m[seen] - largest[seen])
                    total += t * factor
                    mix += x * factor[:, np.newaxis]
                return largest, total, mix
        """,
        "query by query": """
            def join(a, b):
                rows = []
                for (m_a, t_a, x_a), (m_b, t_b, x_b) in zip(zip(*a), zip(*b)):
                    if m_a < m_b:
                        (m_a, t_a, x_a), (m_b, t_b, x_b) = (m_b, t_b, x_b), (m_a, t_a, x_a)
                    f = 0 if t_b == 0 else np.exp(m_b - m_a)
                    rows.append((m_a, t_a + f * t_b, x_a + f * x_b))
                return tuple(np.stack(column) for column in zip(*rows))
        """,
        "NaN is put right afterwards": """
            def join(a, b):
                m = np.maximum(a[0], b[0])
                with np.errstate(invalid="ignore"):
                    f, g = np.nan_to_num(np.exp(a[0] - m)), np.nan_to_num(np.exp(b[0] - m))
                return m, a[1] * f + b[1] * g, (a[2].T * f + b[2].T * g).T
        """,
    },
    "attention_backward": {
        "autograd": """
            import torch

            def attention_backward(q, k, v, dy):
                q, k, v = (torch.tensor(x, requires_grad=True) for x in (q, k, v))
                mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
                y = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
                return tuple(x.numpy() for x in torch.autograd.grad(y, (q, k, v), torch.tensor(dy)))
        """,
        "one query at a time, with the Jacobian of softmax": """
            def attention_backward(q, k, v, dy):
                (T, D), S = q.shape, len(k)
                dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
                for t in range(T):
                    n = S - T + t + 1
                    scores = k[:n] @ q[t] / math.sqrt(D)
                    w = np.exp(scores - scores.max())
                    w = w / w.sum()
                    dv[:n] += np.outer(w, dy[t])
                    jacobian = np.diag(w) - np.outer(w, w)
                    ds = jacobian @ (v[:n] @ dy[t]) / math.sqrt(D)
                    dq[t] = ds @ k[:n]
                    dk[:n] += np.outer(ds, q[t])
                return dq, dk, dv
        """,
        "with the result in place of the mean, as FlashAttention": """
            def attention_backward(q, k, v, dy):
                (T, D), S = q.shape, len(k)
                scores = np.einsum("td,sd->ts", q, k) / math.sqrt(D)
                scores[~np.tri(T, S, S - T, dtype=bool)] = -np.inf
                p = np.exp(scores - scores.max(-1, keepdims=True))
                p = p / p.sum(-1, keepdims=True)
                y = p @ v
                delta = (y * dy).sum(-1, keepdims=True)
                ds = p * (dy @ v.T - delta) / math.sqrt(D)
                return ds @ k, ds.T @ q, p.T @ dy
        """,
    },
}

# {exercise: {misconception: (what the message must say, the answer)}}
WRONG = {
    "log_softmax": {
        "the logarithm of the weights (tracel-ai/burn issue 315)": (
            "a weight that was rounded to 0 has lost its logarithm",
            """
            def log_softmax(x, axis):
                e = np.exp(x - x.max(axis=axis, keepdims=True))
                return np.log(e / e.sum(axis=axis, keepdims=True))
            """,
        ),
        "a little number keeps log from 0": (
            "1e-09 is added before the logarithm",
            """
            def log_softmax(x, axis):
                e = np.exp(x - x.max(axis=axis, keepdims=True))
                return np.log(e / e.sum(axis=axis, keepdims=True) + 1e-9)
            """,
        ),
        "the weights": (
            "these are the weights, not their logarithms",
            """
            def log_softmax(x, axis):
                e = np.exp(x - x.max(axis=axis, keepdims=True))
                return e / e.sum(axis=axis, keepdims=True)
            """,
        ),
        "no maximum (jax-ml/jax issue 985 asks)": (
            "scores of 5000 make exp overflow",
            """
            def log_softmax(x, axis):
                return x - np.log(np.exp(x).sum(axis=axis, keepdims=True))
            """,
        ),
        "the maximum of all": (
            "take off the largest of each line, not of the whole array",
            """
            def log_softmax(x, axis):
                x = x - x.max()
                return x - np.log(np.exp(x).sum(axis=axis, keepdims=True))
            """,
        ),
        "always the last axis": (
            "it ignores `axis` and goes along axis 2",
            """
            def log_softmax(x, axis):
                x = x - x.max(axis=-1, keepdims=True)
                return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
            """,
        ),
        "the sum of all": (
            "the weights have the sum 1 over the whole array",
            """
            def log_softmax(x, axis):
                x = x - x.max()
                return x - np.log(np.exp(x).sum())
            """,
        ),
        "the maximum is taken off in one place only": (
            "taken off in the sum only",
            """
            def log_softmax(x, axis):
                return x - np.log(np.exp(x - x.max(axis=axis, keepdims=True)).sum(axis=axis, keepdims=True))
            """,
        ),
        "divided by a logarithm": (
            "the logarithm of a quotient is a difference",
            """
            def log_softmax(x, axis):
                x = x - x.max(axis=axis, keepdims=True)
                return x / np.log(np.exp(x).sum(axis=axis, keepdims=True))
            """,
        ),
        "only float64": (
            "float32 in, float64 out",
            """
            def log_softmax(x, axis):
                x = x.astype(np.float64)
                x = x - x.max(axis=axis, keepdims=True)
                return x - np.log(np.exp(x).sum(axis=axis, keepdims=True))
            """,
        ),
        "only float32": (
            "should be float64, not float32",
            """
            def log_softmax(x, axis):
                x = x.astype(np.float32)
                x = x - x.max(axis=axis, keepdims=True)
                return x - np.log(np.exp(x).sum(axis=axis, keepdims=True))
            """,
        ),
        "in place": (
            "changes its argument `x` in place",
            """
            def log_softmax(x, axis):
                x -= x.max(axis=axis, keepdims=True)
                return x - np.log(np.exp(x).sum(axis=axis, keepdims=True))
            """,
        ),
    },
    "visible": {
        "a window of one more (huggingface/transformers issue 39408, ml-explore/mlx-lm pull request 390)": (
            "sees one token too many",
            """
            def visible(T, S, window):
                if T > S or window < 1:
                    raise ValueError
                back = np.arange(S - T, S)[:, None] - np.arange(S)
                return (back >= 0) & (back <= window)
            """,
        ),
        "a window of one less": (
            "sees one token too few",
            """
            def visible(T, S, window):
                if T > S or window < 1:
                    raise ValueError
                return np.tri(T, S, S - T, dtype=bool) & ~np.tri(T, S, S - T - window + 1, dtype=bool)
            """,
        ),
        "the upper left corner (pytorch/pytorch issue 108108)": (
            "the queries are the last T tokens, not the first",
            """
            def visible(T, S, window):
                if T > S or window < 1:
                    raise ValueError
                back = np.arange(T)[:, None] - np.arange(S)
                return (back >= 0) & (back < window)
            """,
        ),
        "both sides": (
            "as far into the future as into the past",
            """
            def visible(T, S, window):
                if T > S or window < 1:
                    raise ValueError
                return np.abs(np.arange(S - T, S)[:, None] - np.arange(S)) < window
            """,
        ),
        "only the window": (
            "the future is visible",
            """
            def visible(T, S, window):
                if T > S or window < 1:
                    raise ValueError
                return np.arange(S - T, S)[:, None] - np.arange(S) < window
            """,
        ),
        "the old tokens only": (
            "the past outside the window is visible, and the window is not",
            """
            def visible(T, S, window):
                if T > S or window < 1:
                    raise ValueError
                return np.tri(T, S, S - T - window, dtype=bool)
            """,
        ),
        "the hidden ones": (
            "these are the hidden tokens",
            """
            def visible(T, S, window):
                if T > S or window < 1:
                    raise ValueError
                back = np.arange(S - T, S)[:, None] - np.arange(S)
                return (back < 0) | (back >= window)
            """,
        ),
        "not itself": (
            "a query does not see itself",
            """
            def visible(T, S, window):
                if T > S or window < 1:
                    raise ValueError
                back = np.arange(S - T, S)[:, None] - np.arange(S)
                return (back > 0) & (back <= window)
            """,
        ),
        "0 and 1": (
            "should be bool, not int64",
            """
            def visible(T, S, window):
                if T > S or window < 1:
                    raise ValueError
                return np.tril(np.triu(np.ones((S, S), dtype=np.int64), 1 - window))[S - T :]
            """,
        ),
        "numbers to add": (
            "this is a mask to be added to scores",
            """
            def visible(T, S, window):
                if T > S or window < 1:
                    raise ValueError
                back = np.arange(S - T, S)[:, None] - np.arange(S)
                return np.where((back >= 0) & (back < window), 0.0, -np.inf)
            """,
        ),
        "more queries than tokens": (
            "4 queries cannot be the last of 3 tokens, which should raise ValueError",
            """
            def visible(T, S, window):
                if window < 1:
                    raise ValueError
                back = np.arange(S - T, S)[:, None] - np.arange(S)
                return (back >= 0) & (back < window)
            """,
        ),
        "an empty window": (
            "with a window of 0 tokens no query sees anything, which should raise ValueError",
            """
            def visible(T, S, window):
                if T > S or window < 0:
                    raise ValueError
                back = np.arange(S - T, S)[:, None] - np.arange(S)
                return (back >= 0) & (back < window)
            """,
        ),
        "a negative window": (
            "a window cannot hold -1 tokens",
            """
            def visible(T, S, window):
                if T > S or not window:
                    raise ValueError
                back = np.arange(S - T, S)[:, None] - np.arange(S)
                return (back >= 0) & (back < window)
            """,
        ),
    },
    "softmax_with_sink": {
        "the sink keeps its value while the scores shrink (kyegomez/AttentionIsOFFByOne issue 5)": (
            "taken off the scores, but not off the sink",
            """
            def softmax_with_sink(scores, sink):
                exps = np.exp(scores - scores.max(-1, keepdims=True))
                return exps / (exps.sum(-1, keepdims=True) + np.exp(sink)[:, None, None])
            """,
        ),
        "softmax1, written down wrongly": (
            "it adds 1 to the sum",
            """
            def softmax_with_sink(scores, sink):
                exps = np.exp(scores - scores.max(-1, keepdims=True))
                return exps / (exps.sum(-1, keepdims=True) + 1)
            """,
        ),
        "softmax1, written down rightly": (
            "every head has the same sink, 0",
            """
            def softmax_with_sink(scores, sink):
                largest = np.maximum(scores.max(-1, keepdims=True), 0)
                exps = np.exp(scores - largest)
                return exps / (exps.sum(-1, keepdims=True) + np.exp(-largest))
            """,
        ),
        "the weights are scaled up again": (
            "each row has the sum 1",
            """
            def softmax_with_sink(scores, sink):
                largest = np.maximum(scores.max(-1, keepdims=True), sink[:, None, None])
                exps = np.exp(scores - largest)
                weights = exps / (exps.sum(-1, keepdims=True) + np.exp(sink[:, None, None] - largest))
                return weights / weights.sum(-1, keepdims=True)
            """,
        ),
        "the column stays": (
            "the weight of the sink is still there",
            """
            def softmax_with_sink(scores, sink):
                x = np.concatenate([scores, np.broadcast_to(sink[:, None, None], (*scores.shape[:2], 1))], axis=-1)
                exps = np.exp(x - x.max(-1, keepdims=True))
                return exps / exps.sum(-1, keepdims=True)
            """,
        ),
        "one sink for all": (
            "every head uses the sink of the first",
            """
            def softmax_with_sink(scores, sink):
                largest = np.maximum(scores.max(-1, keepdims=True), sink[0])
                exps = np.exp(scores - largest)
                return exps / (exps.sum(-1, keepdims=True) + np.exp(sink[0] - largest))
            """,
        ),
        "the sink in the sum": (
            "the sink itself is added to the sum, not its exponential",
            """
            def softmax_with_sink(scores, sink):
                exps = np.exp(scores - scores.max(-1, keepdims=True))
                return exps / (exps.sum(-1, keepdims=True) + sink[:, None, None])
            """,
        ),
        "the sink is not looked at for the largest": (
            "a row of -inf gives NaN",
            """
            def softmax_with_sink(scores, sink):
                largest = scores.max(-1, keepdims=True)
                exps = np.exp(scores - largest)
                return exps / (exps.sum(-1, keepdims=True) + np.exp(sink[:, None, None] - largest))
            """,
        ),
        "nothing is taken off": (
            "make exp overflow",
            """
            def softmax_with_sink(scores, sink):
                exps = np.exp(scores)
                return exps / (exps.sum(-1, keepdims=True) + np.exp(sink)[:, None, None])
            """,
        ),
        "the largest of a head": (
            "take off the largest of both first",
            """
            def softmax_with_sink(scores, sink):
                exps = np.exp(scores - scores.max())
                return exps / (exps.sum(-1, keepdims=True) + np.exp(sink[:, None, None] - scores.max()))
            """,
        ),
        "softmax over the queries": (
            "the weights have the sum 1 over the queries",
            """
            def softmax_with_sink(scores, sink):
                exps = np.exp(scores - scores.max(1, keepdims=True))
                return exps / exps.sum(1, keepdims=True)
            """,
        ),
        "the column is float64": (
            "float32 in, float64 out",
            """
            def softmax_with_sink(scores, sink):
                H, T, S = scores.shape
                x = np.ones((H, T, S + 1)) * sink[:, None, None]
                x[:, :, :S] = scores
                x = np.exp(x - x.max(axis=2, keepdims=True))
                return (x / x.sum(axis=2, keepdims=True))[:, :, :S]
            """,
        ),
    },
    "hunt_is_causal": {
        "only T = S": (
            "your test passes the version whose triangle starts in the upper left corner",
            """
            def hunt_is_causal(attention):
                q, k, v = np.ones((4, 2)), np.zeros((4, 2)), np.eye(4)
                assert np.allclose(attention(q, k, v), np.tri(4) / np.arange(1, 5)[:, None])
            """,
        ),
        "only one query": (
            "your test passes the version that hides nothing",
            """
            def hunt_is_causal(attention):
                y = attention(np.ones((1, 2)), np.zeros((4, 2)), np.eye(4))
                assert np.allclose(y, 0.25)
            """,
        ),
        "one query and T = S, nothing between": (
            "try 1 < T < S",
            """
            def hunt_is_causal(attention):
                for T in (1, 5):
                    y = attention(np.ones((T, 2)), np.zeros((5, 2)), np.eye(5))
                    assert np.allclose(y, np.tri(T, 5, 5 - T) / np.arange(6 - T, 6)[:, None])
            """,
        ),
        "only T < S": (
            "but only if T = S",
            """
            def hunt_is_causal(attention):
                for T in (1, 3):
                    y = attention(np.ones((T, 2)), np.zeros((5, 2)), np.eye(5))
                    assert np.allclose(y, np.tri(T, 5, 5 - T) / np.arange(6 - T, 6)[:, None])
            """,
        ),
        "only the last row": (
            "your test passes the version that hides nothing",
            """
            def hunt_is_causal(attention):
                for T in (1, 3, 5):
                    y = attention(np.ones((T, 2)), np.zeros((5, 2)), np.eye(5))
                    assert np.allclose(y[-1], 0.2)
            """,
        ),
        "only that the future is hidden": (
            "your test passes the version whose triangle starts in the upper left corner",
            """
            def hunt_is_causal(attention):
                for T in (1, 3, 5):
                    y = attention(np.ones((T, 2)), np.zeros((5, 2)), np.eye(5))
                    assert (y[np.tri(T, 5, 5 - T) == 0] == 0).all()
            """,
        ),
        "shapes": (
            "your test passes the version whose triangle starts in the upper left corner",
            """
            def hunt_is_causal(attention):
                assert attention(np.ones((2, 4)), np.ones((3, 4)), np.ones((3, 5))).shape == (2, 5)
            """,
        ),
        "to the last digit": (
            "your test fails a version that computes in float32, which is correct",
            """
            def hunt_is_causal(attention):
                for T in (1, 3, 5):
                    y = attention(np.ones((T, 2)), np.zeros((5, 2)), np.eye(5))
                    assert np.allclose(y, np.tri(T, 5, 5 - T) / np.arange(6 - T, 6)[:, None], rtol=0, atol=1e-12)
            """,
        ),
        "the wrong corner is taken for the right one": (
            "your test fails the formula with a mask, which is correct",
            """
            def hunt_is_causal(attention):
                for T in (1, 3, 5):
                    y = attention(np.ones((T, 2)), np.zeros((5, 2)), np.eye(5))
                    assert np.allclose(y, np.tri(T, 5) / np.arange(1, T + 1)[:, None])
            """,
        ),
        "forgets to assert": (
            "your test passes the version",
            """
            def hunt_is_causal(attention):
                for T in (1, 3, 5):
                    y = attention(np.ones((T, 2)), np.zeros((5, 2)), np.eye(5))
                    np.allclose(y, np.tri(T, 5, 5 - T) / np.arange(6 - T, 6)[:, None])
            """,
        ),
        "returns what it should assert": (
            "nobody looks at it, only `assert` counts",
            """
            def hunt_is_causal(attention):
                y = attention(np.ones((3, 2)), np.zeros((5, 2)), np.eye(5))
                return np.allclose(y, np.tri(3, 5, 2) / np.arange(3, 6)[:, None])
            """,
        ),
        "more queries than tokens": (
            "which is correct: ValueError: 5 queries cannot be the last of 3 tokens",
            """
            def hunt_is_causal(attention):
                assert attention(np.ones((5, 2)), np.ones((3, 2)), np.ones((3, 2))).shape == (5, 2)
            """,
        ),
    },
    "grouped_attention": {
        "-1000 for -inf": (
            "hidden scores are heard when the others are low",
            """
            def grouped_attention(q, k, v):
                (B, H, T, D), (H_kv, S) = q.shape, k.shape[1:3]
                q = q.reshape(B, H_kv, H // H_kv, T, D)
                s = np.einsum("bgrtd,bgsd->bgrts", q, k) / math.sqrt(D)
                s = np.where(np.tri(T, S, S - T, dtype=bool), s, -1000.0).astype(q.dtype)
                s = np.exp(s - s.max(-1, keepdims=True))
                s /= s.sum(-1, keepdims=True)
                return np.einsum("bgrts,bgsd->bgrtd", s, v).reshape(B, H, T, D)
            """,
        ),
        "the other order (apple/axlearn pull request 842, onnx/onnx pull request 7274)": (
            "neighbours share a key head, k0 k0 k1 k1, not k0 k1 k0 k1",
            """
            def grouped_attention(q, k, v):
                (B, H, T, D), (H_kv, S) = q.shape, k.shape[1:3]
                k, v = (np.tile(x, (1, H // H_kv, 1, 1)) for x in (k, v))
                scores = q @ k.swapaxes(2, 3) / math.sqrt(D)
                scores = np.where(np.tri(T, S, S - T) > 0, scores, -np.inf)
                e = np.exp(scores - scores.max(-1, keepdims=True))
                return e / e.sum(-1, keepdims=True) @ v
            """,
        ),
        "the group outside": (
            "neighbours share a key head, k0 k0 k1 k1, not k0 k1 k0 k1",
            """
            def grouped_attention(q, k, v):
                (B, H, T, D), (H_kv, S) = q.shape, k.shape[1:3]
                q = q.reshape(B, H // H_kv, H_kv, T, D)
                scores = q @ k[:, None].swapaxes(-1, -2) / math.sqrt(D)
                scores = np.where(np.tri(T, S, S - T) > 0, scores, -np.inf)
                e = np.exp(scores - scores.max(-1, keepdims=True))
                return (e / e.sum(-1, keepdims=True) @ v[:, None]).reshape(B, H, T, D)
            """,
        ),
        "values in another order": (
            "query heads read another head of v than of k",
            """
            def grouped_attention(q, k, v):
                (B, H, T, D), (H_kv, S) = q.shape, k.shape[1:3]
                k, v = np.repeat(k, H // H_kv, axis=1), np.tile(v, (1, H // H_kv, 1, 1))
                scores = q @ k.swapaxes(2, 3) / math.sqrt(D)
                scores = np.where(np.tri(T, S, S - T) > 0, scores, -np.inf)
                e = np.exp(scores - scores.max(-1, keepdims=True))
                return e / e.sum(-1, keepdims=True) @ v
            """,
        ),
        "one head of keys for all": (
            "every query head reads key head 0",
            """
            def grouped_attention(q, k, v):
                T, D, S = *q.shape[2:], k.shape[2]
                scores = q @ k[:, :1].swapaxes(2, 3) / math.sqrt(D)
                scores = np.where(np.tri(T, S, S - T) > 0, scores, -np.inf)
                e = np.exp(scores - scores.max(-1, keepdims=True))
                return e / e.sum(-1, keepdims=True) @ v[:, :1]
            """,
        ),
        "the width of the model (FareedKhan-dev/train-llm-from-scratch pull request 3)": (
            "take the width of a head",
            """
            def grouped_attention(q, k, v):
                (B, H, T, D), (H_kv, S) = q.shape, k.shape[1:3]
                q = q.reshape(B, H_kv, H // H_kv, T, D)
                scores = q @ k[:, :, None].swapaxes(-1, -2) / math.sqrt(H * D)
                scores = np.where(np.tri(T, S, S - T) > 0, scores, -np.inf)
                e = np.exp(scores - scores.max(-1, keepdims=True))
                return (e / e.sum(-1, keepdims=True) @ v[:, :, None]).reshape(B, H, T, D)
            """,
        ),
        "divided by a scale that was to be multiplied with (esceptico/perceiver-io issue 9)": (
            "multiplied by the square root of D",
            """
            def grouped_attention(q, k, v):
                (B, H, T, D), (H_kv, S) = q.shape, k.shape[1:3]
                q = q.reshape(B, H_kv, H // H_kv, T, D)
                scale = D**-0.5
                scores = q @ k[:, :, None].swapaxes(-1, -2) / scale
                scores = np.where(np.tri(T, S, S - T) > 0, scores, -np.inf)
                e = np.exp(scores - scores.max(-1, keepdims=True))
                return (e / e.sum(-1, keepdims=True) @ v[:, :, None]).reshape(B, H, T, D)
            """,
        ),
        "no scale (mlc-ai/mlc-llm pull request 3426)": (
            "not divided by the square root of D",
            """
            def grouped_attention(q, k, v):
                (B, H, T, D), (H_kv, S) = q.shape, k.shape[1:3]
                q = q.reshape(B, H_kv, H // H_kv, T, D)
                scores = q @ k[:, :, None].swapaxes(-1, -2)
                scores = np.where(np.tri(T, S, S - T) > 0, scores, -np.inf)
                e = np.exp(scores - scores.max(-1, keepdims=True))
                return (e / e.sum(-1, keepdims=True) @ v[:, :, None]).reshape(B, H, T, D)
            """,
        ),
        "the upper left corner (pytorch/pytorch issue 144858)": (
            "the first query sees only the first token",
            """
            def grouped_attention(q, k, v):
                (B, H, T, D), (H_kv, S) = q.shape, k.shape[1:3]
                q = q.reshape(B, H_kv, H // H_kv, T, D)
                scores = q @ k[:, :, None].swapaxes(-1, -2) / math.sqrt(D)
                scores = np.where(np.tri(T, S) > 0, scores, -np.inf)
                e = np.exp(scores - scores.max(-1, keepdims=True))
                return (e / e.sum(-1, keepdims=True) @ v[:, :, None]).reshape(B, H, T, D)
            """,
        ),
        "no mask": (
            "every query sees all tokens, its future too",
            """
            def grouped_attention(q, k, v):
                (B, H, T, D), (H_kv, S) = q.shape, k.shape[1:3]
                q = q.reshape(B, H_kv, H // H_kv, T, D)
                scores = q @ k[:, :, None].swapaxes(-1, -2) / math.sqrt(D)
                e = np.exp(scores - scores.max(-1, keepdims=True))
                return (e / e.sum(-1, keepdims=True) @ v[:, :, None]).reshape(B, H, T, D)
            """,
        ),
        "masked after softmax": (
            "the future is hidden after softmax",
            """
            def grouped_attention(q, k, v):
                (B, H, T, D), (H_kv, S) = q.shape, k.shape[1:3]
                q = q.reshape(B, H_kv, H // H_kv, T, D)
                scores = q @ k[:, :, None].swapaxes(-1, -2) / math.sqrt(D)
                e = np.exp(scores - scores.max(-1, keepdims=True))
                e = e / e.sum(-1, keepdims=True) * np.tri(T, S, S - T)
                return (e @ v[:, :, None]).reshape(B, H, T, D)
            """,
        ),
        "masked after softmax and scaled": (
            "a large score in the future spoils a row",
            """
            def grouped_attention(q, k, v):
                (B, H, T, D), (H_kv, S) = q.shape, k.shape[1:3]
                q = q.reshape(B, H_kv, H // H_kv, T, D)
                scores = q @ k[:, :, None].swapaxes(-1, -2) / math.sqrt(D)
                e = np.exp(scores - scores.max(-1, keepdims=True)) * np.tri(T, S, S - T)
                e = e / e.sum(-1, keepdims=True)
                return (e @ v[:, :, None]).reshape(B, H, T, D)
            """,
        ),
        "nothing is taken off before exp": (
            "scores of 1500 make exp overflow",
            """
            def grouped_attention(q, k, v):
                (B, H, T, D), (H_kv, S) = q.shape, k.shape[1:3]
                q = q.reshape(B, H_kv, H // H_kv, T, D)
                scores = q @ k[:, :, None].swapaxes(-1, -2) / math.sqrt(D)
                e = np.exp(np.where(np.tri(T, S, S - T) > 0, scores, -np.inf))
                return (e / e.sum(-1, keepdims=True) @ v[:, :, None]).reshape(B, H, T, D)
            """,
        ),
        "hidden with a number that is not small enough": (
            "a hidden token with a large score is heard",
            """
            def grouped_attention(q, k, v):
                (B, H, T, D), (H_kv, S) = q.shape, k.shape[1:3]
                q = q.reshape(B, H_kv, H // H_kv, T, D)
                scores = q @ k[:, :, None].swapaxes(-1, -2) / math.sqrt(D)
                scores = scores + np.where(np.tri(T, S, S - T) > 0, 0.0, -1000.0)
                e = np.exp(scores - scores.max(-1, keepdims=True))
                return (e / e.sum(-1, keepdims=True) @ v[:, :, None]).reshape(B, H, T, D)
            """,
        ),
        "a square root that widens": (
            "float32 in, float64 out",
            """
            def grouped_attention(q, k, v):
                (B, H, T, D), (H_kv, S) = q.shape, k.shape[1:3]
                q = q.reshape(B, H_kv, H // H_kv, T, D)
                scores = q @ k[:, :, None].swapaxes(-1, -2) / np.sqrt(D)
                scores = np.where(np.tri(T, S, S - T) > 0, scores, -np.inf)
                e = np.exp(scores - scores.max(-1, keepdims=True))
                return (e / e.sum(-1, keepdims=True) @ v[:, :, None]).reshape(B, H, T, D)
            """,
        ),
        "copies (only Linux limits the memory)": (
            "they are copied for every query head",
            """
            def grouped_attention(q, k, v):
                (B, H, T, D), (H_kv, S) = q.shape, k.shape[1:3]
                k, v = (np.repeat(x, H // H_kv, axis=1) for x in (k, v))
                scores = q @ k.swapaxes(2, 3) / math.sqrt(D)
                scores = np.where(np.tri(T, S, S - T) > 0, scores, -np.inf)
                e = np.exp(scores - scores.max(-1, keepdims=True))
                return e / e.sum(-1, keepdims=True) @ v
            """,
        ),
    },
    "join": {
        "a guard that is not far enough down": (
            "where all scores lie around -1000 or -5000 the sums are lost",
            """
            def join(a, b):
                largest = np.maximum(a[0], b[0])
                base = np.maximum(largest, -50)
                f, g = np.exp(a[0] - base), np.exp(b[0] - base)
                return largest, a[1] * f + b[1] * g, a[2] * f[:, None] + b[2] * g[:, None]
            """,
        ),
        "a guard at -1000": (
            "where all scores lie around -1000 or -5000 the sums are lost",
            """
            def join(a, b):
                largest = np.maximum(a[0], b[0])
                base = np.maximum(largest, -1000)
                f, g = np.exp(a[0] - base), np.exp(b[0] - base)
                return largest, a[1] * f + b[1] * g, a[2] * f[:, None] + b[2] * g[:, None]
            """,
        ),
        "sums are added": (
            "the sums are added as they are",
            """
            def join(a, b):
                return np.maximum(a[0], b[0]), a[1] + b[1], a[2] + b[2]
            """,
        ),
        "nothing joined with nothing (flashinfer-ai/flashinfer issue 4051)": (
            "two parts that saw no keys give NaN",
            """
            def join(a, b):
                m = np.maximum(a[0], b[0])
                f, g = np.exp(a[0] - m), np.exp(b[0] - m)
                return m, a[1] * f + b[1] * g, a[2] * f[:, None] + b[2] * g[:, None]
            """,
        ),
        "the online softmax of the lesson: only the old sums shrink": (
            "only the first part shrinks",
            """
            def join(a, b):
                m = np.maximum(a[0], b[0])
                f = np.exp(a[0] - m)
                return m, a[1] * f + b[1], a[2] * f[:, None] + b[2]
            """,
        ),
        "only the second part shrinks": (
            "only the second part shrinks",
            """
            def join(a, b):
                m = np.maximum(a[0], b[0])
                g = np.exp(b[0] - m)
                return m, a[1] + b[1] * g, a[2] + b[2] * g[:, None]
            """,
        ),
        "mix is forgotten": (
            "total shrinks, but mix does not",
            """
            def join(a, b):
                m = np.maximum(a[0], b[0])
                return m, a[1] * np.exp(a[0] - m) + b[1] * np.exp(b[0] - m), a[2] + b[2]
            """,
        ),
        "total is forgotten": (
            "mix shrinks, but total does not",
            """
            def join(a, b):
                m = np.maximum(a[0], b[0])
                f, g = np.exp(a[0] - m)[:, None], np.exp(b[0] - m)[:, None]
                return m, a[1] + b[1], a[2] * f + b[2] * g
            """,
        ),
        "the factor upside down": (
            "the sums grow where they should shrink",
            """
            def join(a, b):
                m = np.maximum(a[0], b[0])
                f, g = np.exp(m - a[0]), np.exp(m - b[0])
                return m, a[1] * f + b[1] * g, a[2] * f[:, None] + b[2] * g[:, None]
            """,
        ),
        "exchanged factors": (
            "each part has the other's factor",
            """
            def join(a, b):
                m = np.maximum(a[0], b[0])
                f, g = np.exp(b[0] - m), np.exp(a[0] - m)
                return m, a[1] * f + b[1] * g, a[2] * f[:, None] + b[2] * g[:, None]
            """,
        ),
        "powers of two (sgl-project/sglang pull request 35045)": (
            "it uses powers of 2",
            """
            def join(a, b):
                m = np.maximum(a[0], b[0])
                f, g = np.exp2(a[0] - m), np.exp2(b[0] - m)
                return m, a[1] * f + b[1] * g, a[2] * f[:, None] + b[2] * g[:, None]
            """,
        ),
        "already divided": (
            "mix is divided by total already",
            """
            def join(a, b):
                m = np.maximum(a[0], b[0])
                f, g = np.exp(a[0] - m), np.exp(b[0] - m)
                total = a[1] * f + b[1] * g
                return m, total, (a[2] * f[:, None] + b[2] * g[:, None]) / total[:, None]
            """,
        ),
        "back to plain exponentials": (
            "a score of 1000 makes exp overflow",
            """
            def join(a, b):
                m = np.maximum(a[0], b[0])
                f, g = np.exp(a[0]), np.exp(b[0])
                total, mix = a[1] * f + b[1] * g, a[2] * f[:, None] + b[2] * g[:, None]
                return m, total / np.exp(m), mix / np.exp(m)[:, None]
            """,
        ),
        "the first part's scale for all": (
            "the largest score is that of the first part",
            """
            def join(a, b):
                g = np.exp(b[0] - a[0])
                return a[0], a[1] + b[1] * g, a[2] + b[2] * g[:, None]
            """,
        ),
        "one largest for all queries": (
            "all queries share one largest score",
            """
            def join(a, b):
                m = np.full_like(a[0], max(a[0].max(), b[0].max()))
                f, g = np.exp(a[0] - m), np.exp(b[0] - m)
                return m, a[1] * f + b[1] * g, a[2] * f[:, None] + b[2] * g[:, None]
            """,
        ),
        "a factor without an axis": (
            "could not be broadcast",
            """
            def join(a, b):
                m = np.maximum(a[0], b[0])
                f, g = np.exp(a[0] - m), np.exp(b[0] - m)
                return m, a[1] * f + b[1] * g, a[2] * f + b[2] * g
            """,
        ),
        "a list": (
            "should be a tuple, not a list",
            """
            def join(a, b):
                m = np.maximum(a[0], b[0])
                base = np.where(m == -np.inf, 0, m)
                f, g = np.exp(a[0] - base), np.exp(b[0] - base)
                return [m, a[1] * f + b[1] * g, a[2] * f[:, None] + b[2] * g[:, None]]
            """,
        ),
        "-inf becomes 0": (
            "the largest score is -inf, not 0",
            """
            def join(a, b):
                m = np.maximum(a[0], b[0])
                m = np.where(m == -np.inf, 0, m)
                f, g = np.exp(a[0] - m), np.exp(b[0] - m)
                return m, a[1] * f + b[1] * g, a[2] * f[:, None] + b[2] * g[:, None]
            """,
        ),
    },
    "attention_backward": {
        misconception: (
            message,
            f"""
            def attention_backward(q, k, v, dy):
                (T, D), S = q.shape, len(k)
                hidden = ~np.tri(T, S, {changed.get("corner", "S - T")}, dtype=bool)
                scores = {changed.get("scores", "q @ k.T / math.sqrt(D)")}
                scores[hidden] = -np.inf
                w = np.exp({changed.get("exponent", "scores - scores.max(1, keepdims=True)")})
                w = w / w.sum(1, keepdims=True)
                dv = {changed.get("dv", "w.T @ dy")}
                dw = dy @ v.T
                ds = {changed.get("ds", "w * (dw - (w * dw).sum(1, keepdims=True))")}
                dq = {changed.get("dq", "ds @ k / math.sqrt(D)")}
                dk = {changed.get("dk", "ds.T @ q / math.sqrt(D)")}
                return {changed.get("result", "dq, dk, dv")}
            """,
        )
        for misconception, message, changed in (
            ("only w (1 - w)", "w (1 - w) is only the part where i = j", {"ds": "w * (1 - w) * dw"}),
            (
                "squares",
                "an outer product: no squares",
                {"ds": "np.stack([(np.diag(p) - p * p) @ x for p, x in zip(w, dw)])"},
            ),
            ("no mean", "its mean under the weights must be taken off", {"ds": "w * dw"}),
            ("the plain mean", "it must be the mean under the weights", {"ds": "w * (dw - dw.mean(1, keepdims=True))"}),
            ("the plain sum", "is taken off unweighted", {"ds": "w * (dw - dw.sum(1, keepdims=True))"}),
            ("the sum over queries", "the sum goes over the queries", {"ds": "w * (dw - (w * dw).sum(0))"}),
            ("plus", "a sign is wrong", {"ds": "w * (dw + (w * dw).sum(1, keepdims=True))"}),
            ("no outer weight", "the last factor is missing", {"ds": "dw - (w * dw).sum(1, keepdims=True)"}),
            ("softmax is left out", "the way back leaves softmax out", {"ds": "dw * ~hidden"}),
            (
                "no scale on the way back",
                "and so must their derivative be",
                {"dq": "ds @ k", "dk": "ds.T @ q"},
            ),
            ("dk without scale", "and so must their derivative be", {"dk": "ds.T @ q"}),
            (
                "the scale twice",
                "divides twice on the way back",
                {"ds": "w * (dw - (w * dw).sum(1, keepdims=True)) / math.sqrt(D)"},
            ),
            (
                "the scale turned round",
                "is multiplied by the square root of D",
                {"dq": "ds @ k * math.sqrt(D)", "dk": "ds.T @ q * math.sqrt(D)"},
            ),
            ("no scale on the way there", "the forward pass does not divide", {"scores": "q @ k.T"}),
            (
                "no scale at all (mlc-ai/mlc-llm pull request 3426)",
                "does not divide the scores",
                {"scores": "q @ k.T", "dq": "ds @ k", "dk": "ds.T @ q"},
            ),
            ("the upper left corner", "the first one sees only the first token", {"corner": "0"}),
            ("no mask", "the forward pass sees the future", {"corner": "S"}),
            ("minus", "with the sign turned round", {"dv": "-w.T @ dy"}),
            ("overflow", "scores above 1000 make exp overflow", {"exponent": "scores"}),
            (
                "hidden by 1000 less",
                "only -inf hides every score",
                {
                    "exponent": "(s := np.where(hidden, q @ k.T / math.sqrt(D) - 1000, scores)) - s.max(1, keepdims=True)"
                },
            ),
            ("another order", "should have shape", {"result": "dv, dk, dq"}),
            ("a list", "should be the tuple (dq, dk, dv), not a list of 3", {"result": "[dq, dk, dv]"}),
            (
                "the largest score of all, the hidden ones too",
                "a large score in the future spoils a row",
                {"exponent": "scores - (q @ k.T / math.sqrt(D)).max(1, keepdims=True)"},
            ),
            ("dk of the wrong side", "raises ValueError", {"dk": "ds @ q / math.sqrt(D)"}),
            ("float64", "float32 in, float64 out", {"scores": "q @ k.T / np.sqrt(D)"}),
        )
    },
}

# Mutants that compute the same.
SAME_CONDITION = "np.where takes 0.0 and 1.0 for False and True"
SYMMETRIC = "the larger of two numbers is the same in either order"
EQUIVALENT = {
    "grouped_attention: np.tri(T, S, S - T, dtype=bool) -> np.tri(T, S, S - T)": SAME_CONDITION,
    "grouped_attention: k.swapaxes(-1, -2) -> k.swapaxes(-2, -1)": "swapping two axes has no order",
    "attention_backward: np.tri(T, S, S - T, dtype=bool) -> np.tri(T, S, S - T)": SAME_CONDITION,
    "softmax_with_sink: np.maximum(scores.max(-1, keepdims=True), sink) ->"
    " np.maximum(sink, scores.max(-1, keepdims=True))": SYMMETRIC,
    "join: np.errstate(invalid='ignore') -> np.errstate()": "it warns, and gives the same",
}
