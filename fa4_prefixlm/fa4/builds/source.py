"""Facts read from the source text of an FA4 build. Nothing of it is imported.

Functions of the build that need nothing but their arguments are compiled and run by themselves (`run_alone`), which is
safer than to interpret their text.
"""

from __future__ import annotations
import __future__

import ast
import copy
import functools
from typing import Any


class UnknownError(Exception):
    """The source has no such function, or it needs more than its arguments."""


def parameters(source: str, function: str) -> frozenset[str]:
    """Names of a function's parameters; empty if there is no such function."""
    node = _function(source, function)
    return frozenset(argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)) if node else frozenset()


def class_fields(source: str, name: str) -> frozenset[str]:
    """Annotated fields of a class; empty if there is no such class."""
    for node in ast.walk(_parsed(source)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            return frozenset(
                item.target.id
                for item in node.body
                if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
            )
    return frozenset()


def run_alone(source: str, function: str, *arguments: object) -> Any:
    """Call a function of the source that needs nothing but its arguments and the builtins.

    Raises:
        UnknownError: there is no such function, or it needs more. Its other exceptions pass through.
    """
    node = _function(source, function)
    if node is None:
        raise UnknownError(f"no function {function}")
    bare = copy.copy(node)
    bare.decorator_list = []  # caches
    names: dict[str, Any] = {}
    flags = __future__.annotations.compiler_flag  # annotations stay text
    try:
        exec(compile(ast.Module([bare], []), f"<{function}>", "exec", flags=flags, dont_inherit=True), names)
        return names[function](*arguments)
    except (NameError, TypeError) as error:
        raise UnknownError(f"{function}: {error}") from error


def sm90_list_stride(source: str) -> str:
    """How the SM90 kernel makes `SeqlenInfoQK`: with its `tile_n` ("tile") or with the default of 128 ("128")."""
    found = set()
    for node in ast.walk(_parsed(source)):
        if isinstance(node, ast.Call) and any(_is_seqlen_create(part) for part in (node.func, *node.args)):
            found.add("tile" if any(keyword.arg == "tile_n" for keyword in node.keywords) else "128")
    return found.pop() if len(found) == 1 else "unknown"


def assigned_numbers(source: str, name: str) -> frozenset[int]:
    """The integers that the source assigns to a variable, either branch of a condition."""
    found: set[int] = set()
    for node in ast.walk(_parsed(source)):
        if isinstance(node, ast.Assign) and any(isinstance(own, ast.Name) and own.id == name for own in node.targets):
            value: ast.expr = node.value
            parts = (value.body, value.orelse) if isinstance(value, ast.IfExp) else (value,)
            found.update(own.value for own in parts if isinstance(own, ast.Constant) and isinstance(own.value, int))
    return frozenset(found)


@functools.lru_cache(maxsize=4)
def _parsed(source: str) -> ast.Module:
    """Parsed once: an interface has thousands of lines, and a dozen facts are read from it."""
    return ast.parse(source)


def _function(source: str, name: str) -> ast.FunctionDef | None:
    for node in ast.walk(_parsed(source)):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    return None


def _is_seqlen_create(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr == "create"
        and isinstance(node.value, ast.Name)
        and node.value.id == "SeqlenInfoQK"
    )
