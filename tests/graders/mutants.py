"""Automatic wrong answers: a solution with one small thing changed, for every small thing.

A grader that lets one through has a hole, unless the mutant computes the same (then exNN_name.py says why). An id names
the change by the code that is changed, "softmax: e / total -> e * total", so that it survives a shift of lines.
"""

import ast
import copy
import itertools

SWAPS = {
    **{ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult], ast.MatMult: [ast.Mult]},
    **{ast.Pow: [ast.Mult], ast.FloorDiv: [ast.Mult], ast.Mod: [ast.FloorDiv]},
    **{ast.LShift: [ast.RShift], ast.RShift: [ast.LShift], ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd]},
    **{ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE], ast.GtE: [ast.Gt, ast.Lt]},
    **{ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is]},
    **{ast.In: [ast.NotIn], ast.NotIn: [ast.In], ast.And: [ast.Or], ast.Or: [ast.And]},
}
PAIRS = ["max min", "argmax argmin", "maximum minimum", "sum mean", "zeros ones", "zeros_like ones_like", "triu tril"]
PAIRS += ["sin cos", "floor ceil", "any all", "append insert", "cumsum cumprod", "log exp", "stack concatenate"]
NAMES = dict(itertools.chain.from_iterable((pair.split(), pair.split()[::-1]) for pair in PAIRS))


def variants(node):
    """The expressions that may stand in the place of this one."""

    def with_(**fields):
        new = copy.deepcopy(node)
        for field, value in fields.items():
            setattr(new, field, value)
        return new

    if isinstance(node, ast.BinOp):
        yield from (with_(op=op()) for op in SWAPS.get(type(node.op), []))
    elif isinstance(node, ast.BoolOp):
        yield from (with_(op=op()) for op in SWAPS[type(node.op)])
    elif isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield from (with_(ops=[*node.ops[:i], new(), *node.ops[i + 1 :]]) for new in SWAPS[type(op)])
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield with_(value=not node.value)
        elif isinstance(node.value, int):
            yield from (with_(value=node.value + step) for step in (1, -1))
        elif isinstance(node.value, float):
            yield from (with_(value=value) for value in (node.value * 2, node.value + 1))
    elif isinstance(node, ast.Slice):
        for bound in ("lower", "upper"):
            if (at := getattr(node, bound)) is not None:
                yield with_(**{bound: None})
                for op in () if isinstance(at, ast.Constant) else (ast.Add(), ast.Sub()):
                    yield with_(**{bound: ast.BinOp(at, op, ast.Constant(1))})
    elif isinstance(node, ast.Call):
        if len(node.args) > 1 and not any(isinstance(arg, ast.Starred) for arg in node.args[:2]):
            yield with_(args=[node.args[1], node.args[0], *node.args[2:]])
        for i in range(len(node.keywords)):
            yield with_(keywords=node.keywords[:i] + node.keywords[i + 1 :])
    elif isinstance(node, ast.IfExp):
        yield with_(body=node.orelse, orelse=node.body)
    elif isinstance(node, ast.Name) and node.id in NAMES and isinstance(node.ctx, ast.Load):
        yield with_(id=NAMES[node.id])
    elif isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield with_(attr=NAMES[node.attr])


LEAVES = ast.Constant | ast.Name | ast.Attribute | ast.UnaryOp | ast.Slice | ast.keyword
FIXED = ast.JoinedStr | ast.expr_context | ast.operator | ast.cmpop | ast.boolop | ast.unaryop  # a message is free


def places(function):
    """(holder, field, index or None, shown): where each statement and expression stands that may be changed.

    `shown` is what an id shows of it: the smallest expression around it that says more than a number or a name.
    """
    first = 1 if ast.get_docstring(function) else 0
    todo = [(function, "body", i, None) for i in range(first, len(function.body))]
    if isinstance(function, ast.FunctionDef):
        for field in ("defaults", "kw_defaults"):
            todo += [(function.args, field, i, function.args) for i in range(len(getattr(function.args, field)))]
    for holder, field, i, shown in todo:
        node = get(holder, field, i)
        if node is None or isinstance(node, FIXED):
            continue
        shown = shown if shown is not None and isinstance(node, LEAVES) else node
        yield holder, field, i, shown
        if isinstance(node, ast.Raise) or isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "msg", "decorator_list"):
                continue
            if isinstance(value, list):
                start = 1 if name == "body" and isinstance(node, ast.FunctionDef) and ast.get_docstring(node) else 0
                todo += [(node, name, j, shown) for j in range(start, len(value)) if isinstance(value[j], ast.AST)]
            elif isinstance(value, ast.AST):
                todo.append((node, name, None, shown))


def short(node, length=100):
    text = " ".join(ast.unparse(node).split())
    return text if len(text) <= length else f"{text[: length - 33]}...{text[-30:]}"


def mutants(source, name, hunt=False):
    """{id: source} of all mutants of the function or class `name` and of the helpers that it uses in the file.

    Of a hunt, which is a test, only the assertions are taken out or turned round: with other inputs it is as good.
    """
    module = ast.parse(source)
    made, seen = {}, {ast.dump(module)}
    for function in functions(module, name):
        for holder, field, i, shown in list(places(function)):
            old = get(holder, field, i)
            before = short(shown)
            for new in changes(old, hunt):
                put(holder, field, i, new)
                text = (
                    f"drop {before}"
                    if isinstance(new, ast.Pass)
                    else f"{before} -> {short(shown if shown is not old else new)}"
                )
                changed = ast.unparse(module)
                put(holder, field, i, old)
                dump = compiled(changed)
                if dump is None or dump in seen:
                    continue
                seen.add(dump)
                key, n = f"{function.name}: {text}", 1
                while key in made:
                    n += 1
                    key = f"{function.name}: {text} ({n})"
                made[key] = changed
    return made


def get(holder, field, i):
    return getattr(holder, field) if i is None else getattr(holder, field)[i]


def put(holder, field, i, new):
    if i is None:
        setattr(holder, field, new)
    else:
        getattr(holder, field)[i] = new


def changes(node, hunt):
    """The nodes that may stand in the place of this statement or expression."""
    if isinstance(node, ast.stmt) and not isinstance(node, ast.Pass) and (not hunt or isinstance(node, ast.Assert)):
        yield ast.Pass()
    if isinstance(node, ast.Assert) or isinstance(node, ast.If | ast.While) and not hunt:
        new = copy.copy(node)
        new.test = ast.UnaryOp(ast.Not(), node.test)
        yield new
    if isinstance(node, ast.AugAssign) and not hunt:
        for op in SWAPS.get(type(node.op), []):
            new = copy.copy(node)
            new.op = op()
            yield new
    if isinstance(node, ast.expr | ast.Slice) and not hunt:
        yield from variants(node)


def compiled(source):
    """What the source means, or None where a mutant is not even Python."""
    try:
        tree = ast.parse(source)
        compile(tree, "mutant", "exec")
        return ast.dump(tree)
    except (SyntaxError, ValueError):
        return None


def functions(module, name):
    """The definition of `name`, then those of the helpers (no exercises themselves) that it mentions, and so on."""
    known = {node.name: node for node in module.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    order = [name]
    for each in order:
        names = [node.id for node in ast.walk(known[each]) if isinstance(node, ast.Name)]
        order += [
            other
            for other in dict.fromkeys(names)
            if other in known and other not in order and "Level " not in (ast.get_docstring(known[other]) or "")
        ]
    return [known[each] for each in order]
