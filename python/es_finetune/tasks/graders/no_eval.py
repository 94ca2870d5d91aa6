"""Keeps graders from running what a model wrote, in the worker process only.

reasoning-gym scores four datasets by `eval(answer)`: `__import__('os').system(...)` ran. `sympy.parse_expr`, which it
and math-verify call, is `eval` at heart, with every built-in function in reach. `restrict` takes that away. An audit
hook refuses what would reach outside in any case, for scorers that this file does not know of.

Imported by graders from the folder they lie in; it imports nothing of es_finetune.
"""

from __future__ import annotations

import ast
import sys

_VALUES = (
    ast.Expression,
    ast.Constant,
    ast.List,
    ast.Tuple,
    ast.Set,
    ast.Dict,
    ast.UnaryOp,
    ast.BinOp,
    ast.operator,
    ast.unaryop,
    ast.expr_context,
)
_FORMULAS = (*_VALUES, ast.Call, ast.keyword, ast.Compare, ast.cmpop)
_OUTSIDE = ("os.", "subprocess.", "socket.", "shutil.", "pty.", "signal.", "fcntl.")
_HARMLESS = {"os.listdir", "os.scandir"}  # an import looks into folders


def restrict(package: str | None = None) -> None:
    """From now on, in this process: `parse_expr` takes formulas alone, `eval` in the modules of `package` values alone,
    and nothing writes files, starts processes or opens connections."""
    from sympy.parsing import sympy_parser

    stringify = sympy_parser.stringify_expr

    def stringify_formula(text, local_dict, global_dict, transformations):
        code = stringify(text, local_dict, global_dict, transformations)
        _check_formula(code, local_dict or {}, global_dict)
        return code

    sympy_parser.stringify_expr = stringify_formula
    for name, module in list(sys.modules.items()):
        if package is not None and name.split(".")[0] == package:
            vars(module).update(eval=value, exec=_refuse)
    sys.dont_write_bytecode = True
    sys.addaudithook(_hook)


def value(text: str) -> object:
    """`eval` of numbers, texts and containers of them joined by operators: no names, calls or attributes. ValueError
    otherwise."""
    tree = ast.parse(text.strip(), mode="eval")
    for node in ast.walk(tree):
        if not isinstance(node, _VALUES):
            raise ValueError(f"{type(node).__name__} in an answer")
    return eval(compile(tree, "<answer>", "eval"), {"__builtins__": {}})


def _check_formula(code: str, local_dict: dict, global_dict: dict) -> None:
    """ValueError unless the Python code that sympy made of a text calls nothing but functions, symbols and numbers of
    sympy."""
    from sympy import Add, Basic, Function, Mul, Number, Pow, Symbol

    for node in ast.walk(ast.parse(code.strip(), mode="eval")):
        if isinstance(node, ast.Name):
            thing = local_dict.get(node.id, global_dict.get(node.id))
            # sqrt is a plain function. Integral and Derivative are none of these: either would be an answer that
            # repeats the question.
            known = (
                issubclass(thing, (Function, Symbol, Number, Add, Mul, Pow))
                if isinstance(thing, type)
                else isinstance(thing, Basic)
            )
            if not known and not str(getattr(thing, "__module__", "")).startswith("sympy.functions."):
                raise ValueError(f"the name {node.id!r} in an answer")
        elif not isinstance(node, _FORMULAS):
            raise ValueError(f"{type(node).__name__} in an answer")


def _refuse(*_):
    raise PermissionError("a grader runs no code")


def _hook(event: str, arguments: tuple) -> None:
    # The last two bits of the flags: 0 is O_RDONLY.
    writing = event == "open" and isinstance(arguments[2], int) and arguments[2] & 3
    if writing or (event.startswith(_OUTSIDE) and event not in _HARMLESS):
        raise PermissionError(f"a grader may not do {event}")
