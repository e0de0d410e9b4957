"""``latentmill compbench``: a T2I-CompBench++ run for a list of methods, and its table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.commands.errors import errors, note
from pipeline.extras import miniature

DEFAULT_JOB = Path(__file__).parents[1] / "examples" / "compbench-micro.yaml"
SCORES = ("bound", "success", "clip_score")
LIMIT_OF_INTERVAL = 1.959964

Scores = Mapping[tuple[str, str, str], Mapping[str, float]]
"""(method, category, score) -> prompt's id -> mean over its draws."""


def compbench(
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="OUT", help="Folder for prompts, rows and the table.")
    ],
    job: Annotated[
        Path,
        typer.Argument(
            metavar="JOB.yaml",
            help="An invert-prompts job file without `input`; else the miniature one.",
            show_default=False,
        ),
    ] = DEFAULT_JOB,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder with T2I-CompBench++'s prompt files, one a category. Left out: the miniature sets.",
        ),
    ] = None,
    reference: Annotated[str | None, typer.Option(metavar="OUT", help="Reference; replaces the job file's.")] = None,
    methods: Annotated[
        str | None, typer.Option(metavar="A,B", help="Only these of the job's methods, by name, with commas.")
    ] = None,
    categories: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Only these, with commas. Left out: all; of the miniature sets those of T2I-CompBench++.",
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Prompts a category. Left out: all (300).")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, metavar="N", help="Replaces the job file's seed.")] = None,
    draws: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Pictures a prompt; replaces the job file's draws.")
    ] = None,
) -> None:
    """Judge methods for prompts by T2I-CompBench++.

    The prompts are inverted and decoded by every method of the job file.
    """
    with errors():
        typer.echo(run(output, job, prompts, reference, _names(methods), _names(categories), limit, seed, draws))


def run(
    output: str, job: Path = DEFAULT_JOB, prompts: Path | None = None, reference: str | None = None,
    methods: list[str] | None = None, categories: list[str] | None = None, limit: int | None = None,
    seed: int | None = None, draws: int | None = None, address: str | None = None,
) -> str:  # fmt: skip
    """What the command does; returns its tables in Markdown, which are also written to ``table.md``.

    Raises:
        ValueError: The job file or the prompt files cannot be used, or rows were not all processed.
    """
    import yaml

    from jobs.run import run_job
    from jobs.schema.reading import load

    config = yaml.safe_load(job.read_text())
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    listing = folder / "prompts.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in read_prompts(prompts, limit, categories))
    if not listing.exists() or listing.read_text() != text:
        listing.write_text(text)
    config["input"] = {"path": str(listing), "id": "id"}
    config["keep"] = ["category"]
    if reference is None and job == DEFAULT_JOB and not Path(config["reference"]).exists():
        reference = _miniature_reference(folder, address)
    if reference is not None:
        config["reference"] = reference
    if seed is not None:
        config["seed"] = seed
    if draws is not None:
        config["draws"] = draws
    if methods is not None:
        config["methods"] = _chosen(config["methods"], methods)
    done = run_job(load(config, tell=note), output=str(folder / "rows"), address=address)
    if done.state != "complete":
        raise ValueError(f"{folder / 'rows'} is {done.state}: {done.reason}; run the command again to resume")
    summary = json.loads((folder / "rows" / "methods.json").read_text())
    scores = read_scores(folder / "rows")
    tables = f"{tabulate(scores, summary)}\n{compare(scores)}"
    (folder / "table.md").write_text(tables)
    return tables


def _miniature_reference(folder: Path, address: str | None) -> str:
    """The reference of the miniature world, made below the output folder where there is none yet."""
    from jobs.run import run_job

    pictures = {"job": "reference", "input": "micro-world://train?rows=3000&seed=0", "encoder": "micro:prior",
                "captions": True}  # fmt: skip
    return run_job(pictures, output=str(folder / "reference"), address=address).output


def _names(text: str | None) -> list[str] | None:
    return None if text is None else [name.strip() for name in text.split(",")]


def _chosen(methods: list[Any], wanted: list[str]) -> list[Any]:
    named = {(one if isinstance(one, str) else one.get("name") or one["method"]): one for one in methods}
    unknown = [name for name in wanted if name not in named]
    if unknown:
        raise ValueError(f"the job has no method {unknown[0]!r}; it has {', '.join(named)}")
    return [named[name] for name in wanted]


def read_prompts(
    folder: Path | None, limit: int | None, categories: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows ``id``, ``category``, ``prompt`` and, of the miniature sets, what is asked.

    Args:
        folder: T2I-CompBench++'s: text files of one prompt a line, ``<category>.txt`` or ``<category>_val.txt`` (what
            follows a tab is left out). None: the miniature sets.
        limit: Prompts a category.
        categories: Only these. None: all; of the miniature sets T2I-CompBench++'s six.

    Raises:
        ValueError: There are no prompt files, or no such category.
    """
    if folder is None:
        from dataclasses import asdict

        with miniature():
            from micro import prompts

        for category in categories or prompts.COMPBENCH:
            yield from (asdict(prompt) for prompt in prompts.load(category)[:limit])
        return
    found = sorted(folder.glob("*_val.txt")) or sorted(folder.glob("*.txt"))
    if not found:
        raise ValueError(f"{folder}: no prompt files (*_val.txt or *.txt) there")
    files = {file.stem.removesuffix("_val"): file for file in found}
    for category in categories or files:
        if category not in files:
            raise ValueError(f"{folder}: no category {category!r}, there are {', '.join(files)}")
        lines = [line.split("\t")[0].strip() for line in files[category].read_text().splitlines()]
        for number, line in enumerate([line for line in lines if line][:limit]):
            yield {"id": f"{category}-{number}", "category": category, "prompt": line}


def read_scores(rows: Path) -> Scores:
    """What the ok rows of a job's output scored."""
    import pyarrow.dataset as ds

    data = ds.dataset(str(rows / "data"), format="parquet")
    scores = [name for name in SCORES if name in data.schema.names]
    variants = [name for name in ("draw", "method") if name in data.schema.names]
    drawn: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for row in data.to_table(["id", "method", "category", *scores]).to_pylist():
        prompt = row["id"].rsplit("/", len(variants))[0]
        for score in scores:
            if row[score] is not None:
                of_prompt = drawn.setdefault((row["method"], row["category"], score), {})
                of_prompt.setdefault(prompt, []).append(float(row[score]))
    return {
        key: {prompt: sum(values) / len(values) for prompt, values in of_prompt.items()}
        for key, of_prompt in drawn.items()
    }


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean and half of its 95 % confidence interval (normal; 0 for a single value)."""
    values = list(values)
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, 0.0
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, LIMIT_OF_INTERVAL * math.sqrt(variance / len(values))


def _judge(scores: Scores) -> str:
    return "bound" if any(score == "bound" for _, _, score in scores) else "clip_score"


def _by_method(scores: Scores) -> dict[str, dict[str, float]]:
    """Method -> prompt -> what its judge gave, over all categories."""
    judged = _judge(scores)
    found: dict[str, dict[str, float]] = {}
    for (method, _, score), values in scores.items():
        if score == judged:
            found.setdefault(method, {}).update(values)
    return found


def tabulate(scores: Scores, summary: Mapping[str, Mapping[str, float | None]]) -> str:
    """Methods by categories in Markdown: the oracle's share of bound objects where there is one, else CLIP scores.

    Intervals are over prompts: draws of one prompt are averaged first, since they are no new evidence about others.
    """
    judged = _judge(scores)
    categories = list(dict.fromkeys(category for _, category, score in scores if score == judged))
    extra = [
        name
        for name in ("success", "clip_score", "frechet_pictures", "frechet_embeddings", "nearest_cosine", "passes",
                     "seconds_per_prompt")
        if any(found.get(name) is not None for found in summary.values())
    ]  # fmt: skip
    head = ["method", *categories, "all", *(name.replace("_", " ") for name in extra)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    everywhere = _by_method(scores)
    for method, found in summary.items():
        columns = [scores.get((method, category, judged)) for category in categories]
        cells = [method]
        for values in (*columns, everywhere.get(method)):
            cells.append("{:.3f} ± {:.3f}".format(*interval(values.values())) if values else "")
        cells += ["" if found.get(name) is None else f"{found[name]:.4g}" for name in extra]
        lines.append(f"| {' | '.join(cells)} |")
    measure = "share of asked objects found with all their attributes" if judged == "bound" else "CLIP score"
    return f"Categories: {measure}, mean ± half of its 95 % interval over prompts.\n\n" + "\n".join(lines) + "\n"


def compare(scores: Scores) -> str:
    """Every method against every other in Markdown: mean difference, prompt by prompt, over all categories.

    The same prompts are hard for every method, so that these intervals are narrower than those of two means suggest.
    """
    found = _by_method(scores)
    lines = [f"| method | {' | '.join(found)} |", f"|{'---|' * (len(found) + 1)}"]
    for method, own in found.items():
        cells = [method]
        for other, theirs in found.items():
            both = own.keys() & theirs.keys()
            if other == method or not both:
                cells.append("")
                continue
            mean, half = interval(own[prompt] - theirs[prompt] for prompt in both)
            sure = len(both) > 1 and abs(mean) > half
            cells.append(f"{'**' * sure}{mean:+.3f} ± {half:.3f}{'**' * sure}")
        lines.append(f"| {' | '.join(cells)} |")
    explained = "Row minus column, prompt by prompt; in bold where chance alone is ruled out (95 %)."
    return f"{explained}\n\n" + "\n".join(lines) + "\n"
