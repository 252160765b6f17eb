"""Replaces one piece of code inside a named function, found by its syntax tree and not by its text or its line."""

from __future__ import annotations

import ast
import copy
import re
from typing import Any

Bindings = dict[str, Any]
_MARK = "metavariable_"
_REST = "..."


def rewrite(source: str, function: str, old: str, new: str) -> str:
    """Source text of a module in which the one place of `function` that matches `old` reads `new`.

    Patterns are an expression or a single statement of Python. `$name` stands for any expression, the same one wherever
    the pattern repeats it; `...` as the last positional argument of a call stands for all further arguments of that
    call. So a pattern survives renamed local variables, moved lines, changed line breaks and comments. The result is
    printed from the syntax tree: its comments are gone.

    Args:
        source: text of the module.
        function: qualified name, such as `"apply_affine"` or `"Tally.add"`; methods and nested functions by dots.
        old: pattern that must match exactly once inside the function.
        new: replacement, of the same kind (expression or statement) as `old`.

    Raises:
        LookupError: there is no such function, or `old` does not match exactly once in it.
        SyntaxError: a pattern is not a single expression or statement.
    """
    tree = ast.parse(source)
    scope = find_function(tree, function)
    pattern, replacement = parse_pattern(old), parse_pattern(new)
    matches = [(node, found) for node in ast.walk(scope) if (found := match(pattern, node, {})) is not None]
    if len(matches) != 1:
        raise LookupError(f"{function} matches {len(matches)} times, not once: {old}")
    node, bindings = matches[0]
    changed = _Replacer(node, fill(replacement, bindings)).visit(tree)
    return ast.unparse(ast.fix_missing_locations(changed)) + "\n"


def find_function(tree: ast.Module, name: str) -> ast.AST:
    """The definition with a qualified name.

    Raises:
        LookupError: if the module has no such function.
    """
    scope: ast.AST = tree
    for part in name.split("."):
        found = [
            node
            for node in ast.walk(scope)
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part and node is not scope
        ]
        if not found:
            raise LookupError(f"There is no function {name}.")
        scope = found[0]  # `walk` goes breadth first: the outermost of that name
    return scope


def parse_pattern(text: str) -> ast.AST:
    """Syntax tree of a pattern: an expression if it is one, else its single statement."""
    marked = re.sub(r"\$(\w+)", rf"{_MARK}\1", text)
    try:
        return ast.parse(marked, mode="eval").body
    except SyntaxError:
        statements = ast.parse(marked).body
    if len(statements) != 1:
        raise SyntaxError(f"Not a single statement: {text}")
    return statements[0]


def match(pattern: Any, node: Any, bindings: Bindings) -> Bindings | None:
    """The bindings extended by what the metavariables of `pattern` stand for, `None` if `node` does not match."""
    if isinstance(pattern, ast.Name) and pattern.id.startswith(_MARK):
        if not isinstance(node, ast.expr):
            return None
        return _bind(pattern.id, node, bindings)
    if type(pattern) is not type(node):
        return None
    if isinstance(pattern, ast.Call) and _has_rest(pattern):
        return _match_call(pattern, node, bindings)
    if isinstance(pattern, list):
        return _match_all(pattern, node, bindings)
    if isinstance(pattern, ast.AST):
        fields = [name for name in pattern._fields if name not in ("ctx", "kind", "type_comment")]
        return _match_all([getattr(pattern, n) for n in fields], [getattr(node, n) for n in fields], bindings)
    return bindings if pattern == node else None


def _match_all(patterns: list[Any], nodes: list[Any], bindings: Bindings) -> Bindings | None:
    found: Bindings | None = bindings
    if len(patterns) != len(nodes):
        return None
    for pattern, node in zip(patterns, nodes, strict=True):
        if (found := match(pattern, node, found)) is None:
            return None
    return found


def _match_call(pattern: ast.Call, node: ast.Call, bindings: Bindings) -> Bindings | None:
    """Matches a call whose pattern ends in `...`: the named keywords may stand anywhere among the others."""
    wanted = {keyword.arg: keyword.value for keyword in pattern.keywords}
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if not wanted.keys() <= given.keys():
        return None
    first = pattern.args[:-1]
    named = [given[name] for name in wanted]
    found = _match_all(
        [pattern.func, *first, *wanted.values()], [node.func, *node.args[: len(first)], *named], bindings
    )
    if found is None:
        return None
    others = [keyword for keyword in node.keywords if keyword.arg not in wanted]
    return {**found, _REST: [*found.get(_REST, []), (node.args[len(first) :], others)]}


def _has_rest(call: ast.Call) -> bool:
    return bool(call.args) and isinstance(call.args[-1], ast.Constant) and call.args[-1].value is Ellipsis


def _bind(name: str, node: ast.expr, bindings: Bindings) -> Bindings | None:
    if name not in bindings:
        return {**bindings, name: node}
    return bindings if ast.unparse(bindings[name]) == ast.unparse(node) else None


def fill(replacement: ast.AST, bindings: Bindings) -> ast.AST:
    """A copy of a replacement pattern with its metavariables and its `...` filled in.

    Raises:
        LookupError: if it has a metavariable that the old pattern does not bind.
    """
    return _Filler(bindings).visit(copy.deepcopy(replacement))


class _Filler(ast.NodeTransformer):
    def __init__(self, bindings: Bindings):
        self.bindings = bindings

    def visit_Name(self, node: ast.Name) -> ast.AST:
        if not node.id.startswith(_MARK):
            return node
        if node.id not in self.bindings:
            raise LookupError(f"${node.id.removeprefix(_MARK)} is not bound.")
        return copy.deepcopy(self.bindings[node.id])

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if _has_rest(node) and _REST in self.bindings:
            if len(self.bindings[_REST]) > 1:
                raise LookupError("`...` stands for the arguments of several calls.")
            arguments, keywords = copy.deepcopy(self.bindings[_REST][0])
            node.args[-1:] = arguments
            node.keywords += keywords
        return node


class _Replacer(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST):
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)
