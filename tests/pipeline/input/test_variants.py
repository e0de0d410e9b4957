"""Every row of an input once a value: the same rows, ids and spans whatever the shard borders."""

import json

import pytest

from pipeline.input.files import list_files, resolve
from pipeline.input.read import read_rows, reader_of
from pipeline.input.rows import Span
from pipeline.input.source import Source


@pytest.fixture(params=["text", "jsonl", "parquet"])
def source(request, tmp_path):
    texts = [f"prompt {i}" for i in range(7)]
    path = tmp_path / f"in.{ {'text': 'txt'}.get(request.param, request.param) }"
    if request.param == "text":
        path.write_text("\n".join(texts) + "\n")
    elif request.param == "jsonl":
        path.write_text("".join(json.dumps({"text": t, "key": f"k{i}"}) + "\n" for i, t in enumerate(texts)))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": texts, "key": [f"k{i}" for i in range(7)]}), path)
    own = None if request.param == "text" else "key"
    plain = Source((str(path),), columns={"prompt": "text"}, id=own, variants={"method": ("a", "b", "c")})
    return resolve(plain)


@pytest.mark.parametrize("shard", [1, 2, 3, 5, 100])
def test_rows_do_not_depend_on_the_spans(source, shard):
    (file,) = list_files(source)
    scan = reader_of(source).scan(source, file, lambda row: row % shard == 0)
    assert scan.rows == 21
    got = []
    for start in range(0, scan.rows, shard):
        span = Span(file.name, file.path, start, min(start + shard, scan.rows), scan.offsets.get(start, 0))
        got += list(read_rows(source, (span,), 0, shard, {"prompt": "text"}))
    assert [(r.values["prompt"], r.values["method"]) for r in got] == [
        (f"prompt {i}", m) for i in range(7) for m in "abc"
    ]
    assert len({r.id for r in got}) == 21
    assert all(r.id.endswith("/" + r.values["method"]) for r in got)
    if source.id:
        assert got[4].id == "k1/b"


def test_a_span_can_be_entered_in_the_middle(source):
    (file,) = list_files(source)
    span = Span(file.name, file.path, 0, 21)
    got = list(read_rows(source, (span,), 4, 3, {"prompt": "text"}))
    assert [(r.values["prompt"], r.values["method"]) for r in got] == [
        ("prompt 1", "b"), ("prompt 1", "c"), ("prompt 2", "a")
    ]  # fmt: skip


def test_a_source_survives_json(source):
    assert Source.from_json(json.loads(json.dumps(source.to_json()))) == source
