"""Truth table of exercises/test_ex06_tinyllama.py: answers that must pass, and answers that must not.

An answer is HEAD and, behind it, the code with its indentation taken off (textwrap.dedent). Many wrong answers are one
that is right, but for a line.
"""

HEAD = "import math\nimport numpy as np\n"

RIGHT = {
    "count_parameters": {
        "one shape after the other": """
            def count_parameters(params, vocab_size, tied=False):
                C, H = params["dim"], params["n_heads"]
                G = H if params.get("n_kv_heads") is None else params["n_kv_heads"]
                D = C // H
                F = int(2 * (4 * C) / 3)
                if params.get("ffn_dim_multiplier") is not None:
                    F = int(params["ffn_dim_multiplier"] * F)
                m = params["multiple_of"]
                F = m * ((F + m - 1) // m)
                shapes = [(vocab_size, C), (C,)]
                if not tied:
                    shapes.append((C, vocab_size))
                for _ in range(params["n_layers"]):
                    shapes += [(C,), (H * D, C), (G * D, C), (G * D, C), (C, H * D)]
                    shapes += [(C,), (F, C), (F, C), (C, F)]
                return sum(math.prod(shape) for shape in shapes)
        """,
        "exact fractions and a table": """
            from fractions import Fraction

            def count_parameters(params, vocab_size, tied=False):
                C = params["dim"]
                kv = Fraction(params.get("n_kv_heads") or params["n_heads"], params["n_heads"])
                width = math.floor(Fraction(8, 3) * C)
                width = math.floor(width * Fraction(params.get("ffn_dim_multiplier") or 1.0))
                width += -width % params["multiple_of"]
                table = {"q": 1, "k": kv, "v": kv, "o": 1}
                table |= {name: Fraction(width, C) for name in ("gate", "up", "down")}
                total = params["n_layers"] * (sum(table.values()) * C * C + 2 * C) + C
                for end in ("embed",) if tied else ("embed", "head"):
                    total += vocab_size * C
                return int(total)
        """,
        "NumPy's numbers": """
            def count_parameters(params, vocab_size, tied=False):
                p = {"n_kv_heads": None, "ffn_dim_multiplier": None} | params
                C = np.int64(p["dim"])
                kv = p["n_kv_heads"] or p["n_heads"]
                inner = np.floor(np.floor(8 * C / 3) * (p["ffn_dim_multiplier"] or 1))
                inner = np.int64(np.ceil(inner / p["multiple_of"])) * p["multiple_of"]
                per_layer = C * (2 * C + 2 * C * kv // p["n_heads"] + 3 * inner + 2)
                return p["n_layers"] * per_layer + C * (1 + vocab_size * (2 - tied))
        """,
    },
    "pool_heads": {
        "head by head": """
            def pool_heads(weight, n_head, n_kv_head):
                if n_head % n_kv_head != 0 or weight.shape[0] % n_head != 0:
                    raise ValueError("no")
                D, size = weight.shape[0] // n_head, n_head // n_kv_head
                new = []
                for g in range(n_kv_head):
                    total = 0
                    for h in range(g * size, (g + 1) * size):
                        total = total + weight[h * D : (h + 1) * D].astype(np.float64)
                    new.append(total / size)
                return np.concatenate(new).astype(weight.dtype)
        """,
        "a matrix that averages": """
            def pool_heads(weight, n_head, n_kv_head):
                size, rest = divmod(n_head, n_kv_head)
                D, left = divmod(len(weight), n_head)
                if rest or left:
                    raise ValueError("heads do not fit")
                average = np.kron(np.eye(n_kv_head), np.kron(np.ones((1, size)) / size, np.eye(D)))
                return (average @ weight.astype(np.float64)).astype(weight.dtype)
        """,
        "the halves of float16 first": """
            def pool_heads(weight, n_head, n_kv_head):
                if n_head // n_kv_head * n_kv_head != n_head or len(weight) // n_head * n_head != len(weight):
                    raise ValueError
                heads = np.array(np.split(weight, n_head))
                size = n_head // n_kv_head
                parts = [sum(heads[g * size + i] / heads.dtype.type(size) for i in range(size)) for g in range(n_kv_head)]
                return np.concatenate(parts)
        """,
        "torch": """
            import torch

            def pool_heads(weight, n_head, n_kv_head):
                if n_head % n_kv_head or weight.shape[0] % n_head:
                    raise ValueError
                w = torch.from_numpy(weight).unflatten(0, (n_kv_head, n_head // n_kv_head, -1))
                return w.double().mean(1).to(w.dtype).flatten(0, 1).numpy()
        """,
    },
    "split_qkv": {
        "slices, as TinyLLaMA's own script": """
            def split_qkv(fused, n_head, n_kv_head):
                if n_head % n_kv_head or len(fused) % (n_head + 2 * n_kv_head):
                    raise ValueError("no")
                D = len(fused) // (n_head + 2 * n_kv_head)
                step = len(fused) // n_kv_head
                q, k, v = [], [], []
                for start in range(0, len(fused), step):
                    end = start + step
                    q.append(fused[start : end - 2 * D])
                    k.append(fused[end - 2 * D : end - D])
                    v.append(fused[end - D : end])
                return np.concatenate(q), np.concatenate(k), np.concatenate(v)
        """,
        "by the numbers of the rows": """
            def split_qkv(fused, n_head, n_kv_head):
                size, rest = divmod(n_head, n_kv_head)
                D, left = divmod(fused.shape[0], n_head + 2 * n_kv_head)
                if rest != 0 or left != 0:
                    raise ValueError("no")
                kind = np.arange(fused.shape[0]) // D % (size + 2)
                return fused[kind < size], fused[kind == size], fused[kind == size + 1]
        """,
        "torch": """
            import torch

            def split_qkv(fused, n_head, n_kv_head):
                size = n_head // n_kv_head
                if size * n_kv_head != n_head or fused.shape[0] % (n_head + 2 * n_kv_head) > 0:
                    raise ValueError
                groups = torch.from_numpy(fused).unflatten(0, (n_kv_head, size + 2, -1))
                return tuple(part.flatten(0, 2).numpy() for part in groups.split((size, 1, 1), dim=1))
        """,
    },
    "hunt_rms_norm": {
        "by its properties": """
            def hunt_rms_norm(norm):
                rng = np.random.default_rng(7)
                C = 5
                gain = np.array([2.0, -1.0, 0.5, 3.0, 1.0])
                x = rng.normal(size=(2, 3, C)) * np.arange(1, 4)[:, None] + 2
                y = norm(x, gain, 1e-9)
                size = np.sqrt(np.mean((y / gain) ** 2, axis=-1))
                assert np.allclose(size, 1, atol=1e-4), size  # no gain, no sum, no other axis
                factor = y / gain / x
                assert np.allclose(factor, factor[..., :1], rtol=1e-3) and (factor > 0).all()  # nothing taken off
                ones = np.ones((1, 4))
                for eps in (3.0, 0.25, 1e-4):
                    for size in (1.0, 0.1):
                        y = norm(size * ones, np.ones(4), eps)
                        assert np.allclose(y, size / (size**2 + eps) ** 0.5, rtol=1e-4), (size, eps)
                half = np.full((2, 4), 1000, np.float16)
                assert np.allclose(norm(half, np.ones(4, np.float16), 1e-5), 1, atol=0.01)
        """,
        "against a loop of its own": """
            def hunt_rms_norm(norm):
                rng = np.random.default_rng(11)
                gain = rng.uniform(-2, 2, 6)
                for shape in ((1, 6), (4, 6), (3, 2, 6)):
                    x = rng.exponential(size=shape) * rng.choice([0.1, 3.0], shape[:-1])[..., None]
                    for eps in (1e-3, 0.4):
                        y = norm(x, gain, eps)
                        for place in np.ndindex(shape[:-1]):
                            size = math.sqrt(sum(a * a for a in x[place]) / 6 + eps)
                            for a, g, b in zip(x[place], gain, y[place]):
                                assert math.isclose(b, a * g / size, rel_tol=1e-4, abs_tol=1e-6)
                y = norm(np.array([[300, 400]], np.float16), np.ones(2, np.float16), 0.1)
                assert abs(y[0, 0] - 0.8485) < 0.01 and abs(y[0, 1] - 1.1314) < 0.01
        """,
        "by hand, with whole numbers": """
            def hunt_rms_norm(norm):
                gain = np.array([2.0, -3.0])
                # mean squares of 25, 4 and 100, and eps makes 36, 15 and 111 of them
                x = np.array([[[5.0, 5.0]], [[2.0, 2.0]], [[10.0, -10.0]], [[7.0, 1.0]]])
                want = gain * x / np.array([6.0, 15**0.5, 111**0.5, 6.0])[:, None, None]
                assert np.abs(norm(x, gain, 11.0) - want).max() < 1e-4
                assert np.abs(norm(x[:, 0], gain, 11.0) - want[:, 0]).max() < 1e-4
                assert np.abs(norm(np.array([[x[0, 0], x[3, 0], x[1, 0]]]), gain, 11.0)[0, 2] - want[1, 0]).max() < 1e-4
                assert np.abs(norm(x[3, 0], gain, 11.0) - want[3, 0]).max() < 1e-4
                y = norm(np.array([500, -500], np.float16), np.array([1, 2], np.float16), 0.0)
                assert np.abs(y - [1, -2]).max() < 0.02
        """,
    },
    "fold_gains": {
        "block by block": """
            def fold_gains(weights):
                new = {name: w.copy() for name, w in weights.items()}
                if "head.weight" not in new:
                    new["head.weight"] = new["embed.weight"].copy()
                new["head.weight"] *= new["norm.weight"]
                new["norm.weight"][:] = 1
                i = 0
                while f"blocks.{i}.attention_norm.weight" in new:
                    for norm, parts in (("attention_norm", "attention.q attention.k attention.v"), ("mlp_norm", "mlp.gate mlp.up")):
                        gain = new[f"blocks.{i}.{norm}.weight"]
                        for part in parts.split():
                            new[f"blocks.{i}.{part}.weight"] *= gain[None, :]
                        gain[:] = 1
                    i += 1
                return new
        """,
        "name by name, with diagonal matrices": """
            def fold_gains(weights):
                def gain_of(name):
                    if name == "head.weight":
                        return weights["norm.weight"]
                    *block, layer, part, _ = ["", *name.split(".")]
                    norm = {"q": "attention", "k": "attention", "v": "attention", "gate": "mlp", "up": "mlp"}.get(part)
                    return weights[".".join([*block[1:], f"{norm}_norm", "weight"])] if norm else None

                new = {}
                for name, w in ({"head.weight": weights["embed.weight"]} | weights).items():
                    if name.endswith("norm.weight"):
                        new[name] = w * 0 + 1
                    elif (gain := gain_of(name)) is not None:
                        new[name] = w @ np.diag(gain)
                    else:
                        new[name] = w
                return new
        """,
        "regular expressions and einsum": """
            import re

            def fold_gains(weights):
                weights = dict(weights)
                weights.setdefault("head.weight", weights["embed.weight"])
                new = dict(weights)
                for name in weights:
                    if name == "head.weight":
                        source = "norm.weight"
                    elif found := re.fullmatch(r"(blocks[.][0-9]+[.])attention[.][qkv][.]weight", name):
                        source = found[1] + "attention_norm.weight"
                    elif found := re.fullmatch(r"(blocks[.][0-9]+[.])mlp[.](gate|up)[.]weight", name):
                        source = found[1] + "mlp_norm.weight"
                    else:
                        continue
                    new[name] = np.einsum("oi,i->oi", weights[name], weights[source])
                for name in new:
                    if re.search("norm", name):
                        new[name] = np.full_like(new[name], 1.0)
                return new
        """,
    },
    "swiglu_backward": {
        "autograd": """
            import torch

            def swiglu_backward(x, gate, up, down, dy):
                leaves = [torch.tensor(part, requires_grad=True) for part in (x, gate, up, down)]
                x, gate, up, down = leaves
                y = torch.nn.functional.silu(x @ gate.T) * (x @ up.T) @ down.T
                return tuple(part.numpy() for part in torch.autograd.grad(y, leaves, torch.tensor(dy)))
        """,
        "einsum, and a sigmoid in two branches": """
            def swiglu_backward(x, gate, up, down, dy):
                a = np.einsum("btc,fc->btf", x, gate)
                b = np.einsum("btc,fc->btf", x, up)
                small = np.exp(-np.abs(a))
                s = np.where(a >= 0, 1 / (1 + small), small / (1 + small))
                dinner = np.einsum("btc,cf->btf", dy, down)
                ddown = np.einsum("btc,btf->cf", dy, s * a * b)
                db = dinner * s * a
                da = dinner * b * s * (1 + a * (1 - s))
                dx = np.einsum("btf,fc->btc", da, gate) + np.einsum("btf,fc->btc", db, up)
                return dx, np.einsum("btf,btc->fc", da, x), np.einsum("btf,btc->fc", db, x), ddown
        """,
        "token by token": """
            def swiglu_backward(x, gate, up, down, dy):
                dx, dgate, dup, ddown = (np.zeros_like(part) for part in (x, gate, up, down))
                for place in np.ndindex(x.shape[:2]):
                    a, b = gate @ x[place], up @ x[place]
                    with np.errstate(over="ignore"):
                        s = 1 / (1 + np.exp(-a))
                    ddown += np.outer(dy[place], a * s * b)
                    dinner = down.T @ dy[place]
                    db = dinner * a * s
                    da = dinner * b * (s + a * s * (1 - s))
                    dgate += np.outer(da, x[place])
                    dup += np.outer(db, x[place])
                    dx[place] = gate.T @ da + up.T @ db
                return dx, dgate, dup, ddown
        """,
    },
    "rms_norm_backward": {
        "autograd": """
            import torch

            def rms_norm_backward(x, gain, eps, dy):
                leaves = [torch.tensor(part, requires_grad=True) for part in (x, gain)]
                wide = [part.float() if part.dtype == torch.float16 else part for part in leaves]
                y = torch.nn.functional.rms_norm(wide[0], gain.shape, wide[1], eps)
                return tuple(part.numpy() for part in torch.autograd.grad(y, leaves, torch.tensor(dy).to(y.dtype)))
        """,
        "with the third power of the root": """
            def rms_norm_backward(x, gain, eps, dy):
                X, G, Y = (part.astype(np.float64) for part in (x, gain, dy))
                C = x.shape[-1]
                square = np.einsum("...c,...c->...", X, X)[..., None] / C + eps
                dot = np.einsum("...c,...c,c->...", Y, X, G)[..., None]
                dx = Y * G / square**0.5 - X * dot / C / square**1.5
                dgain = np.sum(Y * X / square**0.5, axis=tuple(range(x.ndim - 1)))
                return dx.astype(x.dtype), dgain.astype(x.dtype)
        """,
        "row by row, with the Jacobian": """
            def rms_norm_backward(x, gain, eps, dy):
                C = len(gain)
                rows, slopes = x.reshape(-1, C).astype(float), dy.reshape(-1, C).astype(float)
                dx, dgain = np.zeros((len(rows), C)), np.zeros(C)
                for i, (row, slope) in enumerate(zip(rows, slopes)):
                    root = math.sqrt(np.mean(row**2) + eps)
                    jacobian = np.diag(gain.astype(float)) @ (np.eye(C) / root - np.outer(row, row) / (C * root**3))
                    dx[i] = slope @ jacobian
                    dgain += slope * row / root
                return dx.reshape(x.shape).astype(x.dtype), dgain.astype(gain.dtype)
        """,
    },
}


def but(code, *changes):
    """A right answer with something else in some places."""
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert code.count(old) == 1, (old, code.count(old))
        code = code.replace(old, new)
    return code


COUNT = RIGHT["count_parameters"]["one shape after the other"]
ONE_BLOCK = "shapes += [(C,), (H * D, C), (G * D, C), (G * D, C), (C, H * D)]"
POOL = """
    def pool_heads(weight, n_head, n_kv_head):
        if n_head % n_kv_head or len(weight) % n_head:
            raise ValueError("no")
        size, D, rest = n_head // n_kv_head, len(weight) // n_head, weight.shape[1:]
        heads = weight.reshape(n_kv_head, size, D, *rest)
        return heads.mean(1).reshape(-1, *rest)
"""
SLICES = RIGHT["pool_heads"]["head by head"]
SPLIT_SLICES = RIGHT["split_qkv"]["slices, as TinyLLaMA's own script"]
SPLIT = """
    def split_qkv(fused, n_head, n_kv_head):
        if n_head % n_kv_head or len(fused) % (n_head + 2 * n_kv_head):
            raise ValueError("no")
        size, D, rest = n_head // n_kv_head, len(fused) // (n_head + 2 * n_kv_head), fused.shape[1:]
        heads = fused.reshape(n_kv_head, size + 2, D, *rest)
        q, k, v = heads[:, :size], heads[:, size], heads[:, size + 1]
        return tuple(part.reshape(-1, *rest) for part in (q, k, v))
"""
FLAT = (
    "heads = fused.reshape(n_kv_head, size + 2, D, *rest)",
    "q, k, v = np.split(fused, [n_head * D, (n_head + n_kv_head) * D])",
)
TAKEN_APART = "q, k, v = heads[:, :size], heads[:, size], heads[:, size + 1]"
HUNT = """
    def hunt_rms_norm(norm):
        x = 2 * np.sin(np.arange(24.0)).reshape(2, 3, 4) + 1
        gain, eps = np.array([0.5, -2.0, 1.5, 3.0]), 0.7
        want = gain * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
        assert np.allclose(norm(x, gain, eps), want, rtol=1e-4, atol=1e-5)
        y = norm(np.array([300.0, -400.0, 0.0, 500.0], np.float16), np.ones(4, np.float16), 1e-5)
        assert np.allclose(y, np.array([300, -400, 0, 500]) / np.sqrt(500000 / 4), rtol=0.01)
"""
HALF = """        y = norm(np.array([300.0, -400.0, 0.0, 500.0], np.float16), np.ones(4, np.float16), 1e-5)
        assert np.allclose(y, np.array([300, -400, 0, 500]) / np.sqrt(500000 / 4), rtol=0.01)
"""
FOLD = RIGHT["fold_gains"]["block by block"]
SWIGLU = """
    def swiglu_backward(x, gate, up, down, dy):
        a, b = x @ gate.T, x @ up.T
        s = (1 + np.tanh(a / 2)) / 2
        silu = a * s
        dinner = dy @ down
        inner = silu * b
        da = dinner * b * (s + silu * (1 - s))
        db = dinner * silu
        dx = da @ gate + db @ up
        flat = lambda part: part.reshape(-1, part.shape[-1])
        dgate, dup, ddown = flat(da).T @ flat(x), flat(db).T @ flat(x), flat(dy).T @ flat(inner)
        return dx, dgate, dup, ddown
"""
RMS = """
    def rms_norm_backward(x, gain, eps, dy):
        dtype = x.dtype
        if dtype == np.float16:
            x, gain, dy = x.astype(np.float32), gain.astype(np.float32), dy.astype(np.float32)
        r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
        n, dn = x * r, dy * gain
        dx = r * (dn - n * (n * dn).mean(-1, keepdims=True))
        dgain = (dy * n).reshape(-1, len(gain)).sum(0)
        return dx.astype(dtype), dgain.astype(dtype)
"""
DX = "dx = r * (dn - n * (n * dn).mean(-1, keepdims=True))"

# {exercise: {misconception: (what the message must say, the answer)}}
WRONG = {
    "count_parameters": {
        "grouped heads forgotten (meta-llama/llama issue 1111)": (
            "fewer key and value heads than query heads",
            but(COUNT, "(G * D, C), (G * D, C)", "(C, C), (C, C)"),
        ),
        "rows of heads, not of their widths": (
            "a key head has dim / n_heads rows",
            but(COUNT, "(G * D, C), (G * D, C)", "(G, C), (G, C)"),
        ),
        "o as narrow as k": (
            "q and o belong to the query heads",
            but(
                COUNT,
                "(H * D, C), (G * D, C), (G * D, C), (C, H * D)",
                "(G * D, C), (G * D, C), (G * D, C), (C, G * D)",
            ),
        ),
        "no o": ("the output matrix o of attention is missing", but(COUNT, ", (C, H * D)]", "]")),
        "GPT-2's two matrices": ("three matrices, gate, up and down", but(COUNT, "(F, C), (F, C)", "(F, C)")),
        "GPT-2's width": ("the inner width is GPT-2's", but(COUNT, "F = m * ((F + m - 1) // m)", "F = 4 * C")),
        "no multiplier (huggingface/transformers before pull request 24891)": (
            "the multiplier is missing",
            but(COUNT, 'F = int(params["ffn_dim_multiplier"] * F)', "pass"),
        ),
        "the multiplier last": (
            "the multiplier comes before the inner width is rounded up",
            but(
                COUNT,
                "F = m * ((F + m - 1) // m)",
                'F = int((params.get("ffn_dim_multiplier") or 1) * (m * ((int(2 * (4 * C) / 3) + m - 1) // m)))',
            ),
        ),
        "the multiplier for 4 dim": (
            "for 8/3 of dim, not for 4 dim",
            but(
                COUNT, "int(2 * (4 * C) / 3)", 'int(2 * (4 * C) / 3) if not params.get("ffn_dim_multiplier") else 4 * C'
            ),
        ),
        "rounded down to a multiple": (
            "rounded up to a multiple of multiple_of, not down",
            but(COUNT, "(F + m - 1) // m", "F // m"),
        ),
        "rounded to the nearest": (
            "not down and not to the nearest",
            but(COUNT, "m * ((F + m - 1) // m)", "m * round(F / m)"),
        ),
        "not a multiple": ("is not rounded up to a multiple", but(COUNT, "F = m * ((F + m - 1) // m)", "pass")),
        "one multiple too many": (
            "a multiple of multiple_of stays as it is",
            but(COUNT, "(F + m - 1) // m", "F // m + 1"),
        ),
        "rounded once": (
            "rounded down twice",
            but(COUNT, "F = int(2 * (4 * C) / 3)", "F = 8 * C / 3", "(F + m - 1) // m", "int(F + m - 1) // m"),
        ),
        "rounded to nearest whole numbers": (
            "rounded down twice",
            but(COUNT, "F = int(2 * (4 * C) / 3)", "F = round(8 * C / 3)"),
        ),
        "rounded up at once": (
            "rounded down twice",
            but(COUNT, 'int(params["ffn_dim_multiplier"] * F)', 'math.ceil(params["ffn_dim_multiplier"] * F)'),
        ),
        "no norms": (
            "the norms' gains are missing",
            but(COUNT, "(vocab_size, C), (C,)]", "(vocab_size, C)]", "[(C,), (H", "[(H", "[(C,), (F", "[(F"),
        ),
        "one norm a block": ("a block has two norms", but(COUNT, "[(C,), (F", "[(F")),
        "no embedding": ("one of them is missing", but(COUNT, "[(vocab_size, C), (C,)]", "[(C,)]")),
        "no last norm": ("the last norm is missing", but(COUNT, "(vocab_size, C), (C,)]", "(vocab_size, C)]")),
        "LayerNorm's shifts": (
            "a gain, but no shift",
            but(COUNT, "[(C,), (H", "[(C,), (C,), (H", "[(C,), (F", "[(C,), (C,), (F"),
        ),
        "biases": ("has no biases", but(COUNT, "[(C,), (H", "[(C + 2 * G * D + C + 2 * F + C,), (C,), (H")),
        "tied twice": ("a tied head is the embedding, and counts once", but(COUNT, "if not tied", "if True")),
        "never a head": ("one of them is missing", but(COUNT, "if not tied", "if False")),
        "tied means none": (
            "one matrix that is both",
            but(COUNT, "return sum(", "return -tied * vocab_size * C + sum("),
        ),
        "the file's vocabulary (ggml-org/llama.cpp pull request 4258)": (
            "it takes the vocabulary of the file, -1",
            but(
                COUNT,
                "def count_parameters(params, vocab_size, tied=False):",
                "def count_parameters(params, vocab_size, tied=False):\n                vocab_size = params.get('vocab_size', vocab_size)",
            ),
        ),
        "one block": ("only one block is counted", but(COUNT, 'range(params["n_layers"])', "range(1)")),
        "a key that may be missing": (
            "raises KeyError",
            but(COUNT, 'params.get("n_kv_heads") is None', 'params["n_kv_heads"] is None'),
        ),
        "None times": (
            "raises TypeError",
            but(
                COUNT, 'H if params.get("n_kv_heads") is None else params["n_kv_heads"]', 'params.get("n_kv_heads", H)'
            ),
        ),
        "a float": ("should be a whole number, not a number", but(COUNT, "return sum(", "return 1.0 * sum(")),
    },
    "pool_heads": {
        "heads far apart": (
            "neighbours make a group",
            but(POOL, "heads.mean(1)", "weight.reshape(size, n_kv_head, D, *rest).mean(0)"),
        ),
        "the sum": ("these are the sums of the heads", but(POOL, "heads.mean(1)", "heads.sum(1)")),
        "the first of each group": ("it keeps the first head of each group", but(POOL, "heads.mean(1)", "heads[:, 0]")),
        "the last of each group": ("it keeps the last head of each group", but(POOL, "heads.mean(1)", "heads[:, -1]")),
        "the first heads": ("the others lost", but(POOL, "heads.mean(1)", "weight[: n_kv_head * D]")),
        "the mean of all": (
            "every new head is the mean of all old ones",
            but(POOL, "heads.mean(1)", "np.stack([heads.mean((0, 1))] * n_kv_head)"),
        ),
        "heads in the rows between": (
            "it took every n_head-th row for a head",
            but(POOL, "heads.mean(1)", "weight.reshape(D, n_kv_head, size, *rest).mean(2).swapaxes(0, 1)"),
        ),
        "rows next to each other": (
            "the rows of one head stay apart",
            but(POOL, "heads.mean(1)", "weight.reshape(n_kv_head * D, size, *rest).mean(1)"),
        ),
        "divided by the number of groups": (
            "is divided by n_kv_head",
            but(POOL, "heads.mean(1)", "(heads.sum(1) / n_kv_head)"),
        ),
        "divided by a root": (
            "by the square root of the group's size",
            but(POOL, "heads.mean(1)", "(heads.sum(1) / math.sqrt(size))"),
        ),
        "the median": ("the mean is asked for", but(POOL, "heads.mean(1)", "np.median(heads, axis=1)")),
        "repeated for every query head": (
            "once for every head of its group",
            but(POOL, "heads.mean(1)", "heads.mean(1).repeat(size, 0)"),
        ),
        "float16 overflows": (
            "too large for float16, but their mean is not",
            but(POOL, "heads.mean(1)", "(sum(heads.swapaxes(0, 1)) / size).astype(weight.dtype)"),
        ),
        "a matrix only": ("raises IndexError", but(POOL, "D, *rest)", "D, weight.shape[1])")),
        "float64 only": ("float32 in, float64 out", but(POOL, "heads.mean(1)", "heads.mean(1, dtype=float)")),
        "no check": ("6 heads make no 4 groups", but(SLICES, "n_head % n_kv_head != 0 or ", "")),
        "no check of the rows": ("12 rows cannot be 8 heads", but(SLICES, " or weight.shape[0] % n_head != 0", "")),
        "another exception": (
            "which should raise ValueError, but it raises TypeError",
            but(SLICES, "ValueError", "TypeError"),
        ),
    },
    "split_qkv": {
        "all queries first (LitGPT since its pull request 1013)": (
            "all queries do not come first",
            but(SPLIT, FLAT[0], "", TAKEN_APART, FLAT[1]),
        ),
        "equal thirds (vllm-project/vllm issue 13686)": (
            "three equal parts",
            but(
                SPLIT,
                FLAT[0],
                "",
                TAKEN_APART,
                "q, k, v = (fused[i * len(fused) // 3 : (i + 1) * len(fused) // 3] for i in range(3))",
            ),
        ),
        "v before k": (
            "key and value are exchanged",
            but(SPLIT, TAKEN_APART, "q, v, k = heads[:, :size], heads[:, size], heads[:, size + 1]"),
        ),
        "keys first": (
            "in a group the query heads come first",
            but(SPLIT, TAKEN_APART, "k, v, q = heads[:, 0], heads[:, 1], heads[:, 2:]"),
        ),
        "k, q, v": ("not before them", but(SPLIT, TAKEN_APART, "k, q, v = heads[:, 0], heads[:, 1:-1], heads[:, -1]")),
        "ungrouped heads only (epfLLM/Megatron-LLM pull request 45)": (
            "should have shape",
            but(SPLIT, TAKEN_APART, "q, k, v = heads[:, 0], heads[:, 1], heads[:, 2]"),
        ),
        "rows of heads in turn": (
            "rows that lie far apart",
            but(SPLIT, FLAT[0], "heads = np.moveaxis(fused.reshape(D, n_kv_head, size + 2, *rest), 0, 2)"),
        ),
        "groups take turns": (
            "here the groups take turns",
            but(SPLIT, "heads[:, :size],", "heads[:, :size].swapaxes(0, 1),"),
        ),
        "result in another order": ("should have shape", but(SPLIT, "(q, k, v)", "(k, v, q)")),
        "a list": ("should be the tuple (q, k, v), not a list of 3", but(SPLIT, "return tuple(", "return list(")),
        "heads left apart": ("should have shape", but(SPLIT, "part.reshape(-1, *rest)", "part.reshape(-1, D, *rest)")),
        "float64": ("should be int64, not float64", but(SPLIT, "return tuple(part", "return tuple(1.0 * part")),
        "no check": ("6 query heads make no 4 groups", but(SPLIT_SLICES, "n_head % n_kv_head or ", "")),
        "no check of the rows": (
            "21 rows cannot be 6 + 2 + 2 heads",
            but(
                SPLIT_SLICES,
                " or len(fused) % (n_head + 2 * n_kv_head)",
                "",
                "range(0, len(fused), step)",
                "range(0, n_kv_head * step, step)",
            ),
        ),
    },
    "hunt_rms_norm": {
        "rows without a mean": (
            "the version that takes off the mean",
            but(
                HUNT,
                "+ 1\n",
                "+ 1\n        x = x - x.mean(-1, keepdims=True)\n",
                "0.0, 500.0]",
                "0.0, 100.0]",
                "0, 500]",
                "0, 100]",
                "500000 / 4",
                "260000 / 4",
            ),
        ),
        "a small eps, as many tests have": ("try a large eps", but(HUNT, "0.7", "1e-6", "rtol=1e-4", "rtol=1e-3")),
        "a small eps, to the last digit": (
            "your test fails a version that computes in float32",
            but(HUNT, "0.7", "1e-6", "rtol=1e-4, atol=1e-5", "rtol=0, atol=1e-9"),
        ),
        "gains of 1": ("try gains that differ", but(HUNT, "np.array([0.5, -2.0, 1.5, 3.0])", "np.ones(4)")),
        "one row": ("try several rows", but(HUNT, "24.0", "4.0", "2, 3, 4", "1, 4")),
        "one row in each matrix": ("several rows in one matrix", but(HUNT, "24.0", "8.0", "2, 3, 4", "2, 1, 4")),
        "equal rows": (
            "several rows",
            but(HUNT, "np.arange(24.0)).reshape(2, 3, 4)", "np.arange(4.0)) + np.zeros((2, 3, 1))"),
        ),
        "no float16": ("squares float16 in float16", but(HUNT, HALF, "")),
        "float16 to the last digit": ("which is correct", but(HUNT, "rtol=0.01", "rtol=1e-6")),
        "that it has length 1": (
            "your test passes the version",
            """
            def hunt_rms_norm(norm):
                x = 2 * np.sin(np.arange(12.0)).reshape(3, 4) + 1
                y = norm(x, np.ones(4), 1e-5)
                assert np.allclose((y * y).mean(-1), 1, atol=1e-3)
            """,
        ),
        "that doubling changes nothing": (
            "which is correct",
            """
            def hunt_rms_norm(norm):
                x = 2 * np.sin(np.arange(12.0)).reshape(3, 4) + 1
                assert np.allclose(norm(2 * x, np.ones(4), 0.1), norm(x, np.ones(4), 0.1), atol=1e-3)
            """,
        ),
        "eps outside is taken for right": (
            "which is correct",
            but(
                HUNT,
                "np.sqrt((x * x).mean(-1, keepdims=True) + eps)",
                "(np.sqrt((x * x).mean(-1, keepdims=True)) + eps)",
            ),
        ),
        "LayerNorm is taken for right": (
            "which is correct",
            but(HUNT, "want = gain * x /", "want = gain * (x - x.mean(-1, keepdims=True)) /"),
        ),
        "forgets to assert": ("your test passes the version", but(HUNT, "assert np.allclose(norm", "np.allclose(norm")),
        "returns what it should assert": (
            "nobody looks at it, only `assert` counts",
            """
            def hunt_rms_norm(norm):
                return np.allclose(norm(np.ones(4), np.ones(4), 3.0), 0.5)
            """,
        ),
        "gains of another length": (
            "which is correct: ValueError",
            """
            def hunt_rms_norm(norm):
                assert np.allclose(norm(np.ones(4), np.ones(3), 3.0), 0.5)
            """,
        ),
    },
    "fold_gains": {
        "rows": (
            "a column of the matrix, not a row",
            but(
                FOLD,
                "*= gain[None, :]",
                '*= np.resize(gain, len(new[f"blocks.{i}.{part}.weight"]))[:, None]',
                'new["head.weight"] *= new["norm.weight"]',
                'new["head.weight"] *= np.resize(new["norm.weight"], len(new["head.weight"]))[:, None]',
            ),
        ),
        "rows of square matrices": (
            "wrong values in the result",
            but(FOLD, "*= gain[None, :]", '*= gain[:, None] if part == "attention.q" else gain'),
        ),
        "divided": (
            "the matrices are divided by the gain",
            but(FOLD, "*= gain[None, :]", "/= gain[None, :]", 'new["head.weight"] *=', 'new["head.weight"] /='),
        ),
        "gains stay": ("they must be 1", but(FOLD, "gain[:] = 1", "pass", 'new["norm.weight"][:] = 1', "pass")),
        "gains of 0": (
            "gains of 0 let nothing pass",
            but(FOLD, "gain[:] = 1", "gain[:] = 0", 'new["norm.weight"][:] = 1', 'new["norm.weight"][:] = 0'),
        ),
        "gains only": (
            "so the gains are lost",
            but(FOLD, "*= gain[None, :]", "*= 1", 'new["head.weight"] *= new["norm.weight"]', ""),
        ),
        "1 + gain": (
            "these gains are plain factors",
            but(
                FOLD,
                "*= gain[None, :]",
                "*= 1 + gain",
                'new["head.weight"] *= new["norm.weight"]',
                'new["head.weight"] *= 1 + new["norm.weight"]',
            ),
        ),
        "q only": (
            "k and v read the same normalised numbers as q",
            but(FOLD, "attention.q attention.k attention.v", "attention.q"),
        ),
        "q and k only": (
            "v reads the same",
            but(FOLD, "attention.q attention.k attention.v", "attention.q attention.k"),
        ),
        "o, too": ("o reads the heads' results", but(FOLD, "attention.v", "attention.v attention.o")),
        "gate only": ("up reads the same", but(FOLD, "mlp.gate mlp.up", "mlp.gate")),
        "up only": ("gate reads the same", but(FOLD, "mlp.gate mlp.up", "mlp.up")),
        "norms exchanged": (
            "they are exchanged",
            but(
                FOLD,
                '("attention_norm", ',
                '("mlp_norm", ',
                '("mlp_norm", "mlp',
                '("attention_norm", "mlp',
                "gain[:] = 1\n",
                'pass\n                    new[f"blocks.{i}.attention_norm.weight"] = new[f"blocks.{i}.mlp_norm.weight"] = np.ones_like(gain)\n',
            ),
        ),
        "blocks only": (
            "only the blocks are done",
            but(FOLD, 'new["head.weight"] *= new["norm.weight"]', "", 'new["norm.weight"][:] = 1', ""),
        ),
        "the last gain is lost": (
            "the gain of the last norm is lost",
            but(FOLD, 'new["head.weight"] *= new["norm.weight"]', ""),
        ),
        "the head does the gain twice": ("and so has the head now", but(FOLD, 'new["norm.weight"][:] = 1', "")),
        "tied: the embedding (ModelCloud/GPTQModel pull request 1550, spcl/QuaRot pull request 17)": (
            "the last gain went into the embedding",
            but(
                FOLD,
                'new["head.weight"] = new["embed.weight"].copy()',
                'new["embed.weight"] *= new["norm.weight"]',
                'new["head.weight"] *= new["norm.weight"]',
                'if "head.weight" in new: new["head.weight"] *= new["norm.weight"]',
            ),
        ),
        "tied: one array under two names": (
            "but the embedding has changed with it",
            but(FOLD, 'new["embed.weight"].copy()', 'new["embed.weight"]'),
        ),
        "tied: no head": (
            "so it needs head.weight",
            but(
                FOLD,
                "return new",
                'new = new if "head.weight" in weights else {n: w for n, w in new.items() if n != "head.weight"}\n                return new',
            ),
        ),
        "tied: KeyError": ("raises KeyError", but(FOLD, 'if "head.weight" not in new:', "if False:")),
        "the arrays of the argument": (
            "changes its argument `weights` in place",
            but(FOLD, "{name: w.copy() for name, w in weights.items()}", "dict(weights)"),
        ),
        "block 1 and block 10": (
            "with 12 blocks",
            """
            def fold_gains(weights):
                new = {"head.weight": weights["embed.weight"]} | weights
                new["head.weight"] = new["head.weight"] * weights["norm.weight"]
                for i in range(sum("mlp_norm" in name for name in weights)):
                    for name in weights:
                        kind = "attention" if name.split(".")[-2] in "qkv" else "mlp" if name.split(".")[-2] in ("gate", "up") else ""
                        if name.startswith(f"blocks.{i}") and kind:
                            new[name] = new[name] * weights[f"blocks.{i}.{kind}_norm.weight"]
                return {name: np.ones_like(w) if "norm" in name else w for name, w in new.items()}
            """,
        ),
        "float64 ones": (
            "float32 in, float64 out",
            but(FOLD, 'new["norm.weight"][:] = 1', 'new["norm.weight"] = np.ones(len(new["norm.weight"]))'),
        ),
        "a list": ("should be a dict, not a list", but(FOLD, "return new", "return list(new.items())")),
    },
    "swiglu_backward": {
        "sigmoid for silu's derivative": ("two factors that depend on a", but(SWIGLU, "(s + silu * (1 - s))", "s")),
        "sigmoid's derivative": (
            "this is the derivative of sigmoid",
            but(SWIGLU, "(s + silu * (1 - s))", "s * (1 - s)"),
        ),
        "half of the product rule": (
            "the first part is missing",
            but(SWIGLU, "(s + silu * (1 - s))", "silu * (1 - s)"),
        ),
        "a minus": ("a sign is wrong: sigmoid grows", but(SWIGLU, "(s + silu * (1 - s))", "(s - silu * (1 - s))")),
        "silu for sigmoid": ("not silu (1 - silu)", but(SWIGLU, "(s + silu * (1 - s))", "(s + silu * (1 - silu))")),
        "the square of sigmoid": ("not its square", but(SWIGLU, "(s + silu * (1 - s))", "(s + silu * s)")),
        "ReLU's": ("that is ReLU's", but(SWIGLU, "(s + silu * (1 - s))", "(a > 0)")),
        "silu left out": ("leaves silu out", but(SWIGLU, "b * (s + silu * (1 - s))", "b")),
        "silu on up (ml-explore/mlx-lm pull request 767)": (
            "it was put on up",
            but(
                SWIGLU,
                "a, b = x @ gate.T, x @ up.T",
                "b, a = x @ gate.T, x @ up.T",
                "dx = da @ gate + db @ up",
                "da, db = db, da\n        dx = da @ gate + db @ up",
            ),
        ),
        "silu of the product (Nijikadesu/breakdown-minimind issue 3)": (
            "on the product of gate and up",
            but(
                SWIGLU,
                "s = (1 + np.tanh(a / 2)) / 2",
                "p = a * b\n        s = (1 + np.tanh(p / 2)) / 2",
                "silu = a * s",
                "silu = p * s",
                "inner = silu * b",
                "inner = silu",
                "db = dinner * silu",
                "db = dinner * a * (s + silu * (1 - s))",
            ),
        ),
        "no up on the way to the gate": ("was multiplied with up(x)", but(SWIGLU, "dinner * b * (", "dinner * (")),
        "gate(x) without silu": ("not with gate(x)", but(SWIGLU, "db = dinner * silu", "db = dinner * a")),
        "GLU's sigmoid": ("not with sigmoid(gate(x))", but(SWIGLU, "db = dinner * silu", "db = dinner * s")),
        "no gate on the way to up": (
            "multiplied with silu(gate(x)): so",
            but(SWIGLU, "db = dinner * silu", "db = dinner"),
        ),
        "down reads silu": ("in ddown up is missing", but(SWIGLU, "inner = silu * b", "inner = silu")),
        "down reads the product": ("in ddown silu is missing", but(SWIGLU, "inner = silu * b", "inner = a * b")),
        "only through the gate": ("x is read by up, too", but(SWIGLU, "da @ gate + db @ up", "da @ gate")),
        "only through up": ("x is read by gate, too", but(SWIGLU, "da @ gate + db @ up", "db @ up")),
        "the last row": ("not only the last", but(SWIGLU, "part.reshape(-1, part.shape[-1])", "part[-1]")),
        "the mean over tokens": (
            "not their mean",
            but(
                SWIGLU,
                "return dx, dgate, dup, ddown",
                "tokens = x.shape[0] * x.shape[1]\n        return dx, dgate / tokens, dup / tokens, ddown / tokens",
            ),
        ),
        "exp overflows (Lightning-AI/lightning-thunder pull request 2624)": (
            "exp overflows and leaves NaN",
            but(SWIGLU, "s = (1 + np.tanh(a / 2)) / 2", "s = np.exp(a) / (1 + np.exp(a))"),
        ),
        "a derivative that overflows": (
            "exp overflows and leaves NaN",
            but(SWIGLU, "(s + silu * (1 - s))", "(1 + np.exp(-a) + a * np.exp(-a)) / (1 + np.exp(-a)) ** 2"),
        ),
        "clipped": (
            "with gate(x) up to 1500",
            but(
                SWIGLU, "s = (1 + np.tanh(a / 2)) / 2", "a = np.clip(a, -88, 88)\n        s = (1 + np.tanh(a / 2)) / 2"
            ),
        ),
        "matrices turned": (
            "should have shape",
            but(SWIGLU, "flat(da).T @ flat(x), flat(db).T @ flat(x)", "flat(x).T @ flat(da), flat(x).T @ flat(db)"),
        ),
        "a gradient for every row": (
            "should have shape",
            but(
                SWIGLU,
                "flat = lambda part: part.reshape(-1, part.shape[-1])",
                "flat = lambda part: part",
                "flat(da).T @ flat(x), flat(db).T @ flat(x), flat(dy).T @ flat(inner)",
                "np.einsum('btf,btc->bfc', da, x), np.einsum('btf,btc->bfc', db, x), np.einsum('btc,btf->bcf', dy, inner)",
            ),
        ),
        "a list": (
            "should be the tuple (dx, dgate, dup, ddown), not a list of 4",
            but(SWIGLU, "return dx, dgate, dup, ddown", "return [dx, dgate, dup, ddown]"),
        ),
        "exchanged": (
            "the derivatives of gate and up are exchanged",
            but(SWIGLU, "dx = da @", "da, db = db, da\n        dx = da @"),
        ),
        "float64": (
            "float32 in, float64 out",
            but(SWIGLU, "a, b = x @ gate.T, x @ up.T", "x = x.astype(float)\n        a, b = x @ gate.T, x @ up.T"),
        ),
        "in place": ("changes its argument `dy` in place", but(SWIGLU, "return dx", "dy *= 0\n        return dx")),
    },
    "rms_norm_backward": {
        "a constant root (ooples/AiDotNet pull request 695 nearly had it)": (
            "taken for a constant",
            but(RMS, DX, "dx = r * dn"),
        ),
        "no gain (a reviewer of karpathy/llm.c pull request 763 searched for days)": (
            "the gain is missing on the way to x",
            but(RMS, "dn = x * r, dy * gain", "dn = x * r, dy"),
        ),
        "the gain twice (NVIDIA/Megatron-LM pull request 6859)": (
            "the gain is there twice",
            but(RMS, DX, "dx = r * (dn - n * gain * (n * dn).mean(-1, keepdims=True))"),
        ),
        "no gain in the mean": ("in the mean of the second term the gain", but(RMS, "(n * dn).mean", "(n * dy).mean")),
        "LayerNorm's": (
            "a mean is taken off as in LayerNorm",
            but(RMS, "(dn - n *", "(dn - dn.mean(-1, keepdims=True) - n *"),
        ),
        "a sum": ("a sum over the channels", but(RMS, "(n * dn).mean", "(n * dn).sum")),
        "plus": ("the sign is wrong", but(RMS, "(dn - n *", "(dn + n *")),
        "not divided": ("all of dx must be divided", but(RMS, "dx = r * (", "dx = (")),
        "divided once": (
            "the second term must be divided",
            but(RMS, DX, "dx = r * dn - n * (n * dn).mean(-1, keepdims=True)"),
        ),
        "x twice": (
            "in the second term stands x,",
            but(RMS, DX, "dx = r * (dn - x * (x * dn).mean(-1, keepdims=True))"),
        ),
        "x outside": ("the second term must be divided", but(RMS, "dn - n *", "dn - x *")),
        "x inside": ("the second term must be divided", but(RMS, "(n * dn).mean", "(x * dn).mean")),
        "doubled": ("twice as large", but(RMS, "dn - n *", "dn - 2 * n *")),
        "over the tokens": (
            "goes over the tokens",
            but(RMS, "(n * dn).mean(-1, keepdims=True)", "(n * dn).mean(tuple(range(x.ndim - 1)), keepdims=True)"),
        ),
        "over everything": ("goes over all tokens", but(RMS, "(n * dn).mean(-1, keepdims=True)", "(n * dn).mean()")),
        "no eps": ("eps is missing", but(RMS, " + eps)", ")")),
        "eps of its own": ("eps is always 1e-5", but(RMS, " + eps)", " + 1e-5)")),
        "eps outside": (
            "eps belongs under the root",
            but(
                RMS,
                "r = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)",
                "root = np.sqrt((x * x).mean(-1, keepdims=True))\n        r = 1 / (root + eps)",
                DX,
                "dx = r * dn - (x * dn).mean(-1, keepdims=True) * x * r * r / root",
            ),
        ),
        "dgain of x": ("dgain is made of x", but(RMS, "(dy * n)", "(dy * x)")),
        "dgain of y": ("dgain is multiplied with the gain", but(RMS, "(dy * n)", "(dn * n)")),
        "dgain of dy": ("as for a shift", but(RMS, "(dy * n)", "dy")),
        "dgain's mean": ("dgain is a mean over the tokens", but(RMS, ".sum(0)", ".mean(0)")),
        "dgain not summed": (
            "dgain has one number for each channel: sum over all axes but the last",
            but(RMS, "(dy * n).reshape(-1, len(gain)).sum(0)", "dy * n"),
        ),
        "dgain summed over one axis": (
            "dgain has one number for each channel: sum over all axes but the last",
            but(RMS, ".reshape(-1, len(gain)).sum(0)", ".sum(0)"),
        ),
        "float16 squares": ("squares of float16 numbers overflow", but(RMS, "if dtype == np.float16:", "if False:")),
        "float16 squares, then float32": (
            "squares of float16 numbers overflow",
            but(
                RMS,
                "dtype = x.dtype",
                "dtype, square = x.dtype, x * x",
                "(x * x).mean(-1, keepdims=True)",
                "square.mean(-1, keepdims=True, dtype=x.dtype)",
            ),
        ),
        "a sum in float16": (
            "stops at 2048",
            but(RMS, "(dy * n).reshape(-1, len(gain)).sum(0)", "(dy * n).astype(dtype).reshape(-1, len(gain)).sum(0)"),
        ),
        "float32 stays": (
            "float16 in, float32 out",
            but(RMS, "return dx.astype(dtype), dgain.astype(dtype)", "return dx, dgain"),
        ),
        "always float32": (
            "should be",
            but(
                RMS,
                "if dtype == np.float16:",
                "if True:",
                "return dx.astype(dtype), dgain.astype(dtype)",
                "return dx, dgain",
            ),
        ),
        "float32 in between": ("wrong values in", but(RMS, "if dtype == np.float16:", "if True:")),
        "exchanged": (
            "dx comes first",
            but(RMS, "dx.astype(dtype), dgain.astype(dtype)", "dgain.astype(dtype), dx.astype(dtype)"),
        ),
        "a list": (
            "should be the tuple (dx, dgain), not a list of 2",
            but(RMS, "return dx.astype(dtype), dgain.astype(dtype)", "return [dx.astype(dtype), dgain.astype(dtype)]"),
        ),
    },
}

# Mutants that compute the same.
NEGATIVE = "to reshape, every negative number is -1"
EQUIVALENT = {
    "split_qkv: part.reshape(-1, *fused.shape[1:]) -> part.reshape(-2, *fused.shape[1:])": NEGATIVE,
    "swiglu_backward: rows.reshape(-1, rows.shape[-1]) -> rows.reshape(-2, rows.shape[-1])": NEGATIVE,
    "rms_norm_backward: (dy * normal).reshape(-1, len(gain)) -> (dy * normal).reshape(-2, len(gain))": NEGATIVE,
}
