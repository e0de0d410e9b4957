"""The stage of `invert-images`: a picture and a caption in, the noise latent that regenerates it out.

Legend: B rows; `x_BCHW` pictures in [-1, 1]; `z_BCHW` latents; S steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from pipeline.contract import Column, Form, Row, StageInfo, batches, failed, ok
from stages.engine.gradients import loss_scale
from stages.engine.passthrough import in_batches
from stages.engine.randomness import row_seed
from stages.engine.solver import Occupancy
from stages.inversion import lpips
from stages.inversion.ilb import BoostProblem, boost_decoder, boost_joint
from stages.inversion.lpips import Lpips
from stages.inversion.metrics import measure_pictures, noise_statistics
from stages.inversion.preparation import Key, Preparation, Seen, picture_of
from stages.inversion.recorded import check_card, check_recordable
from stages.inversion.schemes import Scheme, check_method, conditions, scheme_of, stacked
from stages.inversion.settings import Boost, InvertImagesSettings
from stages.inverter.model import TextInverter
from stages.inverter.stage import text_columns
from stages.models.buckets import Size, bucket_for, buckets_of
from stages.models.captions import CUT_COLUMN, TOKEN_COLUMNS
from stages.models.families import open_latent_model, read_geometry
from stages.models.latent import Geometry, LatentModel
from stages.models.memory import fitting_slots
from stages.models.multistep import Multistep
from stages.models.pictures import to_picture
from stages.models.sampler import sample
from stages.models.schedule import Schedule

SIZE_COLUMNS = (
    Column("width", "int64", doc="of the picture as it was fitted to the model, in pixels"),
    Column("height", "int64"),
)
CPU_SLOTS = 16
FAR = 0.01
"""A latent that is off by 1 % (40 dB) costs a picture at the autoencoder's floor of 34 dB less than .1 dB."""
GROUP = 4
"""Pictures a slot that are held to be sorted by method and size."""
NOISE_STATISTICS = ("seed_mean", "seed_std", "seed_kurtosis", "seed_autocorrelation")


class InvertImages:
    """Pictures to noise latents by one of several methods a row; then, if asked, back again, and measured.

    Rows carry `image` (a PIL picture), `method` (a method's label), and, where the job has no fixed prompt, `prompt`.

    Args:
        settings: What is loaded, and what is done.
        model: One that is in memory already, for other stages, notebooks and benchmarks.
    """

    known_as = "stages.invert_images:InvertImages"
    Settings = InvertImagesSettings

    def __init__(self, settings: InvertImagesSettings, model: LatentModel | None = None) -> None:
        self.settings = settings
        if settings.accelerate == "graph":  # before the weights are read
            check_card(settings)
        self.model = open_latent_model(settings) if model is None else model
        self.rooms = self.model.rooms
        calls = 2 if settings.guidance > 1 else 1
        self._slots = settings.slots or fitting_slots(
            self.model, "predict", otherwise=CPU_SLOTS, rows=calls * settings.room_of_a_row
        )
        self.geometry, self.device = self.model.geometry, self.model.device
        self.methods = {method.label: method for method in settings.methods}
        self.buckets = _buckets(settings, self.geometry)
        self.schemes = {label: self._made(label, self.model) for label in self.methods}
        self.store = np.dtype(settings.store)
        self.dtype = str(self.model.dtypes[next(iter(self.geometry.parts))]).removeprefix("torch.")
        self.inverter = None if settings.inverter is None else TextInverter.load(settings.inverter, self.device)
        self.preparation = Preparation(
            settings, self.model, self.inverter, lambda: self.slots * (1 if self._streams else GROUP)
        )
        measured = settings.lpips and lpips.lacking(_shortest(self.buckets)) is None
        self.lpips = Lpips(lpips.weights_file(), self.device) if measured else None
        # A method that moves the latent has to decode it again.
        self._compares = any(method.ilb is None for method in settings.methods)
        self._occupancy = {label: Occupancy() for label in self.methods}
        self._told = dict.fromkeys(self.methods, (0, 0))

    @staticmethod
    def describe(settings: InvertImagesSettings) -> StageInfo:
        geometry = read_geometry(settings)
        schedule = geometry.schedule(settings.steps)
        geometry.check_guidance(settings.guidance, settings.negative)
        for method in settings.methods:
            check_method(method, geometry, schedule)
        if settings.accelerate == "graph":
            check_recordable(settings, geometry, schedule)
        buckets = _buckets(settings, geometry)
        shape = geometry.latent_shape if len(buckets) == 1 else (geometry.latent_shape[0], -1, -1)
        latent = partial(Column, kind="tensor", shape=shape, dtype=settings.store)
        each_step = partial(Column, kind="tensor", dtype=settings.store)
        extra = {
            "latent_2": latent("latent_2", doc="the second latent of belm and edict"),
            "bias": each_step(
                "bias", shape=(settings.steps, *shape),
                doc="added to each step's result, picture's first",
            ),
            "input_bias": each_step(
                "input_bias", shape=(settings.steps, *shape),
                doc="added to what the network is shown at each step, picture's first",
            ),
            "picture_latent": latent("picture_latent", doc="z_0, which rf-inversion steers back to"),
            "null_text": each_step(
                "null_text", shape=(settings.steps, *geometry.text_shape),
                doc="negative embedding a step, picture's first",
            ),
        }  # fmt: skip
        needed = {method.extra for method in settings.methods}
        columns = [
            Column("prompt", "string", doc="the caption the picture was inverted under"),
            *(TOKEN_COLUMNS if settings.inverter is None else ()),
            *(() if geometry.grid is None else (CUT_COLUMN,)),
            Column("method", "string"),
            *(SIZE_COLUMNS if len(buckets) > 1 else ()),
            latent("latent", doc="z_T: the seed that regenerates the picture"),
        ]
        if settings.inverter is not None:
            columns += text_columns(settings.inverter, geometry.latent_shape)
        if any(method.ilb for method in settings.methods):
            columns.append(latent("latent_0", doc="z_0 as boosted, scaled as the U-Net sees it"))
        columns += [column for name, column in extra.items() if name in needed]
        if kept := settings.path_steps(len(schedule)):
            if isinstance(schedule, Multistep):
                raise ValueError(
                    "store_path: the steps of the model's sampler hang together, so that no latent stands for one: "
                    "leave `sampler` or `store_path` out"
                )
            columns += [
                each_step(
                    "path_latents", shape=(len(kept), *shape),
                    doc="z_t on the way to z_T as the network is shown them, the picture's own z_0 first",
                ),
                Column("path_times", "tensor", (len(kept),), doc="what the network is told as their times; 0 of z_0"),
                Column("path_alphas", "tensor", (len(kept),), doc="z_t = alpha z_0 + sigma eps: alpha"),
                Column("path_sigmas", "tensor", (len(kept),), doc="sigma"),
            ]  # fmt: skip
        columns += [
            Column(
                "residual",
                "tensor",
                (len(schedule),),
                doc="|D(z) - z_prev| / |z_prev| that each step was left with, at a point that was evaluated",
            ),
            Column("residual_max", "float32", doc="the largest of them"),
            Column(
                "forwards", "int64", doc="network evaluations spent on inverting (two U-Net passes each under guidance)"
            ),
            Column("backwards", "int64", doc="gradients through the network: of null-text alone"),
            Column("dtype", "string", doc="of the denoiser that found the seed"),
            Column("decodes", "int64", doc="decoder passes spent on boosting (a gradient counts as two more)"),
            *(Column(name, "float32", doc="of z_T; a Gaussian seed has 0, 1, 0, 0") for name in NOISE_STATISTICS),
            Column("floor_psnr", "float32", doc="dB of encoding and decoding alone"),
            Column("floor_ssim", "float32"),
        ]
        if settings.reconstruct:
            columns += [
                Column("psnr", "float32", doc="dB of the regenerated picture against the picture"),
                Column("ssim", "float32"),
                Column("psnr_decoded", "float32", doc="dB of the regenerated picture against the decoded z_0"),
                Column("latent_mse", "float32", doc="mean squared distance of the regenerated z_0 to the inverted one"),
            ]
            if settings.lpips:
                why_not = lpips.lacking(_shortest(buckets))
                columns.append(
                    Column("lpips", "float32", doc=why_not or "LPIPS (AlexNet 0.1) of the regenerated picture")
                )
        if settings.pictures:
            columns.append(Column("picture", "image", doc="the picture as it was fitted to the model"))
            columns += [Column("reconstruction", "image")] if settings.reconstruct else []
        if settings.edit_guidance is not None:
            columns.append(Column("edited", "image", doc="regenerated under the row's edit_prompt"))
        metadata = {
            "model": settings.model,
            "scheduler": json.dumps(dict(geometry.scheduler), sort_keys=True, default=str),
            "vae_scaling_factor": str(geometry.scaling_factor),
            "steps": str(settings.steps),
            "guidance": str(settings.guidance),
        }
        if settings.sampler is not None:
            metadata["sampler"] = settings.sampler
        if settings.inverter is not None:
            metadata["inverter"] = settings.inverter
        captions = settings.prompt is None and settings.inverter is None
        reads = _reads(captions=captions, edits=settings.edit_guidance is not None)
        models, notes = geometry.fingerprints(), []
        if settings.lpips and settings.reconstruct:
            if (why_not := lpips.lacking(_shortest(buckets))) is None:
                models["lpips"] = lpips.identity()
            else:
                notes.append(why_not)
        return StageInfo(tuple(columns), models, metadata, reads, tuple(notes))

    def __call__(self, rows: Iterable[Row]) -> Iterator[Row]:
        """One row out for each in. With one method and one size, rows stream; else they go in groups, and in a group
        method by method and size by size."""
        if self._streams:
            yield from self._by_scheme(next(iter(self.schemes.values())), rows)
            return
        for group in batches(self._fitted(rows), GROUP * self.slots * len(self.methods)):
            seen: dict[Key, Seen] = {}
            alike: dict[Any, list[Row]] = {}
            for row in group:
                alike.setdefault((row.get("method"), self._bucket(row)), []).append(row)
            for (label, size), some in alike.items():
                if label in self.methods:
                    yield from self._by_scheme(self._scheme(label, size), some, seen)
                else:
                    names = ", ".join(self.methods)
                    yield from (failed(row, f"no method {label!r}: the job has {names}") for row in some)

    @property
    def _streams(self) -> bool:
        """Whether all rows go one way."""
        return len(self.methods) == len(self.buckets) == 1

    def _fitted(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows with pictures of the size that they are inverted in; those of one picture, which come one after
        another, share it."""
        key, picture = None, None
        for row in rows:
            if row.get("image") is None:
                yield row
                continue
            if key != (own := picture_of(row["id"], row.get("method"))):
                key, picture = own, self.preparation.fitted(row["image"], self._bucket(row))
            yield {**row, "image": picture}

    def _bucket(self, row: Row) -> Size:
        picture = row.get("image")
        return self.geometry.picture_size if picture is None else bucket_for(picture.size, self.buckets)

    def _scheme(self, label: str, size: Size) -> Scheme[Any]:
        """How a method takes pictures of a size to noise and back."""
        if size == self.geometry.picture_size:
            return self.schemes[label]
        return self._made(label, self.model.at(*size))

    def _made(self, label: str, model: LatentModel) -> Scheme[Any]:
        settings = self.settings
        scheme = scheme_of(self.methods[label], model, steps=settings.steps, guidance=settings.guidance)
        scheme.keep_path = scheme.keep_path or settings.store_path is not None
        scheme.recorded = settings.accelerate == "graph"
        return scheme

    @property
    def slots(self) -> int:
        """Rows at once."""
        return min(self._slots, self.rooms["rows"].rows)

    def shrink(self) -> bool:
        """Half as many rows at once, where memory ran out beside what the model itself takes in parts."""
        return self.rooms["rows"].halve(self.slots)

    def take_summary(self) -> dict[str, np.ndarray]:
        """How full each method's slots were since the last call: slot steps, and those that worked on a row."""
        now = {label: (o.slot_steps, o.busy_slot_steps) for label, o in self._occupancy.items()}
        before, self._told = self._told, now
        return {
            f"occupancy.{label}": np.array(counts, dtype=np.int64) - before[label]
            for label, counts in now.items()
            if counts[0] > before[label][0]  # exact pairs have no slots
        }

    @property
    def holds(self) -> int:
        """Most rows at a time: in the slots, and as many again encoded before and unfinished behind; or in a group."""
        if self._streams:
            return 3 * self.slots
        return (GROUP + 1) * self.slots * len(self.methods)

    # --- the way of a row

    def _by_scheme(
        self, scheme: Scheme[Any], rows: Iterable[Row], seen: dict[Key, Seen] | None = None
    ) -> Iterator[Row]:  # fmt: skip
        # A row's working values live beside it, under its id: what the pipeline handed in is handed back untouched, but
        # for the picture: it may be large, and is needed no longer once it is fitted to the model.
        given: dict[str, Row] = {}
        work = self.prepared(scheme, rows, given, seen)
        if scheme.method.ilb is not None:
            work = self._boosted(scheme, scheme.method.ilb, work)
        work = map(self._converged, self._inverted(scheme, work))
        for done in in_batches(work, self.slots, lambda good: self._finished(scheme, good, given)):
            row = given.pop(done.pop("id"))
            yield failed(row, done["error"]) if done.get("status") == "failed" else ok(row, **done)

    def prepared(
        self, scheme: Scheme[Any], rows: Iterable[Row], given: dict[str, Row], seen: dict[Key, Seen] | None = None
    ) -> Iterator[Row]:
        """Pictures to latents and captions to conditions, a batch at a time; what came in is noted in `given`.

        Args:
            seen: What is known of pictures, and what becomes known of these. None: none comes again.
        """

        def checked() -> Iterator[Row]:
            for row in rows:
                given[row["id"]] = {name: value for name, value in row.items() if name != "image"}
                if row.get("image") is None:
                    yield failed({"id": row["id"]}, "no picture in column 'image'; map one to it with input.columns")
                else:
                    yield {**row, "key": picture_of(row["id"], scheme.method.label)}

        def encoded(batch: Sequence[Row]) -> Iterator[Row]:
            compared = {row["key"] for row in batch if self._compares and self._is_regenerated(row["key"][0])}
            yield from self.preparation(scheme.model, scheme.guided, batch, {} if seen is None else seen, compared)

        return in_batches(checked(), self.slots, encoded)

    def _inverted(self, scheme: Scheme[Any], rows: Iterable[Row]) -> Iterator[Row]:
        return scheme.invert(rows, self.slots, self._occupancy[scheme.method.label])

    def _converged(self, row: Row) -> Row:
        """The row, failed where its residual is larger than asked for."""
        limit, residual = self.settings.max_residual, row.get("residual")
        if limit is None or residual is None or row.get("status") == "failed" or bool((residual <= limit).all()):
            return row
        return failed(
            row,
            f"not inverted: a residual of {float(residual.max()):.2g} is left at step {int(residual.argmax()) + 1} of "
            f"{len(residual)} (max_residual: {limit:g}); take more passes, more steps or less guidance",
        )

    def _boosted(self, scheme: Scheme[Any], boost: Boost, rows: Iterable[Row]) -> Iterator[Row]:
        room = self.model.rooms["boost"]
        rows = ({**row, "decoded": None} for row in rows)  # of a latent that is going to be moved

        def make(visit: int | None) -> BoostProblem:
            return BoostProblem(
                self.model.decode, slots=min(self.slots, room.rows), latent_shape=scheme.model.geometry.latent_shape,
                size=scheme.model.geometry.picture_size, steps=boost.iterations, visit=visit, rate=boost.lr,
                warmup=boost.warmup, device=self.device, scale=loss_scale([self.model.dtypes["vae"]]),
            )  # fmt: skip

        def back(some: Sequence[Row]) -> Iterator[Row]:
            for row, z in zip(some, self.regenerated(scheme, some), strict=True):
                spent = {name: row.get(name, 0) + row.get(f"{name}_before", 0) for name in ("forwards", "backwards")}
                yield {**row, "regenerated": z.cpu()} | {f"{name}_before": value for name, value in spent.items()}

        if boost.form == "decoder":
            return boost_decoder(make, rows, room)
        return boost_joint(
            make, lambda some: in_batches(self._inverted(scheme, some), self.slots, back), rows,
            steps=boost.iterations, every=boost.every, room=room,
        )  # fmt: skip

    def _stored(self, value: torch.Tensor) -> np.ndarray:
        return value.numpy().astype(self.store)

    def _as_stored(self, rows: Sequence[Row], name: str) -> torch.Tensor:
        """The rows' values as a reader of the dataset will find them."""
        return torch.from_numpy(np.stack([self._stored(row[name]) for row in rows]).astype(np.float32)).to(self.device)

    def regenerated(self, scheme: Scheme[Any], rows: Sequence[Row]) -> torch.Tensor:
        """z_0 generated from what is stored of each row."""
        extra = scheme.method.extra
        extra_B = None if extra is None else self._as_stored(rows, extra)
        return scheme.generate(self._as_stored(rows, "noise"), conditions(rows, self.device), extra_B)

    @torch.no_grad()
    def _finished(self, scheme: Scheme[Any], rows: Sequence[Row], given: Mapping[str, Row]) -> list[Row]:
        """The ids and output columns of finished rows."""
        method, outputs = scheme.method, []
        chosen = [i for i, row in enumerate(rows) if self._is_regenerated(picture_of(row["id"], method.label)[0])]
        if chosen:
            measured, again_BCHW = self._come_back(scheme, [rows[i] for i in chosen])
            rows = list(rows)
            for i, row in zip(chosen, measured, strict=True):
                rows[i] = row
        statistics = noise_statistics(self._as_stored(rows, "noise"))
        kept = self.settings.path_steps(len(scheme.schedule))
        levels = _noise_levels(scheme.schedule, kept) if kept else {}
        for i, row in enumerate(rows):
            made: Row = {
                "id": row["id"],
                "prompt": row["prompt"],
                "method": method.label,
                "latent": self._stored(row["noise"]),
                "forwards": row["forwards"] + row.get("forwards_before", 0),
                "backwards": row.get("backwards", 0) + row.get("backwards_before", 0),
                "dtype": self.dtype,
                "decodes": row.get("decodes", 0),
                "floor_psnr": row["floor_psnr"],
                "floor_ssim": row["floor_ssim"],
                **row["counted"],
                **row["read"],
                **{name: values[i] for name, values in statistics.items()},
            }
            if "residual" in row:
                made |= {"residual": row["residual"].numpy(), "residual_max": float(row["residual"].max())}
            if method.extra is not None:
                made[method.extra] = self._stored(row[method.extra])
            if len(self.buckets) > 1:
                made |= dict(zip(("width", "height"), scheme.model.geometry.picture_size, strict=True))
            if method.ilb is not None:
                made["latent_0"] = self._stored(row["z"])
            if kept:
                made |= {"path_latents": self._stored(row["path"][kept]), **levels}
            if self.settings.pictures:
                made["picture"] = to_picture(row["x"])
            outputs.append(made)
        if chosen:
            self._add_reconstruction(again_BCHW, measured, [outputs[i] for i in chosen])
        if self.settings.edit_guidance is not None:
            self._add_edits(scheme, self.settings.edit_guidance, rows, given, outputs)
        return outputs

    def _is_regenerated(self, picture: str) -> bool:
        """Whether a picture is among those that are regenerated and measured, by its id."""
        return row_seed(0, picture, "reconstruct") < float(self.settings.reconstruct) * 2**63

    def _come_back(self, scheme: Scheme[Any], rows: Sequence[Row]) -> tuple[list[Row], torch.Tensor]:
        """The rows and their z_0 as it is generated from what is stored; those that are off by more than `FAR` are
        solved again, as often as the method says, and the better seed is kept."""
        best = list(rows)
        again_BCHW = self.regenerated(scheme, best)
        for stricter in scheme.retries():
            off_B = _off(again_BCHW, best)
            far = {best[i]["id"]: i for i in (~(off_B <= FAR)).nonzero().flatten().tolist()}
            if not far:
                break
            solved = [row for row in self._inverted(stricter, [best[i] for i in far.values()]) if "noise" in row]
            for part in batches(solved, self.slots):
                made_BCHW = self.regenerated(stricter, part)
                for row, made, off in zip(part, made_BCHW, _off(made_BCHW, part), strict=True):
                    i = far[row["id"]]
                    forwards = best[i]["forwards"] + row["forwards"]
                    if row.get("status") != "failed" and bool(off < off_B[i]):
                        best[i], again_BCHW[i] = row, made
                    best[i] = {**best[i], "forwards": forwards}
        return best, again_BCHW

    def _add_reconstruction(self, again_BCHW: torch.Tensor, rows: Sequence[Row], outputs: Sequence[Row]) -> None:
        z_BCHW, x_BCHW = (stacked(rows, name, self.device) for name in ("z", "x"))
        made_BCHW = self.model.decode(again_BCHW)
        against_x = measure_pictures(made_BCHW, x_BCHW)
        kept = rows[0]["decoded"] is not None  # a method's rows are alike
        decoded_BCHW = stacked(rows, "decoded", self.device) if kept else self.model.decode(z_BCHW)
        against_decoded = measure_pictures(made_BCHW, decoded_BCHW)
        mse_B = (again_BCHW - z_BCHW).square().flatten(1).mean(1).tolist()
        for i, made in enumerate(outputs):
            made |= {
                "psnr": against_x["psnr"][i],
                "ssim": against_x["ssim"][i],
                "psnr_decoded": against_decoded["psnr"][i],
                "latent_mse": mse_B[i],
            }
            if self.settings.pictures:
                made["reconstruction"] = to_picture(made_BCHW[i].cpu())
        if self.lpips is not None:
            for made, value in zip(outputs, self.lpips(made_BCHW, x_BCHW), strict=True):
                made["lpips"] = value

    def _add_edits(
        self, scheme: Scheme[Any], guidance: float, rows: Sequence[Row], given: Mapping[str, Row],
        outputs: Sequence[Row],
    ) -> None:  # fmt: skip
        """Plain editing: the same noise under another caption."""
        which = [i for i, row in enumerate(rows) if given[row["id"]].get("edit_prompt")]
        if not which:
            return
        prompts = [str(given[rows[i]["id"]]["edit_prompt"]) for i in which]
        told = self.preparation.conditions(scheme.model, prompts, guidance > 1)
        condition = {name: stacked(told, name, self.device) for name in told[0]}
        noise_BCHW = self._as_stored([rows[i] for i in which], "noise")
        edited_BCHW = sample(scheme.model.predictor(guidance), scheme.schedule, noise_BCHW, condition)
        for i, picture in zip(which, self.model.decode(edited_BCHW), strict=True):
            outputs[i]["edited"] = to_picture(picture.cpu())


def _noise_levels(schedule: Schedule, kept: Sequence[int]) -> dict[str, np.ndarray]:
    """Of some latents z_k of the way: their times, and alpha and sigma of z_k = alpha z_0 + sigma eps."""
    none = torch.zeros(1, device=schedule.t_S.device)
    levels = {
        "path_times": (none, schedule.t_S),
        "path_alphas": (schedule.alpha_prev_S[:1], schedule.alpha_S),
        "path_sigmas": (schedule.sigma_prev_S[:1], schedule.sigma_S),
    }
    every = {name: torch.cat([value.float() for value in values]) for name, values in levels.items()}
    return {name: values[list(kept)].cpu().numpy() for name, values in every.items()}


def _off(again_BCHW: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
    """(B,) how far each z_0 that was generated is from the row's own, relative to that; NaN where it overflowed."""
    z_BCHW = stacked(rows, "z", again_BCHW.device)
    return (again_BCHW - z_BCHW).flatten(1).norm(dim=1) / z_BCHW.flatten(1).norm(dim=1).clamp(min=1e-12)


def _buckets(settings: InvertImagesSettings, geometry: Geometry) -> tuple[Size, ...]:
    """The sizes that pictures are fitted to."""
    return buckets_of(geometry) if settings.fit == "bucket" else (geometry.picture_size,)


def _shortest(buckets: Sequence[Size]) -> int:
    """The shortest side among sizes."""
    return min(min(size) for size in buckets)


def _reads(captions: bool, edits: bool) -> dict[str, Form]:
    """The columns that are taken of a row."""
    reads: dict[str, Form] = {"image": "picture"}
    if captions:
        reads["prompt"] = "text"
    if edits:
        reads["edit_prompt"] = "text"
    return reads
