"""Notebooks without Jupyter: their code cells run in order, in one process, and what they print is kept.

``python -m tests.support.notebooks notebooks/tour.ipynb`` runs a notebook in an empty folder and writes what its cells
print and show into it.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

Cell = dict[str, Any]


def cells(notebook: Path) -> list[Cell]:
    """The code cells, in order."""
    found: list[Cell] = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def run(code: list[Cell]) -> list[tuple[str, Any]]:
    """What each cell prints, and the value of its last line where that is an expression.

    Raises:
        Exception: Whatever a cell raises.
    """
    names: dict[str, Any] = {"__name__": "notebook"}
    results = []
    for number, cell in enumerate(code, 1):
        body = ast.parse("".join(cell["source"])).body
        last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(compile(ast.Module(body, []), f"cell {number}", "exec"), names)
            value = None
            if isinstance(last, ast.Expr):
                value = eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
        results.append((said.getvalue(), value))
    return results


def outputs(said: str, value: Any) -> list[Cell]:
    """As a notebook keeps them: what was printed, and a picture that the cell ends with."""
    from PIL import Image

    kept: list[Cell] = []
    if said:
        kept.append({"name": "stdout", "output_type": "stream", "text": said.splitlines(keepends=True)})
    if isinstance(value, Image.Image):
        encoded = io.BytesIO()
        value.save(encoded, "PNG", optimize=True)
        data = {"image/png": base64.b64encode(encoded.getvalue()).decode() + "\n", "text/plain": ["a picture"]}
        kept.append({"data": data, "execution_count": None, "metadata": {}, "output_type": "execute_result"})
    return kept


def main(path: Path) -> None:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for number, (cell, (said, value)) in enumerate(zip(code, run(code), strict=True), 1):
            cell["execution_count"] = number
            cell["outputs"] = outputs(said, value)
            for output in cell["outputs"]:
                if "execution_count" in output:
                    output["execution_count"] = number
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
