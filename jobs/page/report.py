"""``OUT/report.html``: one self-contained page that works offline, in light and dark, narrow and wide.

General panels come from here; a job adds its own through `jobs.schema.base.JobBase.panels`. A panel that raises
becomes a note on the page: the report never fails a job.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.commands.progress import duration
from jobs.page import charts
from jobs.page.html import Exhibit, Html, escape, gallery, shorten, table, tag, words
from jobs.page.view import View
from jobs.schema import registry
from jobs.schema.base import JobBase

if TYPE_CHECKING:
    from pipeline.output.dataset import Record

__all__ = ["Panel", "View", "write_chain_report", "write_report"]

REPORT_FILE = "report.html"
_STYLE = Path(__file__).with_name("report.css")
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_PICTURES = 24
_MEASURES = 24
_REASONS = 20
_FAILURES = 50
Content = Any


@dataclass(frozen=True)
class Panel:
    """One section of the page.

    Attributes:
        title: Heading.
        draw: Makes the content from the dataset; an empty result leaves the panel out.
        note: A sentence below the heading.
    """

    title: str
    draw: Callable[[View], Html]
    note: str = ""


def write_report(output: str, job: JobBase | None = None, storage_options: Mapping[str, Any] | None = None) -> str:
    """Write the page of one run.

    Args:
        output: The run's output folder.
        job: The job that ran, for its own panels. Left out: rebuilt from the settings kept in the plan.

    Returns:
        The page's address.

    Raises:
        pipeline.output.dataset.OutputError: There is no run in the folder.
    """
    from pipeline.output.dataset import Output

    opened = Output.open(output, storage_options)
    view = View(opened)
    own = _own_panels(job or _stored_job(view))
    page = render(view, own, title=output.rstrip("/").rpartition("/")[2] or output)
    with opened.open_file(REPORT_FILE, "wb") as file:
        file.write(page.encode("utf-8", "replace"))
    return f"{output.rstrip('/')}/{REPORT_FILE}"


def render(view: View, own: Sequence[Panel], title: str) -> Html:
    """The page of one run as markup."""
    before = [Panel("Overview", _overview), Panel("Pictures", _pictures)]
    after = [
        Panel("Throughput", _throughput),
        Panel("Measures", _measures),
        Panel("Failed rows", _failed),
        Panel("Columns", _columns),
        Panel("Settings", _settings),
        Panel("How to load it", _loading),
    ]
    drawn = [(panel, _draw(panel, view)) for panel in [*before, *own, *after]]
    sections = [_section(panel, content) for panel, content in drawn if content]
    links = [tag("a", panel.title, href=f"#{_anchor(panel.title)}") for panel, content in drawn if content]
    kind = str(view.config.get("job", "dataset"))
    head = tag(
        "header",
        tag("p", "latentmill", class_="brand"),
        tag("h1", words(title, 80)),
        tag("p", tag("span", view.status.state, class_=f"pill {view.status.state}"), " ", kind, class_="sub"),
        tag("nav", links),
    )
    return document(f"{title} · latentmill", head, sections)


def document(title: str, head: Html, sections: Sequence[Html]) -> Html:
    """A whole page: its style inside, nothing fetched, no scripts allowed."""
    meta = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", title),
        tag("style", Html(_STYLE.read_text(encoding="utf-8"))),
    ]
    body = tag("body", head, tag("main", sections))
    return escape([Html("<!doctype html>\n"), tag("html", tag("head", meta), body, lang="en")])


def _draw(panel: Panel, view: View) -> Html:
    try:
        return panel.draw(view)
    except Exception as error:  # a panel reads untrusted rows; the page must come out whatever it meets
        return tag("p", f"This panel could not be drawn: {type(error).__name__}: {shorten(error, 200)}", class_="quiet")


def _section(panel: Panel, content: Html) -> Html:
    note = tag("p", panel.note, class_="quiet") if panel.note else None
    return tag("section", tag("h2", panel.title), note, content, id=_anchor(panel.title))


def _anchor(title: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in title.lower())


def _own_panels(job: JobBase | None) -> list[Panel]:
    if job is None:
        return []
    try:
        return job.panels()
    except Exception as error:
        message = f"The job's own panels are missing: {type(error).__name__}: {shorten(error, 200)}"
        return [Panel(job.job, lambda view: tag("p", message, class_="quiet"))]


def _stored_job(view: View) -> JobBase | None:
    """The job as the plan remembers it; None where its kind is not installed or its settings have changed."""
    try:
        model = registry.find(view.config["job"])
        job = model.model_validate({**view.config, "input": "unused"})
    except (KeyError, ValueError):
        return None
    return job if isinstance(job, JobBase) else None


def _tile(label: str, value: Content, note: Content = None, tone: str | None = None) -> Html:
    value_tag = tag("strong", value, class_=tone)
    return tag("div", tag("span", label), value_tag, tag("small", note) if note else None, class_="tile")


def _overview(view: View) -> Html:
    progress, records = view.status.progress, view.records
    done = progress.rows_ok + progress.rows_failed
    seconds = sum(record.seconds for record in records)
    size = sum(record.size for record in records)
    workers = len({record.worker for record in records})
    elapsed = sum(end - start for start, end in _busy(records))
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
        _tile("speed", f"{charts.number(done / elapsed)}/s" if elapsed else "-", "rows, all workers together"),
        _tile("time at work", duration(elapsed), f"{duration(seconds)} of workers' time"),
        _tile("shards", f"{progress.shards_done:,}", f"by {workers} worker{'s' if workers != 1 else ''}"),
        _tile("size", _size(size), f"{_size(size / done)} a row" if done else None),
    ]
    means = [
        _tile(f"mean {name.replace('_', ' ')}", charts.number(found["mean"]), _spread(found))
        for name, found in list(view.measures.items())[:6]
        if found.get("n")
    ]
    extra = tag("div", means, class_="tiles small") if means else None
    return escape([tag("div", tiles, class_="tiles"), extra])


def _spread(found: Mapping[str, float]) -> str:
    return f"{charts.number(found['min'])} to {charts.number(found['max'])}"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


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
        count = record.rows_ok + record.rows_failed
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
        rows[record.worker] = rows.get(record.worker, 0.0) + record.rows_ok + record.rows_failed
    top = dict(sorted(rows.items(), key=lambda item: -item[1])[:12])
    more = f" (first 12 of {len(rows)})" if len(rows) > 12 else ""
    return tag("div", charts.bars(top, f"Rows by worker{more}"), class_="cell wide")


def _measures(view: View) -> Html:
    names = view.named("number")
    drawn = [charts.histogram(view.values(name), name.replace("_", " ")) for name in names[:_MEASURES]]
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
    facts: list[tuple[str, Any]] = list(_flat(view.config))
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
    path = view.output.path.rstrip("/")
    files = f"{path}/data/*.parquet"
    text = (
        f"from datasets import load_dataset\nrows = load_dataset({path!r}, split='train')\n\n"
        f"import duckdb\nduckdb.sql(\"SELECT status, count(*) FROM '{files}' GROUP BY 1\")\n\n"
        f"import polars\npolars.scan_parquet({files!r})"
    )
    return tag("pre", tag("code", text))


def write_chain_report(output: str, storage_options: Mapping[str, Any] | None = None) -> str:
    """Write the page of a chain: its steps, how each ended, and what each one's job shows of itself.

    Returns:
        The page's address.
    """
    from jobs.run import chain_steps, open_at
    from pipeline.output.dataset import Output, OutputError

    sections: list[Html] = []
    rows: list[list[Any]] = []
    links: list[Html] = []
    states: list[str] = []
    for step in chain_steps(output, storage_options) or []:
        name = step["name"]
        try:
            view = View(Output.open(step["output"], storage_options))
        except OutputError:
            rows.append([name, step["job"], tag("span", "not started", class_="pill"), "", "", ""])
            states.append("not started")
            continue
        progress = view.status.progress
        state = view.status.state
        states.append(state)
        busy = sum(end - start for start, end in _busy(view.records))
        rows.append(
            [
                tag("a", name, href=f"#{_anchor(name)}"),
                step["job"],
                tag("span", state, class_=f"pill {state}"),
                f"{progress.rows_ok:,}",
                f"{progress.rows_failed:,}",
                duration(busy),
            ]
        )
        own = _own_panels(_stored_job(view)) or [Panel("Pictures", _pictures), Panel("Measures", _measures)]
        panels = [*own, Panel("Failed rows", _failed), Panel("Overview", _overview)]
        parts = [(panel, _draw(panel, view)) for panel in panels]
        body = [[tag("h3", panel.title), panel.note, content] for panel, content in parts if content]
        page = tag("p", tag("a", "the step's own page", href=_relative(output, step["output"])), class_="quiet")
        sections.append(tag("section", tag("h2", f"{name} ", tag("small", step["job"])), body, page, id=_anchor(name)))
        links.append(tag("a", name, href=f"#{_anchor(name)}"))
    state = next((state for state in states if state != "complete"), "complete")
    listing = table(["Step", "Job", "State", "Ok", "Failed", "Time"], rows, numeric=(3, 4, 5))
    title = output.rstrip("/").rpartition("/")[2] or output
    head = tag(
        "header",
        tag("p", "latentmill", class_="brand"),
        tag("h1", words(title, 80)),
        tag("p", tag("span", state, class_=f"pill {state}"), f" chain of {len(rows)} steps", class_="sub"),
        tag("nav", links),
    )
    page = document(f"{title} · latentmill", head, [tag("section", tag("h2", "Steps"), listing), *sections])
    with open_at(output, REPORT_FILE, "wb", storage_options) as file:
        file.write(page.encode("utf-8", "replace"))
    return f"{output.rstrip('/')}/{REPORT_FILE}"


def _relative(output: str, step: str) -> str:
    base = output.rstrip("/") + "/"
    return f"{step[len(base) :]}/{REPORT_FILE}" if step.startswith(base) else f"{step.rstrip('/')}/{REPORT_FILE}"
