"""The sources fit the house that docs/architecture.md declares; and the checker would see it if they did not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.draw_imports import FIGURE, figure
from tests.support.imports import (
    PACKAGES,
    Import,
    check,
    circles,
    faults,
    missing,
    read_house,
    read_imports,
    sources,
    unused,
)

HOUSE = """
```floors
jobs
stages/rare           | pipeline/run
stages/engine         | pipeline/input
index pipeline/storage.py
```

```libraries
ray: pipeline/run/cluster.py (late)
torch: stages, index (late)
```
"""
FITS = {
    "jobs/cli.py": "def main():\n    from pipeline.run import driver",
    "stages/rare/stage.py": "import torch\nfrom stages.engine.solver import solve",
    "stages/engine/solver.py": "import torch\nfrom pipeline import storage",
    "pipeline/run/driver.py": "from pipeline.input.read import rows\nfrom pipeline.run.plan import Plan",
    "pipeline/run/plan.py": "",
    "pipeline/run/cluster.py": "def start():\n    import ray",
    "pipeline/input/read.py": "import pipeline.storage",
    "pipeline/storage.py": "",
    "index/reference.py": "def find():\n    import torch",
}


def plant(root: Path, **more: str) -> list[str]:
    """What the checker says of a small tree that fits, with some of its modules replaced."""
    for path, text in {**FITS, **{name.replace("__", "/") + ".py": text for name, text in more.items()}}.items():
        file = root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(text)
    house = read_house(HOUSE)
    return faults(house, read_imports(root, PACKAGES, house.libraries), sources(root))


def test_every_import_points_down_and_heavy_libraries_stay_where_they_may() -> None:
    said = check()
    assert not said, "\n".join(said)


def test_the_figure_in_docs_is_the_one_that_the_sources_give() -> None:
    drawn = "python -m tests.support.draw_imports draws it again"
    assert FIGURE.read_text(encoding="utf-8") == figure(), drawn


def test_a_tree_that_fits_is_let_pass(tmp_path: Path) -> None:
    assert plant(tmp_path) == []


@pytest.mark.parametrize(
    "text",
    [
        "from stages.rare.stage import grow",
        "import stages.rare.stage",
        "from stages.rare import stage",
        "def solve():\n    from stages.rare.stage import grow",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from stages.rare.stage import Grown",
        "class Slots:\n    def fill(self):\n        if self:\n            import stages.rare.stage as stage",
    ],
)
def test_an_import_that_points_up_is_found_wherever_it_stands(tmp_path: Path, text: str) -> None:
    said = plant(tmp_path, stages__engine__solver=text, stages__rare__stage="")
    (fault,) = said
    assert fault.startswith("stages/engine/solver.py:")
    assert fault.endswith("imports stages/rare/stage.py: stages/engine may not know stages/rare")


def test_wings_know_nothing_of_each_other(tmp_path: Path) -> None:
    assert plant(tmp_path, stages__rare__stage="import pipeline.input.read") == [
        "stages/rare/stage.py:1 imports pipeline/input/read.py: stages/rare may not know pipeline/input"
    ]


def test_a_circle_inside_a_room_is_found(tmp_path: Path) -> None:
    said = plant(
        tmp_path,
        pipeline__run__plan="def check():\n    from pipeline.run.cluster import start",
        pipeline__run__cluster="from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import pipeline.run.driver",
    )
    (fault,) = said
    assert fault.startswith("a circle: pipeline/run/")
    assert all(f"pipeline/run/{name}.py" in fault for name in ("driver", "plan", "cluster"))


def test_separate_circles_are_told_apart() -> None:
    pairs = ["ab", "bc", "ca", "cd", "de", "ed", "ef"]
    found = circles(Import(source, 1, target) for source, target in pairs)
    assert sorted("".join(sorted(circle)) for circle in found) == ["abc", "de"]


def test_a_module_without_a_room_and_a_room_without_a_module_are_found(tmp_path: Path) -> None:
    assert plant(tmp_path, micro__world="") == ["micro/world.py stands in no room of docs/architecture.md"]
    (tmp_path / "micro/world.py").unlink()
    for path in ("pipeline/storage.py", "pipeline/input/read.py", "stages/engine/solver.py"):
        (tmp_path / path).write_text("")
    (tmp_path / "pipeline/storage.py").unlink()
    house = read_house(HOUSE)
    said = faults(house, read_imports(tmp_path, PACKAGES, house.libraries), sources(tmp_path))
    assert said == ["docs/architecture.md has a room pipeline/storage.py, where nothing is"]


def test_heavy_libraries_are_found_where_they_may_not_be(tmp_path: Path) -> None:
    assert plant(tmp_path, pipeline__run__plan="def plan():\n    import ray.data") == [
        "pipeline/run/plan.py:2 imports ray: not there"
    ]
    assert plant(tmp_path, index__reference="from torch import nn") == [
        "index/reference.py:1 imports torch at its top: only inside functions there"
    ]


def test_a_permission_that_nothing_uses_is_found() -> None:
    house = read_house(HOUSE)
    found = [Import("stages/rare/stage.py", 1, "torch"), Import("pipeline/run/cluster.py", 2, "ray", late=True)]
    assert unused(house, found) == ["docs/architecture.md lets index import torch, and nothing there does"]


def test_a_job_that_loads_a_heavy_library_around_corners_is_found(tmp_path: Path) -> None:
    """The stage may have torch at its top; a module that every command loads may not load the stage."""
    assert plant(tmp_path, jobs__cli="from stages.rare.stage import grow") == [
        "loading jobs/cli.py loads torch: jobs/cli.py -> stages/rare/stage.py -> torch"
    ]


def test_the_library_knows_nothing_of_its_tests(tmp_path: Path) -> None:
    assert plant(tmp_path, jobs__cli="def main():\n    import tests.support") == [
        "jobs/cli.py:2 imports tests: the library knows nothing of it"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "from pipeline.run.plan import gone",
        "def measure():\n    from pipeline.run.plan import MOST, gone",
        "import pipeline.run.gone",
        "from pipeline.run import gone",
        "from pipeline.gone import plan",
    ],
)
def test_a_name_that_no_module_has_is_found(tmp_path: Path, text: str) -> None:
    plant(
        tmp_path,
        pipeline__storage="class Folder: ...",
        pipeline__run__plan="if 1:\n    from pipeline.storage import Folder as Kept\nLEAST, (MOST, *REST) = 1, (2, 3)",
        pipeline__run__driver="def run(): ...",
        pipeline__input__read="def rows(): ...",
        jobs__cli="from pipeline.run.plan import Kept, LEAST, REST\nfrom pipeline.run import plan\nimport pipeline.run",
        stages__rare__stage="from stages.engine.solver import solve",
        stages__engine__solver="async def solve(): ...",
    )
    assert missing(tmp_path) == []
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/speed.py").write_text(text)
    (fault,) = missing(tmp_path)
    assert fault.startswith("benchmarks/speed.py:")
    assert fault.endswith("which is not there")


@pytest.mark.parametrize(
    ("page", "said"),
    [("no blocks", "no block"), ("```floors\na\na\n```\n```libraries\n```\n", "a: on two floors")],
)
def test_a_page_that_declares_no_house(page: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        read_house(page)


def test_relative_imports_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="relative"):
        plant(tmp_path, jobs__cli="from . import run")
