"""An output seen through the app: every row once, every column in every way that the page asks for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jobs.view.app import App
from pipeline.output.dataset import Output


def lines_of(out: str | Path, row_id: str) -> dict[str, str]:
    """The lines to copy of the row whose id ends so, by their titles."""
    output = Output.open(str(out))
    app = App({"run": output})
    ids = [name for table in output.tables(["id"]) for name in table["id"].to_pylist()]
    place = app.run("run").find_id(next(name for name in ids if name.endswith(row_id)))
    answer = app.answer("api/row", {"run": "run", "at": str(place)})
    assert answer is not None
    app.close()
    return {block["title"]: block["text"] for block in json.loads(answer.body)["lines"]}


def look_through(out: str | Path) -> None:
    """Compare ids, cells, counts and pictures of all rows with the tables themselves."""
    output = Output.open(str(out))
    stored = [row for table in output.tables() for row in table.to_pylist()]
    app = App({"run": output})

    def ask(path: str, **given: Any) -> Any:
        plain = {name: one if isinstance(one, str) else json.dumps(one) for name, one in given.items()}
        answer = app.answer(path, {"run": "run", **plain})
        assert answer is not None, path
        return json.loads(answer.body) if answer.type == "application/json" else answer.body

    (run,) = ask("api/runs")["runs"]
    columns = {column["name"]: column for column in run["columns"]}
    rows = ask("api/rows", columns=list(columns), limit=500)["rows"]
    assert [row["cells"]["id"] for row in rows] == [row["id"] for row in stored]
    for name, column in columns.items():
        there = [row[name] is not None for row in stored]
        assert ask("api/count", filters=[{"column": name, "op": "notnull"}])["rows"] == sum(there)
        for shown, row in zip(rows, stored, strict=True):
            if column["kind"] in ("text", "bool") or isinstance(row[name], int):
                assert shown["cells"][name] == row[name]
            if column["kind"] in ("image", "vector"):
                assert shown["cells"][name] == (row[name] is not None)
        if column["kind"] == "number":
            told = ask("api/histogram", column=name)
            assert told["rows"] + told["other"] == len(stored)
            assert sum(told["counts"]) == told["rows"]
        if column["kind"] == "text":
            distinct = {row[name] for row in stored}
            assert ask("api/values", column=name)["distinct"] == len(distinct)
        if column["kind"] in ("text", "number", "bool"):
            assert len(ask("api/rows", sort=name, limit=500)["rows"]) == len(stored)
        at = next((row["at"] for row, is_there in zip(rows, there, strict=True) if is_there), None)
        if at is not None and column["kind"] == "image":
            assert len(ask("picture", at=at, column=name)) > 50
        if at is not None and column["kind"] == "vector":
            assert ask("api/vector", at=at, column=name)["vector"]["size"] > 0
    for row in rows:
        told = ask("api/row", at=row["at"])
        assert told["cells"]["id"] == row["cells"]["id"]
        assert all(block["text"] for block in told["lines"])
    app.close()
