"""Lines to copy: how to load a row, and the card's own that draw its picture again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jobs.schema.registry import stored_job
from jobs.view.columns import literal

if TYPE_CHECKING:
    from jobs.view.run import Place, Run

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_ROWS = re.compile(r"^rows = load_dataset\(.*\)$", re.MULTILINE)
_ROW = re.compile(r'^row = next\(row for row in rows if row\["status"\] == "ok".*\)\n', re.MULTILINE)


def lines(run: Run, place: Place, row: Mapping[str, Any]) -> list[dict[str, str]]:
    """Blocks with a title each.

    Args:
        row: The row's plain cells.
    """
    part = next(part for part in run.parts if part.shard == place.shard)
    read = f"SELECT * FROM {literal(part.path)} WHERE id = {literal(str(row['id']))}"
    blocks = [{"title": "This row in DuckDB", "text": f"import duckdb\n\nrow = duckdb.sql({_python(read)})"}]
    if run.status.state != "complete":
        return blocks  # `datasets` reads what is published
    load = _loading(run, place, row)
    blocks.insert(0, {"title": "This row in datasets", "text": f"from datasets import load_dataset\n\n{load}"})
    again = _again(run, row, load)
    return [{"title": "Its picture again", "text": again}, *blocks] if again else blocks


def _loading(run: Run, place: Place, row: Mapping[str, Any]) -> str:
    from pipeline.output.publish import loading

    path = None if "://" in run.output.path else run.output.folder.path("")
    number = sum(part.rows for part in run.parts if part.shard < place.shard) + place.row
    return f'rows = {loading(run.output, path)}\nrow = rows[{number}]\nassert row["id"] == {_python(str(row["id"]))}'


def _again(run: Run, row: Mapping[str, Any], load: str) -> str | None:
    """The block of the card that takes a row, with this row in it; None where there is none or it holds for others."""
    from pipeline.output.publish import CARD

    job = stored_job(run.output.plan)
    if row.get("status") != "ok" or job is None or not job.redraws(row) or not run.output.folder.exists(CARD):
        return None
    card = run.output.folder.read(CARD).decode(errors="replace")
    block = next((text for text in _BLOCK.findall(card) if _ROWS.search(text) and _ROW.search(text)), None)
    return None if block is None else _ROW.sub("", _ROWS.sub(lambda match: load, block)).strip()


def _python(text: str) -> str:
    """A text as Python writes it, plain ASCII: whatever a stranger put into an id stays inside the quotes."""
    return json.dumps(text)
