"""Settings, and how a stage is named."""

from __future__ import annotations

from pipeline.contract import Settings, StageSpec, added


class Before(Settings):
    width: int = 3
    name: str | None = None


class After(Before):
    """The same with an option that is newer."""

    height: int | None = added(ge=1)
    """In pixels."""


def test_an_option_that_is_newer_shows_once_it_is_used() -> None:
    assert After().model_dump(mode="json") == Before().model_dump(mode="json") == {"width": 3, "name": None}
    assert After(height=2).model_dump(mode="json") == {"width": 3, "name": None, "height": 2}
    assert After.model_json_schema()["properties"]["height"]["description"] == "In pixels."
    assert After(height=2).part(After).height == 2


class Plain:
    """A stage that lies where it always lay."""


class Moved:
    """A stage that lay elsewhere."""

    known_as = "elsewhere:Moved"


def test_a_stage_is_known_by_its_import_path_or_the_one_it_had() -> None:
    assert StageSpec(f"{__name__}:Plain").name == f"{__name__}:Plain"
    assert StageSpec(f"{__name__}:Moved").name == "elsewhere:Moved"
