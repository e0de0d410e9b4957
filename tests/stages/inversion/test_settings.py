"""What a job file may say of methods, and what it is told when it may not."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from jobs.kinds.invert_images import InvertImages as Job


def test_job_file_errors_name_the_key() -> None:
    with pytest.raises(ValidationError, match="two are called 'lbo'"):
        Job(input="x", methods=["lbo", "lbo"])
    with pytest.raises(ValidationError, match="needs `passes` of at least 2"):
        Job(input="x", methods=[{"method": "lbo", "bias": "output", "passes": 1}])
    with pytest.raises(ValidationError, match="guidance"):
        Job(input="x", guidance=0.5)


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
