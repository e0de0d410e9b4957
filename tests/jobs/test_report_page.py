"""The report page of real runs: whole, self-contained, and deaf to what stands in the rows."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.page import charts
from jobs.page.html import Exhibit, Html, gallery, picture, shorten, words
from jobs.page.report import Panel, render, throughput, write_report
from jobs.page.view import View
from jobs.run import run_job
from pipeline.output.commit import Record
from pipeline.output.dataset import Output
from tests.support.toy_job import Toy

ATTACKS = [
    "<script>document.title='owned'</script>",
    "\"'><img src=x onerror=alert(1)>",
    "</bdi></figcaption></section><h1>fake</h1>",
    "&lt;b&gt; ]]> <!-- {{7*7}} ${x}",
    "\u202eevil\u202c \x00\x07\x1b[31m",
    "x" * 10_000,
    "東京の夜、ערב טוב, Ωmega 🦔",
    "",
]


class Page(html.parser.HTMLParser):
    """Elements, attributes and texts as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, local_ray: str) -> str:
    folder = tmp_path_factory.mktemp("report")
    rows = [{"text": text, "key": f"{n}{text[:40]}"} for n, text in enumerate(ATTACKS)]
    rows += [{"text": f"fail {text[:200]}", "key": f"bad{n}{text[:40]}"} for n, text in enumerate(ATTACKS)]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    job = Toy.model_validate(
        {
            "input": {"path": str(folder / "rows.jsonl"), "id": "key"},
            "keep": ["text"],
            "shard_rows": 5,
            "max_failed_fraction": 1,
            "resources": {"cpus": 0.5},
        }
    )
    result = run_job(job, output=str(folder / "out"))
    assert result.report == f"{folder}/out/report.html"
    return result.output


@pytest.fixture(scope="module")
def page(output: str) -> Page:
    return Page((Path(output) / "report.html").read_text(encoding="utf-8"))


def test_nothing_is_fetched_and_nothing_runs(page: Page) -> None:
    names = {name for name, _ in page.elements}
    assert not names & {"script", "link", "iframe", "object", "embed", "form", "base"}
    for name, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on")]
        for key in ("src", "href", "xlink:href", "srcset", "action"):
            address = attributes.get(key)
            assert address is None or address.startswith(("data:image/", "#")), (name, address)
    policy = next(a["content"] for name, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    style = next(text for text in page.texts if "--paper" in text)
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style


def test_every_element_is_closed(page: Page) -> None:
    assert page.open == []


def test_rows_are_text_only(page: Page) -> None:
    assert [a for name, a in page.elements if name == "h1"] == [{}]  # ours alone
    shown = "".join(page.texts)
    assert "<script>document.title='owned'</script>" in shown
    assert not {"\x00", "\x07", "\x1b", "\u202e"} & set(shown)
    assert "(10,000 characters)" not in shown or "x" * 400 not in shown


def test_counts_measures_failures_and_own_panels(page: Page, output: str) -> None:
    shown = " ".join(page.texts)
    headings = [text for text in page.texts if text in ("Overview", "Throughput", "Measures", "Failed rows", "Lengths")]
    assert set(headings) == {"Overview", "Throughput", "Measures", "Failed rows", "Lengths"}
    assert "8 rows failed." in shown
    assert "All 8 failed rows" in shown
    assert shown.index("Lengths") < shown.index("Throughput")
    assert "length of the text" in shown
    assert "The text in other letters." in shown  # the columns' own words


def test_a_panel_that_raises_becomes_a_note(output: str) -> None:
    def broken(view: View) -> Html:
        raise RuntimeError("<b>no</b>")

    view = View(Output.open(output))
    made = render(view, [Panel("Broken", broken), Panel("Empty", lambda view: Html())], "title")
    assert "This panel could not be drawn: RuntimeError: &lt;b&gt;no&lt;/b&gt;" in made
    assert "Empty" not in made
    Page(made)


def test_a_stored_job_draws_its_own_panels_again(
    output: str, monkeypatch: pytest.MonkeyPatch, toy_job: type[Toy]
) -> None:
    report = Path(write_report(output))
    assert "Lengths" in report.read_text()
    monkeypatch.setattr(Toy, "panels", lambda self: 1 / 0)
    assert "own panels are missing: ZeroDivisionError" in Path(write_report(output)).read_text()


def test_the_view_reads_what_is_there(output: str) -> None:
    view = View(Output.open(output))
    assert view.columns["length"] == "number"
    assert view.columns["vector"] == "vector"
    assert view.columns["grey"] == "image"
    assert sorted(view.values("length").tolist()) == sorted(float(len(text)) for text in ATTACKS)
    assert view.values("vector").shape == (8, 4)
    assert view.values("length", limit=1).size < 8  # a sample: whole shards are left out
    assert [row["id"] for row in view.rows(["id"], limit=3, spread=False)] == [
        f"{n}{ATTACKS[n][:40]}" for n in range(3)
    ]
    assert len(view.rows(["id", "text"], limit=5)) == 5
    assert len(view.failures(limit=3)) == 3


def record(shard: int, started: float, seconds: float, rows: int = 10, worker: str = "host:1") -> Record:
    given: dict[str, Any] = {"shard": shard, "attempt": "a", "file": f"{shard}", "size": 1, "checksum": ""}
    return Record(**given, rows_ok=rows, rows_failed=0, started=started, seconds=seconds, worker=worker)


def test_throughput_keeps_the_rows_and_leaves_pauses_out() -> None:
    records = [record(0, 100.0, 10.0), record(1, 105.0, 10.0), record(2, 5000.0, 5.0, rows=50)]
    times, rates, pauses = throughput(records, bins=40)
    width = times[1] - times[0]
    assert pauses == 1
    assert times[-1] + width / 2 == pytest.approx(20.0)  # 15 s and 5 s at work
    assert sum(rates) * width == pytest.approx(70.0)
    assert rates[0] == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(10.0)
    assert throughput([]) == ([], [], 0)


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (-3, 7.2), (1e-9, 3e-9), (0, 123456), (5, 5), (0.98, 1.01), (float("nan"), 1)]
)
def test_ticks_are_round_and_inside(low: float, high: float) -> None:
    found = charts.ticks(low, high)
    assert 1 <= len(found) <= 8
    if high > low:
        assert all(low - 1e-12 <= tick <= high * (1 + 1e-9) for tick in found)
        digits = {f"{tick:.6e}".partition("e")[0].rstrip("0").rstrip(".") for tick in found}
        assert max(map(len, digits)) <= 5


@pytest.mark.parametrize(
    "values", [[], [float("nan")] * 3, [1.0], [2, 2, 2], [0, 1, 1, 2], np.random.default_rng(0).normal(size=5000)]
)
def test_a_histogram_draws_every_finite_value(values: Any) -> None:
    made = charts.histogram(values, "a <title>")
    Page(made)
    counts = [int(count.replace(",", "")) for count in re.findall(r": ([\d,]+)</title>", made)]
    assert sum(counts) == int(np.isfinite(np.asarray(values, dtype=float)).sum())
    assert "a &lt;title&gt;" in made


def test_lines_break_where_values_are_missing() -> None:
    made = charts.lines({"a": ([0, 1, 2, 3], [1.0, float("nan"), 2.0, 3.0])}, "t")
    assert made.count("<polyline") == 2
    assert "nan" not in made
    assert charts.lines({}, "t").count("no values") == 1


def test_pictures_that_are_none_leave_a_mark() -> None:
    made = gallery([Exhibit(b"junk", "a"), Exhibit(None, "b")])
    assert made.count("no picture") == 2
    from PIL import Image

    assert picture(Image.new("RGB", (2000, 1000))).startswith('<img src="data:image/jpeg;base64,')


def test_long_texts_say_how_long_they_are() -> None:
    assert shorten("x" * 500, 100) == "x" * 100 + " … (500 characters)"
    assert words("short") == "<bdi>short</bdi>"
