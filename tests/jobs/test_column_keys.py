"""A column that the input lacks is missed under the key of the job file that names it, never under another one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from PIL import Image

from jobs.run import run_spec
from jobs.schema.base import RowJob
from jobs.schema.reading import load
from pipeline.run.draft import draft
from stages.embed.captions import CaptionError, read_captions
from stages.judging.sets import SetError, census

HERE = "it has image, kind, score, text"
SELECT = {"job": "select-corpus", "encoder": "micro:prior", "by": "kind"}
PROMPTS = {"job": "invert-prompts", "methods": ["text-embedding"]}


def encoded() -> bytes:
    Image.new("RGB", (4, 4)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    row = {"image": {"bytes": encoded(), "path": None}, "kind": "ring", "score": 1.0, "text": "a ring"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "pool.parquet")
    return tmp_path / "pool.parquet"


@pytest.mark.parametrize(
    ("job", "key"),
    [
        ({**SELECT, "by": "lost"}, "by"),
        ({**SELECT, "score_column": "lost"}, "score_column"),
        ({**SELECT, "score": "lost"}, "score_column"),
        ({**SELECT, "mixture": {"by": "lost", "weights": {"none": 1}}}, "mixture.by"),
        ({**SELECT, "keep": ["lost"]}, "keep"),
        ({**SELECT, "input": {"id": "lost"}}, "input.id"),
        ({**SELECT, "input": {"columns": {"image": "lost", "kind": "kind", "score": "score"}}}, "input.columns.image"),
        ({**PROMPTS, "input": {"columns": {"prompt": "lost"}}}, "input.columns.prompt"),
        ({**PROMPTS, "keep": ["lost"], "input": {"columns": {"prompt": "text"}}}, "keep"),
    ],
)
def test_a_column_that_is_not_there(job: dict[str, Any], key: str, pool: Path, tmp_path: Path) -> None:
    described = load({**job, "input": {"path": str(pool), **job.get("input", {})}}, tell=lambda message: None)
    assert isinstance(described, RowJob)
    with pytest.raises(ValueError, match=rf"^{key}: .* has no column 'lost'; {HERE}"):
        draft(run_spec(described, str(tmp_path / "out")))


def test_pictures_that_a_kind_keeps_by_itself(tmp_path: Path) -> None:
    pq.write_table(pa.table({"kind": ["ring"], "score": [1.0]}), tmp_path / "bare.parquet")
    described = load({**SELECT, "input": str(tmp_path / "bare.parquet")})
    assert isinstance(described, RowJob)
    with pytest.raises(ValueError, match=r"^input.columns.image: the input has no column 'image'; it has kind, score"):
        draft(run_spec(described, str(tmp_path / "out")))


def test_types_that_do_not_go_together(tmp_path: Path) -> None:
    from pipeline.run.plan import make_plan

    (tmp_path / "in").mkdir()
    for name, score in (("0", [1.0]), ("1", ["good"])):
        row = {"image": [{"bytes": encoded(), "path": None}], "kind": ["ring"], "score": score}
        pq.write_table(pa.table(row), tmp_path / f"in/{name}.parquet")
    described = load({**SELECT, "input": str(tmp_path / "in")})
    assert isinstance(described, RowJob)
    with pytest.raises(ValueError, match=r"^score_column: the column 'score' is double in .*; write it with one type$"):
        make_plan(run_spec(described, str(tmp_path / "out")))


@pytest.mark.parametrize(("columns", "key"), [(("lost", "text"), "captions.id"), (("id", "lost"), "captions.prompt")])
def test_columns_of_a_second_file(columns: tuple[str, str], key: str, tmp_path: Path) -> None:
    pacsv.write_csv(pa.table({"id": ["a"], "text": ["a ring"]}), tmp_path / "captions.csv")
    with pytest.raises(CaptionError, match=rf"^{key}: .*captions.csv has no column 'lost'; it has id, text$"):
        read_captions(str(tmp_path / "captions.csv"), *columns)


def test_columns_of_judged_sets(pool: Path) -> None:
    from pipeline.input.source import Source

    told = Source((str(pool),)).to_json()
    with pytest.raises(SetError, match=rf"^labels: corpora.a: .*pool.parquet: has no column 'lost'; {HERE}$"):
        census("corpora.a", told, ("lost",))
    moved = Source((str(pool),), columns={"image": "lost"}).to_json()
    with pytest.raises(SetError, match=rf"^real: .* has no column 'lost'; {HERE}; map it with real.columns.image$"):
        census("real", moved, ("kind",))
