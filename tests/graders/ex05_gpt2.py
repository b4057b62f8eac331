"""Truth table of exercises/test_ex05_gpt2.py: answers that must pass, and answers that must not.

An answer is HEAD and, behind it, the code with its indentation taken off (textwrap.dedent).
"""

import textwrap

HEAD = "import math\nimport numpy as np\n"


def variants(template, entries):
    """{misconception: (words, code)}: a template whose fields have right values, with some of them changed."""
    template, defaults = textwrap.dedent(template), {}
    for line in template.splitlines():
        if line.startswith("#:"):
            name, _, value = line[2:].partition("=")
            defaults[name.strip()] = value.strip()
    code = "\n".join(line for line in template.splitlines() if not line.startswith("#:"))

    def filled(changed):
        assert set(changed) <= set(defaults), changed
        out = code
        while "<" in out and (left := [name for name in defaults if f"<{name}>" in out]):
            for name in left:
                out = out.replace(f"<{name}>", (defaults | changed)[name])
        return out

    return {misconception: (words, filled(changed)) for misconception, words, changed in entries}


GELU = """
    #: y = x / 2 * (1 + t)
    #: u = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    #: du = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
    #: dt = (1 - t * t)
    #: slope = (1 + t) / 2 + np.where(abs(x) < 20, x / 2 * dt * du, 0.0)
    #: result = y, slope
    #: before = pass
    def gelu_and_slope(x):
        <before>
        with np.errstate(all="ignore"):
            t = np.tanh(<u>)
            y = <y>
            du, dt = <du>, <dt>
            slope = <slope>
            return <result>
"""
SECOND = "np.where(abs(x) < 20, x / 2 * dt * du, 0.0)"
ERF = "np.vectorize(math.erf, otypes=[x.dtype])(x / math.sqrt(2))"

COUNT = """
    #: attention = 4 * C * C + 4 * C
    #: mlp = 8 * C * C + 5 * C
    #: norms = 4 * C
    #: last = 2 * C
    #: tables = vocab_size * C + block_size * C
    #: head = (0 if tied else vocab_size * C)
    #: layers = n_layer
    #: fits = <= budget
    #: result = C, count(C)
    #: refuse = if count(head_dim) > budget: raise ValueError("too small")
    #: step = head_dim
    def widest(budget, n_layer, vocab_size, block_size, head_dim, tied):
        def count(C):
            return <tables> + <layers> * (<attention> + <mlp> + <norms>) + <last> + <head>
        <refuse>
        C = head_dim
        while count(C + <step>) <fits>:
            C += <step>
        return <result>
"""

TABLES = """
    #: head = np.einsum("btv,btc->vc", dlogits, y)
    #: lookup = np.add.at(dembed, ids, dx)
    #: rows = dposition[:T] = dx.sum(0)
    #: size = block_size
    #: result = dembed, dposition
    #: zeros = np.zeros((block_size, C), dx.dtype)
    def embedding_gradients(ids, dx, y, dlogits, block_size):
        (B, T, C), V = dx.shape, dlogits.shape[-1]
        dembed = <head>
        <lookup>
        dposition = <zeros>
        <rows>
        return <result>
"""

PIECES = """
    #: number = max((targets != -100).sum(), 1)
    #: starts = range(0, len(targets), rows)
    #: logits = scores(start, start + rows)
    #: shifted = logits - logits.max(1, keepdims=True)
    #: cost = np.log(np.exp(z).sum(1)) - z[at, safe]
    #: add = total += (cost * seen).sum()
    #: safe = np.where(seen, t, 0)
    #: slopes = p
    #: one = slopes[at, safe] -= 1
    #: mask = slopes *= seen[:, None]
    #: divide = slopes / z.dtype.type(number)
    #: back = back(start, slopes)
    #: before = pass
    #: result = float(total / number)
    def loss_in_pieces(scores, back, targets, rows):
        number = <number>
        total = 0.0
        <before>
        for start in <starts>:
            logits = <logits>
            t = targets[start : start + rows]
            seen, at = t != -100, np.arange(len(t))
            safe = <safe>
            z = <shifted>
            p = np.exp(z)
            p /= p.sum(1, keepdims=True)
            cost = <cost>
            <add>
            slopes = <slopes>
            <one>
            <mask>
            slopes = <divide>
            <back>
        return <result>
"""

BLOCK = """
    #: norm = (h - h.mean(-1, keepdims=True)) / np.sqrt(h.var(-1, keepdims=True) + 1e-5) * w[name + ".weight"] + w[name + ".bias"]
    #: linear = h @ w[name + ".weight"] + w[name + ".bias"]
    #: qkv = np.split(linear(h, "attn.c_attn"), 3, axis=-1)
    #: cut = z.reshape(B, T, n_head, D).transpose(0, 2, 1, 3)
    #: scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(D)
    #: mask = np.where(np.tri(T) > 0, s, -np.inf)
    #: exps = np.exp(s - s.max(-1, keepdims=True))
    #: after = s
    #: join = (s @ v).transpose(0, 2, 1, 3).reshape(B, T, C)
    #: project = linear(y, "attn.c_proj")
    #: act = h / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    #: mlp = linear(gelu(linear(h, "mlp.c_fc")), "mlp.c_proj")
    #: one = x = x + attention(norm(x, "ln_1"))
    #: two = x = x + mlp(norm(x, "ln_2"))
    def gpt2_block(x, weights, n_head):
        w = weights
        B, T, C = x.shape
        D = C // n_head
        def norm(h, name):
            return <norm>
        def linear(h, name):
            return <linear>
        def gelu(h):
            return <act>
        def attention(h):
            q, k, v = <qkv>
            q, k, v = (<cut> for z in (q, k, v))
            s = <scores>
            s = <mask>
            s = <exps>
            s = s / s.sum(-1, keepdims=True)
            s = <after>
            y = <join>
            return <project>
        def mlp(h):
            return <mlp>
        <one>
        <two>
        return x
"""
QKV = 'linear(h, "attn.c_attn")'
NORM = '{} * w[name + ".weight"] + w[name + ".bias"]'
CENTRED = "(h - h.mean(-1, keepdims=True))"

NORMS = """
    #: mean = x.mean(-1, keepdims=True)
    #: var = ((x - mean) ** 2).mean(-1, keepdims=True)
    #: std = np.sqrt(var + eps)
    #: dn = dy * gain
    #: dx = (dn - dn.mean(-1, keepdims=True) - n * (dn * n).mean(-1, keepdims=True)) / std
    #: dgain = (dy * n).sum(rows)
    #: dbias = dy.sum(rows)
    #: rows = tuple(range(x.ndim - 1))
    #: result = dx, dgain, dbias
    def layer_norm_backward(x, gain, dy, eps):
        mean = <mean>
        var = <var>
        std = <std>
        n = (x - mean) / std
        dn = <dn>
        rows = <rows>
        dx = <dx>
        dgain = <dgain>
        dbias = <dbias>
        return <result>
"""

REFERENCE = """
    def hunt_pre_norm(decoder):
        def norm(h):
            return (h - h.mean(1)[:, None]) / np.sqrt(h.var(1)[:, None] + 1e-5)

        def right(x, layers):
            for A, M in layers:
                h = norm(x) @ A
                x = x + np.array([h[: t + 1].mean(0) for t in range(len(x))])
                x = x + np.maximum(norm(x) @ M, 0)
            return norm(x)

        def draw(*shape):  # numpy.random takes longer to import than all the rest
            draw.last += math.prod(shape)
            return 1.5 * np.sin(np.arange(draw.last - math.prod(shape), draw.last) ** 2.0).reshape(shape)

        draw.last = 1
"""

RIGHT = {
    "gelu_and_slope": {
        "by a sigmoid, clipped": """
            def gelu_and_slope(x):
                c = math.sqrt(8 / math.pi)  # (1 + tanh(u)) / 2 is the sigmoid of 2u
                z = np.clip(x, -25, 25)
                s = 1 / (1 + np.exp(-c * (z + 0.044715 * z**3)))
                return x * s, s + z * s * (1 - s) * c * (1 + 0.134145 * z**2)
        """,
        "number by number, with cosh": """
            def gelu_and_slope(x):
                y, slope = np.empty_like(x), np.empty_like(x)
                for place, a in np.ndenumerate(x):
                    a = float(a)
                    if abs(a) > 10:
                        y[place], slope[place] = (a, 1.0) if a > 0 else (0.0, 0.0)
                        continue
                    u = math.sqrt(2 / math.pi) * (a + 0.044715 * a**3)
                    du = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * a**2)
                    y[place] = 0.5 * a * (1 + math.tanh(u))
                    slope[place] = 0.5 * (1 + math.tanh(u)) + 0.5 * a * du / math.cosh(u) ** 2
                return y, slope
        """,
        "autograd": """
            import torch

            def gelu_and_slope(x):
                z = torch.tensor(np.clip(x, -50, 50), requires_grad=True)
                y = torch.nn.functional.gelu(z, approximate="tanh")
                (slope,) = torch.autograd.grad(y.sum(), z)
                return np.where(abs(x) > 50, np.maximum(x, 0), y.detach().numpy()), slope.numpy()
        """,
        "the answer of llm.c": """
            def gelu_and_slope(x):
                k = float(np.sqrt(2.0 / np.pi))
                with np.errstate(all="ignore"):
                    u = k * x * (1 + 0.044715 * x * x)
                    t = np.tanh(u)
                    sech2 = 1 / np.cosh(np.clip(u, -300, 300) if x.dtype == np.float64 else np.clip(u, -40, 40)) ** 2
                    sech2[abs(x) > 10] = 0
                    z = np.where(abs(x) > 10, 0, x)
                    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * z * sech2 * k * (1 + 3 * 0.044715 * z * z)
        """,
    },
    "widest": {
        "halving": """
            import bisect

            def widest(budget, n_layer, vocab_size, block_size, head_dim, tied):
                def count(C):
                    outside = (vocab_size * (1 if tied else 2) + block_size + 2) * C
                    return outside + n_layer * (12 * C**2 + 13 * C)

                heads = bisect.bisect_right(range(1, 100_000), budget, key=lambda n: count(n * head_dim))
                if not heads:
                    raise ValueError("no head fits")
                return heads * head_dim, count(heads * head_dim)
        """,
        "the quadratic formula, in whole numbers": """
            def widest(budget, n_layer, vocab_size, block_size, head_dim, tied):
                a, b = 12 * n_layer, 13 * n_layer + 2 + block_size + vocab_size * (2 - tied)
                C = (math.isqrt(b * b + 4 * a * max(budget, 0)) - b) // (2 * a)
                C -= C % head_dim
                if C < head_dim:
                    raise ValueError(f"{budget} is not enough")
                return C, a * C * C + b * C
        """,
        "tensor by tensor": """
            def widest(budget, n_layer, vocab_size, block_size, head_dim, tied):
                best = None
                C = 0
                while True:
                    C += head_dim
                    shapes = [(vocab_size, C), (block_size, C), (C,), (C,)]
                    if not tied:
                        shapes.append((C, vocab_size))
                    block = [(C,), (C,), (C, 3 * C), (3 * C,), (C, C), (C,), (C,), (C,)]
                    block += [(C, 4 * C), (4 * C,), (4 * C, C), (C,)]
                    total = sum(map(math.prod, shapes)) + n_layer * sum(map(math.prod, block))
                    if total > budget:
                        break
                    best = C, total
                if best is None:
                    raise ValueError("too little")
                return best
        """,
    },
    "hunt_pre_norm": {
        "by its properties": """
            def hunt_pre_norm(decoder):
                rng = np.random.default_rng(0)
                x, zero = rng.normal(size=(3, 4)) * 3 + 1, np.zeros((4, 4))
                norm = lambda h: (h - h.mean(1, keepdims=True)) / np.sqrt(h.var(1, keepdims=True) + 1e-5)
                near = lambda a, b: np.allclose(a, b, atol=1e-3)
                A, M, N = rng.normal(size=(3, 4, 4))
                assert near(decoder(x, [(zero, zero), (zero, zero)]), norm(x))
                heard = np.cumsum(norm(x) @ A, 0) / np.array([[1], [2], [3]])
                assert near(decoder(x, [(A, zero)]), norm(x + heard))
                assert near(decoder(x, [(zero, M)]), norm(x + np.maximum(norm(x) @ M, 0)))
                between = x + heard
                after = between + np.maximum(norm(between) @ M, 0)
                assert near(decoder(x, [(A, M)]), norm(after))
                # layers without matrices change nothing, wherever they stand
                assert near(decoder(x, [(zero, zero), (A, M), (zero, zero)]), norm(after))
                assert near(decoder(x, [(A, M), (zero, N)]), norm(after + np.maximum(norm(after) @ N, 0)))
                assert near(decoder(x, [(zero, N), (zero, M)]), decoder(x + np.maximum(norm(x) @ N, 0), [(zero, M)]))
        """,
        "number by number": """
            def hunt_pre_norm(decoder):
                def norm(row):
                    mean = sum(row) / len(row)
                    var = sum((a - mean) ** 2 for a in row) / len(row)
                    return [(a - mean) / math.sqrt(var + 1e-5) for a in row]

                def times(row, W):
                    return [sum(a * W[i][j] for i, a in enumerate(row)) for j in range(len(row))]

                x = [[1.0, -2.0, 0.5], [3.0, 0.0, -1.0], [0.0, 1.5, 4.0], [-2.0, 2.5, 0.25]]
                layers = [([[1.0, 2.0, 0.0], [-1.0, 0.5, 1.0], [0.3, 0.0, -2.0]], [[0.0, 1.0, 2.0], [1.5, 0.0, -1.0], [0.5, 1.0, 1.0]]),
                          ([[0.0, -1.0, 1.0], [2.0, 1.0, 0.5], [1.0, -0.7, 0.2]], [[1.0, -1.0, 0.0], [0.0, 2.0, 1.0], [-1.0, 0.0, 3.0]])]
                got = decoder(np.array(x), [(np.array(A), np.array(M)) for A, M in layers])
                for A, M in layers:
                    heard = [times(norm(row), A) for row in x]
                    for t in range(4):
                        past = [sum(column) / (t + 1) for column in zip(*heard[: t + 1])]
                        x[t] = [a + b for a, b in zip(x[t], past)]
                        x[t] = [a + max(b, 0) for a, b in zip(x[t], times(norm(x[t]), M))]
                for t in range(4):
                    for a, b in zip(got[t], norm(x[t])):
                        assert abs(a - b) < 1e-3
        """,
        "many random cases": textwrap.dedent(REFERENCE).rstrip()
        + """
    for T, C, n in ((1, 4, 1), (3, 4, 1), (5, 3, 2), (4, 7, 4)):
        x = draw(T, C) + 0.5
        layers = [(draw(C, C), draw(C, C)) for _ in range(n)]
        np.testing.assert_allclose(decoder(x, layers), right(x, layers), atol=2e-3, rtol=1e-3)
""",
    },
    "embedding_gradients": {
        "one-hot rows": """
            def embedding_gradients(ids, dx, y, dlogits, block_size):
                V, C = dlogits.shape[-1], dx.shape[-1]
                hot = np.eye(V, dtype=dx.dtype)[ids.ravel()]
                dembed = hot.T @ dx.reshape(-1, C) + dlogits.reshape(-1, V).T @ y.reshape(-1, C)
                return dembed, np.eye(block_size, dx.shape[1], dtype=dx.dtype) @ dx.sum(0)
        """,
        "loops": """
            def embedding_gradients(ids, dx, y, dlogits, block_size):
                dembed = np.zeros((dlogits.shape[2], dx.shape[2]), dtype=dx.dtype)
                dposition = np.zeros((block_size, dx.shape[2]), dtype=dx.dtype)
                for b in range(len(ids)):
                    dembed += dlogits[b].T @ y[b]
                    for t, token in enumerate(ids[b]):
                        dembed[token] += dx[b, t]
                        dposition[t] += dx[b, t]
                return dembed, dposition
        """,
        "autograd": """
            import torch

            def embedding_gradients(ids, dx, y, dlogits, block_size):
                ids, dx, y, dlogits = map(torch.tensor, (ids, dx, y, dlogits))
                embed = torch.zeros(dlogits.shape[2], dx.shape[2], dtype=dx.dtype, requires_grad=True)
                position = torch.zeros(block_size, dx.shape[2], dtype=dx.dtype, requires_grad=True)
                x = embed[ids] + position[: ids.shape[1]]
                torch.autograd.backward([x, y @ embed.T], [dx, dlogits])
                return embed.grad.numpy(), position.grad.numpy()
        """,
        "token by token": """
            def embedding_gradients(ids, dx, y, dlogits, block_size):
                head = np.tensordot(dlogits, y, axes=[[0, 1], [0, 1]])
                table = np.stack([dx[ids == v].sum(axis=0) for v in range(head.shape[0])])
                fill = ((0, block_size - dx.shape[1]), (0, 0))
                return head + table, np.pad(np.add.reduce(dx), fill)
        """,
    },
    "loss_in_pieces": {
        "only counted rows go back, row by row": """
            def loss_in_pieces(scores, back, targets, rows):
                number, losses = sum(t != -100 for t in targets.tolist()), []
                for start in range(0, len(targets), rows):
                    for i, line in enumerate(scores(start, min(start + rows, len(targets)))):
                        t = int(targets[start + i])
                        if t == -100:
                            continue
                        log_p = line - np.logaddexp.reduce(line)
                        losses.append(-float(log_p[t]))
                        hot = np.zeros_like(line)
                        hot[t] = 1
                        back(start + i, ((np.exp(log_p) - hot) / number)[None].astype(line.dtype))
                return math.fsum(losses) / number if number else 0.0
        """,
        "one row at a time, from the end": """
            def loss_in_pieces(scores, back, targets, rows):
                n = np.count_nonzero(targets != -100)
                loss = 0.0
                for i in reversed(range(targets.size)):
                    if targets[i] < 0:
                        continue
                    logits = scores(start=i, stop=i + 1)
                    logits = logits - np.max(logits)
                    p = np.exp(logits)
                    total = p.sum()
                    loss += float(np.log(total) - logits[0, targets[i]]) / n
                    p /= total
                    p[0, targets[i]] -= 1
                    back(start=i, slopes=p / p.dtype.type(n))
                return loss
        """,
        "autograd for each piece": """
            import torch

            def loss_in_pieces(scores, back, targets, rows):
                number = max(int((targets != -100).sum()), 1)
                loss = 0.0
                for start in range(0, len(targets), rows):
                    logits = torch.tensor(scores(start, start + rows), requires_grad=True)
                    t = torch.tensor(targets[start : start + rows])
                    part = torch.nn.functional.cross_entropy(logits, t, reduction="sum") / number
                    part.backward()
                    back(start, logits.grad.numpy())
                    loss += part.item()
                return loss
        """,
        "a one-hot array": """
            def loss_in_pieces(scores, back, targets, rows):
                number = np.maximum(np.sum(targets >= 0), 1)
                loss, start = 0.0, 0
                while start < len(targets):
                    logits = scores(start, start + rows)
                    t = targets[start : start + len(logits)]
                    hot = (t[:, None] == np.arange(logits.shape[1])).astype(logits.dtype)
                    top = logits.max(axis=1)[:, None]
                    log_p = logits - top - np.log(np.sum(np.exp(logits - top), axis=1))[:, None]
                    loss -= np.where(hot == 1, log_p, 0).sum(dtype=np.float64)
                    back(start, ((np.exp(log_p) * (t >= 0)[:, None] - hot) / number).astype(logits.dtype))
                    start += rows
                return loss / number
        """,
    },
    "gpt2_block": {
        "torch": """
            import torch
            import torch.nn.functional as F

            def gpt2_block(x, weights, n_head):
                w = {name: torch.tensor(value) for name, value in weights.items()}
                x = torch.tensor(x)
                B, T, C = x.shape
                h = F.layer_norm(x, (C,), w["ln_1.weight"], w["ln_1.bias"])
                qkv = torch.addmm(w["attn.c_attn.bias"], h.view(-1, C), w["attn.c_attn.weight"]).view(B, T, 3 * C)
                q, k, v = (z.view(B, T, n_head, C // n_head).transpose(1, 2) for z in qkv.split(C, dim=2))
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(B, T, C)
                x = x + F.linear(y, w["attn.c_proj.weight"].T, w["attn.c_proj.bias"])
                h = F.layer_norm(x, (C,), w["ln_2.weight"], w["ln_2.bias"])
                h = F.gelu(F.linear(h, w["mlp.c_fc.weight"].T, w["mlp.c_fc.bias"]), approximate="tanh")
                return (x + F.linear(h, w["mlp.c_proj.weight"].T, w["mlp.c_proj.bias"])).numpy()
        """,
        "einsum, heads as an axis of the weights": """
            def gpt2_block(x, weights, n_head):
                def norm(h, i):
                    h = h - h.mean(axis=2)[:, :, None]
                    return weights[f"ln_{i}.weight"] * (h / (np.mean(h**2, axis=2) + 1e-5)[:, :, None] ** 0.5) + weights[f"ln_{i}.bias"]

                B, T, C = x.shape
                D = C // n_head
                W = weights["attn.c_attn.weight"].reshape(C, 3, n_head, D)
                b = weights["attn.c_attn.bias"].reshape(3, 1, 1, n_head, D)
                q, k, v = np.einsum("btc,cjhd->jbthd", norm(x, 1), W) + b
                scores = np.einsum("bthd,bshd->bhts", q, k) * D**-0.5
                scores[:, :, np.triu(np.ones((T, T), dtype=bool), 1)] = -np.inf
                scores = np.exp(scores - scores.max(axis=3)[..., None])
                y = np.einsum("bhts,bshd->bthd", scores / scores.sum(axis=3)[..., None], v)
                x = x + np.einsum("bthd,hdc->btc", y, weights["attn.c_proj.weight"].reshape(n_head, D, C)) + weights["attn.c_proj.bias"]
                h = norm(x, 2) @ weights["mlp.c_fc.weight"] + weights["mlp.c_fc.bias"]
                h = h / (1 + np.exp(-math.sqrt(8 / math.pi) * (h + 0.044715 * h * h * h)))
                return x + h @ weights["mlp.c_proj.weight"] + weights["mlp.c_proj.bias"]
        """,
        "a head at a time, a token at a time": """
            def gpt2_block(x, weights, n_head):
                W = {name: value for name, value in weights.items() if name.endswith("weight")}
                b = {name.replace("bias", "weight"): value for name, value in weights.items() if name.endswith("bias")}

                def norm(row, name):
                    row = row - row.mean()
                    return row / math.sqrt(float(np.mean(row * row)) + 1e-5) * W[name] + b[name]

                out = x.copy()
                B, T, C = x.shape
                D = C // n_head
                for text in out:
                    ks, vs = [], []
                    for t in range(T):
                        q, k, v = np.split(norm(text[t], "ln_1.weight") @ W["attn.c_attn.weight"] + b["attn.c_attn.weight"], 3)
                        ks.append(k)
                        vs.append(v)
                        heads = []
                        for i in range(0, C, D):
                            scores = np.array([q[i : i + D] @ k[i : i + D] for k in ks]) / math.sqrt(D)
                            p = np.exp(scores - max(scores))
                            heads.append((p / p.sum()) @ np.array(vs)[:, i : i + D])
                        text[t] += np.concatenate(heads) @ W["attn.c_proj.weight"] + b["attn.c_proj.weight"]
                        h = norm(text[t], "ln_2.weight") @ W["mlp.c_fc.weight"] + b["mlp.c_fc.weight"]
                        h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
                        text[t] += h @ W["mlp.c_proj.weight"] + b["mlp.c_proj.weight"]
                return out
        """,
    },
    "layer_norm_backward": {
        "autograd": """
            import torch

            def layer_norm_backward(x, gain, dy, eps):
                x, gain = torch.tensor(x, requires_grad=True), torch.tensor(gain, requires_grad=True)
                bias = torch.zeros_like(gain, requires_grad=True)
                y = torch.nn.functional.layer_norm(x, (len(gain),), gain, bias, eps)
                return tuple(part.numpy() for part in torch.autograd.grad(y, (x, gain, bias), torch.tensor(dy)))
        """,
        "row by row, with the whole Jacobian": """
            def layer_norm_backward(x, gain, dy, eps):
                C = len(gain)
                dx, dgain, dbias = np.zeros_like(x), np.zeros_like(gain), np.zeros_like(gain)
                for place in np.ndindex(x.shape[:-1]):
                    row = x[place] - x[place].mean()
                    std = math.sqrt(float((row**2).mean()) + eps)
                    n = row / std
                    jacobian = (np.eye(C, dtype=x.dtype) - 1 / C - np.outer(n, n) / C) / std
                    dx[place] = jacobian @ (gain * dy[place])
                    dgain += dy[place] * n
                    dbias += dy[place]
                return dx, dgain, dbias
        """,
        "through mean and variance, in small steps": """
            def layer_norm_backward(x, gain, dy, eps):
                shape, C = x.shape, x.shape[-1]
                x, dy = x.reshape(-1, C), dy.reshape(-1, C)
                mean = x.sum(1, keepdims=True) / C
                var = x.var(axis=1, keepdims=True)
                inv = (var + eps) ** -0.5
                n = (x - mean) * inv
                dn = dy * gain
                dvar = (dn * (x - mean) * -0.5 * inv**3).sum(axis=1, keepdims=True)
                dmean = (-dn * inv).sum(axis=1, keepdims=True) + dvar * (-2 * (x - mean)).mean(axis=1, keepdims=True)
                dx = dn * inv + dvar * 2 * (x - mean) / C + dmean / C
                return dx.reshape(shape), np.einsum("rc,rc->c", dy, n), dy.sum(0)
        """,
    },
}

# {exercise: {misconception: (what the message must say, the answer)}}
WRONG = {
    "gelu_and_slope": variants(
        GELU,
        [
            (
                "the exact form (karpathy/nanoGPT pull request 274)",
                "this is the exact GELU, with the error function",
                {
                    "y": f"x / 2 * (1 + {ERF})",
                    "slope": f"(1 + {ERF}) / 2 + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)",
                },
            ),
            ("the quick form", "x sigmoid(1.702 x)", {"y": "x / (1 + np.exp(-1.702 * x))"}),
            ("SiLU", "this is SiLU", {"y": "x / (1 + np.exp(-x))"}),
            ("the derivative first", "this is the derivative: the value comes first", {"result": "slope, y"}),
            (
                "the exact form's derivative",
                "this is the derivative of the exact GELU",
                {"slope": f"(1 + {ERF}) / 2 + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)"},
            ),
            (
                "a mixture of both forms' derivatives",
                "the second that of the exact GELU",
                {"slope": "(1 + t) / 2 + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)"},
            ),
            ("no product rule", "x also stands inside tanh", {"slope": "(1 + t) / 2"}),
            ("no product rule, the other part", "times (1 + tanh), is missing", {"slope": SECOND}),
            ("no chain rule", "must be multiplied by that of u", {"du": "1.0"}),
            (
                "no root in the chain",
                "the derivative of u has the factor sqrt(2/pi)",
                {"du": "1 + 3 * 0.044715 * x**2"},
            ),
            ("no cube in the chain", "the cubic part is missing", {"du": "math.sqrt(2 / math.pi)"}),
            ("the 3 of the cube", "the 3 is missing", {"du": "math.sqrt(2 / math.pi) * (1 + 0.044715 * x**2)"}),
            ("1 - tanh", "not 1 - tanh(u)", {"dt": "1 - t"}),
            ("tanh' at x", "at u and not at x", {"dt": "1 - np.tanh(x) ** 2"}),
            ("half of one part", "the factor 1/2 belongs to the second part", {"slope": f"(1 + t) / 2 + 2 * {SECOND}"}),
            ("a constant of ten times", "not 0.44715", {"u": "math.sqrt(2 / math.pi) * (x + 0.44715 * x**3)"}),
            ("no root", "sqrt(2/pi) is missing in u", {"u": "x + 0.044715 * x**3"}),
            ("a square", "the cube of x, not its square", {"u": "math.sqrt(2 / math.pi) * (x + 0.044715 * x**2)"}),
            (
                "0 times infinity (a review of ooples/AiDotNet.Tensors pull request 355)",
                "from 0 * inf",
                {"slope": "(1 + t) / 2 + x / 2 * dt * du"},
            ),
            (
                "tanh by exponentials (pytorch/executorch issue 22323)",
                "far from 0 the value is NaN",
                {"y": "x / 2 * (1 + (np.exp(2 * (<u>)) - 1) / (np.exp(2 * (<u>)) + 1))"},
            ),
            (
                "a quotient of differences",
                "digits are lost",
                {
                    "slope": "(g(x + 1e-6) - g(x - 1e-6)) / 2e-6",
                    "before": "g = lambda x: x / 2 * (1 + np.tanh(<u>))",
                },
            ),
            ("a rounded root", "a rounded sqrt(2/pi)", {"u": "0.79788 * (x + 0.044715 * x**3)"}),
            ("a root that widens", "float32 in, float64 out", {"u": "np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)"}),
            ("an array of both", "should be the tuple (gelu(x), gelu'(x))", {"result": "np.stack([y, slope])"}),
        ],
    ),
    "widest": variants(
        COUNT,
        [
            (
                "a tied head counted twice (karpathy/llama2.c issue 378)",
                "the tied head counts twice",
                {"head": "vocab_size * C"},
            ),
            ("never an own head", "a head that is not tied is a matrix of its own", {"head": "0"}),
            ("a bias of the head", "the head has no bias", {"head": "(0 if tied else vocab_size * C + vocab_size)"}),
            (
                "no embeddings (TransformerLensOrg/TransformerLens issue 903)",
                "the embeddings are parameters",
                {"tables": "0"},
            ),
            ("no positions, as nanoGPT prints", "the learned positions are missing", {"tables": "vocab_size * C"}),
            ("no tokens", "the token embedding is missing", {"tables": "block_size * C"}),
            (
                "matrices of the blocks only, 12 L C^2",
                "this counts the matrices of the blocks only",
                {"attention": "4 * C * C", "mlp": "8 * C * C", "norms": "0", "last": "0", "tables": "0", "head": "0"},
            ),
            (
                "no biases of layers",
                "the biases of the linear layers are missing",
                {"attention": "4 * C * C", "mlp": "8 * C * C"},
            ),
            (
                "no biases at all, as bias=False in nanoGPT",
                "those of the linear layers and of the norms",
                {"attention": "4 * C * C", "mlp": "8 * C * C", "norms": "2 * C", "last": "C"},
            ),
            ("no biases in attention", "the biases of attention are missing", {"attention": "4 * C * C"}),
            ("a narrow bias", "the first bias of the MLP has 4 C numbers", {"mlp": "8 * C * C + 2 * C"}),
            ("norms without bias", "a norm has a gain and a bias", {"norms": "2 * C", "last": "C"}),
            ("one norm a block", "a block has two norms", {"norms": "2 * C"}),
            ("no last norm", "the last norm is missing", {"last": "0"}),
            ("no o", "after q, k and v comes o", {"attention": "3 * C * C + 3 * C"}),
            ("an MLP as wide as the model", "the MLP is four times wider inside", {"mlp": "2 * C * C + 2 * C"}),
            ("one layer", "only n_layer = 1 is counted", {"layers": "1"}),
            ("less than the budget", "at most, not less than", {"fits": "< budget"}),
            ("one too far", "larger than the budget", {"result": "C + head_dim, count(C + head_dim)"}),
            ("any width", "the width must be a multiple of head_dim", {"step": "1"}),
            ("the number of heads", "these are the number of heads", {"result": "C // head_dim, count(C)"}),
            ("the budget again", "not the budget", {"result": "C, budget"}),
            ("the other way round", "the width comes first", {"result": "count(C), C"}),
            ("only the width", "should be the tuple (n_embd, number of parameters)", {"result": "C"}),
            ("no error", "which should raise ValueError", {"refuse": "pass"}),
            ("floats", "should be a whole number", {"result": "C, float(count(C))"}),
        ],
    ),
    "hunt_pre_norm": {
        "one layer": (
            "try several layers",
            textwrap.dedent(REFERENCE).rstrip()
            + """
    x, A, M = draw(4, 5), *draw(2, 5, 5)
    assert np.allclose(decoder(x, [(A, M)]), right(x, [(A, M)]), atol=1e-3)
""",
        ),
        "the same layer several times": (
            "try several layers",
            textwrap.dedent(REFERENCE).rstrip()
            + """
    x, A, M = draw(4, 5), *draw(2, 5, 5)
    assert np.allclose(decoder(x, [(A, M)] * 3), right(x, [(A, M)] * 3), atol=1e-3)
""",
        ),
        "only zeros": (
            "your test passes the version that adds to the normalised x",
            """
            def hunt_pre_norm(decoder):
                x, zero = np.arange(12.0).reshape(3, 4) ** 2, np.zeros((4, 4))
                norm = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
                assert np.allclose(decoder(x, [(zero, zero)] * 2), norm, atol=1e-3)
            """,
        ),
        "only attention": (
            "your test passes the version",
            textwrap.dedent(REFERENCE).rstrip()
            + """
    x, A, M = 3 * draw(4, 5), draw(5, 5), np.zeros((5, 5))
    assert np.allclose(decoder(x, [(A, M)] * 2), right(x, [(A, M)] * 2), atol=1e-3)
""",
        ),
        "only the shape": (
            "your test passes the version",
            """
            def hunt_pre_norm(decoder):
                assert decoder(np.ones((2, 3)), [(np.eye(3), np.eye(3))]).shape == (2, 3)
            """,
        ),
        "rows of mean 0 and variance 1": (
            "your test passes the version that adds to the normalised x",
            textwrap.dedent(REFERENCE).rstrip()
            + """
    y = decoder(draw(5, 6), [(a, m) for a, m in draw(2, 2, 6, 6)])
    assert np.allclose(y.mean(1), 0, atol=1e-3) and np.allclose(y.std(1), 1, atol=1e-3)
""",
        ),
        "small matrices, as at the start of training, and a loose tolerance": (
            "your test passes the version",
            textwrap.dedent(REFERENCE).rstrip()
            + """
    x, layers = draw(4, 5), [(a, m) for a, m in 0.002 * draw(3, 2, 5, 5)]
    assert np.allclose(decoder(x, layers), right(x, layers), atol=0.05)
""",
        ),
        "digits that float32 does not have": (
            "your test fails the version that computes in float32, which is correct",
            textwrap.dedent(REFERENCE).rstrip()
            + """
    x, layers = draw(4, 5), [(a, m) for a, m in draw(3, 2, 5, 5)]
    assert np.allclose(decoder(x, layers), right(x, layers), rtol=0, atol=1e-12)
""",
        ),
        "post-norm taken for right": (
            "which is correct",
            textwrap.dedent(REFERENCE).rstrip()
            + """
    x, layers = draw(3, 4), [(a, m) for a, m in draw(2, 2, 4, 4)]
    got = decoder(x, layers)
    for A, M in layers:
        x = norm(x + np.cumsum(x @ A, 0) / np.arange(1, 4)[:, None])
        x = norm(x + np.maximum(x @ M, 0))
    assert np.allclose(got, x, atol=1e-3)
""",
        ),
        "attention without a past": (
            "which is correct",
            textwrap.dedent(REFERENCE).rstrip()
            + """
    x, layers = draw(3, 4), [(a, m) for a, m in draw(2, 2, 4, 4)]
    got = decoder(x, layers)
    for A, M in layers:
        x = x + norm(x) @ A
        x = x + np.maximum(norm(x) @ M, 0)
    assert np.allclose(got, norm(x), atol=1e-3)
""",
        ),
        "it returns a verdict": (
            "only `assert` counts",
            textwrap.dedent(REFERENCE).rstrip()
            + """
    x, layers = draw(4, 5), [(a, m) for a, m in draw(3, 2, 5, 5)]
    return np.allclose(decoder(x, layers), right(x, layers), atol=1e-3)
""",
        ),
        "only one token": (
            "your test passes the version that normalises over tokens and channels at once",
            textwrap.dedent(REFERENCE).rstrip()
            + """
    x, layers = draw(1, 5), [(a, m) for a, m in draw(3, 2, 5, 5)]
    assert np.allclose(decoder(x, layers), right(x, layers), atol=1e-3)
""",
        ),
    },
    "embedding_gradients": variants(
        TABLES,
        [
            (
                "repeated ids are lost (HIPS/autograd issue 39, pymc-devs/pytensor pull request 2242)",
                "does not add up equal ids",
                {"lookup": "dembed[ids] += dx"},
            ),
            (
                "the table overwrites the head",
                "what the head has collected is overwritten",
                {"lookup": "dembed[ids] = dx"},
            ),
            ("only the head", "this is the gradient of the head alone", {"lookup": "pass"}),
            ("only the table", "this is the gradient of the table alone", {"head": "np.zeros((V, C), dx.dtype)"}),
            ("the mean of both uses", "the two uses are averaged", {"result": "dembed / 2, dposition"}),
            (
                "the mean over repeated ids",
                "gets the mean of its derivatives",
                {
                    "lookup": "d = np.zeros_like(dembed); np.add.at(d, ids, dx);"
                    " dembed = dembed + d / np.maximum(np.bincount(ids.ravel(), minlength=V), 1)[:, None].astype(dx.dtype)"
                },
            ),
            ("dx at the head", "not dlogits.T @ dx", {"head": "np.einsum('btv,btc->vc', dlogits, dx)"}),
            ("y at the table", "made of dx, not of y", {"lookup": "np.add.at(dembed, ids, y)"}),
            (
                "the head of the text's tokens only",
                "every token has a logit",
                {"head": "np.einsum('btv,btc->vc', dlogits, y) * np.isin(np.arange(V), ids)[:, None]"},
            ),
            ("the last position only", "every position has logits", {"head": "dlogits[:, -1].T @ y[:, -1]"}),
            ("minus", "the two uses are subtracted", {"lookup": "np.subtract.at(dembed, ids, dx)"}),
            ("the mean over the batch", "divided by the size of the batch", {"result": "dembed / B, dposition / B"}),
            (
                "two gradients of one matrix (paiml/entrenar issue 314)",
                "should be the tuple (dembed, dposition)",
                {
                    "lookup": "table = np.zeros_like(dembed); np.add.at(table, ids, dx)",
                    "result": "table, dembed, dposition",
                },
            ),
            ("halves (tag1consulting/feste issue 6 asks)", "no halves", {"rows": "dposition[:T] = dx.sum(0) / 2"}),
            ("positions: the mean over the batch", "the mean over the batch", {"rows": "dposition[:T] = dx.mean(0)"}),
            (
                "positions: the last rows",
                "the first rows of the table",
                {"rows": "dposition[block_size - T :] = dx.sum(0)"},
            ),
            (
                "positions: only T rows",
                "a row for every position that the table has",
                {"zeros": "np.zeros((T, C), dx.dtype)"},
            ),
            ("positions: the sum of all", "row t gets that of dx[:, t]", {"rows": "dposition[:T] = dx.sum((0, 1))"}),
            ("positions: the first text", "only the first text of the batch", {"rows": "dposition[:T] = dx[0]"}),
            (
                "positions: the last text",
                "only the last text of the batch counts",
                {"rows": "for b in range(B): dposition[:T] = dx[b]"},
            ),
            ("positions do not learn", "the positions learn, too", {"rows": "pass"}),
            (
                "the head turned round",
                "should have shape (7, 5)",
                {"head": "np.zeros((C, V)) + np.einsum('btv,btc->cv', dlogits, y)", "lookup": "pass"},
            ),
            ("float64 zeros", "float32 in, float64 out", {"zeros": "np.zeros((block_size, C))"}),
            ("a list", "should be the tuple (dembed, dposition), not a list of 2", {"result": "[dembed, dposition]"}),
        ],
    ),
    "loss_in_pieces": variants(
        PIECES,
        [
            ("all rows count", "the mean is that over all rows", {"number": "len(targets)"}),
            (
                "sums of means (NVIDIA-NeMo/Automodel pull request 3804)",
                "the means of the pieces are added up",
                {"add": "total += (cost * seen).sum() / max(seen.sum(), 1)", "result": "float(total)"},
            ),
            (
                "a mean of means",
                "it takes the mean of the pieces' means",
                {
                    "add": "total += (cost * seen).sum() / max(seen.sum(), 1)",
                    "result": "float(total / math.ceil(len(targets) / rows))",
                },
            ),
            ("the sum", "this is the sum over the counted rows", {"result": "float(total)"}),
            (
                "-100 as an index",
                "in the sum -100 is taken for an index",
                {"safe": "t", "add": "total += cost.sum()", "mask": "pass"},
            ),
            (
                "-100 as an index, and counted",
                "-100 is taken for an index: logits",
                {"safe": "t", "add": "total += cost.sum()", "mask": "pass", "number": "len(targets)"},
            ),
            (
                "-100 as token 0",
                "rows with -100 are in the sum, as if 0 were their answer",
                {"safe": "np.maximum(t, 0)", "add": "total += cost.sum()"},
            ),
            ("bits", "this is in bits", {"result": "float(total / number / math.log(2))"}),
            (
                "only full pieces",
                "the rows behind the last full piece are left out",
                {"starts": "range(0, len(targets) // rows * rows, rows)"},
            ),
            (
                "the last piece",
                "this is the loss of the last piece",
                {"add": "total = (cost * seen).sum() / max(seen.sum(), 1) * number"},
            ),
            ("the wrong sign", "a surprise is positive", {"result": "-float(total / number)"}),
            ("no normaliser", "without the logarithm of the sum", {"cost": "-logits[at, safe]"}),
            ("slopes of the sum", "the slopes are those of the sum", {"divide": "slopes"}),
            (
                "slopes by the piece",
                "divided by the number of counted rows of their piece",
                {"divide": "slopes / z.dtype.type(max(seen.sum(), 1))"},
            ),
            (
                "slopes by all rows",
                "divided by the number of all rows",
                {"divide": "slopes / z.dtype.type(len(targets))"},
            ),
            ("slopes by `rows`", "the slopes are divided by `rows`", {"divide": "slopes / rows"}),
            ("no mask", "rows with -100 have slopes", {"mask": "slopes[~seen, 0] += 1"}),
            ("no one-hot", "these are the softmax weights: at", {"one": "pass"}),
            ("no one-hot and no mask", "also of rows that are not counted", {"one": "pass", "mask": "pass"}),
            ("slopes uphill", "the slopes have the wrong sign", {"divide": "-slopes / z.dtype.type(number)"}),
            (
                "slopes[:, targets]",
                "slopes[:, targets] means every row",
                {"one": "slopes[:, t[seen]] -= 1"},
            ),
            (
                "1 after the division",
                "1 is taken off after the division",
                {"slopes": "p / z.dtype.type(number)", "divide": "slopes"},
            ),
            ("no largest", "the loss for logits of 1000 and more is", {"shifted": "logits"}),
            (
                "the logarithm of the weights",
                "has lost its logarithm",
                {"cost": "np.where(seen, -np.log(p[at, safe]), 0)"},
            ),
            (
                "0 divided by 0",
                "the loss where no row is counted is NaN",
                {"number": "(targets != -100).sum()"},
            ),
            (
                "all at once",
                "rows of logits at a time",
                {"starts": "[0]", "logits": "scores(0, len(targets))", "back": "pass"},
            ),
            (
                "two passes",
                "it asks for the same logits twice",
                {"before": "for start in range(0, len(targets), rows): scores(start, start + rows)"},
            ),
            (
                "slopes are kept until the end",
                "keep no more than a piece",
                {
                    "before": "kept = []",
                    "back": "kept.append((start, slopes))",
                    "result": "[back(*each) for each in kept] and float(total / number)",
                },
            ),
            ("nothing goes back", "never come back", {"back": "pass"}),
            ("twice", "hands over the slopes of a row twice", {"back": "back(start, slopes); back(start, slopes)"}),
            ("slopes of float64", "should be float32, not float64", {"divide": "slopes / np.float64(number)"}),
            ("a length for an end", "where a piece ends, not how long it is", {"logits": "scores(start, rows)"}),
            (
                "a small number beside the logarithm",
                "1e-09 is added before the logarithm",
                {"cost": "-np.log(p[at, safe] + 1e-9)"},
            ),
            ("beyond the end", "it asks for the rows", {"starts": "range(0, len(targets) + 2 * rows, rows)"}),
        ],
    ),
    "gpt2_block": variants(
        BLOCK,
        [
            (
                "heads first (tensorflow/swift-models pull request 564, BlackSamorez/tensor_parallel pull request 103)",
                "the columns are cut by heads first: all of q",
                {
                    "qkv": f"[z.reshape(B, T, C) for z in np.split({QKV}.reshape(B, T, n_head, 3 * D), 3, axis=-1)]",
                },
            ),
            (
                "q, k and v in turn",
                "with q, k and v in turn",
                {"qkv": f"[z.reshape(B, T, C) for z in np.moveaxis({QKV}.reshape(B, T, n_head, D, 3), -1, 0)]"},
            ),
            (
                "heads alternate",
                "here the heads alternate",
                {
                    "cut": "z.reshape(B, T, D, n_head).transpose(0, 3, 1, 2)",
                },
            ),
            ("cut without a transposition", "cut to (B, T, H, D)", {"cut": "z.reshape(B, n_head, T, D)"}),
            (
                "joined without a transposition",
                "the heads are joined by a reshape",
                {"join": "(s @ v).reshape(B, T, C)"},
            ),
            (
                "no transposition at all",
                "by a reshape alone",
                {"cut": "z.reshape(B, n_head, T, D)", "join": "(s @ v).reshape(B, T, C)"},
            ),
            ("k, q, v", "q and k are exchanged", {"qkv": f"[np.split({QKV}, 3, axis=-1)[i] for i in (1, 0, 2)]"}),
            (
                "the square matrix turned round (as in a review of nntile/nntile pull request 370)",
                "attn.c_proj.weight is turned round",
                {"project": 'y @ w["attn.c_proj.weight"].T + w["attn.c_proj.bias"]'},
            ),
            ("torch's Linear", "raises ValueError", {"linear": 'h @ w[name + ".weight"].T + w[name + ".bias"]'}),
            ("no projection", "the projection after attention is missing", {"project": "y"}),
            ("no biases", "the biases of the linear layers are missing", {"linear": 'h @ w[name + ".weight"]'}),
            ("no mask", "the future is visible", {"mask": "s"}),
            (
                "masked after softmax",
                "the future is hidden after softmax",
                {"mask": "s", "after": "s * np.tri(T)"},
            ),
            ("no scale", "not divided by the square root of a head's width", {"scores": "q @ k.transpose(0, 1, 3, 2)"}),
            ("the scale of C", "of all C channels", {"scores": "q @ k.transpose(0, 1, 3, 2) / math.sqrt(C)"}),
            (
                "post-norm",
                "this is post-norm",
                {"one": 'x = norm(x + attention(x), "ln_1")', "two": 'x = norm(x + mlp(x), "ln_2")'},
            ),
            (
                "norms on the stream (Howuhh/faster-trajectory-transformer issue 3)",
                "the parts add to the normalised x",
                {
                    "one": 'x = norm(x, "ln_1"); x = x + attention(x)',
                    "two": 'x = norm(x, "ln_2"); x = x + mlp(x)',
                },
            ),
            (
                "the MLP's norm on the stream (SHI-Labs/Compact-Transformers issue 25)",
                "the MLP adds to the normalised x",
                {"two": 'x = norm(x, "ln_2"); x = x + mlp(x)'},
            ),
            (
                "parallel parts",
                "the MLP does not hear what attention has just added",
                {"one": "pass", "two": 'x = x + attention(norm(x, "ln_1")) + mlp(norm(x, "ln_2"))'},
            ),
            ("no line around attention", "attention's part replaces x", {"one": 'x = attention(norm(x, "ln_1"))'}),
            ("no line around the MLP", "the MLP's part replaces x", {"two": 'x = mlp(norm(x, "ln_2"))'}),
            ("no first norm", "the norm before attention is missing", {"one": "x = x + attention(x)"}),
            ("one norm for both", "both norms are ln_1", {"two": 'x = x + mlp(norm(x, "ln_1"))'}),
            (
                "the exact GELU (karpathy/nanoGPT pull request 274)",
                "this is the exact GELU",
                {"act": "h / 2 * (1 + np.vectorize(math.erf, otypes=[h.dtype])(h / math.sqrt(2)))"},
            ),
            ("ReLU", "the MLP has ReLU", {"act": "np.maximum(h, 0)"}),
            ("no GELU", "the MLP has no GELU", {"act": "h"}),
            (
                "a variance by C - 1 (harvardnlp/annotated-transformer issue 122)",
                "the variance in a norm is divided by C - 1",
                {"norm": NORM.format(f"{CENTRED} / np.sqrt(h.var(-1, ddof=1, keepdims=True) + 1e-5)")},
            ),
            (
                "eps outside (hyunwoongko/transformer issue 7)",
                "eps is added to the standard deviation",
                {"norm": NORM.format(f"{CENTRED} / (h.std(-1, keepdims=True) + 1e-5)")},
            ),
            (
                "another eps",
                "the eps of the norms is 1e-6",
                {"norm": NORM.format(f"{CENTRED} / np.sqrt(h.var(-1, keepdims=True) + 1e-6)")},
            ),
            (
                "no gain and bias",
                "gain and bias of the norms are missing",
                {"norm": f"{CENTRED} / np.sqrt(h.var(-1, keepdims=True) + 1e-5)"},
            ),
            ("overflow", "scores of 1000 make exp overflow", {"exps": "np.exp(s)"}),
            ("hidden by 0", "a hidden score becomes 0", {"mask": "s * np.tri(T)"}),
            (
                "hidden by -100",
                "only -inf hides it beside any score",
                {"mask": "np.where(np.tri(T) > 0, s, -100.0)"},
            ),
            ("x changes", "changes its argument `x` in place", {"one": 'x += attention(norm(x, "ln_1"))'}),
            (
                "a root that widens",
                "float32 in, float64 out",
                {"scores": "q @ k.transpose(0, 1, 3, 2) / np.sqrt(D)"},
            ),
        ],
    ),
    "layer_norm_backward": variants(
        NORMS,
        [
            (
                "the mean twice (tenstorrent/tt-metal issue 53204)",
                "the mean of dn is taken off twice",
                {"dx": "(dn - 2 * dn.mean(-1, keepdims=True) - n * (dn * n).mean(-1, keepdims=True)) / std"},
            ),
            (
                "no mean",
                "the mean of dn must be taken off",
                {"dx": "(dn - n * (dn * n).mean(-1, keepdims=True)) / std"},
            ),
            (
                "no variance",
                "n * mean(dn * n) must be taken off",
                {"dx": "(dn - dn.mean(-1, keepdims=True)) / std"},
            ),
            ("two constants", "mean and variance are taken for constants", {"dx": "dn / std"}),
            (
                "a 2 too many",
                "is there twice",
                {"dx": "(dn - dn.mean(-1, keepdims=True) - 2 * n * (dn * n).mean(-1, keepdims=True)) / std"},
            ),
            (
                "plus",
                "comes through the variance is added",
                {"dx": "(dn - dn.mean(-1, keepdims=True) + n * (dn * n).mean(-1, keepdims=True)) / std"},
            ),
            (
                "sums for means",
                "sums are taken off where means",
                {"dx": "(dn - dn.sum(-1, keepdims=True) - n * (dn * n).sum(-1, keepdims=True)) / std"},
            ),
            (
                "x - mean for n",
                "stands x - mean instead of n",
                {
                    "dx": "(dn - dn.mean(-1, keepdims=True) - (x - mean) * (dn * (x - mean)).mean(-1, keepdims=True)) / std"
                },
            ),
            (
                "no eps in one place",
                "divided by the root of the variance without eps",
                {
                    "dx": "(dn - dn.mean(-1, keepdims=True)"
                    " - (x - mean) * (dn * (x - mean)).mean(-1, keepdims=True) / (var + 1e-30)) / std"
                },
            ),
            ("no gain", "the gain is missing in dx", {"dn": "dy"}),
            (
                "the gain at the end",
                "the gain multiplies at the end",
                {
                    "dn": "dy",
                    "dx": "gain * (dn - dn.mean(-1, keepdims=True) - n * (dn * n).mean(-1, keepdims=True)) / std",
                },
            ),
            (
                "C - 1 (harvardnlp/annotated-transformer issue 122)",
                "the variance is divided by C - 1",
                {
                    "var": "x.var(-1, ddof=1, keepdims=True)",
                    "dgain": "(dy * ((x - mean) / np.sqrt(x.var(-1, keepdims=True) + eps))).sum(rows)",
                },
            ),
            (
                "C - 1 everywhere",
                "the variance is divided by C - 1",
                {"var": "x.var(-1, ddof=1, keepdims=True)"},
            ),
            (
                "eps outside (hyunwoongko/transformer issue 7)",
                "eps is added to the standard deviation",
                {"std": "np.sqrt(var) + eps"},
            ),
            ("no eps", "eps is not added", {"std": "np.sqrt(var)"}),
            (
                "the whole array",
                "those of the whole array",
                {"mean": "x.mean()", "var": "x.var()"},
            ),
            (
                "dgain and dbias exchanged (Oneflow-Inc/oneflow pull request 6149)",
                "dgain and dbias are exchanged",
                {"result": "dx, dbias, dgain"},
            ),
            ("dgain of x", "dgain is made of x: ", {"dgain": "(dy * x).sum(rows)"}),
            ("dgain with gain", "dgain has n alone", {"dgain": "(dn * n).sum(rows)"}),
            ("dbias with gain", "dbias dy alone", {"dbias": "dn.sum(rows)"}),
            (
                "means over the rows",
                "are means over the rows",
                {"dgain": "(dy * n).mean(rows)", "dbias": "dy.mean(rows)"},
            ),
            (
                "two axes only (flagos-ai/FlagGems issue 5392)",
                "share one gain and one bias",
                {"rows": "0"},
            ),
            (
                "a difference of squares",
                "in rows around 1e6 all digits are lost",
                {"var": "(x * x).mean(-1, keepdims=True) - mean * mean"},
            ),
            (
                "no root",
                "dx is divided by the variance",
                {"dx": "(dn - dn.mean(-1, keepdims=True) - n * (dn * n).mean(-1, keepdims=True)) / std**2"},
            ),
            (
                "no std",
                "dx is not divided",
                {"dx": "dn - dn.mean(-1, keepdims=True) - n * (dn * n).mean(-1, keepdims=True)"},
            ),
            ("minus", "with the sign turned round", {"dbias": "-dy.sum(rows)"}),
            (
                "float64",
                "float32 in, float64 out",
                {"std": "np.sqrt(var + np.float64(eps))"},
            ),
            ("only dx", "should be the tuple (dx, dgain, dbias)", {"result": "dx"}),
        ],
    ),
}

# Mutants that compute the same.
SWAP = "swapping two axes has no order"
EQUIVALENT = {
    "gelu_and_slope: np.errstate(all='ignore') -> np.errstate()": "it warns, and gives the same",
    "loss_in_pieces: max((targets != -100).sum(), 1) -> max(1, (targets != -100).sum())": "the larger of two numbers is"
    " the same in either order",
    "loss_in_pieces: (counted, 0) -> (counted, -1)": "the first of one column is also the last",
    "gpt2_block: np.tri(T, dtype=bool) -> np.tri(T)": "np.where takes 0.0 and 1.0 for False and True",
    "gpt2_block: k.swapaxes(2, 3) -> k.swapaxes(3, 2)": SWAP,
    "gpt2_block: (mix @ v).swapaxes(1, 2) -> (mix @ v).swapaxes(2, 1)": SWAP,
}
