"""Job ``select-corpus``: a pool of candidate pictures to a training set of good ones that differ."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from jobs.page.html import Html, table
from jobs.page.view import View
from jobs.schema.base import RowJob
from jobs.schema.panel import Panel
from pipeline.contract import Settings, StageSpec, added, given, renamed
from stages.selection.settings import EmbedCandidatesSettings, SelectionSettings

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    import pipeline.run.driver

FOLDER = "corpus"
SELECTION = "selection.parquet"
BALANCE = "balance.json"
CLASSES = "classes.json"
NO_ORIGIN = "none"
PROVENANCE = ("prompt", "method", "guide", "anchor", "number", "candidate", "job_seed", "parents")
"""What an earlier run says of where a picture comes from, beside its id and its score."""
MOST_CLASSES = 200
"""Lines of the page's table."""


class Mixture(Settings):
    """How often rows of each origin are to be drawn in training, such as real pictures and grown ones."""

    by: str
    """Column that tells a row's origin, such as ``method``, which real pictures have not."""
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(min_length=1)
    """Value of that column -> its share of the draws; ``none`` is for rows without one. Shares need not sum to 1."""


class SelectCorpus(EmbedCandidatesSettings, SelectionSettings, RowJob):
    """Pictures with a class, of which the good ones that differ from each other become a training set.

    Rows need a picture in ``image``, and their class in the column `by`. All are embedded by the workers; when the last
    shard is committed, each class's candidates are compared with each other.
    """

    job: Literal["select-corpus"] = "select-corpus"
    by: str = "concept"
    """Column with the class of a picture."""
    score_column: str | None = Field("score", **renamed("score", to="score_column"))
    """Column with numbers, higher for better pictures. ``null``: there is none."""
    export: Literal["parquet", "imagefolder", "webdataset"] = "parquet"
    """What the training set is written as; `datasets.load_dataset` takes each."""
    test: float = Field(0.0, ge=0, lt=1)
    """Share of the pictures that go into the split ``test``, by a hash of their ids."""
    mixture: Mixture | None = added()
    """Give each picture of the training set a ``weight``, so that draws by weight mix origins in these shares."""

    @model_validator(mode="before")
    @classmethod
    def _keeps_what_it_needs(cls, value: Any) -> Any:
        if not isinstance(value, Mapping) or not isinstance(value.get("keep", ()), Sequence):
            return value
        needed = ["image", *(given(cls, value, name) for name in ("by", "score_column"))]
        if isinstance(mixture := value.get("mixture"), Mapping):
            needed.append(mixture.get("by"))
        if not all(name is None or isinstance(name, str) for name in needed):  # told as what it is
            return value
        keep = [name for name in value.get("keep", ()) if name not in needed]
        return {**value, "keep": [name for name in dict.fromkeys(needed) if name is not None] + keep}

    @model_validator(mode="after")
    def _columns_apart(self) -> SelectCorpus:
        for name in self.keep:
            if name in ("label", "class") or (name == "weight" and self.mixture is not None):
                raise ValueError(f"keep: the training set has a column {name!r} of its own; map it with input.columns")
        if self.by in ("id", "image", self.score_column):
            raise ValueError(f"by: {self.by!r} holds no classes; name the column that does")
        return self

    offered: ClassVar[tuple[str, ...]] = PROVENANCE

    @property
    def asked(self) -> dict[str, str]:
        origin = None if self.mixture is None else self.mixture.by
        named = {"mixture.by": origin, "score_column": self.score_column, "by": self.by}
        return {"image": "input.columns.image", **{column: key for key, column in named.items() if column is not None}}

    def stage(self) -> StageSpec:
        return StageSpec.of("stages.selection.stage:EmbedCandidates", self.part(EmbedCandidatesSettings))

    products: ClassVar[tuple[str, ...]] = (FOLDER, SELECTION, BALANCE, CLASSES)
    finish_apart: ClassVar[bool] = True

    def finish(self, finished: pipeline.run.driver.Finished) -> None:
        """Choose, a class at a time, and write what was chosen."""
        import tempfile

        _require_pictures(finished)
        with tempfile.TemporaryDirectory() as scratch:
            pool = gather(finished, self, f"{scratch}/embeddings")
            why = [said or "" for said in chosen(pool, self)]
        weights = None if self.mixture is None else mixed(pool, why, self.mixture)
        self._write_selection(finished, pool, why)
        self._write_corpus(finished, pool, why, weights)
        _write_json(finished, BALANCE, _balance(pool, why, self.count))

    def _write_selection(self, finished: pipeline.run.driver.Finished, pool: Pool, why: Sequence[str]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        columns = {
            "id": pa.array(pool.ids, pa.string()),
            "label": pa.array(pool.labels, pa.string()),
            "score": pa.array(pool.score_N, pa.float64(), from_pandas=True),
            "kept": pa.array([not said for said in why], pa.bool_()),
            "why": pa.array([said or None for said in why], pa.string()),
        }
        with finished.output.open_file(SELECTION, "wb") as file:
            pq.write_table(pa.table(columns), file)

    def _write_corpus(
        self, finished: pipeline.run.driver.Finished, pool: Pool, why: Sequence[str],
        weights: Mapping[str | None, float] | None,
    ) -> None:  # fmt: skip
        import pyarrow as pa

        from pipeline.output.training_set import split_of, writer

        numbers = {own: number for number, own in enumerate(pool.classes)}
        shown = [name for name in finished.output.plan["keep"] if name not in ("image", self.by)]
        start = 0
        with writer(self.export, FOLDER, finished.output.open_file) as corpus:
            for rows in finished.tables(["id", "image", self.by, *shown]):
                kept = [n for n in range(len(rows)) if not why[start + n]]
                labels = [str(pool.labels[start + n]) for n in kept]
                drawn = None if weights is None else [weights[pool.origins[start + n]] for n in kept]
                start += len(rows)
                taken = rows.take(pa.array(kept, pa.int64()))  # typed, or none of them has no type
                named = {
                    "id": taken["id"], "image": _pictures(taken["image"]), "label": pa.array(labels, pa.string()),
                    "class": pa.array([numbers[own] for own in labels], pa.int64()),
                    **({} if drawn is None else {"weight": pa.array(drawn, pa.float64())}),
                    **{name: taken[name] for name in shown},
                }  # fmt: skip
                splits = [split_of(own, self.test) for own in taken["id"].to_pylist()]
                for split in sorted(set(splits)):
                    part = [n for n, own in enumerate(splits) if own == split]
                    corpus.add(split, pa.table(named).take(part))
        _write_json(finished, CLASSES, numbers)

    def card(self, finished: pipeline.run.driver.Finished) -> str:
        return _CARD.format(output=finished.output.path, by=self.by)

    def panels(self) -> list[Panel]:
        note = "Candidates of each class, those that were kept, and why the others were not."
        return [Panel("Class balance", _draw_balance, note)]


_CARD = """## The training set

`{output}/corpus` holds the pictures that were kept, `selection.parquet` every candidate with `kept` and `why` it was
not, `balance.json` their numbers by class (column `{by}`), `classes.json` the number of each class.

"""


@dataclass(frozen=True)
class Pool:
    """All rows, in the order of the output.

    Attributes:
        ids, labels: Of each row; a label is None where a row has no class.
        score_N: NaN where there is none.
        origins: What each row's column of `mixture` says; None where it says nothing, or there is no mixture.
        nearest: The picture of `against` that a row is nearest to, and the cosine to it; None without `against`.
        good_N: The row has an embedding.
        z_NE: Memory map of embeddings; zeros where there is none.
    """

    ids: list[str]
    labels: list[str | None]
    origins: list[str | None]
    score_N: np.ndarray
    nearest: list[tuple[str, float] | None]
    good_N: np.ndarray
    z_NE: np.ndarray

    @property
    def classes(self) -> list[str]:
        return sorted({own for own in self.labels if own is not None})


def gather(finished: pipeline.run.driver.Finished, job: SelectCorpus, path: str) -> Pool:
    """What choosing needs of the committed rows; embeddings lie in a file, so that memory holds one class of them.

    Args:
        path: Of that file, on a local disk.

    Raises:
        ValueError: No row has an embedding, or the column of scores holds no numbers.
    """
    import numpy as np

    ids: list[str] = []
    labels: list[str | None] = []
    origins: list[str | None] = []
    scores: list[Any] = []
    good: list[bool] = []
    nearest: list[tuple[str, float] | None] = []
    against = ["nearest", "nearest_cosine"] if job.against is not None else []
    by = [] if job.mixture is None else [job.mixture.by]
    numbers = [job.score_column] if job.score_column else []
    wanted = dict.fromkeys(["id", "status", job.by, *by, *numbers, "embedding", *against])
    width = 1
    with open(path, "wb") as file:
        for rows in finished.tables(list(wanted)):
            ids += rows["id"].to_pylist()
            labels += [None if own is None else str(own) for own in rows[job.by].to_pylist()]
            told_of = rows[by[0]].to_pylist() if by else [None] * len(rows)
            origins += [None if own is None else str(own) for own in told_of]
            scores += rows[job.score_column].to_pylist() if job.score_column else [None] * len(rows)
            good += [own == "ok" for own in rows["status"].to_pylist()]
            if against:
                told = zip(*(rows[name].to_pylist() for name in against), strict=True)
                nearest += [None if own is None else (own, cosine) for own, cosine in told]
            width = rows["embedding"].type.list_size
            file.write(_filled(rows["embedding"], width).tobytes())
    if not any(good):
        raise ValueError("no candidate could be embedded, so there is nothing to choose from: see the failed rows")
    try:
        score_N = np.array([np.nan if own is None else own for own in scores], np.float64)
    except (TypeError, ValueError):
        message = f"score_column: {job.score_column!r} holds something else than numbers; name another, or null"
        raise ValueError(message) from None
    z_NE = np.memmap(path, np.float32, "r", shape=(len(ids), width))
    return Pool(ids, labels, origins, score_N, nearest or [None] * len(ids), np.array(good), z_NE)


def _require_pictures(finished: pipeline.run.driver.Finished) -> None:
    """What planning has seen to, unless the input's first rows held nothing in the column."""
    import pyarrow as pa

    from pipeline.input.rows import is_picture
    from pipeline.output.schema import decode_schema

    kind = decode_schema(finished.output.plan["schema"]).field("image").type
    if not (is_picture(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        message = "the column 'image' holds addresses of pictures, of which no training set can be made"
        raise ValueError(f"{message}: give their folder or a Parquet file with their bytes as the input")


def _pictures(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Encoded pictures as `datasets` types them, {bytes, path}, also where the column holds bytes alone."""
    import pyarrow as pa

    if pa.types.is_struct(column.type):
        return column
    data = column.combine_chunks().cast(pa.binary())
    return pa.chunked_array([pa.StructArray.from_arrays([data, pa.nulls(len(data), pa.string())], ["bytes", "path"])])


def _filled(column: pa.ChunkedArray, width: int) -> np.ndarray:
    """Embeddings as rows of float32, zeros where there is none."""
    import numpy as np

    z_NE = np.zeros((len(column), width), np.float32)
    there_N = np.flatnonzero(column.is_valid().to_numpy())
    taken = column.take(there_N)
    flat = [np.asarray(chunk.flatten(), np.float32) for chunk in taken.chunks]
    z_NE[there_N] = np.concatenate([np.empty(0, np.float32), *flat]).reshape(-1, width)
    return z_NE


def chosen(pool: Pool, job: SelectCorpus) -> list[str | None]:
    """Why each row of the pool is dropped; None: it is kept."""
    import numpy as np

    from stages.selection.choose import Candidates, choose

    why: list[str | None] = ["failed" if not good else "no class" for good in pool.good_N]
    members: dict[str, list[int]] = {}
    for n, own in enumerate(pool.labels):
        if own is not None and pool.good_N[n]:
            members.setdefault(own, []).append(n)
    for rows in members.values():
        copies = [near[0] if (near := pool.nearest[n]) and near[1] >= job.copy_cosine else None for n in rows]
        score_N = pool.score_N[rows] if job.score_column else None
        group = Candidates([pool.ids[n] for n in rows], np.asarray(pool.z_NE[rows]), score_N, copies)
        for n, said in zip(rows, choose(group, job), strict=True):
            why[n] = said
    return why


def mixed(pool: Pool, why: Sequence[str], mixture: Mixture) -> dict[str | None, float]:
    """Origin -> weight of each of its kept rows.

    Weights are 1 in the mean; those of an origin sum to its share, of the shares of origins that have kept rows. Ours.

    Raises:
        ValueError: A kept row's origin has no share.
    """
    counts: Counter[str | None] = Counter()
    for own, origin, said in zip(pool.ids, pool.origins, why, strict=True):
        if said:
            continue
        if (origin or NO_ORIGIN) not in mixture.weights:
            where = f"row {own!r} has {origin or 'nothing'!r} in the column {mixture.by!r}"
            raise ValueError(f"mixture: {where}, which has no weight; there are {', '.join(mixture.weights)}")
        counts[origin] += 1
    shares = {origin: mixture.weights[origin or NO_ORIGIN] for origin in counts}
    return {origin: shares[origin] / sum(shares.values()) * counts.total() / count for origin, count in counts.items()}


def _balance(pool: Pool, why: Sequence[str], count: int) -> dict[str, dict[str, Any]]:
    """Of each class: candidates, those kept, and how many were dropped for what."""
    said: dict[str, Counter[str]] = {own: Counter() for own in pool.classes}
    for own, reason in zip(pool.labels, why, strict=True):
        if own is not None:
            said[own][_kind(reason)] += 1
    return {
        own: {
            "candidates": each.total(), "kept": each.pop("", 0), "asked": count, "dropped": dict(sorted(each.items())),
        }
        for own, each in said.items()
    }  # fmt: skip


def _kind(reason: str) -> str:
    """A reason without the id in it."""
    return next((kind for kind in ("copy of", "too near") if reason.startswith(kind)), reason)


def _write_json(finished: pipeline.run.driver.Finished, name: str, value: Mapping[str, Any]) -> None:
    with finished.output.open_file(name, "wb") as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False).encode())


def _draw_balance(view: View) -> Html:
    try:
        with view.output.open_file(BALANCE) as file:
            balance: dict[str, dict[str, Any]] = json.loads(file.read())
    except FileNotFoundError:
        return Html("")
    fewest = sorted(balance.items(), key=lambda item: (item[1]["kept"] - item[1]["asked"], item[0]))
    lines = [
        [own, each["candidates"], f"{each['kept']} of {each['asked']}",
         ", ".join(f"{count} {kind}" for kind, count in each["dropped"].items())]
        for own, each in fewest[:MOST_CLASSES]
    ]  # fmt: skip
    return table(["class", "candidates", "kept", "dropped"], lines, (1, 2))
