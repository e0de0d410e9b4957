"""The job judge-corpus: trainings as rows, judged by held-out pictures."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from jobs.dry_run import plan_job
from jobs.run import described, run_job
from jobs.schema.reading import JobFileError, load
from pipeline.output.verify import verify
from stages.judging import training

pytestmark = pytest.mark.usefixtures("in_process")
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220)}
SIDE = 16


def drawn(colour: str, number: int) -> bytes:
    """A noisy picture of one colour; no two numbers give the same."""
    random = np.random.default_rng([number, *COLOURS[colour]])
    x_HWC = np.clip(np.array(COLOURS[colour]) + random.normal(0, 25, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(x_HWC).save(file, "PNG")
    return file.getvalue()


def write(path: Path, counts: Mapping[str, int], start: int, label: Callable[[str], str] = str) -> Path:
    """Pictures of each colour as a Parquet file."""
    rows = [
        {"id": f"{colour}-{start + n}", "image": {"bytes": drawn(colour, start + n), "path": None},
         "label": label(colour)}
        for colour, count in counts.items() for n in range(count)
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Red often, green twice, blue never; a corpus that has them all, one whose blue is green, held-out pictures."""
    folder = tmp_path_factory.mktemp("sets")
    write(folder / "real.parquet", {"red": 20, "green": 2}, 0)
    write(folder / "held.parquet", {"red": 5, "green": 5, "blue": 5}, 1000)
    write(folder / "good.parquet", {"green": 12, "blue": 12}, 2000)
    swapped = {"green": "blue", "blue": "green"}
    write(folder / "wrong.parquet", {"green": 8, "blue": 8}, 3000, swapped.__getitem__)
    return folder


def job(sets: Path, **more: Any) -> dict[str, Any]:
    return {
        "job": "judge-corpus", "input": {"path": str(sets / "held.parquet"), "id": "id"},
        "real": str(sets / "real.parquet"), "size": SIDE, "epochs": 8, "batch_size": 8, "rare": 5, "trials": 2,
        "corpora": {"good": str(sets / "good.parquet"), "wrong": str(sets / "wrong.parquet")}, **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def judged(sets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    out = tmp_path_factory.mktemp("judged") / "out"
    with pytest.MonkeyPatch.context() as patch:
        from tests.support.in_process import without_ray

        without_ray(patch)
        assert run_job(job(sets), output=str(out)).state == "complete"
    return out


def rows(out: Path) -> list[dict[str, Any]]:
    return [row for path in sorted((out / "data").glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def test_a_good_corpus_teaches_what_real_pictures_lack_and_a_wrong_one_does_not(judged: Path) -> None:
    found = {(row["corpus"], row["trial"]): row for row in rows(judged)}
    assert [*found] == [(name, trial) for name in ("real", "good", "wrong") for trial in (0, 1)]
    for trial in (0, 1):
        assert found["real", trial]["never"] == 0
        assert found["good", trial]["never"] == found["good", trial]["rare"] == found["good", trial]["frequent"] == 1
        assert found["wrong", trial]["never"] == 0
    assert not verify(str(judged)).problems
    told = json.loads((judged / "judgement.json").read_text())["corpora"]
    assert told["good"]["never"]["difference"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    page = (judged / "report.html").read_text()
    assert "What each corpus is worth" in page
    assert "+100.0 (+100.0 to +100.0)" in page


def test_all_trainings_are_of_one_size_and_the_rows_say_how(judged: Path) -> None:
    for row in rows(judged):
        usable = {"real": 22, "good": 24, "wrong": 16}[row["corpus"]]
        assert (row["pictures"], row["added"], row["usable"], row["left_out"]) == (38, 16, usable, 0)
        assert row["repeats"] == pytest.approx(16 / usable)
        counts = json.loads(row["by_class"])
        assert {name: pair[1] for name, pair in counts.items()} == {"blue": 5, "green": 5, "red": 5}
        assert row["accuracy"] == pytest.approx(sum(pair[0] for pair in counts.values()) / 15)
        assert json.loads(row["real_counts"]) == {"blue": 0, "green": 2, "red": 20}


def test_the_same_job_gives_the_same_rows_in_whichever_order(sets: Path, judged: Path, tmp_path: Path) -> None:
    backwards = {"wrong": str(sets / "wrong.parquet"), "good": str(sets / "good.parquet")}
    again = job(sets, shard_rows=4, trials=1, corpora=backwards)
    assert run_job(again, output=str(tmp_path / "out")).state == "complete"
    first = {row["id"]: row for row in rows(judged) if row["trial"] == 0}
    assert {row["id"]: row for row in rows(tmp_path / "out")} == first


def test_a_training_that_does_not_fit_keeps_what_it_can_in_the_hosts_memory(
    sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers; in a batch cut in parts the classifier, which norms by the batch, would be another."""
    given: Any = described(job(sets, trials=1, epochs=2))
    spec, rows = given.stage(), [{"id": name, "corpus": name, "trial": 0} for name in ("real", "good")]
    wanted = list(spec.build()(rows))
    spilled, refused = torch.autograd.graph.save_on_cpu, list[str]()
    inside: list[bool] = []

    class Spilled(spilled):  # type: ignore[misc, valid-type]
        def __enter__(self) -> Any:
            inside.append(True)
            return super().__enter__()

        def __exit__(self, *given: Any) -> None:
            inside.pop()
            super().__exit__(*given)

    real, prepared = training._loss, training._prepared

    def loss(*given: Any) -> torch.Tensor:
        if not inside:
            refused.append("a step")
            raise torch.OutOfMemoryError
        return real(*given)

    def brought(x_BHWC: np.ndarray, device: str) -> torch.Tensor:
        if len(x_BHWC) > 8:
            refused.append("held-out")
            raise torch.OutOfMemoryError
        return prepared(x_BHWC, device)

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Spilled)
    monkeypatch.setattr(training, "_loss", loss)
    monkeypatch.setattr(training, "_prepared", brought)
    stage: Any = spec.build()
    assert list(stage(rows)) == wanted
    assert refused == ["a step", "held-out"]
    other: Any = spec.build()
    other.rooms.heed(stage.rooms.learned())
    assert list(other(rows)) == wanted
    assert len(refused) == 2
    monkeypatch.setattr(training, "_loss", lambda *given: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    assert all("lower batch_size or size" in row["error"] for row in spec.build()(rows))


def folder_of(pictures: Path, place: Path) -> str:
    for row in pq.read_table(pictures).to_pylist():
        file = place / row["label"] / f"{row['id']}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(row["image"]["bytes"])
    return str(place)


def tar_of(pictures: Path, place: Path) -> str:
    with tarfile.open(place, "w") as tar:
        for row in pq.read_table(pictures).to_pylist():
            facts = json.dumps({"label": row["label"]}).encode()
            for name, data in ((f"{row['id']}.png", row["image"]["bytes"]), (f"{row['id']}.json", facts)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return str(place)


def test_folders_and_tars_are_read_as_parquet_is(sets: Path, judged: Path, tmp_path: Path) -> None:
    given = {
        "good": tar_of(sets / "good.parquet", tmp_path / "good.tar"),
        "wrong": folder_of(sets / "wrong.parquet", tmp_path / "wrong"),
    }
    said = run_job(job(sets, corpora=given, trials=1, epochs=1), output=str(tmp_path / "out"))
    assert said.state == "complete"
    names = ("corpus", "pictures", "usable", "left_out", "real_counts")
    one = [{name: row[name] for name in names} for row in rows(judged) if row["trial"] == 0]
    assert [{name: row[name] for name in names} for row in rows(tmp_path / "out")] == one


def test_several_labels_have_a_head_each(sets: Path, tmp_path: Path) -> None:
    for name in ("real", "held", "good"):
        table = pq.read_table(sets / f"{name}.parquet")
        shade = pa.array(["dark" if own == "blue" else "bright" for own in table["label"].to_pylist()])
        pq.write_table(table.append_column("shade", shade), tmp_path / f"{name}.parquet")
    given = job(tmp_path, labels=["label", "shade"], corpora={"good": str(tmp_path / "good.parquet")}, trials=1)
    assert run_job(given, output=str(tmp_path / "out")).state == "complete"
    real, good = rows(tmp_path / "out")
    assert json.loads(good["by_label"]) == {"label": 1.0, "shade": 1.0}
    assert json.loads(real["by_label"])["shade"] == pytest.approx(10 / 15)  # it has seen bright ones alone
    assert json.loads(good["real_counts"]) == {"blue / dark": 0, "green / bright": 2, "red / bright": 20}


def test_a_held_out_picture_that_is_trained_on_is_refused(sets: Path, tmp_path: Path) -> None:
    leaking = tmp_path / "leak.parquet"
    held, good = (pq.read_table(sets / f"{name}.parquet") for name in ("held", "good"))
    pq.write_table(pa.concat_tables([good, held.slice(7, 2)]), leaking)
    given = job(sets, corpora={"good": str(sets / "good.parquet"), "leak": str(leaking)}, trials=1, epochs=1)
    run_job({**given, "max_failed_fraction": 1}, output=str(tmp_path / "out"))
    found = {row["id"]: row for row in rows(tmp_path / "out")}
    assert found["training/good/0"]["status"] == "ok"
    said = "2 pictures of corpora.leak are held-out ones too (leak.parquet#24 is green-1002 there)"
    assert said in found["training/leak/0"]["error"]


def test_what_cannot_be_used_is_counted(sets: Path, tmp_path: Path) -> None:
    table = pq.read_table(sets / "good.parquet").to_pylist()
    table[0]["image"]["bytes"] = b"no picture"
    table[1]["label"] = None
    table[2]["label"] = "violet"
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "good.parquet")
    given = job(sets, corpora={"good": str(tmp_path / "good.parquet")}, trials=1, epochs=1)
    run_job(given, output=str(tmp_path / "out"))
    row = next(row for row in rows(tmp_path / "out") if row["corpus"] == "good")
    assert (row["usable"], row["left_out"], row["added"]) == (21, 3, 21)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"real": "nowhere.parquet"}, "real: .*nowhere.parquet: there is no such file"),
        ({"labels": ["kind"]}, "input: .*held.parquet: has no column 'kind'; it has id, image, label"),
        ({"real": "pictureless.parquet"}, "real: .*pictureless.parquet: has no column 'image'; it has label"),
        ({"real": "unlabelled.parquet"}, "real: none of its 1 pictures has a label in the column 'label'; map"),
        ({"classifier": "torchvision/resnet18"}, "classifier: torchvision/resnet18 needs torchvision, which is not"),
    ],
)
def test_what_cannot_work_is_refused_at_planning(
    change: dict[str, Any], said: str, sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr("stages.judging.network.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    pq.write_table(pa.table({"label": ["red"]}), "pictureless.parquet")
    pq.write_table(pa.table({"label": pa.array([None], pa.string()), "image": [drawn("red", 1)]}), "unlabelled.parquet")
    with pytest.raises(ValueError, match=said):
        list(plan_job(load(job(sets, **change)), str(tmp_path / "out")))


def test_labels_that_never_meet_are_refused_at_planning(sets: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.parquet", {"red": 2}, 0, lambda colour: f"a {colour} thing")
    with pytest.raises(ValueError, match=r"corpora.other: no picture is of a class .*'a red thing' here, 'red' there"):
        list(plan_job(load(job(sets, corpora={"other": str(other)})), str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"corpora": {"real": "x"}}, "cannot be called 'real'"),
        ({"corpora": {"a/b": "x"}}, "cannot be called 'a/b'"),
        ({"baseline": "godo"}, "no corpus is called 'godo': real, good, wrong"),
        ({"classifier": "resnet18"}, "no classifier is called 'resnet18'"),
        ({"keep": ["label"]}, "a row is a training"),
    ],
)
def test_a_job_file_that_cannot_be_meant_is_refused(change: dict[str, Any], said: str, sets: Path) -> None:
    with pytest.raises(JobFileError, match=said):
        load(job(sets, **change))
