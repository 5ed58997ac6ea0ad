"""The default corpus: the English that comes with every Python, so that a demonstration downloads nothing."""

from __future__ import annotations

import ast
import importlib
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

_SMALLEST = 100_000  # characters; a whole Python has some two million
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "idlelib", "lib2to3"}


def python_corpus() -> list[str]:
    """The documents of Python's own documentation on this machine: about 2 MB of English.

    They are the language reference that ``help()`` shows (``pydoc_data.topics``, a document a topic), then the
    docstrings of the standard library (a document a source file, read with ``ast``, not imported). The order is fixed
    and no text comes twice; another Python release has slightly other text. What a distribution has
    stripped is missing.

    Raises:
        ValueError: so much is stripped that less than 100,000 characters are left.
    """
    documents = list(dict.fromkeys([*_topics(), *_docstrings(Path(sysconfig.get_path("stdlib")))]))
    if (size := sum(map(len, documents))) < _SMALLEST:
        raise ValueError(
            f"this Python carries only {size:,} characters of documentation (of {_SMALLEST:,} at least); "
            "its distribution has stripped it: train on text files of your own"
        )
    return documents


def _topics() -> Iterator[str]:
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    for name in sorted(topics):
        yield topics[name]


def _docstrings(library: Path) -> Iterator[str]:
    """The docstrings of each source file in ``library``, joined by blank lines."""
    seen: set[str] = set()
    for path in _sources(library):
        new = [text for text in dict.fromkeys(_docstrings_of(path)) if text not in seen]
        seen.update(new)
        if new:
            yield "\n\n".join(new) + "\n"


def _sources(library: Path) -> list[Path]:
    files = []
    for folder, subfolders, names in os.walk(library):
        subfolders[:] = [name for name in subfolders if name not in _NOT_LIBRARY]
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files, key=lambda path: path.relative_to(library).parts)


def _docstrings_of(path: Path) -> list[str]:
    """The docstrings of a file, in the order of its lines; none if this Python cannot parse it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes such as "\d" in somebody else's source
            tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    return [text for node in _documented(tree) if (text := ast.get_docstring(node))]


def _documented(node: ast.AST) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """What can have a docstring in ``node``, in the order of its lines (``ast.walk`` would visit expressions too)."""
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        yield node
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):
        for statement in getattr(node, block, ()):
            yield from _documented(statement)
