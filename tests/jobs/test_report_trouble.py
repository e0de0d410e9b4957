"""The report never fails a job."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.run import run_job
from pipeline.output.progress import Progress
from tests.support.in_process import without_ray
from tests.support.toy_job import Toy


def test_a_page_that_cannot_be_written_is_said_and_no_more(
    tmp_path: Path, toy_job: type[Toy], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_ray(monkeypatch)
    (tmp_path / "in.txt").write_text("a\nb\n")
    job = {"job": "toy", "input": {"path": str(tmp_path / "in.txt"), "columns": {"text": "text"}}}
    (tmp_path / "out/report.html").mkdir(parents=True)
    (tmp_path / "out/report.html").rename(tmp_path / "taken")
    said: list[Progress] = []

    def tell(progress: Progress) -> None:
        said.append(progress)
        if progress.phase == "publishing":
            (tmp_path / "taken").rename(tmp_path / "out/report.html")

    result = run_job(job, output=str(tmp_path / "out"), progress=tell)
    assert (result.state, result.ok, result.report) == ("complete", 2, None)
    told = [progress.message for progress in said if progress.message and "report.html" in progress.message]
    assert len(told) == 1
    assert "could not be written (IsADirectoryError" in told[0]
    (tmp_path / "out/report.html").rmdir()
    again = run_job(job, output=str(tmp_path / "out"))
    assert again.report == f"{tmp_path}/out/report.html"
    assert Path(again.report).exists()
