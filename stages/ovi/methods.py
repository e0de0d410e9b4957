"""From a method's settings to what maps the rows; OVI and `direct`, which optimise.

Legend: E embedding width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from pipeline.contract import Row, failed
from stages.engine.passthrough import in_batches
from stages.engine.solver import Occupancy, solve
from stages.models.vision_tower import States, VisionTower
from stages.ovi.baselines import rescaled, retrieval, text_embedding
from stages.ovi.constraints import CaptionSearch, Search, Whitening, floored, open_search
from stages.ovi.context import BATCH, Context, RowMap
from stages.ovi.priors import by_caption, kernelled, linear, mapped, prior
from stages.ovi.problem import OviProblem, Parametrization
from stages.ovi.settings import (
    OVI,
    Direct,
    Kernel,
    Linear,
    MeanShift,
    Procrustes,
    PromptMethod,
    Retrieval,
    TextEmbedding,
    TrainedPrior,
)
from stages.ovi.trained_prior import trained_prior
from stages.ovi.warm_starts import WarmStarts

START_NEIGHBOURS = 8
"""Images whose mean `direct` starts from when the neighbour constraint is on."""
OWN_FLOOR = 1e-3
"""Of the variances that a prompt's own Gaussian has, over their mean: few captions leave some at nothing."""


def build(method: PromptMethod, context: Context) -> RowMap:
    """The method that its settings describe.

    Raises:
        ValueError: It needs a reference and there is none, or a setting does not fit the model.
    """
    mapped = _build(method, context)
    return rescaled(mapped, context.need_reference(method).mean_norm) if method.rescale else mapped


def _build(method: PromptMethod, context: Context) -> RowMap:
    match method:
        case TextEmbedding():
            return text_embedding
        case Retrieval():
            return _nearest(method, context, BATCH)
        case MeanShift() | Linear() | Kernel() | Procrustes():
            return prior(method, context)
        case TrainedPrior():
            return trained_prior(method, context)
        case Direct():
            return direct(method, context)
        case OVI():
            return ovi(method, context)
    raise TypeError(f"no method for {type(method).__name__}")


def ovi(method: OVI, context: Context) -> RowMap:
    """OVI through the image encoder."""
    tower = VisionTower(context.network(method.precision), method.tokens, method.compact)
    solved = optimised(method, context, Parametrization.tokens(tower))
    if context.states is not None:
        whole = VisionTower(context.vision(), method.tokens, method.compact)
        solved = _with_states(solved, whole, context.states)
    if method.warm_start is None:
        return solved
    starts = WarmStarts.open(method.warm_start, (method.tokens, tower.width), context.text)
    return lambda rows: solved(starts(rows, context.slots[method.label]))


def _with_states(solved: RowMap, tower: VisionTower, which: States) -> RowMap:
    """The same rows, each with the hidden states of its tokens (T, D) as `states`, float16: one pass a row."""

    def run(rows: Iterable[Row]) -> Iterator[Row]:
        for row in solved(rows):
            if row["status"] == "failed":
                yield row
                continue
            w_1PD = torch.as_tensor(row["variable"], device=tower.positions_ND.device)[None]
            states_TD = tower.states(w_1PD.to(tower.positions_ND.dtype), which)[0].half().cpu()
            if states_TD.isfinite().all():
                yield {**row, "states": states_TD.numpy()}
            else:
                yield failed(row, "store_states: the hidden states are beyond float16; leave the option out")

    return run


def _nearest(method: Retrieval, context: Context, batch: int) -> RowMap:
    if method.nearest_by == "caption":
        return mapped(by_caption(*context.need_captions(method), method.k), batch)
    return retrieval(context.need_reference(method), method.k, batch)


def direct(method: Direct, context: Context) -> RowMap:
    """OVI's objective over the embedding itself (ours), in whitened coordinates.

    A row starts from the mean image, or from its prompt's own; with the neighbour constraint, which holds a row where
    it starts, from the mean of the images nearest to the text.
    """
    constraint = method.constraint
    whitening = whitening_of(method, context)
    assert whitening is not None
    solved = optimised(method, context, Parametrization.direct(whitening))
    if not constraint.neighbours or constraint.around:
        return solved
    images = Retrieval(k=min(START_NEIGHBOURS, _offered(method, context)), nearest_by=constraint.nearest_by)
    nearest = _nearest(images, context, method.slots)  # so that rows that have to wait are no more than the slots take
    mean_E, inverse_EE = whitening.mean_E.cpu(), whitening.inverse_EE.cpu()

    def started(rows: list[Row]) -> Iterator[Row]:
        for row in rows:
            start_E = inverse_EE @ (torch.from_numpy(row["embedding"]) - mean_E)
            kept = {name: value for name, value in row.items() if name not in ("embedding", "status", "error")}
            yield {**kept, "start": start_E.numpy()}

    return lambda rows: solved(in_batches(nearest(rows), method.slots, started))


def optimised(method: OVI | Direct, context: Context, parametrization: Parametrization) -> RowMap:
    """The rows' problems by the batched solver."""
    whitening = whitening_of(method, context)
    problem = OviProblem(
        parametrization, method, seed=context.seed, whitening=whitening, search=_search_of(method, context)
    )  # fmt: skip
    context.slots[method.label] = problem.slots
    # On a GPU, asking after every step whether a row is done makes the host wait for the device each time.
    poll = 4 if torch.device(context.device).type == "cuda" else 1

    room = context.rooms[f"slots of {method.label}"]

    def solved(rows: Iterable[Row]) -> Iterator[Row]:
        problem.forget(room.rows)  # an earlier call may have ended in the middle
        occupancy = context.occupancy.setdefault(method.label, Occupancy())
        return solve(problem, rows, occupancy=occupancy, poll=poll, room=room)

    return solved


def _offered(method: Direct, context: Context) -> int:
    """How many images there are to start from."""
    if method.constraint.nearest_by:
        return context.need_captions(method)[1].pairs.rows
    return context.need_reference(method).rows


def whitening_of(method: OVI | Direct, context: Context) -> Whitening | None:
    """The Gaussian that holds a method's rows: of all images, or of each prompt's own; None without a reference."""
    if method.needs_reference:
        context.need_reference(method)
    reference, constraint = context.reference, method.constraint
    if reference is None:
        return None
    if constraint.around is None:
        factor_EE = reference.cholesky
        if constraint.floor is not None:
            factor_EE = floored(reference.gaussian.covariance_EE, constraint.floor)
        return Whitening.of(reference.mean, factor_EE, context.device)
    kernel = constraint.around == "kernel"
    conditional = kernelled(method, context, Kernel()) if kernel else linear(method, context)
    factor_EE = floored(conditional.regression.left_EE, constraint.floor or OWN_FLOOR)
    return Whitening.of(reference.mean, factor_EE, context.device, conditional.mean)


def _search_of(method: OVI | Direct, context: Context) -> Search | None:
    constraint = method.constraint
    if not constraint.neighbours:
        return None
    if constraint.nearest_by:
        return CaptionSearch(*context.need_captions(method), constraint.k)
    return open_search(context.need_reference(method), constraint.k, context.device)
