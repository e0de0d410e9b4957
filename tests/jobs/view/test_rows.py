"""Pages, counts, histograms and values against pyarrow and numpy on the same files."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from jobs.view.app import App
from jobs.view.columns import shown
from jobs.view.database import Database
from jobs.view.query import BadRequest, Order, Sql, filters
from jobs.view.run import Place, Run
from pipeline.output.dataset import Output
from pipeline.output.planfile import OutputError
from pipeline.output.schema import encode_schema
from pipeline.storage import Folder
from tests.jobs.view.conftest import replaced
from tests.support import ROOT

FILTERS: list[tuple[list[dict[str, Any]], Callable[[pa.Table], Any]]] = [
    ([{"column": "prompt", "op": "contains", "value": "STAR"}],
     lambda t: pc.match_substring(pc.utf8_lower(t["prompt"]), "star")),
    ([{"column": "prompt", "op": "lacks", "value": "star"}],
     lambda t: pc.invert(pc.match_substring(t["prompt"], "star"))),
    ([{"column": "prompt", "op": "starts", "value": "red "}], lambda t: pc.starts_with(t["prompt"], "red ")),
    ([{"column": "method", "op": "in", "value": ["lbo", "ddim"]}],
     lambda t: pc.is_in(t["method"], pa.array(["lbo", "ddim"]))),
    ([{"column": "error", "op": "isnot", "value": "x"}], lambda t: pc.is_valid(t["id"])),
    ([{"column": "status", "op": "is", "value": "failed"}], lambda t: pc.equal(t["status"], "failed")),
    ([{"column": "psnr", "op": "between", "value": [30, "33.5"]}],
     lambda t: pc.and_(pc.greater_equal(t["psnr"], 30), pc.less_equal(t["psnr"], 33.5))),
    ([{"column": "psnr", "op": "between", "value": [None, 25]}, {"column": "converged", "op": "is", "value": True}],
     lambda t: pc.and_(pc.less_equal(t["psnr"], 25), t["converged"])),
    ([{"column": "psnr", "op": "between", "value": [None, None]}], lambda t: pc.is_valid(t["psnr"])),
    ([{"column": "forwards", "op": "is", "value": "77"}], lambda t: pc.equal(t["forwards"], 77)),
    ([{"column": "forwards", "op": "is", "value": 76.6}], lambda t: pc.equal(t["forwards"], -1)),
    ([{"column": "picture", "op": "null"}], lambda t: pc.is_null(t["picture"])),
    ([{"column": "latent", "op": "notnull"}], lambda t: pc.is_valid(t["latent"])),
]  # fmt: skip


@pytest.fixture(scope="session")
def run(app: App) -> Run:
    return app.run("many")


@pytest.mark.parametrize(("given", "expected"), FILTERS, ids=lambda one: "")
def test_filters_pass_the_rows_that_arrow_passes(run: Run, table: pa.Table, given: Any, expected: Any) -> None:
    wanted = table.filter(pc.fill_null(expected(table), False))["id"].to_pylist()
    text = json.dumps(given)
    assert run.count(text) == len(wanted)
    assert _ids(run, text, None, 250) == wanted


def test_a_figure_as_it_is_typed_is_meant_in_the_columns_precision(run: Run, table: pa.Table) -> None:
    value = next(one for one in table["psnr"].to_pylist() if one is not None)
    typed = str(np.float32(value))  # the shortest text that is this float32: not the float64 of that text
    assert float(typed) != value
    assert run.count(json.dumps([{"column": "psnr", "op": "is", "value": typed}])) >= 1
    assert run.count(json.dumps([{"column": "psnr", "op": "between", "value": [typed, typed]}])) >= 1


@pytest.mark.parametrize(("name", "down"), [("psnr", True), ("psnr", False), ("prompt", False), ("converged", True)])
def test_every_row_comes_once_in_any_order(run: Run, table: pa.Table, name: str, down: bool) -> None:
    values = table[name].to_pylist()
    order = sorted((n for n, value in enumerate(values) if value is not None),
                   key=lambda n: (-float(values[n]) if down else values[n], n))  # fmt: skip
    order += [n for n, value in enumerate(values) if value is None]
    ids = table["id"].to_pylist()
    assert _ids(run, None, Order.by(run.columns[name], down), 250) == [ids[n] for n in order]


def test_nan_is_found_apart_sorted_last_and_in_no_range(tmp_path: Path, many: Path) -> None:
    shutil.copytree(many, tmp_path / "out")
    file = next((tmp_path / "out" / "data").glob("part-00000-*"))
    values = pq.read_table(file)["ssim"].to_numpy().copy()
    missing = int(np.isnan(values[4:]).sum())
    values[:4] = [np.nan, np.inf, -np.inf, np.nan]
    replaced(tmp_path / "out", 0, {"ssim": pa.array(values)})
    output = Output.open(str(tmp_path / "out"))
    database = Database([output.folder])
    run = Run.open("nan", output, database)
    count = lambda op, value=None: run.count(json.dumps([{"column": "ssim", "op": op, "value": value}]))  # noqa: E731
    assert count("nan") == 2 + missing
    assert count("between", ["inf", None]) == 1
    best = run.page(None, Order.by(run.columns["ssim"], True), None, 1).places[0]
    assert best == Place(0, 1)
    told = run.histogram("ssim", None)
    assert np.isfinite([told["min"], told["max"], told["mean"]]).all()
    assert sum(told["counts"]) == told["rows"]
    database.close()


def test_a_histogram_counts_what_numpy_counts(run: Run, table: pa.Table) -> None:
    for name in ("psnr", "residual_max", "forwards"):
        values = table[name].drop_null().to_numpy().astype(np.float64)
        told = run.histogram(name, None)
        edges = np.asarray(told["edges"])
        low, width, bars = edges[0], edges[1] - edges[0], len(edges) - 1
        bins = np.clip(np.floor((values - low) / width), 0, bars - 1).astype(int)
        assert told["counts"] == np.bincount(bins, minlength=bars).tolist()
        assert (told["rows"], told["other"]) == (len(values), table.num_rows - len(values))
        assert (told["min"], told["max"]) == (values.min(), values.max())
        assert told["mean"] == pytest.approx(values.mean())
        assert told["median"] == pytest.approx(np.median(values), rel=0.05)


def test_a_histogram_shows_the_other_columns_filters_and_not_its_own(run: Run, table: pa.Table) -> None:
    own = {"column": "psnr", "op": "between", "value": [40, None]}
    given = json.dumps([{"column": "method", "op": "is", "value": "lbo"}, own])
    wanted = table.filter(pc.equal(table["method"], "lbo"))["psnr"].drop_null()
    assert run.histogram("psnr", given)["rows"] == len(wanted)


def test_values_are_counted(run: Run, table: pa.Table) -> None:
    told = run.values("method", None)
    wanted = {one["values"]: one["counts"] for one in table["method"].value_counts().to_pylist()}
    assert {one["value"]: one["rows"] for one in told["values"]} == wanted
    assert run.values("error", None)["values"][0] == {"value": None, "whole": True, "rows": table["error"].null_count}


def test_a_row_is_found_where_it_stands(run: Run, table: pa.Table) -> None:
    place = run.find_id("row-00000542")
    assert place == Place(5, 42)
    assert run.cell(place, "latent") == pytest.approx(table["latent"][542].as_py())
    assert run.cell(place, "picture", "bytes") == (table["picture"][542].as_py() or {"bytes": None})["bytes"]
    (cells,) = run.fetch([place], ["id", "psnr", "picture"])
    assert cells == {
        "id": "row-00000542",
        "psnr": table["psnr"][542].as_py(),
        "picture": table["picture"][542].is_valid,
    }


def test_a_run_that_goes_on_is_read_as_far_as_it_is() -> None:
    output = Output.open(str(ROOT / "tests" / "pipeline" / "run" / "old_outputs" / "half"))
    database = Database([output.folder])
    run = Run.open("half", output, database)
    wanted = sum(table.num_rows for table in output.tables(["id"]))
    assert run.rows == run.count(None) == len(_ids(run, None, None, 5)) == wanted
    database.close()


def test_files_may_be_published_while_they_are_looked_at(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "tests" / "pipeline" / "run" / "old_outputs" / "half", tmp_path / "out")
    output = Output.open(str(tmp_path / "out"))
    app = App({"half": output})
    asked = {"run": "half", "filters": '[{"column": "id", "op": "is", "value": "no such row"}]'}
    before = app.answer("api/count", asked)
    (tmp_path / "out" / "data").mkdir()
    for record in list(output.records()):
        (tmp_path / "out" / "_latentmill" / "attempts" / record.file).rename(
            tmp_path / "out" / output.part(record.shard)
        )
    assert app.answer("api/count", asked) == before
    assert app.answer("api/row", {"run": "half", "at": "0-0"}) is not None
    app.close()


def test_names_that_differ_in_case_alone_are_told_apart(tmp_path: Path) -> None:
    pq.write_table(pa.table({"Psnr": [1.0], "psnr": [2.0], 'a"; DROP': [3.0]}), tmp_path / "odd.parquet")
    database = Database([Folder.at(str(tmp_path))])
    files = [str(tmp_path / "odd.parquet")]
    names = [row[0] for row in database.rows(Sql("DESCRIBE SELECT * FROM read_parquet(?)", (files,)))]
    columns = shown(pq.read_schema(files[0]), names)
    for name, value in (("Psnr", 1.0), ("psnr", 2.0), ('a"; DROP', 3.0)):
        where = filters(columns, json.dumps([{"column": name, "op": "is", "value": value}]))
        assert database.rows(Sql("SELECT count(*) FROM read_parquet(?) WHERE ", (files,)) + where) == [(1,)]
    database.close()


def test_a_column_that_duckdb_keeps_for_itself_is_refused(app: App) -> None:
    output = app.outputs["many"]
    schema = pa.schema([("id", pa.string()), ("file_index", pa.int64())])
    odd = replace(output, plan={**output.plan, "schema": encode_schema(schema)})
    with pytest.raises(OutputError, match="'file_index' has a name that DuckDB keeps for itself"):
        Run.open("odd", odd, app.run("many").database)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("nonsense", "not JSON"),
        ("{}", "a list"),
        ('[{"column": "id; DROP TABLE x", "op": "is", "value": "1"}]', "no column"),
        ('[{"column": "id\\" = id OR 1=1 --", "op": "null"}]', "no column"),
        ('[{"column": "psnr", "op": "= 1 OR", "value": 1}]', "takes no filter"),
        ('[{"column": "psnr", "op": "is", "value": "1 OR 1=1"}]', "a number is wanted"),
        ('[{"column": "psnr", "op": "is", "value": "NaN"}]', "filter 'nan'"),
        ('[{"column": "psnr", "op": "between", "value": [1]}]', "two numbers"),
        ('[{"column": "prompt", "op": "contains", "value": 7}]', "a text"),
        ('[{"column": "picture", "op": "is", "value": "x"}]', "takes no filter"),
        ('[{"column": "converged", "op": "is", "value": "yes"}]', "true or false"),
    ],
)
def test_what_makes_no_sense_is_told_in_a_sentence(run: Run, given: str, said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        run.count(given)


def test_a_value_is_a_value_whatever_it_looks_like(run: Run) -> None:
    for value in ("' OR '1'='1", "x'; DROP TABLE pair_0; --", "%", "\\", "\x00", "🙂" * 100):
        assert run.count(json.dumps([{"column": "prompt", "op": "is", "value": value}])) == 0


def test_nothing_but_the_runs_folders_is_read(run: Run, tmp_path: Path) -> None:
    pq.write_table(pa.table({"x": [1]}), tmp_path / "secret.parquet")
    for text in ("SELECT * FROM read_parquet(?)", "SELECT * FROM read_text(?)"):
        with pytest.raises(duckdb.Error, match=r"(?i)disabled|permission"):
            run.database.rows(Sql(text, (str(tmp_path / "secret.parquet"),)))
    with pytest.raises(duckdb.Error, match="locked"):
        run.database.rows(Sql("SET enable_external_access = true"))


def _ids(run: Run, given: str | None, order: Order | None, limit: int) -> list[str]:
    """All ids, page by page."""
    found: list[str] = []
    after: str | None = None
    while True:
        page = run.page(given, order, after, limit)
        found += [row["id"] for row in run.fetch(page.places, ["id"])]
        assert len(page.places) <= limit
        after = page.next
        if after is None:
            return found


def test_a_store_is_read_through_fsspec(many: Path) -> None:
    import fsspec

    store = fsspec.filesystem("memory")
    for file in filter(Path.is_file, many.rglob("*")):
        store.pipe_file(f"/viewed/out/{file.relative_to(many)}", file.read_bytes())
    output = Output.open("memory://viewed/out")
    database = Database([output.folder])
    run = Run.open("stored", output, database)
    given = json.dumps([{"column": "method", "op": "is", "value": "lbo"}])
    here = sum(pq.read_table(file)["method"].to_pylist().count("lbo") for file in (many / "data").iterdir())
    assert run.count(given) == here
    assert run.fetch([Place(2, 3)], ["id"]) == [{"id": "row-00000203"}]
    with pytest.raises(duckdb.Error, match=r"(?i)disabled|permission"):
        database.rows(Sql("SELECT * FROM read_parquet(?)", ("memory:///elsewhere/x.parquet",)))
    database.close()
    store.rm("/viewed", recursive=True)


def test_closing_ends_what_runs(many: Path) -> None:
    database = Database([Output.open(str(many)).folder])
    said: list[str] = []

    def long() -> None:
        try:
            database.rows(Sql("SELECT sum(a.range * b.range) FROM range(1000000) a, range(1000000) b"))
        except BadRequest as error:
            said.append(str(error))

    asking = threading.Thread(target=long)
    asking.start()
    while not database._running:
        time.sleep(0.01)
    database.close()
    asking.join(timeout=60)
    assert "stopped" in said[0]
