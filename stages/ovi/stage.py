"""The stage of `invert-prompts`: a prompt and the name of a method in, an image embedding (and its picture) out."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from itertools import islice

import numpy as np

from pipeline.contract import Column, Form, Row, StageInfo, batches, failed
from stages.engine.device import chosen_device, exact_float32
from stages.engine.room import Rooms
from stages.engine.turns import in_turns
from stages.models import clip, kandinsky
from stages.models.captions import PROMPT_COLUMNS, PROMPT_READS, TOKEN_COLUMNS, count_told, prompt_of
from stages.models.fingerprint import describe_model
from stages.models.names import shipped
from stages.ovi import scoring
from stages.ovi.context import Context, require_captions
from stages.ovi.methods import build
from stages.ovi.settings import OVI, InvertPromptsSettings, TrainedPrior
from stages.ovi.summary import Moments, Spent

_READS: dict[str, Form] = {**PROMPT_READS, **dict.fromkeys(scoring.ASKED, "value")}
CHUNK, DRAWN = clip.TEXTS, 256
"""Most rows that are read, or finished, at once: those without pictures, and those with."""
KNOWN_BYTES = 64 << 20
"""Of prompts whose text embeddings are kept: the rows of a prompt, one a method and draw, come one after another, and
lists of prompts that people have repeat themselves."""
_KNOWN_PROMPT = 500
"""Bytes of such a prompt beside its embedding."""
_INTERNAL = frozenset({"key", "own_id", "variable", "start", "text"})

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
        exact_float32(True)
        model, revision, self.scores = settings.encoder, settings.revision, settings.scores
        self.rooms = Rooms(self.device)
        self.text = clip.TextEncoder(
            model, revision, self.device, allow_pickle=settings.allow_pickle, room=self.rooms["texts"]
        )
        self.reference = None
        if settings.reference is not None:
            from index.reference import Reference

            encoder = clip.identity(model, "image", revision, allow_pickle=settings.allow_pickle)
            self.reference = Reference.open(settings.reference, encoder=encoder, device=self.device)
        context = Context(
            model=model, revision=revision, device=self.device, seed=settings.seed,
            vision=lambda: self.image_encoder.model, text=self.text, reference=self.reference,
            allow_pickle=settings.allow_pickle, states=settings.store_states, rooms=self.rooms,
            alone=settings.encoder_of_one_precision,
        )  # fmt: skip
        self.methods = {method.label: build(method, context) for method in settings.methods}
        self.decoder = None
        if settings.decoder is not None:
            negative_E = self.image_encoder.zero_embedding()
            self.decoder = kandinsky.Decoder(
                settings.decoder, negative_E, seed=settings.seed, device=self.device,
                allow_pickle=settings.allow_pickle, room=self.rooms["pictures"],
            )  # fmt: skip
        self.oracle = None
        if "oracle" in self.scores:
            self.oracle = scoring.open_oracle(settings.oracle)
        self.spent = Spent(self.methods, context.occupancy)
        self.slots = sum(context.slots.values())
        # No more than the slots give back in a while: what waits to be many holds its shards open.
        most = CHUNK if settings.decoder is None else DRAWN
        self.chunk = min(most, max(context.slots.values(), default=most))
        if self.settings.decoder is not None:
            self.chunk = max(self.chunk, self.settings.decoder.batch_size)
        self._known: dict[str, tuple[np.ndarray, dict[str, int | bool]]] = {}
        self._most_known = KNOWN_BYTES // (_KNOWN_PROMPT + 4 * clip.text_width(model, revision))
        self._read = 0.0  # seconds of this call that rows, and their texts' embeddings, were waited for

    @cached_property
    def image_encoder(self) -> clip.ImageEncoder:
        return clip.ImageEncoder(
            self.settings.encoder, self.settings.revision, self.device, allow_pickle=self.settings.allow_pickle,
            room=self.rooms["judged pictures"],
        )  # fmt: skip

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
        if settings.store_states is not None:
            columns.append(_states_column(settings))
        if settings.decoder is not None:
            columns.append(Column("image", "image"))
            columns += _CLIP_SCORE if "clip" in settings.scores else ()
            if "oracle" in settings.scores:
                columns += _ORACLE_SCORES
                shipped("micro:oracle")  # that it is not installed is said while the job is planned
            kandinsky.check_width(settings.decoder, width)
            models |= kandinsky.identity(settings.decoder, pickles)
        return StageInfo(tuple(columns), models, reads=_READS)

    @property
    def holds(self) -> int:
        """Most rows at a time: read, waiting for their method's turn, in the slots, and waiting to be finished."""
        return self.chunk + 2 * self.slots + len(self.methods) * self.chunk

    def take_summary(self) -> dict[str, np.ndarray]:
        return self.spent.take()

    def tally(self) -> Moments | None:
        """Of a shard's rows."""
        return Moments() if "frechet" in self.scores else None

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        """One row out for each in. The methods take turns, each with its slots full for as long as rows come."""
        self._read = 0.0
        unfinished: dict[str, list[Row]] = {label: [] for label in self.methods}
        first = next(iter(self.methods))
        begun = time.perf_counter()
        for label, row in in_turns(
            self._timed(self._prepared(rows)), self.methods, lambda row: row["method"] if "key" in row else first,
            max(self.slots, 1),
        ):  # fmt: skip
            self.spent.add(label, "seconds", time.perf_counter() - begun - self._read)
            if "key" not in row:
                yield row
            else:
                unfinished[label].append(row)
            if len(unfinished[label]) >= self.chunk:
                yield from self._finished(label, unfinished[label])
                unfinished[label] = []
            self._read, begun = 0.0, time.perf_counter()
        for label, left in unfinished.items():
            yield from self._finished(label, left)

    def _timed(self, rows: Iterator[Row]) -> Iterator[Row]:
        """The rows; what they are waited for counts for no method."""
        while True:
            begun = time.perf_counter()
            row = next(rows, None)
            self._read += time.perf_counter() - begun
            if row is None:
                return
            yield row

    def _problem(self, row: Row) -> str | None:
        prompt = prompt_of(row)
        if prompt is None:
            return f"no prompt: none of the columns {', '.join(PROMPT_COLUMNS)} holds a text"
        if not prompt.strip():
            return "the prompt is empty"
        if row.get("method") not in self.methods:
            return f"no method {row.get('method')!r}: the job has {', '.join(self.methods)}"
        return None

    def _prepared(self, rows: Iterable[Row]) -> Iterator[Row]:
        """Rows as the methods take them, under ids without their method; those that no method can take have failed."""
        for chunk in batches(rows, self.chunk):
            good: list[Row] = []
            for row in chunk:
                problem = self._problem(row)
                if problem:
                    yield failed(row, problem)
                else:
                    good.append(row)
            begun = time.perf_counter()
            prompts = [str(prompt_of(row)) for row in good]
            texts = self._texts(prompts)
            for label, count in Counter(row["method"] for row in good).items():
                self.spent.add(label, "seconds", (time.perf_counter() - begun) * count / len(good))
            for row, prompt in zip(good, prompts, strict=True):
                text_E, counts = texts[prompt]
                own_id = str(row["id"])
                key = own_id.removesuffix(f"/{row['method']}")
                yield {**row, "id": key, "own_id": own_id, "key": key, "prompt": prompt, "text": text_E, **counts}

    def _texts(self, prompts: list[str]) -> dict[str, tuple[np.ndarray, dict[str, int | bool]]]:
        """Of each distinct prompt the text embedding (E,) and its `TOKEN_COLUMNS`."""
        known = self._known
        if new := list(dict.fromkeys(prompt for prompt in prompts if prompt not in known)):
            text_BE, counts = self.text.counted(new)
            known |= {
                prompt: (text_E, count_told([(count, self.text.length)]))
                for prompt, text_E, count in zip(new, text_BE.numpy(), counts, strict=True)
            }
        found = {prompt: known[prompt] for prompt in prompts}
        for prompt in [*islice(known, max(0, len(known) - self._most_known))]:
            del known[prompt]
        return found

    def _finished(self, label: str, rows: list[Row]) -> Iterator[Row]:
        """A method's rows measured and, if asked, decoded and scored."""
        done, lost = _parted(rows)
        done = scoring.embedding_measures(done, self.reference)
        if self.decoder is not None:
            begun = time.perf_counter()
            done, undrawn = _parted(self.decoder(done, key="key"))
            self.spent.add(label, "decode_seconds", time.perf_counter() - begun)
            lost += undrawn
            done = self._scored(done)
        for row in [*lost, *done]:
            yield self._output(row)

    def _output(self, row: Row) -> Row:
        """The row under its own id, without what only the methods needed."""
        kept = {name: value for name, value in row.items() if name not in _INTERNAL}
        if self.settings.store_tokens and "variable" in row:
            kept["tokens"] = row["variable"]
        return {**kept, "id": row["own_id"]}

    def _scored(self, rows: list[Row]) -> list[Row]:
        if "clip" in self.scores or "frechet" in self.scores:
            rows = scoring.clip_scores(rows, self.image_encoder)
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


def _states_column(settings: InvertPromptsSettings) -> Column:
    """Of all OVI methods, which have to agree on its shape.

    Raises:
        ValueError: They do not, there is none, or one keeps the embedding of another step than its last.
    """
    own = [method for method in settings.methods if isinstance(method, OVI)]
    if any(method.stopping.best for method in own):
        raise ValueError("`store_states` keeps the last step's, and `stop: {best: true}` the embedding of another")
    lengths = {method.tokens if method.compact else None for method in own}
    if len(lengths) != 1:
        raise ValueError(
            "`store_states` needs OVI methods with sequences of one length: all compact with as many tokens, or none"
        )
    shape = clip.states_shape(settings.encoder, settings.revision, *lengths)
    doc = f"{settings.store_states} hidden states of the image encoder, behind its class token if it has one"
    return Column("states", "tensor", shape, "float16", doc=doc)
