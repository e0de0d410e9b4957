"""What a job file may say of methods, and what it is told when it may not."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from jobs.kinds.invert_images import InvertImages as Job
from stages.inversion.settings import LboMethod
from stages.rare.settings import RareDrawing


def test_job_file_errors_name_the_key() -> None:
    with pytest.raises(ValidationError, match="two are called 'lbo'"):
        Job(input="x", methods=["lbo", "lbo"])
    with pytest.raises(ValidationError, match="needs `passes` of at least 2"):
        Job(input="x", methods=[{"method": "lbo", "bias": "output", "passes": 1}])
    with pytest.raises(ValidationError, match="guidance"):
        Job(input="x", guidance=0.5)


def test_what_is_regenerated_is_all_none_or_a_share() -> None:
    assert Job(input="x").reconstruct is True
    assert [Job(input="x", reconstruct=value).reconstruct for value in (True, False, 0.05)] == [True, False, 0.05]
    assert Job(input="x").own_settings()["reconstruct"] is True  # as plans have it
    for value in (-0.1, 1.5):
        with pytest.raises(ValidationError, match="reconstruct"):
            Job(input="x", reconstruct=value)


def test_what_lbo_no_longer_offers_is_said_and_old_job_files_read_the_same() -> None:
    with pytest.raises(ValidationError, match="update gauss-newton was measured to be inferior"):
        Job(input="x", methods=[{"method": "lbo", "update": "gauss-newton"}])
    with pytest.raises(ValidationError, match="no longer offered"):
        Job(input="x", methods=[{"method": "lbo", "rate": 0.5}])
    old = {
        "name": "", "ilb": None, "method": "lbo", "bias": "input", "update": "safeguarded", "warm_start": "linear",
        "passes": 10, "tolerance": None, "rate": None, "window": 3, "replay": False,
    }  # fmt: skip
    (method,) = Job(input="x", methods=[old]).own_settings()["methods"]
    assert method == old


@pytest.mark.parametrize(
    ("steps", "given", "passes"), [(50, {}, 10), (9, {}, 10), (8, {}, 30), (4, {"passes": 10}, 10)]
)
def test_lbo_takes_more_passes_where_steps_are_few(steps: int, given: dict[str, int], passes: int) -> None:
    job = Job(input="x", steps=steps, methods=[{"method": "lbo", **given}, "ddim"])
    (lbo, _) = job.own_settings()["methods"]  # as plans have it
    assert (job.methods[0].rule(1.0).limit, lbo["passes"]) == (passes, passes)
    rare = RareDrawing(model="x", methods=["slerp"], steps=steps, inversion={"method": "lbo", **given})
    assert rare.inversion.rule(1.0).limit == passes


@pytest.mark.parametrize(
    ("eps", "guidance", "tolerance"),
    [(2**-23, 1.0, 1e-3), (2**-23, 3.0, 1e-5), (2**-10, 1.0, 1e-3), (2**-10, 3.0, 2**-11), (2**-7, 1.0, 2**-8)],
)
def test_lbo_asks_for_no_more_than_the_network_s_dtype_can_give(eps: float, guidance: float, tolerance: float) -> None:
    assert LboMethod().rule(guidance, eps).tolerance == pytest.approx(tolerance)
    assert LboMethod(tolerance=1e-6).rule(guidance, eps).tolerance == 1e-6  # asked for is asked for
