"""Installed, the packages are found whatever the working directory holds, by the driver and by Ray's workers."""

from __future__ import annotations

import json
import subprocess
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("index", "jobs", "latentmill", "micro", "pipeline", "stages")
LAUNCHER = "from jobs.__main__ import main\nmain()\n"


@pytest.fixture
def installed(tmp_path: Path) -> list[str]:
    """The command of an installation that is no editable one: packages in site-packages, the script in ``bin``."""
    venv.create(tmp_path / "venv", symlinks=True, with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "venv")}))
    for name in PACKAGES:
        (site / name).symlink_to(ROOT / name)
    (site / "outer.pth").write_text(sysconfig.get_path("purelib") + "\n")  # whose own .pth files do not count
    script = tmp_path / "venv/bin/latentmill"
    script.write_text(LAUNCHER)
    return [str(tmp_path / "venv/bin/python"), str(script)]


FROM_PYTHON = "import latentmill; assert latentmill.run_job('job.yaml', output='out').state == 'complete'"


@pytest.mark.slow
@pytest.mark.parametrize("python", [False, True])
def test_a_run_in_a_folder_with_our_names(tmp_path: Path, installed: list[str], python: bool) -> None:
    here = tmp_path / "mine"
    for name in ("pipeline", "stages", "micro"):
        (here / name).mkdir(parents=True)
        (here / name / "__init__.py").write_text("raise RuntimeError('the user\\'s own')\n")
    for name in ("index", "jobs"):
        (here / f"{name}.py").write_text("raise RuntimeError('the user\\'s own')\n")
    np.save(here / "vectors.npy", np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32))
    job = {"job": "reference", "input": "vectors.npy", "given": "embeddings", "dim": 4}
    (here / "job.yaml").write_text(json.dumps(job))
    command = [installed[0], "-c", FROM_PYTHON] if python else [*installed, "run-job", "job.yaml", "-o", "out"]
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (here / "out/_SUCCESS").exists()
