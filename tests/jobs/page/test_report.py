"""The report page of real runs: whole, self-contained, and deaf to what stands in the rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.page.html import Html
from jobs.page.report import render
from jobs.page.view import View
from jobs.report import write_report
from jobs.run import run_job
from jobs.schema.panel import Panel
from pipeline.output.dataset import Output
from tests.support.html_page import Page
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
