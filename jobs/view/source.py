"""The picture that a row was made of, read again from the job's input: outputs of some jobs keep none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.page.hits import source_pictures
from jobs.view.query import BadRequest

if TYPE_CHECKING:
    from PIL.Image import Image

    from jobs.view.run import Place, Run


def shows_source(run: Run) -> bool:
    """Whether the run was made of pictures, of which its output holds none."""
    holds = any(column.kind == "image" for column in run.columns.values())
    config = dict(run.output.plan.get("config") or {})
    return not holds and config.get("job") == "reference" and config.get("given") != "embeddings"


def source_picture(run: Run, place: Place) -> Image:
    """It. Files of the input's own folders are read; addresses in rows are not fetched.

    Raises:
        BadRequest: It is not there any more, or not to be read.
    """
    found = source_pictures(run.output, {place.shard: [place.row]}, fetch=False)
    picture = found.get((place.shard, place.row))
    if picture is None:
        raise BadRequest("the picture is not in the job's input any more, or is an address, which is not fetched here")
    return picture
