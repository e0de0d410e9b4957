"""The stage of `invert-images`: a picture and a caption in, the noise latent that regenerates it out.

Legend: B rows; `x_BCHW` pictures in [-1, 1]; `z_BCHW` latents; S steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from pipeline.contract import Column, Form, Row, StageInfo, batches, failed, ok
from stages.engine.solver import Occupancy, solve
from stages.inversion import null_text
from stages.inversion import pairs as exact_pair
from stages.inversion.engine import InversionProblem
from stages.inversion.ilb import BoostProblem, boost_decoder, boost_joint
from stages.inversion.lbo import replay_bias
from stages.inversion.metrics import measure_pictures, noise_statistics
from stages.inversion.settings import (
    AnyInversionMethod,
    BelmMethod,
    Boost,
    EdictMethod,
    InversionMethod,
    LboMethod,
    NullTextMethod,
)
from stages.inverter.model import TextInverter
from stages.inverter.stage import text_columns
from stages.models.pictures import fit_picture, to_picture
from stages.models.sampler import sample
from stages.models.schedule import Schedule, make_schedule
from stages.models.unet import Condition, Geometry, LatentDiffusion, read_geometry

if TYPE_CHECKING:
    from stages.models.pictures import Fit

NOISE_STATISTICS = ("seed_mean", "seed_std", "seed_kurtosis", "seed_autocorrelation")


def parse(methods: Sequence[Mapping[str, Any]]) -> tuple[InversionMethod, ...]:
    """Method settings from their JSON form."""
    from pydantic import TypeAdapter

    adapter: TypeAdapter[Any] = TypeAdapter(AnyInversionMethod)
    return tuple(adapter.validate_python(dict(method)) for method in methods)


class InvertImages:
    """Pictures to noise latents by one of several methods a row; then, if asked, back again, and measured.

    Rows carry `image` (a PIL picture), `method` (a method's label), and, where the job has no fixed prompt, `prompt`.

    Args:
        model, revision, variant, dtype, device: See `stages.models.unet.LatentDiffusion.load`; None: CUDA if any.
        methods: Settings in JSON form.
        steps: Sampling steps.
        guidance: Scale of classifier-free guidance, in inversion and generation alike.
        prompt: One prompt for all rows; None: the row's own, empty where it has none.
        negative: Negative prompt under guidance.
        size: Side of the pictures; None: the model's own.
        fit: What is done with a picture of another shape (`stages.models.pictures.fit_picture`).
        reconstruct: Regenerate every picture and measure it.
        pictures: Keep the fitted picture and its reconstruction.
        edit_guidance: Regenerate under the row's `edit_prompt` with this guidance; None: no edits.
        inverter: Folder of a trained inverter (`stages.inverter.model`): what it reads out of each picture stands in
            for the caption's text latent, and is stored.
        lpips: Measure LPIPS, where its weights are at hand.
        store: dtype of stored latents; what is measured is regenerated from the stored numbers.
        slots: Rows at once.
    """

    known_as = "stages.invert_images:InvertImages"

    def __init__(
        self, model: str, methods: Sequence[Mapping[str, Any]], *, revision: str | None = None,
        variant: str | None = None, dtype: str = "float32", device: str | None = None, steps: int = 50,
        guidance: float = 1.0, prompt: str | None = None, negative: str | None = None, size: int | None = None,
        fit: Fit = "crop", reconstruct: bool = True, pictures: bool = True, edit_guidance: float | None = None,
        inverter: str | None = None, lpips: bool = False, store: str = "float32", slots: int = 16,
    ) -> None:  # fmt: skip
        if device in (None, "auto"):
            device = "cuda" if torch.cuda.is_available() else "cpu"
        loaded = LatentDiffusion.load(model, revision=revision, variant=variant, dtype=dtype, device=device)
        self._set_up(
            loaded, read_geometry(model, revision=revision, size=size), parse(methods), steps=steps, guidance=guidance,
            prompt=prompt, negative=negative, fit=fit, reconstruct=reconstruct, pictures=pictures,
            edit_guidance=edit_guidance, lpips=lpips, store=store, slots=slots,
            inverter=TextInverter.load(inverter, device) if inverter is not None else None,
        )  # fmt: skip

    def _set_up(
        self, model: LatentDiffusion, geometry: Geometry, methods: Sequence[InversionMethod], *, steps: int,
        guidance: float, prompt: str | None, negative: str | None, fit: Fit, reconstruct: bool, pictures: bool,
        edit_guidance: float | None, lpips: bool, store: str, slots: int, inverter: TextInverter | None = None,
    ) -> None:  # fmt: skip
        self.model, self.geometry, self.device = model, geometry, model.device
        self.methods = {method.label: method for method in methods}
        self.schedule: Schedule = make_schedule(geometry.scheduler, steps).to(self.device)
        self.guidance, self.prompt, self.negative, self.fit = guidance, prompt, negative, fit
        self.predict = model.predictor(guidance)
        self.reconstruct, self.pictures, self.edit_guidance = reconstruct, pictures, edit_guidance
        self.store, self.slots = np.dtype(store), slots
        self.inverter = inverter
        self.lpips = None
        if lpips:
            from stages.inversion.metrics import load_lpips

            self.lpips = load_lpips(self.device)
        self._summary: dict[str, Occupancy] = {}

    @classmethod
    def from_loaded(
        cls, model: LatentDiffusion, geometry: Geometry, methods: Sequence[InversionMethod], *, steps: int = 50,
        guidance: float = 1.0, slots: int = 16,
    ) -> InvertImages:  # fmt: skip
        """The stage around a model that is in memory already, for notebooks and benchmarks."""
        stage = cls.__new__(cls)
        stage._set_up(
            model, geometry, methods, steps=steps, guidance=guidance, prompt=None, negative=None, fit="crop",
            reconstruct=True, pictures=False, edit_guidance=None, lpips=False, store="float32", slots=slots,
        )  # fmt: skip
        return stage

    @staticmethod
    def describe(
        model: str, methods: Sequence[Mapping[str, Any]], *, revision: str | None = None, variant: str | None = None,
        dtype: str = "float32", device: str | None = None, steps: int = 50, guidance: float = 1.0,
        prompt: str | None = None, negative: str | None = None, size: int | None = None, fit: Fit = "crop",
        reconstruct: bool = True, pictures: bool = True, edit_guidance: float | None = None,
        inverter: str | None = None, lpips: bool = False, store: str = "float32", slots: int = 16,
    ) -> StageInfo:  # fmt: skip
        from stages.models.fingerprint import describe_model

        geometry = read_geometry(model, revision=revision, size=size)
        make_schedule(geometry.scheduler, steps)
        chosen = parse(methods)
        kept_as: Literal["float16", "float32"] = "float16" if store == "float16" else "float32"
        latent = partial(Column, kind="tensor", shape=geometry.latent_shape, dtype=kept_as)
        columns = [
            Column("prompt", "string", doc="the caption the picture was inverted under"),
            Column("method", "string"),
            latent("latent", doc="z_T: the seed that regenerates the picture"),
        ]
        if inverter is not None:
            columns += text_columns(inverter, geometry.latent_shape)
        if any(method.ilb for method in chosen):
            columns.append(latent("latent_0", doc="z_0 as boosted, scaled as the U-Net sees it"))
        if any(isinstance(method, BelmMethod | EdictMethod) for method in chosen):
            columns.append(latent("latent_2", doc="the second latent of belm and edict"))
        if any(isinstance(method, LboMethod) and method.replay for method in chosen):
            latents = (steps, *geometry.latent_shape)
            columns.append(
                Column("bias", "tensor", latents, kept_as, doc="added to each step's result, picture's first")
            )
        if any(isinstance(method, NullTextMethod) for method in chosen):
            texts = (steps, *geometry.text_shape)
            columns.append(
                Column("null_text", "tensor", texts, kept_as, doc="negative embedding a step, picture's first")
            )
        columns += [
            Column("residual", "tensor", (steps,), doc="|D(z) - z_prev| / |z_prev| at each step's last evaluation"),
            Column("residual_max", "float32", doc="the largest of them"),
            Column(
                "forwards", "int64", doc="network evaluations spent on inverting (two U-Net passes each under guidance)"
            ),
            Column("backwards", "int64", doc="gradients through the network"),
            Column("decodes", "int64", doc="decoder passes spent on boosting (a gradient counts as two more)"),
            *(Column(name, "float32", doc="of z_T; a Gaussian seed has 0, 1, 0, 0") for name in NOISE_STATISTICS),
            Column("floor_psnr", "float32", doc="dB of encoding and decoding alone"),
            Column("floor_ssim", "float32"),
        ]
        if reconstruct:
            columns += [
                Column("psnr", "float32", doc="dB of the regenerated picture against the picture"),
                Column("ssim", "float32"),
                Column("psnr_decoded", "float32", doc="dB of the regenerated picture against the decoded z_0"),
                Column("latent_mse", "float32", doc="mean squared distance of the regenerated z_0 to the inverted one"),
            ]
            if lpips:
                columns.append(Column("lpips", "float32", doc="LPIPS (Alex); null where its weights are not installed"))
        if pictures:
            columns.append(Column("picture", "image", doc="the picture as it was fitted to the model"))
            columns += [Column("reconstruction", "image")] if reconstruct else []
        if edit_guidance is not None:
            columns.append(Column("edited", "image", doc="regenerated under the row's edit_prompt"))
        parts = ["unet", "vae", "text_encoder", *(["text_encoder_2"] if geometry.kind == "sdxl" else [])]
        return StageInfo(
            tuple(columns),
            {part: describe_model(model, revision, part) for part in parts},
            {
                "model": model,
                "scheduler": json.dumps(dict(geometry.scheduler), sort_keys=True, default=str),
                "vae_scaling_factor": str(geometry.scaling_factor),
                "steps": str(steps),
                "guidance": str(guidance),
                **({"inverter": inverter} if inverter is not None else {}),
            },
            reads=_reads(captions=prompt is None and inverter is None, edits=edit_guidance is not None),
        )

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        """One row out for each in. With one method, rows stream; with several, they go method by method in groups."""
        if len(self.methods) == 1:
            yield from self._by_method(next(iter(self.methods.values())), rows)
            return
        for group in batches(rows, 4 * self.slots * len(self.methods)):
            by_label: dict[Any, list[Row]] = {}
            for row in group:
                by_label.setdefault(row.get("method"), []).append(row)
            for label, some in by_label.items():
                if label in self.methods:
                    yield from self._by_method(self.methods[label], some)
                else:
                    names = ", ".join(self.methods)
                    yield from (failed(row, f"no method {label!r}: the job has {names}") for row in some)

    def take_summary(self) -> dict[str, np.ndarray]:
        """How full each method's slots were since the last call: slot steps, and those that worked on a row."""
        summary = {
            f"occupancy.{label}": np.array([o.slot_steps, o.busy_slot_steps], dtype=np.int64)
            for label, o in self._summary.items()
        }
        self._summary = {}
        return summary

    # --- the way of a row

    def _by_method(self, method: InversionMethod, rows: Iterable[Row]) -> Iterator[Row]:
        # A row's working values live beside it, under its id: what the pipeline handed in is handed back untouched.
        given: dict[str, Row] = {}
        work = self._prepared(method, rows, given)
        if method.ilb is not None:
            work = self._boosted(method, method.ilb, work)
        work = self._inverted(method, work)
        for batch in batches(work, self.slots):
            done = [row for row in batch if row.get("status") != "failed"]
            yield from (failed(given.pop(row["id"]), row["error"]) for row in batch if row.get("status") == "failed")
            for row, outputs in zip(done, self._finished(method, done, given), strict=True):
                yield ok(given.pop(row["id"]), **outputs)

    def _prompt_of(self, row: Row) -> str:
        if self.inverter is not None:
            return ""
        return self.prompt if self.prompt is not None else str(row.get("prompt") or "")

    @torch.no_grad()
    def _prepared(self, method: InversionMethod, rows: Iterable[Row], given: dict[str, Row]) -> Iterator[Row]:
        """Pictures to latents and captions to conditions, a batch at a time."""
        guided = self.guidance > 1 or isinstance(method, NullTextMethod)
        for batch in batches(rows, self.slots):
            given.update((row["id"], row) for row in batch)
            good = []
            for row in batch:
                if row.get("image") is None:
                    yield failed({"id": row["id"]}, "no picture in column 'image'; map one to it with input.columns")
                else:
                    good.append(row)
            if not good:
                continue
            x_BCHW = torch.stack([fit_picture(row["image"], self.geometry.size, self.fit) for row in good]).to(
                self.device
            )
            z_BCHW = self.model.encode(x_BCHW)
            floor = measure_pictures(self.model.decode(z_BCHW), x_BCHW)
            prompts = [self._prompt_of(row) for row in good]
            condition = self.model.condition(prompts, size=self.geometry.size, guided=guided, negative=self.negative)
            if self.inverter is not None:
                text_BLE, pooled_BE = self.inverter(z_BCHW)
                condition["text_BLE"] = text_BLE.half().float()  # as it is stored
                if pooled_BE is not None:
                    condition["pooled_BE"] = pooled_BE.half().float()
            for i, row in enumerate(good):
                own = {name: value[i].cpu() for name, value in condition.items()}
                yield {
                    "id": row["id"], "x": x_BCHW[i].cpu(), "z": z_BCHW[i].cpu(), "condition": own, "prompt": prompts[i],
                    "floor_psnr": floor["psnr"][i], "floor_ssim": floor["ssim"][i],
                }  # fmt: skip

    def _boosted(self, method: InversionMethod, boost: Boost, rows: Iterable[Row]) -> Iterator[Row]:
        def make(visit: int | None) -> BoostProblem:
            return BoostProblem(
                self.model.decode, slots=self.slots, latent_shape=self.geometry.latent_shape, size=self.geometry.size,
                steps=boost.steps, visit=visit, rate=boost.rate, warmup=boost.warmup, device=self.device,
            )  # fmt: skip

        def round_trip(some: Iterable[Row]) -> Iterator[Row]:
            for batch in batches(self._inverted(method, some), self.slots):
                done = [row for row in batch if row.get("status") != "failed"]
                yield from (row for row in batch if row.get("status") == "failed")
                for row, z in zip(done, self._regenerated(method, done), strict=True):
                    spent = {name: row[name] + row.get(f"{name}_before", 0) for name in ("forwards", "backwards")}
                    yield {**row, "regenerated": z.cpu()} | {f"{name}_before": value for name, value in spent.items()}

        if boost.form == "decoder":
            return boost_decoder(make, rows)
        return boost_joint(make, round_trip, rows, steps=boost.steps, every=boost.every)

    def _inverted(self, method: InversionMethod, rows: Iterable[Row]) -> Iterator[Row]:
        """Rows with `z` to rows with `noise`, what a method needs beside it, residuals and passes."""
        if isinstance(method, BelmMethod | EdictMethod):
            return self._pairs(method, rows)
        replay = isinstance(method, LboMethod) and method.replay
        null = isinstance(method, NullTextMethod)
        problem = InversionProblem(
            self.model.predictor(1.0) if null else self.predict, self.schedule, method.rule(self.guidance),
            slots=self.slots, latent_shape=self.geometry.latent_shape, device=self.device, keep_path=replay or null,
        )  # fmt: skip
        solved = solve(problem, rows, occupancy=self._summary.setdefault(method.label, Occupancy()))
        if replay:
            return self._with_bias(solved)
        if isinstance(method, NullTextMethod):
            return self._with_null_text(method, solved)
        return solved

    def _pairs(self, method: InversionMethod, rows: Iterable[Row]) -> Iterator[Row]:
        for batch in batches(rows, self.slots):
            good = [row for row in batch if row.get("status") != "failed"]
            yield from (row for row in batch if row.get("status") == "failed")
            if not good:
                continue
            z_BCHW, condition = self._stack(good, "z"), self._conditions(good)
            if isinstance(method, EdictMethod):
                pair = exact_pair.edict_invert(self.predict, self.schedule, z_BCHW, condition, method.mixing)
            else:
                pair = exact_pair.belm_invert(self.predict, self.schedule, z_BCHW, condition)
            passes = len(self.schedule) * (2 if isinstance(method, EdictMethod) else 1)
            for i, row in enumerate(good):
                if not bool(pair[0][i].isfinite().all() & pair[1][i].isfinite().all()):
                    yield failed(row, f"{method.label} overflowed: an exact pair has no damping; use another method")
                    continue
                yield {**row, "noise": pair[0][i].cpu(), "second": pair[1][i].cpu(), "forwards": passes, "backwards": 0}

    def _with_bias(self, rows: Iterable[Row]) -> Iterator[Row]:
        for batch in batches(rows, self.slots):
            good = [row for row in batch if row.get("status") != "failed"]
            yield from (row for row in batch if row.get("status") == "failed")
            if not good:
                continue
            bias = replay_bias(self.predict, self.schedule, self._stack(good, "path"), self._conditions(good))
            for row, own in zip(good, bias, strict=True):
                yield {**row, "bias": own.cpu(), "forwards": row["forwards"] + len(self.schedule)}

    def _with_null_text(self, method: NullTextMethod, rows: Iterable[Row]) -> Iterator[Row]:
        for batch in batches(rows, self.slots):
            good = [row for row in batch if row.get("status") != "failed"]
            yield from (row for row in batch if row.get("status") == "failed")
            if not good:
                continue
            learned = null_text.learn_null_text(
                self.model.predictor(1.0), self.schedule, self._stack(good, "path"), self._conditions(good),
                guidance=method.guidance, iterations=method.iterations,
            )  # fmt: skip
            for i, row in enumerate(good):
                forwards, backwards = row["forwards"] + int(learned.forwards_B[i]), int(learned.backwards_B[i])
                yield {**row, "null_text": learned.null_BSLE[i].cpu(), "forwards": forwards, "backwards": backwards}

    def _stack(self, rows: Sequence[Row], name: str) -> torch.Tensor:
        return torch.stack([row[name] for row in rows]).to(self.device)

    def _conditions(self, rows: Sequence[Row]) -> Condition:
        return {name: self._stack([row["condition"] for row in rows], name) for name in rows[0]["condition"]}

    def _stored(self, value: torch.Tensor) -> np.ndarray:
        return value.numpy().astype(self.store)

    def _as_stored(self, rows: Sequence[Row], name: str) -> torch.Tensor:
        """The rows' values as a reader of the dataset will find them."""
        return torch.from_numpy(np.stack([self._stored(row[name]) for row in rows]).astype(np.float32)).to(self.device)

    def _regenerated(self, method: InversionMethod, rows: Sequence[Row]) -> torch.Tensor:
        """z_0 generated from what is stored of each row."""
        if not rows:
            return torch.empty((0, *self.geometry.latent_shape))
        noise_BCHW, condition = self._as_stored(rows, "noise"), self._conditions(rows)
        if isinstance(method, BelmMethod):
            pair = (noise_BCHW, self._as_stored(rows, "second"))
            return exact_pair.belm_generate(self.predict, self.schedule, pair, condition)
        if isinstance(method, EdictMethod):
            pair = (noise_BCHW, self._as_stored(rows, "second"))
            return exact_pair.edict_generate(self.predict, self.schedule, pair, condition, method.mixing)
        if isinstance(method, NullTextMethod):
            learned = self._as_stored(rows, "null_text")
            return null_text.generate_null_text(
                self.model.predictor(1.0), self.schedule, noise_BCHW, condition, learned, guidance=method.guidance
            )
        bias = self._as_stored(rows, "bias") if isinstance(method, LboMethod) and method.replay else None
        return sample(self.predict, self.schedule, noise_BCHW, condition, bias)

    @torch.no_grad()
    def _finished(self, method: InversionMethod, rows: Sequence[Row], given: Mapping[str, Row]) -> list[dict[str, Any]]:
        """The output columns of finished rows."""
        if not rows:
            return []
        outputs: list[dict[str, Any]] = []
        statistics = noise_statistics(self._as_stored(rows, "noise"))
        for i, row in enumerate(rows):
            made: dict[str, Any] = {
                "prompt": row["prompt"],
                "method": method.label,
                "latent": self._stored(row["noise"]),
                "forwards": row["forwards"] + row.get("forwards_before", 0),
                "backwards": row["backwards"] + row.get("backwards_before", 0),
                "decodes": row.get("decodes", 0),
                "floor_psnr": row["floor_psnr"],
                "floor_ssim": row["floor_ssim"],
                **{name: values[i] for name, values in statistics.items()},
            }
            if "residual" in row:
                made |= {"residual": row["residual"].numpy(), "residual_max": float(row["residual"].max())}
            for column, name in (("latent_2", "second"), ("bias", "bias"), ("null_text", "null_text")):
                if name in row:
                    made[column] = self._stored(row[name])
            if self.inverter is not None:
                names = (("text_latent", "text_BLE"), ("pooled", "pooled_BE"))
                held = row["condition"]
                made |= {column: held[name].half().numpy() for column, name in names if name in held}
            if method.ilb is not None:
                made["latent_0"] = self._stored(row["z"])
            if self.pictures:
                made["picture"] = to_picture(row["x"])
            outputs.append(made)
        if self.reconstruct:
            self._add_reconstruction(method, rows, outputs)
        if self.edit_guidance is not None:
            self._add_edits(rows, given, outputs)
        return outputs

    def _add_reconstruction(self, method: InversionMethod, rows: Sequence[Row], outputs: list[dict[str, Any]]) -> None:
        again_BCHW, z_BCHW, x_BCHW = self._regenerated(method, rows), self._stack(rows, "z"), self._stack(rows, "x")
        seen_BCHW = self.model.decode(again_BCHW)
        against_x = measure_pictures(seen_BCHW, x_BCHW)
        against_decoded = measure_pictures(seen_BCHW, self.model.decode(z_BCHW))
        mse_B = (again_BCHW - z_BCHW).square().flatten(1).mean(1).tolist()
        for i, made in enumerate(outputs):
            made |= {
                "psnr": against_x["psnr"][i],
                "ssim": against_x["ssim"][i],
                "psnr_decoded": against_decoded["psnr"][i],
                "latent_mse": mse_B[i],
            }
            if self.pictures:
                made["reconstruction"] = to_picture(seen_BCHW[i].cpu())
        if self.lpips is not None:
            for made, value in zip(outputs, self.lpips(seen_BCHW, x_BCHW), strict=True):
                made["lpips"] = value

    def _add_edits(self, rows: Sequence[Row], given: Mapping[str, Row], outputs: list[dict[str, Any]]) -> None:
        """Plain editing: the same seed under another caption."""
        assert self.edit_guidance is not None
        asked = [i for i, row in enumerate(rows) if given[row["id"]].get("edit_prompt")]
        if not asked:
            return
        prompts = [str(given[rows[i]["id"]]["edit_prompt"]) for i in asked]
        condition = self.model.condition(
            prompts, size=self.geometry.size, guided=self.edit_guidance > 1, negative=self.negative
        )
        noise_BCHW = self._as_stored([rows[i] for i in asked], "noise")
        edited = self.model.decode(
            sample(self.model.predictor(self.edit_guidance), self.schedule, noise_BCHW, condition)
        )
        for i, picture in zip(asked, edited, strict=True):
            outputs[i]["edited"] = to_picture(picture.cpu())


def _reads(captions: bool, edits: bool) -> dict[str, Form]:
    """The columns that are taken of a row."""
    reads: dict[str, Form] = {"image": "picture"}
    if captions:
        reads["prompt"] = "text"
    if edits:
        reads["edit_prompt"] = "text"
    return reads
