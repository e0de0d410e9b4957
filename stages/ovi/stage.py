"""The stage of `invert-prompts`: a prompt and the name of a method in, an image embedding (and its picture) out."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch

from pipeline.contract import Column, Row, StageInfo, batches, failed
from stages.engine.solver import Occupancy
from stages.models import clip
from stages.models import kandinsky as decode
from stages.ovi.settings import OVI, AnyRecipe, Recipe, TrainedPrior

PROMPT_COLUMNS = ("prompt", "text", "caption")
"""Where the prompt is looked for, in this order."""
CHUNK = 256
_INTERNAL = frozenset({"key", "variable", "start", "text", "seen"})

_MEASURES = (
    Column("text_cosine", "float32", doc="cosine of embedding and text embedding"),
    Column("norm", "float32", doc="norm of the embedding"),
    Column("loss", "float32", doc="final value of the objective"),
    Column("steps", "int64", doc="updates, or denoising steps of a trained prior"),
    Column("passes", "int64", doc="passes through the image encoder (forward and backward), or through the prior"),
    Column("stopped", "string", doc="why the optimisation ended: reached, stalled, limit"),
)
_AGAINST_REFERENCE = (
    Column("mahalanobis", "float32", doc="squared Mahalanobis distance to the reference's images, over E"),
    Column("neighbour_cosine", "float32", doc="mean cosine to the neighbours that the constraint pulled towards"),
    Column("nearest_cosine", "float32", doc="cosine to the nearest image of the reference"),
    Column("nearest_id", "string", doc="its id"),
)


def parse(methods: Sequence[Mapping[str, Any]]) -> tuple[Recipe, ...]:
    """Recipes from their JSON form."""
    from pydantic import TypeAdapter

    adapter: TypeAdapter[Any] = TypeAdapter(AnyRecipe)
    return tuple(adapter.validate_python(dict(method)) for method in methods)


class InvertPrompts:
    """Prompts to image embeddings by one of several methods a row, then, if asked, to pictures and scores.

    Rows carry `prompt` and `method` (a recipe's label). Whatever is random about a row is drawn from the seed and the
    id without its method, so that the methods of one prompt start from the same tokens and the same decoder noise.

    Args:
        model: Folder or hub id of the encoders.
        methods: Recipes in JSON form.
        reference: Output of a `reference` job.
        decoder: Keys `model`, `revision`, and those of `stages.models.kandinsky.Sampling`; None: no pictures.
        scores: Any of `clip`, `oracle`, `frechet`.
        oracle: Folder of the oracle; None: the shipped one.
        store_tokens: Keep OVI's tokens, for warm starts.
        device: None: CUDA where there is one.
    """

    def __init__(
        self, model: str, methods: Sequence[Mapping[str, Any]], *, revision: str | None = None,
        reference: str | None = None, decoder: Mapping[str, Any] | None = None, scores: Sequence[str] = (),
        oracle: str | None = None, store_tokens: bool = False, seed: int = 0, device: str | None = None,
    ) -> None:  # fmt: skip
        from stages.ovi import priors

        self.model, self.revision, self.scores, self.seed = model, revision, tuple(scores), seed
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.store_tokens = store_tokens
        self.text = clip.TextEncoder(model, revision, self.device)
        self.reference = None
        if reference is not None:
            from index.reference import Reference

            encoder = clip.identity(model, "image", revision)
            self.reference = Reference.open(reference, encoder=encoder, device=self.device)
        occupancy: dict[str, Occupancy] = {}
        self.occupancy = occupancy
        bench = priors.Bench(
            model=model, revision=revision, device=self.device, seed=seed, vision=lambda: self.images.model,
            text=self.text, reference=self.reference, occupancy=occupancy,
        )  # fmt: skip
        self.methods = {recipe.label: priors.build(recipe, bench) for recipe in parse(methods)}
        self.decoder = None
        if decoder is not None:
            options = {key: value for key, value in decoder.items() if key not in ("model", "revision")}
            self.decoder = decode.Decoder(
                decoder["model"], self.images.zero_embedding(), decode.Sampling(**options), seed=seed,
                revision=decoder.get("revision"), device=self.device,
            )  # fmt: skip
        self.oracle = None
        if "oracle" in self.scores:
            from micro.oracle import Oracle

            self.oracle = Oracle.load(oracle) if oracle else Oracle.load()
        self._start_summary()

    @cached_property
    def images(self) -> clip.ImageEncoder:
        return clip.ImageEncoder(self.model, self.revision, self.device)

    @staticmethod
    def describe(
        model: str, methods: Sequence[Mapping[str, Any]], *, revision: str | None = None,
        reference: str | None = None, decoder: Mapping[str, Any] | None = None, scores: Sequence[str] = (),
        oracle: str | None = None, store_tokens: bool = False, seed: int = 0, device: str | None = None,
    ) -> StageInfo:  # fmt: skip
        recipes = parse(methods)
        width = clip.embedding_width(model, revision)
        columns = [
            Column("prompt", "string"), Column("method", "string"),
            Column("embedding", "tensor", (width,), doc="image embedding, raw"), *_MEASURES,
        ]  # fmt: skip
        models = {
            "image_encoder": clip.identity(model, "image", revision),
            "text_encoder": clip.identity(model, "text", revision),
        }
        for recipe in recipes:
            if isinstance(recipe, TrainedPrior):
                from stages.models.fingerprint import describe_model

                own, part = (recipe.prior, "") if recipe.prior else (recipe.model or model, "prior")
                models[f"prior_{recipe.label}"] = describe_model(own, revision if own == model else None, part)
        if reference is not None:
            from index.reference import find

            columns += _AGAINST_REFERENCE
            digest = hashlib.blake2b((find(reference) / "reference.json").read_bytes(), digest_size=16).hexdigest()
            models["reference"] = {"path": reference, "revision": "", "fingerprint": digest}
        if store_tokens:
            columns.append(_tokens_column(recipes, model, revision))
        if decoder is not None:
            columns.append(Column("image", "image"))
            models |= decode.identity(decoder["model"], decoder.get("revision"))
            if "clip" in scores:
                columns.append(Column("clip_score", "float32", doc="100 max(cos(picture, prompt), 0)"))
            if "oracle" in scores:
                columns.append(Column("bound", "float32", doc="share of the asked objects that the oracle finds"))
                columns.append(Column("success", "bool", doc="the oracle finds everything that was asked"))
        return StageInfo(tuple(columns), models)

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        """One row out for each in; the shard's rows are held together, so that each method's slots stay full."""
        groups: dict[str, list[Row]] = {}
        for row in rows:
            problem = self._problem(row)
            if problem:
                yield failed(row, problem)
            else:
                groups.setdefault(row["method"], []).append(row)
        for label, group in groups.items():
            yield from self._by_method(label, group)

    def _problem(self, row: Row) -> str | None:
        prompt = prompt_of(row)
        if prompt is None:
            return f"no prompt: none of the columns {', '.join(PROMPT_COLUMNS)} holds a text"
        if not prompt.strip():
            return "the prompt is empty"
        if row.get("method") not in self.methods:
            return f"no method {row.get('method')!r}: the job has {', '.join(self.methods)}"
        return None

    def _by_method(self, label: str, group: list[Row]) -> Iterator[Row]:
        started = time.perf_counter()
        prompts = [str(prompt_of(row)) for row in group]
        text_BE = self.text(prompts)
        ids = {}
        given = []
        for row, prompt, text in zip(group, prompts, text_BE, strict=True):
            key = str(row["id"]).removesuffix(f"/{label}")
            ids[key] = row["id"]
            given.append({**row, "id": key, "key": key, "prompt": prompt, "text": text.numpy()})
        from stages.ovi.scoring import embedding_measures

        for chunk in batches(self.methods[label](given), CHUNK):
            self._spent(label, "seconds", time.perf_counter() - started)
            solved = [row for row in chunk if row["status"] != "failed"]
            out = [row for row in chunk if row["status"] == "failed"]
            solved = embedding_measures(solved, self.reference)
            self._count(label, solved, len(out))
            started = time.perf_counter()
            if self.decoder is not None:
                solved = list(self.decoder(solved, key="key"))
                self._spent(label, "decode_seconds", time.perf_counter() - started)
                out += [row for row in solved if row["status"] == "failed"]
                solved = self._scored(label, [row for row in solved if row["status"] != "failed"])
            for row in [*out, *solved]:
                if self.store_tokens and "variable" in row:
                    row["tokens"] = row["variable"]
                own = ids[row["key"]]
                yield {**{name: row[name] for name in row if name not in _INTERNAL}, "id": own}
            started = time.perf_counter()

    def _scored(self, label: str, rows: list[Row]) -> list[Row]:
        from stages.ovi import scoring

        if "clip" in self.scores or "frechet" in self.scores:
            rows = scoring.clip_scores(rows, self.images)
        if "frechet" in self.scores and rows:
            self._moments(f"pictures.{label}", np.stack([row["seen"] for row in rows]))
        if self.oracle is None:
            return rows
        good, bad = [], []
        for row in rows:
            try:
                scoring.asked_of(row)
                good.append(row)
            except ValueError as error:
                bad.append(failed(row, str(error)))
        return [*scoring.oracle_scores(good, self.oracle), *bad]

    # What a shard leaves beside its record: time and slot occupancy of each method, and moments of its embeddings.

    def _start_summary(self) -> None:
        self._totals: dict[str, dict[str, float]] = {label: {} for label in self.methods}
        self._accumulators: dict[str, Any] = {}
        for occupancy in self.occupancy.values():
            occupancy.__init__()  # type: ignore[misc]

    def _spent(self, label: str, what: str, seconds: float) -> None:
        totals = self._totals[label]
        totals[what] = totals.get(what, 0.0) + seconds

    def _count(self, label: str, solved: list[Row], lost: int) -> None:
        self._spent(label, "rows", len(solved))
        self._spent(label, "failed", lost)
        if "frechet" in self.scores and solved:
            self._moments(f"embeddings.{label}", np.stack([row["embedding"] for row in solved]))

    def _moments(self, name: str, z_BE: np.ndarray) -> None:
        from index.gaussian import Accumulator

        self._accumulators.setdefault(name, Accumulator(z_BE.shape[1])).add(z_BE)

    def take_summary(self) -> dict[str, np.ndarray]:
        """`totals.<method>`: rows, failed, seconds, decode seconds, slot steps, busy slot steps; and moments.

        Moments are those of `index.gaussian.Moments.to_arrays`, of the embeddings and of the pictures' embeddings.
        """
        summary = {}
        for label, totals in self._totals.items():
            occupancy = self.occupancy.get(label, Occupancy())
            summary[f"totals.{label}"] = np.array(
                [*(totals.get(name, 0.0) for name in TOTALS[:4]), occupancy.slot_steps, occupancy.busy_slot_steps]
            )
        for name, accumulator in self._accumulators.items():
            arrays = accumulator.moments().to_arrays()
            summary |= {f"moments.{name}.{part}": array for part, array in arrays.items()}
        self._start_summary()
        return summary


TOTALS = ("rows", "failed", "seconds", "decode_seconds", "slot_steps", "busy_slot_steps")


def prompt_of(row: Row) -> str | None:
    """The row's prompt: the first of its columns `prompt`, `text`, `caption` that holds a text."""
    return next((row[name] for name in PROMPT_COLUMNS if isinstance(row.get(name), str)), None)


def _tokens_column(recipes: Sequence[Recipe], model: str, revision: str | None) -> Column:
    counts = {recipe.tokens for recipe in recipes if isinstance(recipe, OVI)}
    if len(counts) != 1:
        raise ValueError(
            f"`store_tokens` needs OVI methods of one number of tokens, there are {sorted(counts) or 'none'}"
        )
    return Column("tokens", "tensor", (*counts, clip.vision_width(model, revision)), doc="OVI's tokens")
