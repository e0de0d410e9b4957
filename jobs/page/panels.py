"""The sections that the page of every run has, whatever its job."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jobs.page import charts
from jobs.page.amounts import duration, figure, size
from jobs.page.html import Content, Exhibit, Html, escape, gallery, shorten, table, tag, words
from jobs.page.view import View
from jobs.schema.panel import Panel
from jobs.schema.registry import stored_job

if TYPE_CHECKING:
    from pipeline.output.commit import Record

_PICTURES = 24
_HEADLINES = ("psnr", "ssim", "text_cosine", "clip_score", "score", "neighbour_cosine", "loss", "residual_max", "norm")
_MEASURES = 24
_REASONS = 20
_FAILURES = 50


def of_a_run(own: Sequence[Panel]) -> list[Panel]:
    """All sections of a run's page, the job's own among them."""
    return [
        Panel("Overview", _overview),
        Panel("Pictures", _pictures),
        *own,
        Panel("Throughput", _throughput),
        Panel("Measures", _measures),
        Panel("Failed rows", _failed),
        Panel("Columns", _columns),
        Panel("Settings", _settings),
        Panel("How to load it", _loading),
    ]


def of_a_step(own: Sequence[Panel]) -> list[Panel]:
    """What a chain's page shows of a step: what its job says of itself, and what went wrong."""
    own = own or [Panel("Pictures", _pictures), Panel("Measures", _measures)]
    return [*own, Panel("Failed rows", _failed), Panel("Overview", _overview)]


def seconds_at_work(records: Sequence[Record]) -> float:
    """Time in which at least one shard was being worked on."""
    return sum(end - start for start, end in _busy(records))


def _tile(label: str, value: Content, note: Content = None, tone: str | None = None) -> Html:
    value_tag = tag("strong", value, class_=tone)
    return tag("div", tag("span", label), value_tag, tag("small", note) if note else None, class_="tile")


def _overview(view: View) -> Html:
    progress, records = view.status.progress, view.records
    done = progress.rows_done
    seconds = sum(record.seconds for record in records)
    written = sum(record.size for record in records)
    workers = len({record.worker for record in records})
    elapsed = seconds_at_work(records)
    share = progress.rows_failed / done if done else 0.0
    tiles = [
        _tile(
            "rows", f"{done:,}", f"of {progress.rows:,} planned" if done != progress.rows else "all that were planned"
        ),
        _tile(
            "failed",
            f"{progress.rows_failed:,}",
            f"{share:.2%} of rows" if progress.rows_failed else "none",
            "bad" if progress.rows_failed else "good",
        ),
        *(
            [_tile("duplicates", f"{progress.rows_duplicate:,}", "hold what an earlier row holds")]
            if progress.rows_duplicate
            else []
        ),
        _tile("speed", f"{charts.number(done / elapsed)}/s" if elapsed else "-", "rows, all workers together"),
        _tile("time at work", duration(elapsed), f"{duration(seconds)} of workers' time"),
        _tile("shards", f"{progress.shards_done:,}", f"by {workers} worker{'s' if workers != 1 else ''}"),
        _tile("size", size(written, ".3g"), f"{size(written / done, '.3g')} a row" if done else None),
    ]
    means = [
        _tile(f"mean {name.replace('_', ' ')}", figure(found["mean"], name), _spread(found, name))
        for name, found in _telling(view.measures)
    ]
    extra = tag("div", means, class_="tiles small") if means else None
    return escape([tag("div", tiles, class_="tiles"), extra])


def _telling(measures: Mapping[str, Mapping[str, float]]) -> list[tuple[str, Mapping[str, float]]]:
    """The six that say most: what is known to matter first, what is the same in all rows last."""
    found = [(name, one) for name, one in measures.items() if one.get("n")]

    def rank(entry: tuple[str, Mapping[str, float]]) -> tuple[bool, int]:
        name, one = entry
        return one["min"] == one["max"], _HEADLINES.index(name) if name in _HEADLINES else len(_HEADLINES)

    return sorted(found, key=rank)[:6]


def _spread(found: Mapping[str, float], name: str) -> str:
    return f"{figure(found['min'], name)} to {figure(found['max'], name)}"


def _busy(records: Sequence[Record]) -> list[tuple[float, float]]:
    """Stretches of time in which at least one shard was being worked on; pauses between resumed runs fall out."""
    spans = sorted((record.started, record.started + record.seconds) for record in records)
    merged: list[tuple[float, float]] = []
    for start, end in spans:
        if merged and start <= merged[-1][1] + 1.0:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def throughput(records: Sequence[Record], bins: int = 60) -> tuple[list[float], list[float], int]:
    """Rows a second over the time at work.

    Returns:
        Middle of each time bin in seconds since the start, with pauses cut out; rows a second in it; number of pauses.
    """
    stretches = _busy(records)
    total = sum(end - start for start, end in stretches)
    if total <= 0:
        return [], [], 0
    width = total / bins
    rows = [0.0] * bins

    def worked(moment: float) -> float:
        return sum(max(0.0, min(moment, end) - start) for start, end in stretches)

    for record in records:
        begin, end = worked(record.started), worked(record.started + record.seconds)
        count = record.rows
        first, last = min(bins - 1, int(begin / width)), min(bins - 1, int(end / width))
        for index in range(first, last + 1):
            overlap = min(end, (index + 1) * width) - max(begin, index * width)
            rows[index] += count * (max(0.0, overlap) / (end - begin) if end > begin else float(index == first))
    return [(index + 0.5) * width for index in range(bins)], [count / width for count in rows], len(stretches) - 1


def _throughput(view: View) -> Html:
    records = view.records
    if not records:
        return Html()
    times, rates, pauses = throughput(records, bins=min(60, max(6, 2 * len(records))))
    note = f"{pauses} pause{'s' if pauses != 1 else ''} between runs left out" if pauses else ""
    drawn = charts.lines({"rows": (times, rates)}, "Rows a second", "seconds at work", note, fill=True)
    return tag("div", tag("div", drawn, class_="cell wide"), _by_worker(records), class_="charts")


def _by_worker(records: Sequence[Record]) -> Html:
    rows: dict[str, float] = {}
    for record in records:
        rows[record.worker] = rows.get(record.worker, 0.0) + record.rows
    top = dict(sorted(rows.items(), key=lambda item: -item[1])[:12])
    more = f" (first 12 of {len(rows)})" if len(rows) > 12 else ""
    return tag("div", charts.bars(top, f"Rows by worker{more}"), class_="cell wide")


def _measures(view: View) -> Html:
    names = view.named("number")
    drawn = [charts.histogram(view.values(name), name.replace("_", " "), measure=name) for name in names[:_MEASURES]]
    for name in view.named("bool"):
        values = view.values(name)
        counts = {"yes": float((values == 1).sum()), "no": float((values == 0).sum())}
        drawn.append(tag("div", charts.bars(counts, name.replace("_", " "), "rows"), class_="cell"))
    if not drawn:
        return Html()
    more = len(names) - _MEASURES
    note = tag("p", f"{more} more numeric columns are not drawn.", class_="quiet") if more > 0 else None
    return escape([tag("div", drawn, class_="charts"), note])


def _pictures(view: View) -> Html:
    images = view.named("image")
    if not images:
        return Html()
    texts = view.named("text")
    caption = next((name for name in ("prompt", "caption", "text") if name in texts), texts[0] if texts else None)
    columns = ["id", *images, *([caption] if caption else [])]
    rows = view.rows(columns, max(1, _PICTURES // len(images)))
    shown = [
        Exhibit(row[name], str(row[caption] or "") if caption else "", _note(row["id"], name, len(images)))
        for row in rows
        for name in images
    ]
    return gallery(shown)


def _note(row_id: str, column: str, columns: int) -> str:
    return shorten(row_id, 48) if columns == 1 else f"{column} · {shorten(row_id, 32)}"


def _failed(view: View) -> Html:
    failed = view.status.progress.rows_failed
    if not failed:
        return Html()
    reasons = list(view.status.errors.items())
    listed = [[words(reason, 300), f"{count:,}", f"{count / failed:.1%}"] for reason, count in reasons[:_REASONS]]
    rows = [[tag("code", words(row["id"], 80)), words(row["error"], 300)] for row in view.failures(_FAILURES)]
    shown = f"The first {len(rows)} of {failed:,}" if failed > len(rows) else f"All {failed:,}"
    return escape(
        [
            tag("p", f"{failed:,} rows failed. They stand in the dataset with their reason; nothing was dropped."),
            table(["What went wrong", "Rows", "Share"], listed, numeric=(1, 2)),
            tag("details", tag("summary", f"{shown} failed rows"), table(["Id", "Reason"], rows)),
        ]
    )


def _columns(view: View) -> Html:
    from pipeline.output.schema import decode_schema

    rows = []
    for field in decode_schema(view.plan["schema"]):
        metadata = {key.decode(): value.decode(errors="replace") for key, value in (field.metadata or {}).items()}
        said = metadata.get("doc") or metadata.get("description") or ""
        shape = metadata.get("shape", "")
        about = [words(said, 300), tag("small", f" shape {shape}") if shape else None]
        rows.append([tag("code", field.name), tag("small", shorten(field.type, 80)), about])
    return table(["Column", "Type", "What it is"], rows)


def _settings(view: View) -> Html:
    plan = view.plan
    job = stored_job(plan)
    facts: list[tuple[str, Any]] = list(_flat(view.config if job is None else job.own_keys()))
    facts += [(f"model: {role}", model.get("path", "")) for role, model in dict(plan.get("models", {})).items()]
    facts += [
        (name, plan[name])
        for name in ("seed", "shard_rows", "keep", "limit", "fingerprint", "created")
        if plan.get(name)
    ]
    rows = [[tag("code", name), words(value, 200)] for name, value in facts]
    return tag("details", tag("summary", f"{len(rows)} settings"), table(["", ""], rows))


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found += _flat(value, f"{prefix}{key}.")
        elif value is not None and value != [] and value != {}:
            found.append((f"{prefix}{key}", value))
    return found


def _loading(view: View) -> Html:
    from pipeline.output.publish import loading

    files = f"{view.output.path.rstrip('/')}/{view.output.parts}"
    text = (
        f"from datasets import load_dataset\nrows = {loading(view.output)}\n\n"
        f"import duckdb\nduckdb.sql(\"SELECT status, count(*) FROM '{files}' GROUP BY 1\")\n\n"
        f"import polars\npolars.scan_parquet({files!r})"
    )
    return tag("pre", tag("code", text))
