"""Lines of code of each family, as a table: ``python -m tests.engine.families.lines``.

Blank lines, comments and docstrings don't count.
"""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

FAMILIES = Path(__file__).resolve().parents[3] / "engine" / "families"
_NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


def code_lines(source: str) -> int:
    """Count the lines of Python code that hold more than comments and docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None
        for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)
    }
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NO_CODE and token.string:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def folder_lines(folder: Path) -> int:
    """Count the lines of code of all modules in a folder."""
    return sum(code_lines(file.read_text()) for file in sorted(folder.rglob("*.py")))


def main() -> None:
    print("| folder of `engine/families/` | lines of code |\n|---|---|")
    for folder in sorted(path for path in FAMILIES.iterdir() if (path / "__init__.py").is_file()):
        print(f"| `{folder.name}` | {folder_lines(folder)} |")
    shared = sum(code_lines(file.read_text()) for file in FAMILIES.glob("*.py"))
    print(f"| modules beside the folders | {shared} |")


if __name__ == "__main__":
    main()
