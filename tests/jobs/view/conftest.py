"""An output folder of random figures, and the app on it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.view.folder import make
from jobs.view.app import App
from jobs.view.server import Server
from pipeline.output.dataset import Output

ROWS, SHARD_ROWS = 600, 100
HOSTILE = "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script>\u202e"
"""What a stranger may write in place of a prompt."""


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 rows in 6 files; one in a hundred has failed."""
    folder = tmp_path_factory.mktemp("view") / "many [1]"
    make(str(folder), ROWS, SHARD_ROWS)
    rows = pq.read_table(next((folder / "data").glob("part-00000-*")))
    replaced(folder, 0, {"prompt": _hostile(rows)})
    return folder


def _hostile(rows: pa.Table) -> pa.Array:
    return pa.array([HOSTILE, *rows["prompt"].to_pylist()[1:]])


@pytest.fixture(scope="session")
def table(many: Path) -> pa.Table:
    """The same rows, read by pyarrow."""
    return pa.concat_tables([pq.read_table(file) for file in sorted((many / "data").iterdir())])


@pytest.fixture(scope="session")
def app(many: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[App]:
    """The folder, and another one of more rows, the first of which are equal."""
    other = tmp_path_factory.mktemp("view") / "other"
    make(str(other), ROWS + 50, SHARD_ROWS)
    _change(other)
    made = App({"many": Output.open(str(many)), "other": Output.open(str(other))})
    yield made
    made.close()


def replaced(folder: Path, shard: int, columns: Mapping[str, pa.Array]) -> None:
    """Another content of a shard's columns, and its size in the record."""
    (file,) = (folder / "data").glob(f"part-{shard:05d}-*")
    rows = pq.read_table(file)
    for name, values in columns.items():
        rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), values)
    pq.write_table(rows, file)
    (record,) = (folder / "_latentmill" / "records").glob(f"*-{shard:06d}.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"size": file.stat().st_size}))


def _change(folder: Path) -> None:
    """Ten rows with 1 dB more, and three with another method."""
    rows = pq.read_table(next((folder / "data").glob("part-00000-*")))
    psnr = [value if value is None or n >= 10 else value + 1 for n, value in enumerate(rows["psnr"].to_pylist())]
    method = ["another"] * 3 + rows["method"].to_pylist()[3:]
    changed = {"psnr": pa.array(psnr, pa.float32()), "method": pa.array(method), "prompt": _hostile(rows)}
    replaced(folder, 0, changed)


@pytest.fixture(scope="session")
def server(app: App) -> Iterator[Server]:
    made = Server(app)
    thread = threading.Thread(target=made.serve_forever, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
