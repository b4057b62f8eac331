"""Truth table of exercises/test_ex03_rope.py: answers that must pass, and answers that must not.

An answer is HEAD and, behind it, the code with its indentation taken off (textwrap.dedent).
"""

HEAD = "import math\nimport numpy as np\n"

RIGHT = {
    "rotate_first": {
        "complex numbers, as in Meta's LLaMA": """
            import torch

            def rotate_first(x, positions, r, base):
                x = torch.from_numpy(x)
                f = 1.0 / base ** (torch.arange(0, r, 2, dtype=torch.float64) / r)
                angles = torch.outer(torch.from_numpy(positions).double(), f)
                z = torch.view_as_complex(x[..., :r].double().unflatten(-1, (-1, 2)).contiguous())
                turned = torch.view_as_real(z * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
                return torch.cat((turned.to(x.dtype), x[..., r:]), dim=-1).numpy()
        """,
        "a product with cos and one with sin, as in GPT-J": """
            def rotate_first(x, positions, r, base):
                angles = np.repeat(np.outer(positions, base ** (-np.arange(r // 2) / (r / 2))), 2, axis=1)
                front = x[..., :r]
                other = np.stack([-front[..., 1::2], front[..., ::2]], axis=-1).reshape(front.shape)
                front = front * np.cos(angles) + other * np.sin(angles)
                return np.concatenate([front.astype(x.dtype), x[..., r:]], axis=-1)
        """,
        "a matrix for each token, with ones where nothing turns": """
            def rotate_first(x, positions, r, base):
                D, y = x.shape[-1], np.empty_like(x)
                for t, m in enumerate(positions):
                    matrix = np.eye(D)
                    for i in range(r // 2):
                        c, s = math.cos(m / base ** (2 * i / r)), math.sin(m / base ** (2 * i / r))
                        matrix[2 * i : 2 * i + 2, 2 * i : 2 * i + 2] = [[c, -s], [s, c]]
                    y[:, :, t] = x[:, :, t] @ matrix.T
                return y
        """,
        "through the half-split order and back": """
            def rotate_first(x, positions, r, base):
                order = np.r_[0:r:2, 1:r:2, r : x.shape[-1]]
                z = x[..., order].astype(np.float64)
                a, b = z[..., : r // 2].copy(), z[..., r // 2 : r].copy()
                angles = np.multiply.outer(positions, np.power(float(base), -2 * np.arange(r // 2) / r))
                z[..., : r // 2] = np.cos(angles) * a - np.sin(angles) * b
                z[..., r // 2 : r] = np.cos(angles) * b + np.sin(angles) * a
                return z[..., np.argsort(order)].astype(x.dtype)
        """,
    },
    "new_angles": {
        "loops": """
            def new_angles(head_dim, trained, length, base):
                counts = []
                for i in range(head_dim // 2):
                    f = base ** (-2 * i / head_dim)
                    known = (trained - 1) * f
                    counts.append(0)
                    if known < 2 * math.pi:
                        for m in range(trained, length):
                            counts[-1] += math.fmod(m * f, 2 * math.pi) > known
                return np.array(counts, dtype=np.int64)
        """,
        "turns in place of radians": """
            def new_angles(head_dim, trained, length, base):
                turns = np.outer(np.arange(length), base ** (-np.arange(head_dim // 2) * 2 / head_dim)) / (2 * np.pi)
                new = turns - np.floor(turns) > turns[trained - 1]
                return np.count_nonzero(new, axis=0)
        """,
        "how many fall into each turn, without their angles": """
            def new_angles(head_dim, trained, length, base):
                # In turn n the known distances end at (2 pi n) / f + trained - 1, the new ones at 2 pi (n + 1) / f.
                result = np.zeros(head_dim // 2, np.int64)
                for i in range(head_dim // 2):
                    lap, n = 2 * np.pi * base ** (2 * i / head_dim), 0
                    while n * lap < length:
                        first = math.floor(n * lap + trained - 1 + 1e-9) + 1
                        last = min(math.ceil((n + 1) * lap) - 1, length - 1)
                        result[i] += max(last - first + 1, 0)
                        n += 1
                return result
        """,
    },
    "turn_again": {
        "back to position 0, then forth": """
            def turned(k, angles):
                a, b = np.split(k, 2, axis=-1)
                cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
                return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

            def turn_again(k, was, now, old, new):
                plain = turned(k, -(was[:, :, None] * old))
                return turned(plain, now[:, :, None] * new).astype(k.dtype)
        """,
        "key by key": """
            def turn_again(k, was, now, old, new):
                y, half = np.empty_like(k), k.shape[-1] // 2
                for b, h, t in np.ndindex(k.shape[:3]):
                    for i in range(half):
                        angle = now[b, t] * new[i] - was[b, t] * old[i]
                        u, w = float(k[b, h, t, i]), float(k[b, h, t, i + half])
                        y[b, h, t, i] = u * math.cos(angle) - w * math.sin(angle)
                        y[b, h, t, i + half] = u * math.sin(angle) + w * math.cos(angle)
                return y
        """,
        "by length and direction": """
            def turn_again(k, was, now, old, new):
                half = k.shape[-1] // 2
                u, w = k[..., :half].astype(np.float64), k[..., half:].astype(np.float64)
                length, direction = np.hypot(u, w), np.arctan2(w, u)
                direction += np.expand_dims(np.einsum("bt,i->bti", now, new) - np.einsum("bt,i->bti", was, old), 1)
                return np.concatenate([length * np.cos(direction), length * np.sin(direction)], -1).astype(k.dtype)
        """,
        "torch": """
            import torch

            def turn_again(k, was, now, old, new):
                was, now, old, new = (torch.from_numpy(x).double() for x in (was, now, old, new))
                angles = (now.unsqueeze(-1) * new - was.unsqueeze(-1) * old).unsqueeze(1)
                cos, sin = (torch.cat((x, x), -1) for x in (angles.cos(), angles.sin()))
                x = torch.from_numpy(k).double()
                a, b = x.chunk(2, -1)
                return (x * cos + torch.cat((-b, a), -1) * sin).numpy().astype(k.dtype)
        """,
    },
    "hunt_rotation": {
        "channel by channel, with unit vectors": """
            def hunt_rotation(rotate):
                D, way = 4, None
                for start in (0, 777, 5000):
                    for T in (3, 1):
                        for channel in range(D):
                            q, k, v = np.zeros((2, 2, T, D)), np.zeros((2, 1, T, D)), np.ones((2, 1, T, D))
                            q[..., channel] = 1
                            k[..., channel] = 2
                            got = rotate(q, k, v, start)
                            assert np.allclose(got[2], 1)
                            i, sign = channel % (D // 2), 1 if channel < D // 2 else -1
                            for t in range(T):
                                angle = (start + t) * 10000 ** (-2 * i / D)
                                other = (channel + D // 2) % D
                                for size, x in ((1, got[0]), (2, got[1])):
                                    mine = x[:, :, t, channel] / size
                                    assert np.allclose(mine, math.cos(angle), atol=5e-3)
                                    seen = x[:, :, t, other] / size * sign
                                    if way is None and abs(math.sin(angle)) > 0.1:
                                        way = 1 if np.allclose(seen, math.sin(angle), atol=5e-3) else -1
                                    expected = (way or 1) * math.sin(angle)
                                    assert np.allclose(seen, expected, atol=5e-3)
                                    rest = [c for c in range(D) if c not in (channel, other)]
                                    assert np.allclose(x[:, :, t, rest], 0, atol=1e-6)
        """,
        "two references, one for each way": """
            def reference(x, start, way):
                T, D = x.shape[2:]
                y = np.empty(x.shape)
                for t in range(T):
                    for i in range(D // 2):
                        angle = way * (start + t) * 10000.0 ** (-2 * i / D)
                        a, b = x[:, :, t, i], x[:, :, t, i + D // 2]
                        y[:, :, t, i] = a * np.cos(angle) - b * np.sin(angle)
                        y[:, :, t, i + D // 2] = a * np.sin(angle) + b * np.cos(angle)
                return y

            def hunt_rotation(rotate):
                fits = {1: True, -1: True}
                for start in (2, 257, 4999):
                    for T in (3, 1):
                        x = np.sin(np.arange(160 * T) ** 2).reshape(2, 8, T, 10)
                        q, k, v = x[:, :4], x[:, 4:6], x[:, 6:]
                        q2, k2, v2 = rotate(q.copy(), k.copy(), v.copy(), start)
                        for way in fits:
                            good = np.abs(q2 - reference(q, start, way)).max() < 0.02
                            fits[way] &= bool(good and np.abs(k2 - reference(k, start, way)).max() < 0.02)
                        assert np.abs(v2 - v).max() < 1e-5
                assert any(fits.values())
        """,
        "by properties: start and T do not matter, only the position; and one token by hand": """
            def hunt_rotation(rotate):
                x = np.sin(np.arange(96) ** 2).reshape(2, 2, 6, 4)
                for start in (0, 501, 4990):
                    whole = rotate(x, x, x, start)
                    for T in (1, 2, 5):
                        for t in range(0, 6 - T + 1, 2):
                            part = rotate(x[:, :, t : t + T], x[:, :, t : t + T], x[:, :, t : t + T], start + t)
                            for a, b in zip(part, whole):
                                assert np.allclose(a, b[:, :, t : t + T], atol=0.01)
                    # All tokens alike: q of the next one is turned against k of this one as everywhere.
                    same = np.ones((2, 2, 6, 4)) * x[:1, :1, :1]
                    q, k, v = rotate(same, same, same, start)
                    assert np.allclose(v, same) and np.allclose(q, k, atol=1e-5)
                    z = q[..., :2] + 1j * q[..., 2:]
                    z0 = same[..., :2] + 1j * same[..., 2:]
                    steps = np.arange(start, start + 6)[:, None] * np.array([1.0, 0.01])
                    ccw, cw = np.allclose(z, z0 * np.exp(1j * steps), atol=0.01), np.allclose(z, z0 * np.exp(-1j * steps), atol=0.01)
                    if start == 0:
                        first = ccw
                    assert (ccw if first else cw)
        """,
    },
    "to_halves": {
        "reshape and transpose, as Hugging Face's converter": """
            def to_halves(weight, n_head, n_kv_head, r):
                heads = n_head + 2 * n_kv_head
                w = weight.reshape(heads, len(weight) // heads, -1)
                qk = n_head + n_kv_head
                front = w[:qk, :r].reshape(qk, r // 2, 2, -1).swapaxes(1, 2).reshape(qk, r, -1)
                y = w.copy()
                y[:qk, :r] = front
                return y.reshape(weight.shape)
        """,
        "row by row": """
            def to_halves(weight, n_head, n_kv_head, r):
                D = weight.shape[0] // (n_head + n_kv_head + n_kv_head)
                y = weight.copy()
                for head in range(n_head + n_kv_head):
                    for i in range(r // 2):
                        y[head * D + i] = weight[head * D + 2 * i]
                        y[head * D + i + r // 2] = weight[head * D + 2 * i + 1]
                return y
        """,
        "three parts, put together again": """
            import torch

            def halves(w, heads, r):
                w = w.unflatten(0, (heads, -1))
                return torch.cat((w[:, 0:r:2], w[:, 1:r:2], w[:, r:]), dim=1).flatten(0, 1)

            def to_halves(weight, n_head, n_kv_head, r):
                w = torch.from_numpy(weight)
                D = len(w) // (n_head + 2 * n_kv_head)
                q, k, v = w.split([n_head * D, n_kv_head * D, n_kv_head * D])
                return torch.cat((halves(q, n_head, r), halves(k, n_kv_head, r), v)).numpy()
        """,
        "a matrix of zeros and ones": """
            def to_halves(weight, n_head, n_kv_head, r):
                D = len(weight) // (n_head + 2 * n_kv_head)
                swap = np.zeros((D, D), dtype=int)
                for d in range(D):
                    swap[d // 2 + (d % 2) * (r // 2) if d < r else d, d] = 1
                rows = swap @ np.arange(D)
                picks = [h * D + rows for h in range(n_head + n_kv_head)]
                return np.take(weight, np.append(np.concatenate(picks), np.arange(len(picks) * D, len(weight))), axis=0)
        """,
    },
    "ntk_base": {
        "a loop": """
            def ntk_base(head_dim, base, trained, factor):
                if trained < 2 * math.pi:
                    raise ValueError("pair 0 cannot be slowed down")
                for i in range(1, head_dim // 2):
                    if trained * base ** (-2 * i / head_dim) < 2 * math.pi:
                        return base * factor ** (head_dim / 2 / i)
                return base
        """,
        "the largest base that any pair asks for": """
            def ntk_base(head_dim, base, trained, factor):
                asked = [base]
                for i in range(head_dim // 2):
                    f = 1 / base ** (2 * i / head_dim)
                    if trained * f / (2 * math.pi) < 1:
                        if i == 0:
                            raise ValueError
                        asked.append((f / factor) ** (-head_dim / (2 * i)))
                return max(asked)
        """,
        "by logarithms, with the first pair from a formula": """
            def ntk_base(head_dim, base, trained, factor):
                turns = trained / (2 * np.pi)
                if turns < 1:
                    raise ValueError(f"only {turns} turns")
                i = math.floor(head_dim * math.log(turns) / (2 * math.log(base))) + 1
                if i >= head_dim / 2:
                    return base
                return math.exp(math.log(base) + math.log(factor) * head_dim / (2 * i))
        """,
        "halving an interval": """
            def ntk_base(head_dim, base, trained, factor):
                f = lambda b: b ** (-np.arange(0, head_dim, 2) / head_dim)
                slow = trained * f(base) < 2 * np.pi
                if slow[0]:
                    raise ValueError("pair 0 makes less than a turn")
                enough = lambda log: bool((f(math.exp(log))[slow] <= f(base)[slow] / factor).all())
                low, high = math.log(base), math.log(base) + head_dim * math.log(factor)
                if enough(low):
                    return base
                for _ in range(200):
                    middle = (low + high) / 2
                    low, high = (low, middle) if enough(middle) else (middle, high)
                return math.exp(high)
        """,
    },
    "hunt_yarn": {
        "pair by pair, between two bounds": """
            def hunt_yarn(tables):
                for D, base, trained, factor in ((32, 10000.0, 1024, 3.0), (8, 500.0, 2048, 16.0), (64, 1e6, 4096, 2.0)):
                    scale = 1 + math.log(factor) / 10
                    cos, sin = tables(np.arange(3), D, base, trained, factor)
                    assert cos.shape == (3, D // 2)
                    before = 1.0
                    for i in range(D // 2):
                        f = base ** (-2 * i / D)
                        turns = trained * f / 2 / math.pi
                        assert abs(cos[0, i] - scale) < 1e-4 and abs(sin[0, i]) < 1e-4
                        assert abs(math.hypot(cos[1, i], sin[1, i]) - scale) < 1e-4
                        ratio = math.atan2(sin[1, i], cos[1, i]) / f
                        if turns > 32:
                            assert abs(ratio - 1) < 1e-3
                        elif turns < 1:
                            assert abs(ratio - 1 / factor) < 1e-3
                        else:
                            assert 1 / factor + 1e-5 < ratio < 1 - 1e-5 and ratio < before + 1e-5
                        before = ratio
                    angles = np.arctan2(sin[1], cos[1])
                    for m in (10000, 5):
                        c, s = tables(np.array([m]), D, base, trained, factor)
                        assert abs(c - scale * np.cos(m * angles)).max() < 0.02
                        assert abs(s - scale * np.sin(m * angles)).max() < 0.02
        """,
        "complex numbers": """
            def hunt_yarn(tables):
                models = [(64, 10000.0, 2048, 8.0), (16, 1000.0, 20000, 4.0), (48, 500000.0, 512, 1.5)]
                for D, base, trained, s in models:
                    m = np.array([1, 300, 0, 9876])
                    cos, sin = tables(m, D, base, trained, s)
                    z = np.asarray(cos, complex) + 1j * sin
                    assert np.allclose(abs(z), 0.1 * np.log(s) + 1, atol=1e-4)
                    f = base ** (-2 * np.arange(D // 2) / D)
                    g = np.angle(z[0])
                    assert np.allclose(z / abs(z), np.exp(1j * m[:, None] * g), atol=0.02)
                    wave = 2 * np.pi / f
                    fast, slow = trained / wave > 32, trained / wave < 1
                    ok = np.where(fast, np.isclose(g, f, rtol=1e-4), np.where(slow, np.isclose(g, f / s, rtol=1e-4), False))
                    mid = ~fast & ~slow
                    ok |= mid & (g < f * (1 - 1e-5)) & (g > f / s * (1 + 1e-5))
                    assert ok.all(), (D, base, trained, s)
                    assert (np.diff((g / f)[mid]) < 1e-6).all()
        """,
        "both ramps as bounds is not needed: the ends, the order, and short texts": """
            def hunt_yarn(tables):
                def spectrum(positions, *model):
                    cos, sin = tables(np.asarray(positions), *model)
                    size = np.sqrt(cos**2 + sin**2)
                    assert np.allclose(size, 0.1 * math.log(model[3]) + 1, atol=1e-3)
                    return cos, sin

                for model in ((128, 10000.0, 4096, 4.0), (16, 500.0, 8000, 4.0)):
                    D, base, trained, s = model
                    cos, sin = spectrum([1], *model)
                    now = np.arctan2(sin[0], cos[0])
                    for positions in ([2, 1], [trained - 1, 0], [trained, 9999], [9999]):
                        cos, sin = spectrum(positions, *model)
                        for row, m in enumerate(positions):
                            assert np.allclose(cos[row], (0.1 * math.log(s) + 1) * np.cos(now * m), atol=0.03)
                            assert np.allclose(sin[row], (0.1 * math.log(s) + 1) * np.sin(now * m), atol=0.03)
                    old = np.array([base ** (-2 * i / D) for i in range(D // 2)])
                    turns = old * trained / (2 * math.pi)
                    assert np.allclose(now[turns > 32], old[turns > 32], rtol=1e-3)
                    assert np.allclose(now[turns < 1], old[turns < 1] / s, rtol=1e-3)
                    share = (1 - now / old) / (1 - 1 / s)
                    inside = share[(turns <= 32) & (turns >= 1)]
                    assert inside.min() > 1e-4 and inside.max() < 1 - 1e-4 and (np.diff(inside) > 0).all()
        """,
    },
}


def first(**changed):
    """A way to write rotate_first, with something changed."""
    part = {
        "f": "base ** (-np.arange(0, r, 2) / r)",
        "at": "positions",
        "a": "x[..., 0:r:2]",
        "b": "x[..., 1:r:2]",
        "one": "a * np.cos(angles) - b * np.sin(angles)",
        "two": "a * np.sin(angles) + b * np.cos(angles)",
        "angles": "angles",
        "y": "x.copy()",
        "to_a": "y[..., 0:r:2]",
        "to_b": "y[..., 1:r:2]",
        "result": "y",
    } | changed
    return f"""
        def rotate_first(x, positions, r, base):
            angles = np.outer({part["at"]}, {part["f"]})
            angles = {part["angles"]}
            a, b = {part["a"]}, {part["b"]}
            y = {part["y"]}
            {part["to_a"]} = {part["one"]}
            {part["to_b"]} = {part["two"]}
            return {part["result"]}
    """


def counting(
    known="(trained - 1) * f", lap="% (2 * np.pi)", new="angles > known", f="-np.arange(0, head_dim, 2)", **changed
):
    """A way to write new_angles, with something changed."""
    return f"""
        def new_angles(head_dim, trained, length, base):
            f = base ** ({f} / head_dim)
            angles = np.arange({changed.get("distances", "trained, length")})[:, None] * f {lap}
            known = {known}
            return {changed.get("result", f"({new}).sum(axis=0)")}
    """


def again(
    angles="now[..., None] * new - was[..., None] * old", first="k[..., :D // 2]", second="k[..., D // 2 :]", **changed
):
    """A way to write turn_again, with something changed."""
    return f"""
        def turn_again(k, was, now, old, new):
            D = k.shape[-1]
            angles = ({angles})[:, None]
            a, b = {first}, {second}
            one = a * np.cos(angles) - b * np.sin(angles)
            two = {changed.get("two", "a * np.sin(angles) + b * np.cos(angles)")}
            return {changed.get("result", "np.concatenate([one, two], axis=-1).astype(k.dtype)")}
    """


def rows(order="np.r_[0:r:2, 1:r:2, r:D]", heads="n_head + n_kv_head", **changed):
    """A way to write to_halves, with something changed."""
    return f"""
        def to_halves(weight, n_head, n_kv_head, r):
            D = {changed.get("D", "len(weight) // (n_head + 2 * n_kv_head)")}
            order, y = {order}, weight.copy()
            for h in range({heads}):
                y[h * D : (h + 1) * D] = {changed.get("what", "weight[h * D + order]")}
            return {changed.get("result", "y")}
    """


def stretched(result="base * factor ** (head_dim / (2 * i))", turns="trained * f / (2 * math.pi)", **changed):
    """A way to write ntk_base, with something changed."""
    return f"""
        def ntk_base(head_dim, base, trained, factor):
            f = [base ** (-2 * i / head_dim) for i in range(head_dim // 2)]
            slow = [i for i, f in enumerate(f) if {turns} < 1]
            if not slow:
                return {changed.get("nothing", "base")}
            if {changed.get("refused", "slow[0] == 0")}:
                raise {changed.get("error", "ValueError")}
            i = {changed.get("i", "slow[0]")}
            return {result}
    """


def hunting(
    starts="((0, 4), (9, 4), (9, 1), (300, 4), (5000, 4))", ways="[1, -1]", compared="(q, k), (q2, k2)", **changed
):
    """A way to write hunt_rotation, with something changed."""
    return f"""
        def hunt_rotation(rotate):
            numbers = lambda *shape: np.sin(np.arange(1.0, math.prod(shape) + 1) ** 2).reshape(shape)
            D, ways = {changed.get("D", 6)}, {ways}
            f = 10000.0 ** (-np.arange(0, D, 2) / D)
            points = lambda x: x[..., : D // 2] + 1j * x[..., D // 2 :]
            for start, T in {starts}:
                q, k, v = (numbers({changed.get("B", 2)}, heads, T, D) for heads in ({changed.get("H", 4)}, {changed.get("H_kv", 2)}, {changed.get("H_kv", 2)}))
                q2, k2, v2 = rotate(q, k, v, start)
                {changed.get("values", "assert np.allclose(v2, v, atol=1e-5)")}
                turn = np.exp(1j * np.outer(np.arange(start, start + T), f))
                for x, y in zip({compared}):
                    ways = [way for way in ways if np.allclose(points(y), points(x) * turn**way, atol={changed.get("atol", 0.01)})]
                {changed.get("last", "assert ways")}
    """


MODELS = "(64, 10000.0, 2048, 4.0), (32, 500000.0, 300, 2.0), (16, 500.0, 8192, 8.0)"


def yarn_hunt(models=MODELS, far="[9000, 7, trained + 5]", near="[1]", **changed):
    """A way to write hunt_yarn, with something changed."""
    return f"""
        def hunt_yarn(tables):
            for D, base, trained, factor in ({models},):
                f = base ** (-np.arange(0, D, 2) / D)
                turns = {changed.get("turns", "trained * f / (2 * np.pi)")}
                cos, sin = tables(np.array({near}), D, base, trained, factor)
                now = np.arctan2(sin, cos)[0]
                left = now / f
                {changed.get("fast", "assert np.allclose(left[turns > 32], 1, atol=1e-3)")}
                {changed.get("slow", "assert np.allclose(left[turns < 1], 1 / factor, atol=1e-3)")}
                between = left[(turns >= 1) & (turns <= 32)]
                {changed.get("between", "assert (between < 1 - 1e-4).all() and (between > 1 / factor + 1e-4).all()")}
                {changed.get("order", "assert (np.diff(left) < 1e-4).all()")}
                positions = np.array({far})
                cos, sin = tables(positions, D, base, trained, factor)
                size = {changed.get("size", "0.1 * np.log(factor) + 1")}
                {changed.get("tables", "assert np.allclose(cos + 1j * sin, size * np.exp(1j * np.outer(positions, now)), atol=0.02)")}
    """


# {exercise: {misconception: (what the message must say, the answer)}}
WRONG = {
    "rotate_first": {
        "half-split pairs, as in GPT-NeoX": (
            "asked for are neighbours, 2i and 2i + 1",
            first(a="x[..., : r // 2]", b="x[..., r // 2 : r]", to_a="y[..., : r // 2]", to_b="y[..., r // 2 : r]"),
        ),
        "frequencies of the whole head (pie-project/pie issue 602)": (
            "the frequencies are those of all D channels",
            first(f="base ** (-np.arange(0, r, 2) / x.shape[-1])"),
        ),
        "all channels (AI-Hypercomputer/maxtext pull request 4615)": (
            "all channels are turned",
            """
            def rotate_first(x, positions, r, base):
                D = x.shape[-1] // 2 * 2
                angles = np.outer(positions, base ** (-np.arange(0, D, 2) / D))
                z = (x[..., 0:D:2] + 1j * x[..., 1:D:2]) * np.exp(1j * angles)
                return np.stack([z.real, z.imag], axis=-1).reshape(*x.shape[:3], D).astype(x.dtype)
            """,
        ),
        "the last channels": (
            "the last r channels are turned",
            first(a="x[..., -r::2]", b="x[..., 1 - r :: 2]", to_a="y[..., -r::2]", to_b="y[..., 1 - r :: 2]"),
        ),
        "i/r": ("the exponent is -i/r", first(f="base ** (-np.arange(r // 2) / r)")),
        "a 2 too many": ("the exponent is -4i/r", first(f="base ** (-2 * np.arange(0, r, 2) / r)")),
        "a positive exponent": ("the exponent is negative", first(f="base ** (np.arange(0, r, 2) / r)")),
        "from the slow pairs on": (
            "the fast pairs are the last ones",
            first(f="base ** (-np.arange(0, r, 2) / r)[::-1]"),
        ),
        "one frequency": ("all pairs turn alike", first(f="np.ones(r // 2)")),
        "base 10000": ("the base is 10000", first(f="10000.0 ** (-np.arange(0, r, 2) / r)")),
        "clockwise": (
            "it turns clockwise",
            first(one="a * np.cos(angles) + b * np.sin(angles)", two="b * np.cos(angles) - a * np.sin(angles)"),
        ),
        "from 0 on (huggingface/transformers pull request 22416)": (
            "tokens are taken to stand at 0, 1, 2",
            first(at="np.arange(x.shape[2])"),
        ),
        "side by side": (
            "tokens are taken to stand side by side",
            first(at="np.arange(positions[0], positions[0] + len(positions))"),
        ),
        "from 1 on": ("positions count from 0", first(at="positions + 1")),
        "degrees": ("the angles are taken for degrees", first(angles="np.deg2rad(angles)")),
        "turns": ("they are radians, not turns", first(angles="2 * np.pi * angles")),
        "zeros": ("the channels that do not rotate are 0", first(y="np.zeros_like(x)")),
        "two halves, not woven again": (
            "the turned channels come out as two halves",
            first(to_a="y[..., : r // 2]", to_b="y[..., r // 2 : r]"),
        ),
        "views of what is written": (
            "is computed from the new first one",
            first(y="x.copy()", a="x[..., 0:r:2]", two="y[..., 0:r:2] * np.sin(angles) + b * np.cos(angles)"),
        ),
        "in place": ("changes its argument `x` in place", first(y="x")),
        "cos and sin of half-split pairs (facebookresearch/vjepa2 pull request 15)": (
            "cos and sin are in the order of half-split pairs",
            """
            def rotate_first(x, positions, r, base):
                angles = np.tile(np.outer(positions, base ** (-np.arange(0, r, 2) / r)), 2)
                front = x[..., :r]
                other = np.stack([-front[..., 1::2], front[..., ::2]], axis=-1).reshape(front.shape)
                front = front * np.cos(angles) + other * np.sin(angles)
                return np.concatenate([front.astype(x.dtype), x[..., r:]], axis=-1)
            """,
        ),
        "halves exchanged (raiyanyahya/how-to-train-your-gpt issue 6)": (
            "but the copy for sin has its halves exchanged",
            """
            def rotate_first(x, positions, r, base):
                angles = np.repeat(np.outer(positions, base ** (-np.arange(0, r, 2) / r)), 2, axis=1)
                front = x[..., :r]
                other = np.concatenate([-front[..., r // 2 :], front[..., : r // 2]], axis=-1)
                front = front * np.cos(angles) + other * np.sin(angles)
                return np.concatenate([front.astype(x.dtype), x[..., r:]], axis=-1)
            """,
        ),
        "from the first position on": ("it need not be 0", first(at="positions - positions[0]")),
        "not a rotation": ("a turn keeps the length", first(two="b * np.cos(angles) - a * np.sin(angles)")),
        "ones": ("the channels from r on have changed", first(y="np.ones_like(x)")),
        "float64": ("float32 in, float64 out", first(y="x.astype(np.float64)")),
        "float32 angles": ("float32 leaves out all that is below 1/250", first(angles="angles.astype(x.dtype)")),
        "angles always in float32": ("right to a few digits only", first(angles="angles.astype(np.float32)")),
        "only the rotated part": ("should have shape", first(result="y[..., :r]")),
        "the heads' axis": (
            "could not be broadcast",
            first(angles="angles[:, None]"),
        ),
    },
    "new_angles": {
        "no turns taken off": ("every distance counts as new", counting(lap="")),
        "one too far": ("not `trained`", counting(known="trained * f")),
        "one distance too many": ("not `length`", counting(distances="trained, length + 1")),
        "one distance too few": ("not length - 2", counting(distances="trained, length - 1")),
        "the known ones": ("these are the distances with known angles", counting(new="angles <= known")),
        "what is known is taken modulo, too": (
            "take no turns off what it knows",
            counting(known="(trained - 1) * f % (2 * np.pi)"),
        ),
        "all distances of slow pairs": (
            "after a full turn it knows angles again",
            counting(result="np.where(known < 2 * np.pi, length - trained, 0)"),
        ),
        "pi": ("a full turn is 2 pi, not pi", counting(lap="% np.pi")),
        "1": ("a full turn is 2 pi, not 1", counting(lap="% 1")),
        "360": ("a full turn is 2 pi, not 360", counting(lap="% 360")),
        "i/D": ("the exponent is -i/head_dim", counting(f="-np.arange(head_dim // 2)")),
        "a 2 too many": ("the exponent is -4i/head_dim", counting(f="-2 * np.arange(0, head_dim, 2)")),
        "rising": ("from the slow pairs to the fast ones", counting(result="(angles > known).sum(axis=0)[::-1]")),
        "turns of whole tokens": (
            "a full turn need not take a whole number of tokens",
            """
            def new_angles(head_dim, trained, length, base):
                laps = (2 * np.pi * base ** (np.arange(0, head_dim, 2) / head_dim)).astype(int)
                return (np.arange(trained, length)[:, None] % laps > trained - 1).sum(axis=0)
            """,
        ),
        "a share": (
            "this is the share",
            counting(result="(angles > known).mean(axis=0) if length > trained else np.zeros(head_dim // 2)"),
        ),
        "floats": ("whole numbers, int64", counting(result="(angles > known).sum(axis=0).astype(float)")),
        "per distance": ("should have shape", counting(result="(angles > known).sum(axis=1)")),
        "a list": ("should be an array", counting(result="(angles > known).sum(axis=0).tolist()")),
        "every channel, not every pair": (
            "should have shape",
            counting(result="np.tile((angles > known).sum(axis=0), 2)"),
        ),
        "a table of all that training saw": (
            "every distance counts as new",
            """
            def new_angles(head_dim, trained, length, base):
                f = base ** (-np.arange(0, head_dim, 2) / head_dim)
                seen = np.round(np.arange(trained)[:, None] * f % (2 * np.pi), 6)
                now = np.round(np.arange(trained, length)[:, None] * f % (2 * np.pi), 6)
                return np.array([(~np.isin(now[:, i], seen[:, i])).sum() for i in range(head_dim // 2)])
            """,
        ),
    },
    "turn_again": {
        "the new angles on top": ("on top of the old ones", again("now[..., None] * new")),
        "only back": ("the new ones are not put on", again("-(was[..., None] * old)")),
        "the wrong way": ("turned the wrong way", again("was[..., None] * old - now[..., None] * new")),
        "both on": ("both angles are put on", again("now[..., None] * new + was[..., None] * old")),
        "the difference of positions, new": (
            "they were made with the old ones",
            again("(now - was)[..., None] * new"),
        ),
        "the difference of positions, old (huggingface/transformers issue 25104)": (
            "the new angles are made with the old frequencies",
            again("(now - was)[..., None] * old"),
        ),
        "the difference of frequencies, at first": (
            "the frequencies change at the old positions",
            again("was[..., None] * (new - old)"),
        ),
        "the difference of frequencies, now": (
            "the frequencies change at the new positions",
            again("now[..., None] * (new - old)"),
        ),
        "both differences": (
            "differences of positions are multiplied by differences",
            again("(now - was)[..., None] * (new - old)"),
        ),
        "crossed": ("but old and new are not", again("was[..., None] * new - now[..., None] * old")),
        "neighbours": (
            "pair i is the channels i and i + D/2",
            again(
                first="k[..., 0::2]",
                second="k[..., 1::2]",
                result="np.stack([one, two], axis=-1).reshape(k.shape).astype(k.dtype)",
            ),
        ),
        "the positions of the first row": (
            "all rows have the positions of the first one",
            again("now[:1, :, None] * new - was[:1, :, None] * old"),
        ),
        "nothing": ("the keys still have their old angles", again(result="k.copy()")),
        "neighbours in the result": (
            "they belong back into two halves",
            again(result="np.stack([one, two], axis=-1).reshape(k.shape).astype(k.dtype)"),
        ),
        "all keys of length 1": (
            "a turn keeps the length",
            again(
                first="k[..., :D // 2] / np.hypot(k[..., :D // 2], k[..., D // 2 :])",
                second="k[..., D // 2 :] / np.hypot(k[..., :D // 2], k[..., D // 2 :])",
            ),
        ),
        "one half after the other": (
            "is computed from the new first half",
            again(two="one * np.sin(angles) + b * np.cos(angles)"),
        ),
        "float64": ("float32 in, float64 out", again(result="np.concatenate([one, two], axis=-1)")),
        "float32 angles": (
            "float32 leaves out all that is below 1/250",
            again("(now[..., None] * new).astype(k.dtype) - (was[..., None] * old).astype(k.dtype)"),
        ),
        "always float32 angles": (
            "right to a few digits only",
            again("(now[..., None] * new - was[..., None] * old).astype(np.float32)"),
        ),
        "in place": (
            "changes its argument `k` in place",
            """
            def turn_again(k, was, now, old, new):
                a, b = np.split(k.copy(), 2, axis=-1)
                angles = (now[..., None] * new - was[..., None] * old)[:, None]
                k[..., : k.shape[-1] // 2] = a * np.cos(angles) - b * np.sin(angles)
                k[..., k.shape[-1] // 2 :] = a * np.sin(angles) + b * np.cos(angles)
                return k
            """,
        ),
        "no axis for the heads": (
            "could not be broadcast",
            """
            def turn_again(k, was, now, old, new):
                a, b = np.split(k, 2, axis=-1)
                angles = now[..., None] * new - was[..., None] * old
                one, two = a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)
                return np.concatenate([one, two], axis=-1).astype(k.dtype)
            """,
        ),
    },
    "hunt_rotation": {
        "only from 0 on": (
            "your test passes the version",
            hunting("((0, 5), (0, 1))"),
        ),
        "never from 0 on is enough, but one call is not": (
            "your test passes the version",
            hunting("((300, 4),)"),
        ),
        "single tokens only": (
            "try several tokens behind a cache",
            hunting("((0, 5), (9, 1), (300, 1), (5000, 1), (7, 1))"),
        ),
        "several tokens only": ("try T = 1 and start > 0", hunting("((0, 4), (9, 4), (301, 4), (5000, 4))")),
        "near positions only": (
            "your test passes the version with positions in bfloat16",
            hunting("((0, 4), (9, 4), (9, 1), (90, 4))"),
        ),
        "not far enough": (
            "your test passes the version whose table ends at position 1023",
            hunting("((0, 4), (9, 4), (9, 1), (301, 4))"),
        ),
        "never the same number of tokens": (
            "that keeps the tables of its first call",
            hunting("((0, 4), (9, 3), (9, 1), (300, 5), (5000, 6))"),
        ),
        "values are not looked at": ("turns the values, too", hunting(values="pass")),
        "keys are not looked at": ("your test passes the version", hunting(compared="(q,), (q2,)")),
        "queries are not looked at": (
            "your test passes the version in which keys are placed right, and queries",
            hunting(compared="(k,), (k2,)"),
        ),
        "counter-clockwise only": (
            "your test fails a version that turns clockwise, which is correct",
            hunting(ways="[1]"),
        ),
        "each call may choose": (
            "that turns single tokens the other way",
            hunting(ways="[]", last="assert len(ways) > 0")
            .replace("for start, T in", "for start, T in")
            .replace("q2, k2, v2 = rotate", "ways = [1, -1]; q2, k2, v2 = rotate"),
        ),
        "too exact": ("your test fails a version that computes in float32, which is correct", hunting(atol=1e-6)),
        "too coarse": ("your test passes the version", hunting(atol=3.0)),
        "scores only": (
            "your test passes the version",
            """
            def hunt_rotation(rotate):
                q, k, v = np.sin(np.arange(288) ** 2).reshape(3, 2, 2, 4, 6)
                scores = []
                for start in (0, 100, 3000):
                    a, b, c = rotate(q, k, v, start)
                    assert np.allclose(c, v)
                    scores.append(a @ b.swapaxes(2, 3))
                    assert np.allclose(scores[0], scores[-1], atol=0.02)
            """,
        ),
        "lengths only": (
            "your test passes the version",
            """
            def hunt_rotation(rotate):
                q, k, v = np.sin(np.arange(288) ** 2).reshape(3, 2, 2, 4, 6)
                a, b, c = rotate(q, k, v, 300)
                assert np.allclose(np.linalg.norm(a, axis=-1), np.linalg.norm(q, axis=-1), atol=1e-4)
                assert np.allclose(c, v)
            """,
        ),
        "one pair": ("your test passes the version", hunting(D=2)),
        "neighbours are taken for right": (
            "your test fails",
            hunting().replace("x[..., : D // 2] + 1j * x[..., D // 2 :]", "x[..., 0::2] + 1j * x[..., 1::2]"),
        ),
        "forgets to assert": ("your test passes the version", hunting(last="ways")),
        "returns what it should assert": (
            "nobody looks at it, only `assert` counts",
            hunting(last="pass") + "            return bool(ways)\n",
        ),
        "a list of positions": (
            "your test fails",
            hunting().replace("rotate(q, k, v, start)", "rotate(q, k, v, [start] * T)"),
        ),
    },
    "to_halves": {
        "nothing": ("nothing is moved", rows(heads="0")),
        "the way back": ("this is the way back", rows(order="np.argsort(np.r_[0:r:2, 1:r:2, r:D])")),
        "v, too": ("v is reordered, too", rows(heads="n_head + 2 * n_kv_head")),
        "q alone": ("k stays as it is", rows(heads="n_head")),
        "k alone": ("q stays as it is", rows(heads="n_head, n_head + n_kv_head")),
        "q and v": (
            "v is reordered in place of k",
            rows().replace(
                "for h in range(n_head + n_kv_head)",
                "for h in [*range(n_head), *range(n_head + n_kv_head, n_head + 2 * n_kv_head)]",
            ),
        ),
        "k in n_head pieces (ggml-org/llama.cpp pull request 3364, huggingface/transformers issue 31766)": (
            "k is cut into as many heads as q has",
            """
            def to_halves(weight, n_head, n_kv_head, r):
                D = len(weight) // (n_head + 2 * n_kv_head)
                y = weight.copy()
                for start, stop in ((0, n_head * D), (n_head * D, (n_head + n_kv_head) * D)):
                    part = weight[start:stop].reshape(n_head, (stop - start) // n_head, -1)
                    part = np.concatenate([part[:, 0:r:2], part[:, 1:r:2], part[:, r:]], axis=1)
                    y[start:stop] = part.reshape(y[start:stop].shape)
                return y
            """,
        ),
        "the whole head": ("all D channels of a head are reordered", rows(order="np.r_[0:D:2, 1:D:2]")),
        "the last channels": (
            "the last r channels of a head are reordered",
            rows(order="np.r_[0 : D - r, D - r : D : 2, D - r + 1 : D : 2]"),
        ),
        "odd ones first": ("odd channels come first", rows(order="np.r_[1:r:2, 0:r:2, r:D]")),
        "q and k as one head each": (
            "q and k are reordered as if each were one head",
            """
            def to_halves(weight, n_head, n_kv_head, r):
                D = len(weight) // (n_head + 2 * n_kv_head)
                q, k, v = np.split(weight, [n_head * D, (n_head + n_kv_head) * D])
                return np.concatenate([q[0::2], q[1::2], k[0::2], k[1::2], v])
            """,
        ),
        "columns": (
            "the columns are reordered",
            "def to_halves(weight, n_head, n_kv_head, r):\n    return np.concatenate([weight[:, 0::2], weight[:, 1::2]], axis=1)\n",
        ),
        "only matrices, no biases (vllm-project/vllm pull request 55335)": (
            "IndexError",
            rows(what="weight[h * D + order, :]"),
        ),
        "written over while it is read": (
            "rows are lost, or changed, or there twice",
            """
            def to_halves(weight, n_head, n_kv_head, r):
                D = len(weight) // (n_head + 2 * n_kv_head)
                y = weight.copy()
                for h in range(n_head + n_kv_head):
                    for i in range(r // 2):
                        y[h * D + i], y[h * D + i + r // 2] = y[h * D + 2 * i], y[h * D + 2 * i + 1]
                return y
            """,
        ),
        "in place": (
            "changes its argument `weight` in place",
            rows().replace("weight.copy()", "weight").replace("weight[h * D + order]", "weight[h * D + order].copy()"),
        ),
        "a third each": (
            "are taken for a third of the rows each",
            """
            def to_halves(weight, n_head, n_kv_head, r):
                q, k, v = np.split(weight, 3)
                out = []
                for part, heads in ((q, n_head), (k, n_kv_head)):
                    part = part.reshape(heads, len(part) // heads, -1)
                    part = np.concatenate([part[:, 0:r:2], part[:, 1:r:2], part[:, r:]], axis=1)
                    out.append(part.reshape(q.shape))
                return np.concatenate([*out, v])
            """,
        ),
        "three parts": (
            "should be an array, not a tuple",
            rows(result="np.split(y, [n_head * D, (n_head + n_kv_head) * D])[0], y, y"),
        ),
        "float32": ("should be float64, not float32", rows(result="y.astype(np.float32)")),
        "q, k and v of a group together": (
            "each key head is taken to lie behind its own queries",
            """
            def to_halves(weight, n_head, n_kv_head, r):
                D, group = len(weight) // (n_head + 2 * n_kv_head), n_head // n_kv_head
                y = weight.reshape(n_kv_head, group + 2, D, -1).copy()
                y[:, : group + 1] = y[:, : group + 1][:, :, np.r_[0:r:2, 1:r:2, r:D]]
                return y.reshape(weight.shape)
            """,
        ),
        "as many heads of k and v as of q": (
            "so D is another number",
            rows(D="len(weight) // (3 * n_head)", heads="2 * n_head"),
        ),
        "heads and channels": ("should have shape", rows(result="y.reshape(-1, D, *weight.shape[1:])")),
    },
    "ntk_base": {
        "bloc97's rule": (
            "this base slows the last pair by the factor",
            stretched("base * factor ** (head_dim / (head_dim - 2))"),
        ),
        "the base times the factor": ("this base is `factor` times the old one", stretched("base * factor")),
        "nothing": ("this base divides no pair at all", stretched("base")),
        "the second slow pair": ("but the first one asks for more", stretched(i="slow[0] + 1")),
        "the last fast pair": ("which needs nothing", stretched(i="max(slow[0] - 1, 1)")),
        "the last slow pair": ("this base slows the last pair by the factor", stretched(i="slow[-1]")),
        "D/i": ("the exponent is D/i", stretched("base * factor ** (head_dim / i)")),
        "the exponent upside down": ("the exponent is 2i/D", stretched("base * factor ** (2 * i / head_dim)")),
        "only the ratio": ("the old base is missing", stretched("factor ** (head_dim / (2 * i))")),
        "a smaller base": ("a smaller base makes the pairs faster", stretched("base / factor ** (head_dim / (2 * i))")),
        "between two pairs": (
            "it slows a pair between two pairs",
            stretched(
                "base * factor ** (head_dim / (2 * i))",
                i="head_dim * math.log(trained / (2 * math.pi)) / (2 * math.log(base))",
            ),
        ),
        "radians for turns": ("a turn is 2 pi, not 1", stretched(turns="trained * f")),
        "half turns": ("a turn is 2 pi, not pi", stretched(turns="trained * f / math.pi")),
        "turns in the long text": (
            "the turns are counted in the long text",
            stretched(turns="trained * factor * f / (2 * math.pi)"),
        ),
        "turns in a shorter text": (
            "the turns of a text `factor` times shorter",
            stretched(turns="trained / factor * f / (2 * math.pi)"),
        ),
        "the largest distance": (
            "which needs nothing",
            stretched(turns="(trained - 1) * f / (2 * math.pi)"),
        ),
        "half of what is needed": ("becomes slower by", stretched("base * (factor / 2) ** (head_dim / (2 * i))")),
        "more than is needed": ("a smaller base is enough", stretched("base * (2 * factor) ** (head_dim / (2 * i))")),
        "always something": (
            "the base may stay as it is",
            stretched(nothing="base * factor ** (head_dim / (head_dim - 2)) if head_dim > 2 else base * factor"),
        ),
        "no pair, no base": (
            "the base where every pair makes a full turn should be a number, not None",
            stretched(nothing="None"),
        ),
        "an error where nothing is to do": (
            "every pair may make a full turn",
            stretched().replace("return base\n", "raise ValueError\n"),
        ),
        "pair 0 is passed over": (
            "no base changes its frequency",
            stretched(refused="slow == [0]", i="max(slow[0], 1)"),
        ),
        "another error": ("which should raise ValueError", stretched(error="ZeroDivisionError")),
        "a whole number": ("becomes slower by", stretched("int(base * factor ** (head_dim / (2 * i)))")),
        "an array": (
            "should be a number, not an array",
            stretched("np.array([base * factor ** (head_dim / (2 * i))])"),
        ),
    },
    "hunt_yarn": {
        "fast pairs are not looked at": ("your test passes the version", yarn_hunt(fast="pass")),
        "slow pairs are not looked at": ("your test passes the version", yarn_hunt(slow="pass")),
        "the pairs in between are not looked at": (
            "your test passes the version",
            yarn_hunt(between="pass", order="pass"),
        ),
        "their order is not looked at": ("that, in between, divides the slower pairs by less", yarn_hunt(order="pass")),
        "only their order": ("your test passes the version", yarn_hunt(between="pass")),
        "no model with fast pairs only": (
            "try a model in which all pairs do",
            yarn_hunt("(64, 10000.0, 2048, 4.0), (32, 500000.0, 300, 2.0)"),
        ),
        "the factor is not looked at": (
            "your test passes the version",
            yarn_hunt(size="np.hypot(cos, sin)"),
        ),
        "short texts only": ("your test passes the version", yarn_hunt(far="[3, 1, 2]")),
        "positions in their order": (
            "that takes the positions to be 0, 1, 2",
            yarn_hunt(near="[0, 1]", far="range(2500)").replace("cos)[0]", "cos)[1]"),
        ),
        "long texts only": (
            "your test passes the version that changes nothing until a position lies beyond training",
            yarn_hunt(near="[1, 9999]", far="[9000, trained + 5]"),
        ),
        "the authors' ramp and no other": (
            "which is correct",
            """
            def hunt_yarn(tables):
                for D, base, trained, factor in ((64, 10000.0, 2048, 4.0), (16, 500.0, 8192, 8.0)):
                    f = base ** (-np.arange(0, D, 2) / D)
                    pair = lambda turns: D * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(base))
                    low, high = max(math.floor(pair(32)), 0), min(math.ceil(pair(1)), D - 1)
                    ramp = np.clip((np.arange(D // 2) - low) / (high - low), 0, 1)
                    angles = np.outer([1, 9000], f / factor * ramp + f * (1 - ramp))
                    cos, sin = tables(np.array([1, 9000]), D, base, trained, factor)
                    assert np.allclose(cos, np.cos(angles) * (0.1 * math.log(factor) + 1), atol=0.02)
                    assert np.allclose(sin, np.sin(angles) * (0.1 * math.log(factor) + 1), atol=0.02)
            """,
        ),
        "the paper's ramp and no other": (
            "which is correct",
            yarn_hunt(
                between="assert np.allclose(between, 1 / factor + (1 - 1 / factor) * (turns[(turns >= 1) & (turns <= 32)] - 1) / 31)"
            ),
        ),
        "too exact": (
            "your test fails a version that computes in float32, which is correct",
            yarn_hunt().replace("atol=0.02", "atol=1e-7"),
        ),
        "radians for turns": ("which is correct", yarn_hunt(turns="trained * f")),
        "the ramp upside down is taken for right (Lightning-AI/litgpt pull request 2202)": (
            "which is correct",
            yarn_hunt()
            .replace("turns > 32]", "turns < 1]", 1)
            .replace("left[turns < 1], 1 / factor", "left[turns > 32], 1 / factor"),
        ),
        "cos and sin of the long text alone": (
            "your test passes the version",
            """
            def hunt_yarn(tables):
                cos, sin = tables(np.arange(3), 64, 10000.0, 2048, 4.0)
                assert np.allclose(np.hypot(cos, sin), 0.1 * np.log(4) + 1, atol=1e-3)
                f = 10000.0 ** (-np.arange(0, 64, 2) / 64)
                assert np.allclose(np.arctan2(sin, cos)[1, 0], 1, atol=1e-3)
                assert np.allclose(np.arctan2(sin, cos)[1, -1], f[-1] / 4, atol=1e-6)
            """,
        ),
        "forgets to assert": (
            "your test passes the version",
            yarn_hunt(fast="pass", slow="pass", between="pass", order="pass", tables="pass"),
        ),
        "shapes": (
            "your test passes the version",
            """
            def hunt_yarn(tables):
                cos, sin = tables(np.arange(5), 16, 10000.0, 2048, 4.0)
                assert cos.shape == sin.shape == (5, 8)
            """,
        ),
        "an exception": (
            "your test crashes instead of saying `assert`",
            yarn_hunt().replace(
                "assert np.allclose(left[turns > 32], 1, atol=1e-3)",
                "1 / bool(np.allclose(left[turns > 32], 1, atol=1e-3))",
            ),
        ),
    },
}

# Mutants that compute the same.
EQUIVALENT = {
    "new_angles: angles > known -> angles >= known": "no two angles are equal: 2 pi is not a multiple of a frequency",
    "ntk_base: turns < 1 -> turns <= 1": "no pair makes exactly one turn: 2 pi is not a whole number of tokens",
}
