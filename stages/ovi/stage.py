"""The stage of `invert-prompts`: a prompt and the name of a method in, an image embedding (and its picture) out."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property

import numpy as np

from pipeline.contract import Column, Form, Row, StageInfo, batches, failed
from stages.engine.device import chosen_device
from stages.models import clip, kandinsky
from stages.models.captions import PROMPT_COLUMNS, PROMPT_READS, TOKEN_COLUMNS, prompt_of, token_counts
from stages.models.fingerprint import describe_model
from stages.models.names import shipped
from stages.ovi import scoring
from stages.ovi.context import Context, require_captions
from stages.ovi.methods import build
from stages.ovi.settings import OVI, InvertPromptsSettings, TrainedPrior
from stages.ovi.summary import Summary

_READS: dict[str, Form] = {**PROMPT_READS, **dict.fromkeys(scoring.ASKED, "value")}
CHUNK = 256
_INTERNAL = frozenset({"key", "variable", "start", "text", "picture_embedding"})

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
_CLIP_SCORE = (Column("clip_score", "float32", doc="100 max(cos(picture, prompt), 0)"),)
_ORACLE_SCORES = (
    Column("bound", "float32", doc="share of the asked objects that the oracle finds"),
    Column("success", "bool", doc="the oracle finds everything that was asked"),
)


class InvertPrompts:
    """Prompts to image embeddings by one of several methods a row, then, if asked, to pictures and scores.

    Rows carry `prompt` and `method` (a method's label). Whatever is random about a row is drawn from the seed and the
    id without its method, so that the methods of one prompt start from the same tokens and the same decoder noise.

    Args:
        settings: What is loaded, and what is done.
        device: None: CUDA where there is one.
    """

    known_as = "stages.invert_prompts:InvertPrompts"
    Settings = InvertPromptsSettings

    def __init__(self, settings: InvertPromptsSettings, device: str | None = None) -> None:
        self.settings, self.device = settings, chosen_device(device)
        model, revision, self.scores = settings.encoder, settings.revision, settings.scores
        self.text = clip.TextEncoder(model, revision, self.device, allow_pickle=settings.allow_pickle)
        self.reference = None
        if settings.reference is not None:
            from index.reference import Reference

            encoder = clip.identity(model, "image", revision, allow_pickle=settings.allow_pickle)
            self.reference = Reference.open(settings.reference, encoder=encoder, device=self.device)
        context = Context(
            model=model, revision=revision, device=self.device, seed=settings.seed,
            vision=lambda: self.image_encoder.model, text=self.text, reference=self.reference,
            allow_pickle=settings.allow_pickle,
        )  # fmt: skip
        self.methods = {method.label: build(method, context) for method in settings.methods}
        self.decoder = None
        if settings.decoder is not None:
            negative_E = self.image_encoder.zero_embedding()
            self.decoder = kandinsky.Decoder(
                settings.decoder, negative_E, seed=settings.seed, device=self.device, allow_pickle=settings.allow_pickle
            )
        self.oracle = None
        if "oracle" in self.scores:
            self.oracle = scoring.open_oracle(settings.oracle)
        self.summary = Summary(self.methods, context.occupancy)

    @cached_property
    def image_encoder(self) -> clip.ImageEncoder:
        return clip.ImageEncoder(
            self.settings.encoder, self.settings.revision, self.device, allow_pickle=self.settings.allow_pickle
        )

    @staticmethod
    def describe(settings: InvertPromptsSettings) -> StageInfo:
        model, revision, pickles = settings.encoder, settings.revision, settings.allow_pickle
        width = clip.embedding_width(model, revision)
        columns = [
            Column("prompt", "string"), *TOKEN_COLUMNS, Column("method", "string"),
            Column("embedding", "tensor", (width,), doc="image embedding, raw"), *_MEASURES,
        ]  # fmt: skip
        models = {
            "image_encoder": clip.identity(model, "image", revision, allow_pickle=pickles),
            "text_encoder": clip.identity(model, "text", revision, allow_pickle=pickles),
        }
        for method in settings.methods:
            if isinstance(method, TrainedPrior):
                own, part = (method.prior, "") if method.prior else (method.model or model, "prior")
                models[f"prior_{method.label}"] = describe_model(
                    own, revision if own == model else None, part, allow_pickle=bool(pickles)
                )
        if settings.reference is not None:
            columns += _AGAINST_REFERENCE
            models["reference"] = _identity_of_reference(settings, settings.reference, models)
        if settings.store_tokens:
            columns.append(_tokens_column(settings))
        if settings.decoder is not None:
            columns.append(Column("image", "image"))
            columns += _CLIP_SCORE if "clip" in settings.scores else ()
            if "oracle" in settings.scores:
                columns += _ORACLE_SCORES
                shipped("micro:oracle")  # that it is not installed is said while the job is planned
            kandinsky.check_width(settings.decoder, width)
            models |= kandinsky.identity(settings.decoder, pickles)
        return StageInfo(tuple(columns), models, reads=_READS)

    def take_summary(self) -> dict[str, np.ndarray]:
        return self.summary.take()

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
        counted = token_counts(prompts, [(self.text.tokenizer, self.text.length)])
        ids = {}
        given = []
        for row, prompt, text_E, counts in zip(group, prompts, text_BE, counted, strict=True):
            key = str(row["id"]).removesuffix(f"/{label}")
            ids[key] = row["id"]
            given.append({**row, "id": key, "key": key, "prompt": prompt, "text": text_E.numpy(), **counts})
        for chunk in batches(self.methods[label](given), CHUNK):
            self.summary.add(label, "seconds", time.perf_counter() - started)
            done, lost = _parted(chunk)
            done = scoring.embedding_measures(done, self.reference)
            self.summary.add(label, "rows", len(done))
            self.summary.add(label, "failed", len(lost))
            if "frechet" in self.scores:
                self.summary.observe(f"embeddings.{label}", [row["embedding"] for row in done])
            if self.decoder is not None:
                started = time.perf_counter()
                done, undrawn = _parted(self.decoder(done, key="key"))
                self.summary.add(label, "decode_seconds", time.perf_counter() - started)
                lost += undrawn
                done = self._scored(label, done)
            for row in [*lost, *done]:
                yield self._output(row, ids[row["key"]])
            started = time.perf_counter()

    def _output(self, row: Row, own_id: str) -> Row:
        """The row under its own id, without what only the methods needed."""
        kept = {name: value for name, value in row.items() if name not in _INTERNAL}
        if self.settings.store_tokens and "variable" in row:
            kept["tokens"] = row["variable"]
        return {**kept, "id": own_id}

    def _scored(self, label: str, rows: list[Row]) -> list[Row]:
        if "clip" in self.scores or "frechet" in self.scores:
            rows = scoring.clip_scores(rows, self.image_encoder)
        if "frechet" in self.scores:
            self.summary.observe(f"pictures.{label}", [row["picture_embedding"] for row in rows])
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


def _parted(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """Rows that go on, and rows that have failed."""
    good: list[Row] = []
    bad: list[Row] = []
    for row in rows:
        (bad if row["status"] == "failed" else good).append(row)
    return good, bad


def _identity_of_reference(
    settings: InvertPromptsSettings, path: str, models: Mapping[str, Mapping[str, str]]
) -> dict[str, str]:  # fmt: skip
    """Path and fingerprint of the reference; what does not fit it is told now, not by the workers.

    Args:
        models: The job's encoders.

    Raises:
        ValueError: It was made with other encoders, or has fewer rows or captions than a method asks for.
    """
    from index.reference import find, require_encoder

    folder = find(path)
    content = (folder / "reference.json").read_bytes()
    facts = json.loads(content)
    require_encoder(folder, facts["encoder"], models["image_encoder"])
    for method in settings.methods:
        require_captions(method, path, facts)
        if method.needed_captions and facts["text_encoder"]["fingerprint"] != models["text_encoder"]["fingerprint"]:
            raise ValueError(
                f"method {method.label!r}: the captions of {path} were embedded by {facts['text_encoder']['path']}, "
                f"the prompts are by {models['text_encoder']['path']}: make the reference with this text encoder"
            )
        if method.needed_rows > facts["rows"]:
            raise ValueError(f"method {method.label!r}: k is {method.needed_rows}, {path} has {facts['rows']} rows")
    return {"path": path, "revision": "", "fingerprint": hashlib.blake2b(content, digest_size=16).hexdigest()}


def _tokens_column(settings: InvertPromptsSettings) -> Column:
    counts = {method.tokens for method in settings.methods if isinstance(method, OVI)}
    if len(counts) != 1:
        raise ValueError(
            f"`store_tokens` needs OVI methods of one number of tokens, there are {sorted(counts) or 'none'}"
        )
    width = clip.vision_width(settings.encoder, settings.revision)
    return Column("tokens", "tensor", (*counts, width), doc="OVI's tokens")
