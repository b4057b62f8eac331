"""Truth table of exercises/test_ex04_alibi.py: answers that must pass, and answers that must not.

An answer is HEAD and, behind it, the code with its indentation taken off (textwrap.dedent).
"""

HEAD = "import math\nimport numpy as np\n"

RIGHT = {
    "key_bias": {
        "row by row": """
            def key_bias(mask, slopes):
                B, S = mask.shape
                bias = np.full((B, len(slopes), 1, S), -np.inf, dtype=slopes.dtype)
                for b in range(B):
                    real = np.flatnonzero(mask[b])
                    bias[b, :, 0, real] = np.arange(len(real))[:, None] * slopes
                return bias
        """,
        "einsum and a mask that is added": """
            def key_bias(mask, slopes):
                number = np.maximum(np.cumsum(mask, axis=-1) - 1, 0).astype(slopes.dtype)
                hide = np.zeros(mask.shape, slopes.dtype)
                hide[~mask] = -np.inf
                return np.einsum("h,bs->bhs", slopes, number)[:, :, np.newaxis] + hide[:, None, None]
        """,
        "torch, as in BLOOM": """
            import torch

            def key_bias(mask, slopes):
                mask, slopes = torch.from_numpy(mask), torch.from_numpy(slopes)
                number = (mask.cumsum(dim=-1) - 1) * mask
                alibi = slopes[:, None] * number[:, None, :]
                return alibi.masked_fill(~mask[:, None], -torch.inf)[:, :, None].numpy()
        """,
        "with a triangle of ones": """
            def key_bias(mask, slopes):
                B, S = mask.shape
                before = mask.astype(slopes.dtype) @ np.triu(np.ones((S, S), slopes.dtype), 1)
                out = np.empty((B, slopes.size, 1, S), slopes.dtype)
                out[:, :, 0] = slopes.reshape(1, -1, 1) * before.reshape(B, 1, S)
                np.copyto(out, -np.inf, where=~mask[:, None, None, :])
                return out
        """,
    },
    "hunt_slopes": {
        "the authors' own code as an oracle": """
            def hunt_slopes(slopes):
                def right(n):
                    if math.log2(n).is_integer():
                        start = 2 ** (-(2 ** -(math.log2(n) - 3)))
                        return [start * start**i for i in range(n)]
                    closest = 2 ** math.floor(math.log2(n))
                    return right(closest) + right(2 * closest)[0::2][: n - closest]

                for n in (1, 2, 3, 4, 6, 8, 11, 12, 24):
                    assert np.allclose(slopes(n), right(n), rtol=1e-5, atol=1e-9)
        """,
        "by properties: halves, ratios, and what other H have": """
            def hunt_slopes(slopes):
                for P in (2, 4, 8, 16):
                    m = np.asarray(slopes(P), dtype=float)
                    assert len(m) == P
                    assert np.allclose(m[1:] / m[:-1], m[0], rtol=1e-4)
                    assert np.allclose(m[-1], 2**-8, rtol=1e-4)
                    fine = np.asarray(slopes(2 * P))
                    for H in (P + 1, P + P // 2, 2 * P - 1):
                        got = np.asarray(slopes(H))
                        assert np.allclose(got[:P], m, rtol=1e-4)
                        assert np.allclose(got[P:], fine[::2][: H - P], rtol=1e-4)
        """,
        "a handful of tables": """
            def hunt_slopes(slopes):
                tables = {
                    1: [2**-8],
                    2: [2**-4, 2**-8],
                    3: [2**-4, 2**-8, 2**-2],
                    5: [2**-2, 2**-4, 2**-6, 2**-8, 2**-1],
                    6: [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3],
                    8: [2**-1, 2**-2, 2**-3, 2**-4, 2**-5, 2**-6, 2**-7, 2**-8],
                    12: [0.5, 0.25, 0.125, 0.0625, 2**-5, 2**-6, 2**-7, 2**-8, 0.70710678, 0.35355339, 0.17677670, 0.08838835],
                }
                for H, table in tables.items():
                    assert np.abs(np.array(slopes(H)) / table - 1).max() < 1e-5, H
        """,
    },
    "in_windows": {
        "the context of each token, in closed form": """
            def in_windows(losses, N, stride):
                L = losses.size
                if stride < 1 or stride > L:
                    raise ValueError("stride")
                n = np.arange(N)
                window = np.maximum(-(-(n - L + 1) // stride), 0)  # the first that reaches token n
                count = window[-1] + 1
                ends = np.minimum(np.arange(count) * stride + L, N)
                return float(losses[n - window * stride].mean()), int((ends - np.arange(count) * stride).sum())
        """,
        "as Hugging Face's guide does it": """
            def in_windows(losses, N, stride):
                if stride not in range(1, len(losses) + 1):
                    raise ValueError(f"{stride}")
                nll, read, previous = [], 0, 0
                for begin in range(0, N, stride):
                    end = min(begin + len(losses), N)
                    fresh = end - previous
                    nll.extend(losses[: end - begin][-fresh:])
                    read += end - begin
                    previous = end
                    if end == N:
                        break
                return sum(nll) / len(nll), read
        """,
        "token by token": """
            def in_windows(losses, N, stride):
                if not 0 < stride <= len(losses):
                    raise ValueError
                start, end, total = 0, min(len(losses), N), 0.0
                read = end
                for n in range(N):
                    if n == end:
                        start += stride
                        end = min(start + len(losses), N)
                        read += end - start
                    total += losses[n - start]
                return total / N, read
        """,
    },
    "reach": {
        "counting up": """
            def reach(slope, gap, eps):
                d, others = 0, 0.0
                while True:
                    others += math.exp(slope * (d + 1) - gap)
                    if 1 / (1 + others) < eps:
                        return d
                    d += 1
        """,
        "softmax, doubling and halving": """
            def reach(slope, gap, eps):
                def weight(d):
                    scores = -slope * np.arange(d + 1.0)
                    scores[d] += gap
                    scores = np.exp(scores - scores.max())
                    return scores[d] / scores.sum()

                high = 1
                while weight(high) >= eps:
                    high *= 2
                low = 0
                while high - low > 1:
                    middle = (low + high) // 2
                    if weight(middle) >= eps:
                        low = middle
                    else:
                        high = middle
                return low
        """,
        "the logarithm of 1 + x for large x is that of x": """
            def reach(slope, gap, eps):
                log_x = gap + math.log((1 - eps) / eps) + math.log(-math.expm1(-slope))
                top = log_x if log_x > 50 else math.log1p(math.exp(log_x))
                return math.floor(top / slope)
        """,
    },
    "hunt_cached_alibi": {
        "against an oracle, with random numbers": """
            def hunt_cached_alibi(attention):
                H, D, E = 2, 3, 4
                for T, S in ((1, 1), (1, 6), (3, 7), (5, 5)):
                    q, k, v = (np.sin(np.arange(H * n * w) + w * n).reshape(H, n, w) for n, w in ((T, D), (S, D), (S, E)))
                    slopes = np.array([0.8, 0.3])
                    y = attention(q, k, v, slopes)
                    for h in range(H):
                        for t in range(T):
                            i = S - T + t
                            x = [q[h, t] @ k[h, j] / math.sqrt(D) - slopes[h] * (i - j) for j in range(i + 1)]
                            w = np.exp(np.array(x))
                            assert np.allclose(y[h, t], w @ v[h, : i + 1] / w.sum(), rtol=1e-4, atol=1e-5)
        """,
        "ratios of neighbouring weights": """
            def hunt_cached_alibi(attention):
                H, S, D = 4, 5, 9
                slopes = np.array([1.0, 0.5, 0.25, 0.125])
                eye = np.tile(np.eye(S), (H, 1, 1))
                for T in range(1, S + 1):
                    w = attention(np.zeros((H, T, D)), np.ones((H, S, D)), eye, slopes)
                    for t in range(T):
                        n = S - T + t + 1
                        assert np.all(np.abs(w[:, t, n:]) < 1e-6)
                        ratio = w[:, t, 1:n] / w[:, t, : n - 1]
                        assert np.allclose(ratio, np.exp(slopes)[:, None], rtol=1e-3)
                        assert np.allclose(w[:, t].sum(-1), 1, atol=1e-5)
        """,
        "the last row of a whole text, then with a cache": """
            def hunt_cached_alibi(attention):
                H, S, D = 3, 6, 4
                q, k, v = 2 * np.cos(np.arange(3.0 * H * S * D) ** 1.5).reshape(3, H, S, D)
                m = np.array([0.6, 0.1, 0.9])
                scores = np.einsum("htd,hsd->hts", q, k) / 2
                for i in range(S):
                    for j in range(S):
                        scores[:, i, j] += m * (j - i) if j <= i else -np.inf
                w = np.exp(scores - scores.max(-1, keepdims=True))
                full = (w / w.sum(-1, keepdims=True)) @ v
                for T in range(1, S + 1):
                    assert np.allclose(attention(q[:, S - T :], k, v, m), full[:, S - T :], atol=1e-4), T
        """,
    },
    "fold": {
        "two channels more: one for each part of the distance": """
            def fold(q, k, slopes):
                (H, T, D), (G, S, _) = q.shape, k.shape
                W = D + 2
                new_q = np.zeros((H, T, W), q.dtype)
                new_k = np.zeros((G, S, W), k.dtype)
                new_q[:, :, :D] = q * math.sqrt(W / D)
                new_q[:, :, D] = math.sqrt(W) * slopes[:, None]
                new_q[:, :, D + 1] = -math.sqrt(W) * slopes[:, None] * np.arange(S - T, S)
                new_k[:, :, :D], new_k[:, :, D], new_k[:, :, D + 1] = k, np.arange(S), 1
                return new_q, new_k
        """,
        "the keys grow, and the places are scaled": """
            def fold(q, k, slopes):
                D = q.shape[-1]
                W = D + 1
                price = np.repeat(slopes[:, None], q.shape[1], axis=1) * 16
                place = np.tile(np.arange(k.shape[1]) * (W**0.5 / 16), (len(k), 1)).astype(k.dtype)
                return np.dstack([q, price]), np.dstack([k * (W / D) ** 0.5, place])
        """,
        "twice as wide, with zeros": """
            def fold(q, k, slopes):
                D = q.shape[2]
                W = 2 * D
                a = np.zeros((*q.shape[:2], D), q.dtype)
                b = np.zeros((*k.shape[:2], D), k.dtype)
                a[..., -1] = (slopes * W**0.5)[:, None]
                b[..., -1] = np.arange(len(k[0]))
                return np.concatenate([2**0.5 * q, a], -1), np.concatenate([k, b], -1)
        """,
        "places counted from -1000": """
            def fold(q, k, slopes):
                D = q.shape[2]
                new_q = np.pad(q * (1 + 1 / D) ** 0.5, ((0, 0), (0, 0), (0, 1)))
                new_k = np.pad(k, ((0, 0), (0, 0), (0, 1)))
                new_q[..., D] = (slopes * (D + 1) ** 0.5)[:, None]
                new_k[..., D] = np.arange(k.shape[1]) - 1000
                return new_q, new_k
        """,
    },
    "read_back": {
        "a running sum relative to the largest possible score": """
            def read_back(q, read, S, slope, norm, eps):
                D = len(q)
                q64 = q.astype(float)
                top = math.sqrt(q64 @ q64) * norm / math.sqrt(D)
                log_total, y, distance, b = -math.inf, 0.0, 0, 0
                while True:
                    k, v = read(b)
                    b += 1
                    scores = []
                    for row in k[::-1]:
                        scores.append(float(row @ q64) / math.sqrt(D) - slope * distance)
                        distance += 1
                    scores = np.array(scores[::-1])
                    here = np.logaddexp.reduce(scores)
                    new = np.logaddexp(log_total, here)
                    y = y * math.exp(log_total - new) + np.exp(scores - new) @ v.astype(float)
                    log_total = new
                    log_rest = top - slope * distance - math.log1p(-math.exp(-slope))
                    if distance == S or log_rest <= math.log(eps) + np.logaddexp(log_total, log_rest):
                        return y.astype(q.dtype)
        """,
        "token by token within a block": """
            def read_back(q, read, S, slope, norm, eps):
                scale = 1 / math.sqrt(q.size)
                bound = float(np.linalg.norm(q)) * norm * scale
                m, total, mix, d, b = -math.inf, 0.0, 0.0, 0, 0
                done = False
                while not done:
                    keys, values = read(b)
                    for key, value in zip(keys[::-1], values[::-1]):
                        s = float(q @ key) * scale - slope * d
                        if s > m:
                            f = math.exp(m - s)
                            total, mix, m = total * f, mix * f, s
                        w = math.exp(s - m)
                        total, mix, d = total + w, mix + w * value, d + 1
                    b += 1
                    x = bound - slope * d - m
                    rest = math.inf if x > 700 else math.exp(x) / (1 - math.exp(-slope))
                    share = 1.0 if rest == math.inf else rest / (rest + total)
                    done = d >= S or share <= eps
                return (mix / total).astype(q.dtype)
        """,
        "parts, joined at the end": """
            def read_back(q, read, S, slope, norm, eps):
                q64, parts, d = np.float64(q), [], 0
                highest = np.sqrt((q64**2).sum() / len(q)) * norm
                for b in range(S):
                    k, v = read(b)
                    s = np.float64(k) @ q64 / np.sqrt(len(q)) - slope * (d + np.arange(len(k))[::-1])
                    parts.append((s, v))
                    d += len(k)
                    every = np.concatenate([s for s, _ in parts])
                    known = every.max() + np.log(np.exp(every - every.max()).sum())
                    rest = highest - slope * d - np.log(-np.expm1(-slope))
                    if d == S or rest - np.logaddexp(known, rest) <= np.log(eps):
                        break
                w = np.exp(every - known)
                return (w @ np.concatenate([np.float64(v) for _, v in parts])).astype(q.dtype)
        """,
    },
}


def changed(code, *changes):
    """The code with one or more pieces replaced; each must be there."""
    for old, new in changes:
        assert old in code, old
        code = code.replace(old, new)
    return code


KEY_BIAS = """
    def key_bias(mask, slopes):
        number = mask.cumsum(axis=1) - 1
        bias = slopes[:, None] * number[:, None].astype(slopes.dtype)
        return np.where(mask[:, None], bias, -np.inf)[:, :, None]
"""
IN_WINDOWS = """
    def in_windows(losses, N, stride):
        L = len(losses)
        if not 1 <= stride <= L:
            raise ValueError("stride")
        total, read, end, windows, means = 0.0, 0, 0, 0, []
        for start in range(0, N, stride):
            new = end - start
            end = min(start + L, N)
            total += losses[max(new, 0) : end - start].sum()
            means.append(losses[max(new, 0) : end - start].mean())
            read += end - start
            windows += 1
            if end == N:
                break
        return total / N, read
"""
REACH = """
    def reach(slope, gap, eps):
        d = 0
        while True:
            others = sum(math.exp(slope * k - gap) for k in range(1, d + 2))
            if 1 / (1 + others) < eps:
                return d
            d += 1
"""
FOLD = """
    def fold(q, k, slopes):
        (H, T, D), (H_kv, S) = q.shape, k.shape[:2]
        W = D + 1
        price = np.broadcast_to(slopes[:, None, None] * W**0.5, (H, T, 1))
        place = np.broadcast_to(np.arange(S, dtype=k.dtype)[:, None], (H_kv, S, 1))
        return np.concatenate([q * (W / D) ** 0.5, price], 2), np.concatenate([k, place], 2)
"""
READ_BACK = """
    def read_back(q, read, S, slope, norm, eps):
        D = len(q)
        highest = math.sqrt(float(q @ q)) * norm / math.sqrt(D)
        largest, total, mix, seen, b = -math.inf, 0.0, 0.0, 0, 0
        while seen < S:
            k, v = read(b)
            n, b = len(k), b + 1
            back = (seen + np.arange(n)[::-1]).astype(q.dtype)
            seen += n
            scores = k @ q / math.sqrt(D) - slope * back
            top = max(largest, scores.max())
            exps = np.exp(scores - top)
            shrink = np.exp(largest - top)
            total = total * shrink + exps.sum()
            mix = mix * shrink + exps @ v
            largest = top
            log_rest = highest - slope * seen - math.log(1 - math.exp(-slope))
            if log_rest - np.logaddexp(log_rest, largest + np.log(total)) <= math.log(eps):
                break
        return mix / total
"""

# {exercise: {misconception: (what the message must say, the answer)}}
WRONG = {
    "key_bias": {
        misconception: (words, changed(KEY_BIAS, *changes))
        for misconception, words, *changes in (
            (
                "all places are numbered (PaddlePaddle/PaddleNLP pull request 6496)",
                "it numbers padding, too",
                ("mask.cumsum(axis=1) - 1", "np.arange(mask.shape[1]) + 0 * mask"),
            ),
            (
                "padding on the left is taken off",
                "only padding on the left is taken out",
                ("mask.cumsum(axis=1) - 1", "np.arange(mask.shape[1]) - mask.argmax(axis=1)[:, None]"),
            ),
            (
                "all padding is taken off",
                "only how much padding there is counts",
                ("mask.cumsum(axis=1) - 1", "np.arange(mask.shape[1]) - (~mask).sum(axis=1)[:, None]"),
            ),
            ("numbers from 1", "the first real token is number 1", ("mask.cumsum(axis=1) - 1", "mask.cumsum(axis=1)")),
            (
                "BLOOM's tensor, which hides nothing",
                "only -inf keeps all from looking at it",
                ("np.where(mask[:, None], bias, -np.inf)", "(bias * mask[:, None])"),
            ),
            (
                "nothing is hidden",
                "only -inf keeps all from looking at it",
                ("np.where(mask[:, None], bias, -np.inf)", "bias"),
            ),
            ("hidden by -1e9", "only -inf hides", ("-np.inf", "-1e9")),
            ("hidden by the smallest float", "only -inf hides", ("-np.inf", "np.finfo(slopes.dtype).min")),
            ("hidden by -10000, as in early BERT", "only -inf hides", ("-np.inf", "-10000.0")),
            ("the mask is turned round", "it hides the real tokens", ("np.where(mask", "np.where(~mask")),
            (
                "numbers from the right",
                "the numbers begin at the last token",
                ("mask.cumsum(axis=1) - 1", "mask[:, ::-1].cumsum(axis=1)[:, ::-1] - 1"),
            ),
            ("minus", "the sign is wrong", ("slopes[:, None] *", "-slopes[:, None] *")),
            (
                "distances to the last token",
                "a correct bias, but not the one that was asked for",
                ("mask.cumsum(axis=1) - 1", "mask.cumsum(axis=1) - mask.sum(axis=1, keepdims=True)"),
            ),
            ("numbers down the batch", "the numbers run from row to row", ("axis=1", "axis=0")),
            (
                "one text after the other",
                "the numbers go on from one row to the next",
                ("mask.cumsum(axis=1)", "mask.cumsum().reshape(mask.shape)"),
            ),
            (
                "one slope",
                "the first head's slope is used for all heads",
                ("slopes[:, None]", "np.full_like(slopes, slopes[0])[:, None]"),
            ),
            ("0 * -inf", "padding gets NaN", ("-np.inf", "np.nan")),
            ("inf", "whoever adds that looks at nothing else", ("-np.inf", "np.inf")),
            ("float64", "float32 in, float64 out", (".astype(slopes.dtype)", "")),
            ("no axis for the queries", "an axis of length 1 is missing", (")[:, :, None]", ")")),
            (
                "a row for each query",
                "one row will do",
                (")[:, :, None]", ")[:, :, None].repeat(mask.shape[1], 2)"),
            ),
            ("heads before texts", "should have shape", (")[:, :, None]", ")[:, :, None].swapaxes(0, 1)")),
            ("a list", "should be an array, not a list", (")[:, :, None]", ")[:, :, None].tolist()")),
        )
    },
    "hunt_slopes": {
        "12 heads alone": (
            "your test passes the version",
            """
            def hunt_slopes(slopes):
                right = [2.0**-h for h in range(1, 9)] + [2 ** -(h + 0.5) for h in range(4)]
                assert np.allclose(slopes(12), right)
            """,
        ),
        "the slopes of H heads against those of 2P heads": (
            "ends in 2^-4",
            """
            def hunt_slopes(slopes):
                for H in (1, 2, 3, 6, 8, 12, 20):
                    P = 1 << H.bit_length() - 1
                    assert np.allclose(slopes(H)[:P], slopes(P))
                    assert np.allclose(slopes(P), slopes(2 * P)[1::2])
                    assert np.allclose(slopes(H)[P:], slopes(2 * P)[::2][: H - P])
            """,
        ),
        "only a power of two": (
            "2^(-8h/H) for every H",
            """
            def hunt_slopes(slopes):
                assert np.allclose(slopes(8), [2.0**-h for h in range(1, 9)])
                assert np.allclose(slopes(4), [2.0 ** -(2 * h) for h in range(1, 5)])
            """,
        ),
        "one H between powers that is close to the lower one": (
            "the nearest power of two, not the next lower",
            """
            def hunt_slopes(slopes):
                assert np.allclose(slopes(4), [2**-2, 2**-4, 2**-6, 2**-8])
                assert np.allclose(slopes(5), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1])
                assert np.allclose(slopes(10)[8:], [2**-0.5, 2**-1.5])
            """,
        ),
        "the same slopes in any order": (
            "sorts the slopes",
            """
            def hunt_slopes(slopes):
                for P in (4, 8):
                    for H in range(P, 2 * P):
                        right = [2 ** (-8 * h / P) for h in range(1, P + 1)] + [2 ** (-4 * h / P) for h in range(1, 2 * (H - P), 2)]
                        assert np.allclose(sorted(slopes(H)), sorted(right))
            """,
        ),
        "the formula of the paper for all H": (
            "your test fails",
            """
            def hunt_slopes(slopes):
                for H in (1, 2, 4, 6, 8, 12):
                    assert np.allclose(slopes(H), [2 ** (-8 * h / H) for h in range(1, H + 1)])
            """,
        ),
        "slopes must fall": (
            "your test fails",
            """
            def hunt_slopes(slopes):
                for H in (8, 12):
                    m = np.array(slopes(H))
                    assert (m[1:] < m[:-1]).all()
            """,
        ),
        "bit by bit": (
            "your test fails a version that",
            """
            def hunt_slopes(slopes):
                def right(H):
                    P = 1 << H.bit_length() - 1
                    m = [2 ** (-8 * h / P) for h in range(1, P + 1)]
                    return m if P == H else m + right(2 * P)[::2][: H - P]
                for H in range(1, 20):
                    assert list(slopes(H)) == right(H)
            """,
        ),
        "powers of two, and how many come back for others": (
            "your test passes the version",
            """
            def hunt_slopes(slopes):
                for H in (1, 3, 6, 12):
                    assert len(slopes(H)) == H
                for P in (1, 2, 4, 8, 16):
                    assert np.allclose(slopes(P), 2.0 ** (-8 * np.arange(1, P + 1) / P))
            """,
        ),
        "only where the series begins and ends": (
            "your test passes the version",
            """
            def hunt_slopes(slopes):
                for P in (1, 2, 4, 8, 16):
                    assert np.isclose(slopes(P)[0], 2 ** (-8 / P)) and np.isclose(slopes(P)[-1], 2**-8)
            """,
        ),
        "it expects an array": (
            "your test fails the authors' recursion",
            """
            def hunt_slopes(slopes):
                for P in (1, 2, 4, 8, 16):
                    assert slopes(P).shape == (P,)
            """,
        ),
        "a bool instead of assert": (
            "nobody looks at it",
            """
            def hunt_slopes(slopes):
                return bool(np.allclose(slopes(2), [2**-4, 2**-8]))
            """,
        ),
        "an absolute tolerance that is too large": (
            "your test passes the version",
            """
            def hunt_slopes(slopes):
                for H in (8, 12):
                    right = [2.0**-h for h in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]
                    assert np.abs(np.array(slopes(H)) - right[:H]).max() < 0.7
            """,
        ),
    },
    "in_windows": {
        misconception: (words, changed(IN_WINDOWS, *changes))
        for misconception, words, *changes in (
            (
                "a mean of means (huggingface/transformers issue 34138)",
                "it takes the mean of the windows' means",
                ("total / N", "float(np.mean(means))"),
            ),
            (
                "overlaps are scored again",
                "every window scores all its tokens",
                ("losses[max(new, 0) : end - start].sum()", "losses[: end - start].sum()"),
                ("total / N", "total / read"),
            ),
            ("no overlap", "the stride is ignored", ("range(0, N, stride)", "range(0, N, L)")),
            (
                "as much context as can be",
                "as if the stride were 1",
                ("total / N", "sum(losses[min(n, L - 1)] for n in range(N)) / N"),
            ),
            (
                "the last window scores too many (huggingface/transformers pull request 7938)",
                "though fewer of them are new",
                (
                    "losses[max(new, 0) : end - start].sum()",
                    "losses[(max(end - stride - start, 0) if start else 0) : end - start].sum()",
                ),
                ("windows += 1", "windows += min(stride, end - start) if start else end"),
                ("total / N", "total / windows"),
            ),
            (
                "the rest is dropped",
                "the tokens behind the last full window are lost",
                ("new = end - start", "new = end - start\n            if start + L > N and start: break"),
                ("total / N", "total / end"),
            ),
            (
                "the last window is moved back",
                "the last window is moved back until it is full",
                (
                    "total += losses[max(new, 0) : end - start].sum()",
                    "first = max(end - L, 0)\n            total += losses[max(new, 0) + start - first : end - first].sum()",
                ),
            ),
            (
                "a short first window (huggingface/transformers issue 18887)",
                "it can be full",
                (
                    "new = end - start\n",
                    "last, end = end, min(start + stride, N)\n            begin = max(start + stride - L, 0)\n            total += losses[start - begin : end - begin].sum()\n            continue\n",
                ),
            ),
            (
                "new tokens without their context",
                "as if they were the first of their window",
                ("losses[max(new, 0) : end - start].sum()", "losses[: end - start - max(new, 0)].sum()"),
            ),
            ("N - 1", "it divides by N - 1", ("total / N", "np.float64(total) / (N - 1)")),
            ("a sum", "this is the sum over the tokens", ("total / N", "total")),
            ("a perplexity", "this is the perplexity", ("total / N", "math.exp(total / N)")),
            ("divided by windows", "divided by the number of windows", ("total / N", "total / windows")),
            ("divided by tokens read", "but context is not scored", ("total / N", "total / read")),
            ("windows are counted", "this is how many windows there are", (", read\n", ", windows\n")),
            ("N tokens", "each token is counted once", (", read\n", ", N\n")),
            ("full windows", "counted as a full one", (", read\n", ", windows * L\n")),
            (
                "windows behind the end",
                "there are windows behind the one that reaches the end",
                ("                break\n", "                pass\n"),
                ("means.append", "0 and means.append"),
            ),
            (
                "any stride",
                "leave some out, which should raise ValueError",
                ("not 1 <= stride <= L", "stride < 1"),
            ),
            ("a stride of 0 by Python's own error", "with a stride of -2", ("not 1 <= stride <= L", "stride > L")),
            (
                "a stride is compared with the text",
                "does not fit windows of 6 tokens",
                ("not 1 <= stride <= L", "not 1 <= stride <= L and (stride < 1 or stride <= N)"),
            ),
            ("a list", "should be the tuple (loss, read), not", ("return total / N, read", "return [total / N, read]")),
            ("the loss alone", "should be the tuple (loss, read), not", ("return total / N, read", "return total / N")),
            ("assert in place of ValueError", "raises AssertionError", ("raise ValueError", "assert 0,")),
        )
    },
    "reach": {
        "two tokens": (
            "two tokens only",
            """
            def reach(slope, gap, eps):
                return int((gap + math.log(1 / eps - 1)) // slope) if gap + math.log(1 / eps - 1) > 0 else 0
            """,
        ),
        "log(x)": (
            "it takes log(x) for log(1 + x)",
            """
            def reach(slope, gap, eps):
                return int((gap + math.log(1 / eps - 1) + math.log(1 - math.exp(-slope))) / slope)
            """,
        ),
        "a series from exp(0)": (
            "the series begins with exp(0)",
            """
            def reach(slope, gap, eps):
                x = math.exp(gap) * (1 / eps - 1) * (math.exp(slope) - 1)
                return int(math.log(1 + x) / slope)
            """,
        ),
        "a ratio for a weight": (
            "compares the token with the query's own",
            """
            def reach(slope, gap, eps):
                return math.floor((gap - math.log(eps)) / slope)
            """,
        ),
        "exp(1000)": (
            "exp(1000) overflows",
            """
            def reach(slope, gap, eps):
                x = math.exp(gap) * (1 / eps - 1) * (1 - math.exp(-slope))
                return int(math.log(1 + x) / slope)
            """,
        ),
        "exp(1000) in NumPy": (
            "exp(1000) overflows",
            """
            def reach(slope, gap, eps):
                x = np.exp(gap) * (1 / eps - 1) * (1 - np.exp(-slope))
                return int(np.log1p(x) // slope)
            """,
        ),
        "the sum from 0": (
            "the reach should be",
            """
            def reach(slope, gap, eps):
                x = (1 / eps - 1) * (math.exp(slope) - 1) + 1
                return math.floor((math.log(x) + gap) / slope) - 1
            """,
        ),
        "a float": (
            "should be a whole number, not a number",
            """
            def reach(slope, gap, eps):
                return np.floor(np.logaddexp(0, gap + math.log(1 / eps - 1) + math.log(1 - math.exp(-slope))) / slope)
            """,
        ),
        **{
            misconception: (words, changed(REACH, *changes))
            for misconception, words, *changes in (
                ("no gap", "`gap` is left out", ("- gap", "")),
                ("the worst case", "the first token's score is the smallest", ("- gap", "+ gap")),
                ("the first distance that is too far", "this is one more", ("return d", "return d + 1")),
                ("one less", "this is one less", ("return d", "return d - 1")),
                (
                    "without the query itself",
                    "or the query's own left out",
                    ("range(1, d + 2)", "range(1, d + 1)"),
                ),
                (
                    "older tokens",
                    "tokens further back than d are in the sum",
                    ("range(1, d + 2))", "range(1, d + 2)) + math.exp(-gap) / (math.exp(slope) - 1)"),
                ),
                (
                    "no bias for the others",
                    "the other tokens have no bias",
                    ("slope * k", "slope * (d + 1)"),
                ),
                ("without itself", "the first token is left out of the sum", ("1 / (1 + others)", "1 / others")),
                ("powers of 2", "softmax has powers of e", ("math.exp(slope * k - gap)", "2 ** (slope * k - gap)")),
            )
        },
        "rounded": (
            "round down",
            """
            def reach(slope, gap, eps):
                return round(np.logaddexp(0, gap + math.log(1 / eps - 1) + math.log(1 - math.exp(-slope))) / slope)
            """,
        ),
        "rounded up": (
            "this is one more",
            """
            def reach(slope, gap, eps):
                return math.ceil(np.logaddexp(0, gap + math.log(1 / eps - 1) + math.log(1 - math.exp(-slope))) / slope)
            """,
        ),
    },
    "hunt_cached_alibi": {
        "no cache": (
            "your test passes the version",
            """
            def hunt_cached_alibi(attention):
                S, m = 5, np.array([0.5, 0.2])
                w = attention(np.zeros((2, S, 4)), np.ones((2, S, 4)), np.stack([np.eye(S)] * 2), m)
                for i in range(S):
                    right = np.exp(-m[:, None] * (i - np.arange(i + 1)))
                    assert np.allclose(w[:, i, : i + 1], right / right.sum(1, keepdims=True), atol=1e-5)
            """,
        ),
        "only T = 1": (
            "lets a query see its future",
            """
            def hunt_cached_alibi(attention):
                S, m = 5, np.array([0.5, 0.2])
                w = attention(np.zeros((2, 1, 4)), np.ones((2, S, 4)), np.stack([np.eye(S)] * 2), m)
                right = np.exp(-m[:, None] * (S - 1 - np.arange(S)))
                assert np.allclose(w[:, 0], right / right.sum(1, keepdims=True), atol=1e-5)
            """,
        ),
        "D = 1": (
            "try D > 1",
            """
            def hunt_cached_alibi(attention):
                H, S = 2, 5
                m = np.array([0.5, 0.2])
                for T in (1, 3, S):
                    w = attention(np.zeros((H, T, 1)), np.ones((H, S, 1)), np.stack([np.eye(S)] * H), m)
                    for t in range(T):
                        i = S - T + t
                        right = np.exp(-m[:, None] * (i - np.arange(i + 1)))
                        right = np.pad(right / right.sum(1, keepdims=True), ((0, 0), (0, S - i - 1)))
                        assert np.allclose(w[:, t], right, atol=1e-5)
            """,
        ),
        "one head": (
            "try different slopes",
            """
            def hunt_cached_alibi(attention):
                S, m = 5, np.array([0.5])
                for T in (1, 3, S):
                    w = attention(np.zeros((1, T, 4)), np.ones((1, S, 4)), np.eye(S)[None], m)
                    for t in range(T):
                        i = S - T + t
                        right = np.exp(-0.5 * (i - np.arange(i + 1)))
                        assert np.allclose(w[0, t], np.pad(right / right.sum(), (0, S - i - 1)), atol=1e-5)
            """,
        ),
        "whole text against cache only": (
            "your test passes the version",
            """
            def hunt_cached_alibi(attention):
                q, k, v = np.sin(np.arange(144.0)).reshape(3, 2, 6, 4)
                m = np.array([0.5, 0.25])
                full = attention(q, k, v, m)
                for T in (1, 3):
                    assert np.allclose(attention(q[:, -T:], k, v, m), full[:, -T:], atol=1e-5)
            """,
        ),
        "older tokens weigh less": (
            "your test passes the version",
            """
            def hunt_cached_alibi(attention):
                w = attention(np.zeros((2, 1, 4)), np.ones((2, 5, 4)), np.stack([np.eye(5)] * 2), np.array([0.5, 0.2]))
                assert (np.diff(w[:, 0]) > 0).all()
            """,
        ),
        "to the last bit": (
            "your test fails",
            """
            def hunt_cached_alibi(attention):
                w = attention(np.zeros((1, 1, 4)), np.ones((1, 5, 4)), np.eye(5)[None], np.array([0.3]))[0, 0]
                right = np.exp(-0.3 * np.arange(5)[::-1])
                assert (w == right / right.sum()).all()
            """,
        ),
        "without the division by the square root": (
            "your test fails",
            """
            def hunt_cached_alibi(attention):
                q, k = np.sin(np.arange(80.0)).reshape(2, 2, 5, 4)
                m = np.array([0.5, 0.2])
                w = attention(q, k, np.stack([np.eye(5)] * 2), m)
                s = np.einsum("htd,hsd->hts", q, k) - m[:, None, None] * (np.arange(5)[:, None] - np.arange(5))
                s[:, np.arange(5)[:, None] < np.arange(5)] = -np.inf
                e = np.exp(s)
                assert np.allclose(w, e / e.sum(-1, keepdims=True), atol=1e-4)
            """,
        ),
        "queries from 0": (
            "your test fails",
            """
            def hunt_cached_alibi(attention):
                w = attention(np.zeros((1, 2, 4)), np.ones((1, 5, 4)), np.eye(5)[None], np.array([0.3]))[0]
                for t in range(2):
                    right = np.exp(-0.3 * np.arange(t + 1)[::-1])
                    assert np.allclose(w[t, : t + 1], right / right.sum(), atol=1e-5)
            """,
        ),
        "only shapes": (
            "your test passes the version",
            """
            def hunt_cached_alibi(attention):
                for T in (1, 3, 5):
                    y = attention(np.ones((2, T, 4)), np.ones((2, 5, 4)), np.ones((2, 5, 3)), np.array([0.5, 0.2]))
                    assert y.shape == (2, T, 3) and np.allclose(y, 1, atol=1e-5)
            """,
        ),
    },
    "fold": {
        misconception: (words, changed(FOLD, *changes))
        for misconception, words, *changes in (
            ("no bias", "there is no bias in the products", ("slopes[:, None, None] *", "0 * slopes[:, None, None] *")),
            ("q as it is", "divides by sqrt(W) where ALiBi divides by sqrt(D)", ("q * (W / D) ** 0.5", "q")),
            ("the slope as it is", "the kernel divides the slope by sqrt(W), too", (" * W**0.5, (H", ", (H")),
            (
                "nothing is multiplied",
                "and nothing was multiplied before",
                (" * W**0.5, (H", ", (H"),
                ("q * (W / D) ** 0.5", "q"),
            ),
            ("q is divided before", "the kernel divides once more", ("q * (W / D) ** 0.5", "q * D**-0.5")),
            (
                "ALiBi as it stands, as if the kernel did not divide",
                "by sqrt(W), also the slope",
                ("q * (W / D) ** 0.5", "q * D**-0.5"),
                (" * W**0.5, (H", ", (H"),
            ),
            (
                "places as parts of the text",
                "the places are divided by S",
                ("np.arange(S, dtype=k.dtype)", "(np.arange(S, dtype=k.dtype) / S)"),
            ),
            (
                "all is divided before",
                "and the kernel does it once more",
                ("q * (W / D) ** 0.5", "q * W**-0.5"),
                (" * W**0.5, (H", " * W**-0.5, (H"),
            ),
            ("the factor upside down", "turn it round", ("(W / D) ** 0.5", "(D / W) ** 0.5")),
            ("no square root", "not by W: q is multiplied by W / D", ("(W / D) ** 0.5", "(W / D)")),
            (
                "the same factor for both",
                "but for the slope it must be sqrt(W)",
                (" * W**0.5, (H", " * (W / D) ** 0.5, (H"),
            ),
            ("the slope times W", "the slope is multiplied by W", (" * W**0.5, (H", " * W, (H")),
            ("minus", "old keys get more weight", ("slopes[:, None, None] *", "-slopes[:, None, None] *")),
            ("places backwards", "new keys change when the text grows", ("np.arange(S, ", "np.arange(1 - S, 1, ")),
            (
                "distances without a sign",
                "or the places run backwards",
                ("np.arange(S, dtype=k.dtype)", "np.arange(S, dtype=k.dtype)[::-1]"),
            ),
            ("one slope", "all heads have the first slope", ("slopes[:, None, None]", "slopes[0]")),
            (
                "the slope of the group",
                "the slope must come with q",
                ("slopes[:, None, None]", "slopes[:: H // H_kv].repeat(H // H_kv)[:, None, None]"),
            ),
            (
                "slopes in the keys, which are copied",
                "the keys were copied for every query head",
                ("(H_kv, S, 1))", "(H, S, 1)) * slopes[:, None, None]"),
                ("np.concatenate([k, place]", "np.concatenate([k.repeat(H // H_kv, 0), place]"),
                ("slopes[:, None, None] * W", "np.ones_like(slopes)[:, None, None] * W"),
            ),
            (
                "slopes in the keys, one for each key head",
                "the slope must come with q",
                ("(H_kv, S, 1))", "(H_kv, S, 1)) * slopes[:: H // H_kv, None, None]"),
                ("slopes[:, None, None] * W", "np.ones_like(slopes)[:, None, None] * W"),
            ),
            (
                "slopes divide the keys",
                "change with the slopes",
                ("(H_kv, S, 1))", "(H_kv, S, 1)) * slopes.max()"),
                ("slopes[:, None, None] * W", "(slopes / slopes.max())[:, None, None] * W"),
            ),
            (
                "keys that know the queries",
                "change with the queries",
                ("[k, place]", "[k, place + q[0, -1, 0]]"),
            ),
            (
                "places from the end of the text",
                "new keys change when the text grows",
                ("np.arange(S, dtype=k.dtype)", "(np.arange(S, dtype=k.dtype) - S)"),
            ),
            ("no channel", "should be wider than q", ("return np", "return q, k\n        np")),
            ("float64", "float32 in, float64 out", ("np.arange(S, dtype=k.dtype)", "np.arange(S)")),
            (
                "a list",
                "should be the tuple (new_q, new_k)",
                (
                    "return np.concatenate([q * (W / D) ** 0.5, price], 2), np.concatenate([k, place], 2)",
                    "return [np.concatenate([q * (W / D) ** 0.5, price], 2), np.concatenate([k, place], 2)]",
                ),
            ),
        )
    },
    "read_back": {
        misconception: (words, changed(READ_BACK, *changes))
        for misconception, words, *changes in (
            ("distances turned round", "its last row is the newest token", ("np.arange(n)[::-1]", "np.arange(n)")),
            ("distances begin anew", "the distances begin anew in every block", ("(seen + np", "(0 + np")),
            (
                "blocks of one size",
                "as if all blocks were as long as this one",
                ("(seen + np", "((b - 1) * n + np"),
            ),
            ("mix is forgotten", "total shrinks, but mix does not", ("mix * shrink", "mix")),
            ("total is forgotten", "mix shrinks, but total does not", ("total * shrink", "total")),
            (
                "exponentials are compared",
                "exp overflows",
                (
                    "log_rest - np.logaddexp(log_rest, largest + np.log(total)) <= math.log(eps)",
                    "math.exp(log_rest) <= eps * (math.exp(largest) * total + math.exp(log_rest))",
                ),
            ),
            ("no square root of D", "the scores are not divided by sqrt(D)", ("k @ q / math.sqrt(D)", "k @ q")),
            ("no bias", "the scores have no bias", ("- slope * back", "")),
            ("plus", "the sign of the bias is wrong", ("- slope * back", "+ slope * back")),
            (
                "no shrinking",
                "different numbers were taken off",
                ("shrink = np.exp(largest - top)", "shrink = 1"),
                ("top = max(largest, scores.max())", "top = scores.max()"),
            ),
            (
                "a mean of blocks",
                "each block has the same weight",
                ("mix = mix * shrink + exps @ v", "mix, mean = mix * shrink + exps @ v, mean + exps @ v / exps.sum()"),
                ("D = len(q)", "D, mean = len(q), 0.0"),
                ("mix / total", "mean / b"),
            ),
            (
                "the last block",
                "this is attention over the last block",
                ("return mix / total", "return exps @ v / exps.sum()"),
            ),
            ("no division", "the values are not divided by the sum", ("mix / total", "mix")),
            (
                "the shrinking upside down",
                "grow instead of shrinking",
                ("shrink = np.exp(largest - top)", "shrink = np.exp(top - largest) if b > 1 else 0.0"),
            ),
            ("never enough", "it reads the whole text", ("                break\n", "                pass\n")),
            ("one block", "it reads no more than the first block", ("<= math.log(eps)", "< 1e9")),
            (
                "one block more",
                "it reads one block more than is needed",
                (
                    "                break\n",
                    "                if done:\n                    break\n                done = True\n",
                ),
                ("D = len(q)", "D, done = len(q), False"),
            ),
            (
                "the next token only",
                "only the next one is counted",
                (" - math.log(1 - math.exp(-slope))", ""),
            ),
            (
                "a part of the sum so far",
                "but eps is a part of all",
                ("np.logaddexp(log_rest, largest + np.log(total))", "(largest + np.log(total))"),
            ),
            (
                "the largest for the sum",
                "compared with the largest exponential alone",
                ("largest + np.log(total)", "largest"),
            ),
            (
                "an absolute bound",
                "rest is compared with 1",
                ("log_rest - np.logaddexp(log_rest, largest + np.log(total))", "log_rest"),
            ),
            (
                "an integral",
                "is taken for an integral",
                ("math.log(1 - math.exp(-slope))", "math.log(slope)"),
            ),
            ("no length of q", "the length of q is left out", ("math.sqrt(float(q @ q)) * norm", "norm")),
            ("no root in the bound", "the largest score is not divided by sqrt(D)", ("norm / math.sqrt(D)", "norm")),
            ("a square", "the square of the length of q", ("math.sqrt(float(q @ q))", "float(q @ q)")),
            ("a bound of 0", "is taken to be 0", ("math.sqrt(float(q @ q)) * norm / math.sqrt(D)", "0.0")),
            ("no norm", "`norm` is left out", ("* norm /", "/")),
            ("one nearer", "not one nearer", ("slope * seen", "slope * (seen - 1)")),
            ("one further", "not one further", ("slope * seen", "slope * (seen + 1)")),
            (
                "a finite series",
                "as if the text had none",
                (
                    "math.log(1 - math.exp(-slope))",
                    "math.log(1 - math.exp(-slope)) + (math.log(1 - math.exp(-slope * (S - seen))) if seen < S else 0)",
                ),
            ),
            (
                "no end",
                "stop when S tokens have been read",
                ("while seen < S", "while True"),
            ),
            (
                "oldest first",
                "should be read in turn",
                ("read(b)", "read(b + 1) if b == 0 and S > 12 else read(b)"),
            ),
            (
                "each block twice",
                "should be read in turn",
                ("k, v = read(b)", "k, v = read(b)[0], read(b)[1]"),
            ),
            (
                "plain exponentials",
                "exp overflows or all is rounded to 0",
                ("top = max(largest, scores.max())", "top = 0.0"),
                ("largest - top)", "0.0)"),
            ),
            (
                "a plain rest",
                "exp overflows or all is rounded to 0",
                ("top = max(largest, scores.max())", "top = 0.0"),
                ("shrink = np.exp(largest - top)", "shrink = 1.0"),
                ("log_rest = highest", "log_rest = 0.0 + highest"),
            ),
            ("float64", "float32 in, float64 out", (".astype(q.dtype)", ".astype(float)")),
            ("a list", "should be an array, not a list", ("return mix / total", "return list(mix / total)")),
        )
    },
}

# Mutants that compute the same.
SYMMETRIC = "it is the same in either order"
FIRST = "what stands there at first is multiplied by exp(-inf) = 0"
EQUIVALENT = {
    "in_windows: min(start + L, N) -> min(N, start + L)": SYMMETRIC,
    "reach: np.logaddexp(0, log_x) -> np.logaddexp(log_x, 0)": SYMMETRIC,
    "read_back: (-np.inf, 0.0, 0.0, 0, 0) -> (-np.inf, 1.0, 0.0, 0, 0)": FIRST,
    "read_back: (-np.inf, 0.0, 0.0, 0, 0) -> (-np.inf, 0.0, 1.0, 0, 0)": FIRST,
    "read_back: log_rest - largest - np.log(total) <= np.log(eps / (1 - eps)) -> log_rest - largest - np.log(total) <"
    " np.log(eps / (1 - eps))": "rest is never just the part eps, to the last bit",
}
