"""Weights of a step that was not trained, as far as held-out checkpoints justify them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geoscope._version import __version__
from geoscope.arguments import Place, path_of, scalar
from geoscope.engine import matrix_boundary
from geoscope.errors import NumericsError, OptionError, first_names
from geoscope.files import record_bytes, record_size
from geoscope.linalg import Product
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.writable import refuse_unwritable
from geoscope.outputs.model_folder import plan_model, write_model
from geoscope.outputs.output import MemoryFolder, file_size, output_of
from geoscope.peft.folder import EXTRAPOLATION, RECORD
from geoscope.records import Status
from geoscope.sources.memory import Model, as_models_or_references
from geoscope.trajectory.backtest import Backtest
from geoscope.trajectory.horizon import credible_horizon
from geoscope.trajectory.methods import METHODS
from geoscope.trajectory.prediction import MethodInput, Prediction
from geoscope.verbs.choices import chosen
from geoscope.verbs.options import Progress
from geoscope.verbs.series.distance import series_distance
from geoscope.verbs.series.extrapolate_adapter import input_paths, write_adapter
from geoscope.verbs.series.extrapolation import Extrapolation
from geoscope.verbs.series.follow import measure_series, with_base
from geoscope.verbs.series.model_vectors import ModelVector, model_vectors
from geoscope.verbs.series.next_series import HORIZON_ORIGINS, NEXT, NextForecast, next_forecast
from geoscope.verbs.series.opening import open_followed
from geoscope.verbs.series.options import FollowOptions
from geoscope.verbs.series.report import Trajectory, traps_of
from geoscope.verbs.series.tensors import MatchedSeries, ModelTensor

__all__ = ["extrapolate", "methods"]

_ALIASES = {"damped": "damped(linear)"}
# Entries of a block of all checkpoints.
_BLOCK = 1 << 22


def methods() -> tuple[str, ...]:
    """Names that `--method` takes, as `backtest` spells them."""
    return ("auto", *METHODS)


def extrapolate(
    references: Model | Sequence[Model],
    target: int,
    out: Place | None = None,
    *,
    base: Model | None = None,
    method: str = "auto",
    options: FollowOptions | None = None,
    extend: Sequence[float] = (),
    training: int = 1000,
    origins: int | None = None,
    whole_model: bool = False,
    device: str = "cpu",
    rank: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
    **named: Any,
) -> Extrapolation:
    """The predicted model of step `target`, or of adapters an adapter.

    references, base: as of `follow`. out: a folder to write; without one the tensors stay in
    memory. named: fields of `FollowOptions`, in place of those in `options`.
    method: one of `methods`; `auto` takes for each tensor the one with the best held-out skill and
    holds where none has any; it leaves out `next`, whose networks take minutes. extend: of `next`,
    the published family W_T + c·Ẑ, a model in `out`/c… for each c. training: steps of its networks,
    1000 as published. origins: of the backtest, at which they train again for the held-out skill;
    default three, as many as a credible horizon takes, and one with `force`. whole_model: norms and
    biases train them and are predicted, too, and without `include` also embeddings and the output
    head, as published. device: where they train. rank: of a predicted adapter; default twice that
    of the series. force: beyond the credible horizon, too, of a series that is far from its base,
    and over an earlier output. Tensors that are not followed are copied from the last checkpoint.
    Raises GeoscopeError.
    """
    options, start = with_base(chosen(FollowOptions, options, named), base)
    if options.allow_vocab_resize:
        raise OptionError("`allow_vocab_resize`: a predicted model has whole tensors; leave it out")
    place = None if out is None else path_of(out, "out")
    target, method, extend = scalar(target, "target", "int"), _method_named(method), tuple(extend)
    rank = None if rank is None else scalar(rank, "rank", "int")
    is_next = method in (NEXT, f"damped({NEXT})")  # networks train
    _refuse_of_next(is_next=is_next, extend=extend, origins=origins, whole_model=whole_model)
    if whole_model and not options.include:
        options = replace(options, include=(".",))
    progress = progress or Progress()
    opened = as_models_or_references(references, "references")
    found = open_followed(opened, options, progress, start=start, in_parts=False)
    _refuse_series(found, options, target, is_next=is_next, rank=rank)
    made = measure_series(found, options, progress)
    far = series_distance(found, made.increments)
    if far is not None and not force:
        raise OptionError(f"{far.text}, or use `force`")
    forecast, vectors = None, {}
    if is_next:
        if whole_model:
            vectors = model_vectors(found, options, progress)
        forecast = next_forecast(
            found,
            made,
            target,
            seed=options.seed,
            device=device,
            training=training,
            origins=origins or (1 if force else HORIZON_ORIGINS),
            vectors=vectors,
            jobs=options.jobs,
            progress=progress,
        )
    test = made.backtest(None if forecast is None else {NEXT: forecast.moves})
    if forecast is not None:
        test = test.at(forecast.origins)
    result = _planned(found, test, method, target, seed=options.seed, force=force)
    methods_of = test.choice() if method == "auto" else dict.fromkeys(made.increments, method)
    traps = traps_of(found, made, base_exact=options.base is not None)
    told = () if far is None else (far.text,)
    tried = () if forecast is None else (_tried(found, forecast),)
    result = replace(
        result,
        out=place,
        chosen=methods_of | dict.fromkeys(vectors, method),
        notes=(*told, *found.notes, *traps, *tried, *_not_followed(found, made)),
        folders=_folders(place, extend),
    )
    if found.series.kind == "adapter":
        return _write_adapter(found, made, test, result, options, rank=rank, force=force)
    if forecast is None or not extend:
        return _write(found, made, test, result, forecast, vectors, force=force)
    return _write_family(found, made, test, result, forecast, vectors, extend, force=force)


def _folders(out: Path | None, extend: Sequence[float]) -> tuple[Path, ...]:
    """Where models are written: in `out`, or of a family in a folder for each factor."""
    if out is None:
        return ()
    return tuple(out / f"c{factor:g}" for factor in extend) or (out,)


def _method_named(name: str) -> str:
    """The method as the backtest spells it. Raises OptionError for an unknown one."""
    method = _ALIASES.get(name, name.replace("-", "_"))
    if method not in methods():
        raise OptionError(f"`method` {method!r} is not one of {', '.join(methods())}")
    return method


def _refuse_series(
    found: MatchedSeries, options: FollowOptions, target: int, *, is_next: bool, rank: int | None
) -> None:
    """Raises for a series that the method or the target does not fit, or that cannot be written."""
    of_adapters = found.series.kind == "adapter"
    if of_adapters and is_next:
        raise OptionError("`method` next reads whole models; of adapters take another")
    if of_adapters and options.initial_adapter is not None and options.base is None:
        raise OptionError(
            "with `initial_adapter`, the predicted adapter needs the original model; give that as "
            "`base`"
        )
    if rank is not None and not of_adapters:
        raise OptionError("`rank` applies to adapters only; this series has whole models")
    for point in found.series.points:
        if point.checkpoint is not None:
            refuse_unwritable(point.checkpoint, "extrapolate")
    if target <= found.steps[-1]:
        raise OptionError(
            f"`target` {target}: the series ends at step {found.steps[-1]}; give a later step"
        )


def _planned(
    found: MatchedSeries, test: Backtest, method: str, target: int, *, seed: int, force: bool
) -> Extrapolation:
    """Skill and horizon of the method. Raises OptionError for a target beyond the horizon."""
    last = found.steps[-1]
    horizon = 0.0 if method == "hold" else credible_horizon(test, method, seed=seed).steps
    skill = test.skill(method)
    if method != "hold" and target - last > horizon and not force:
        raise OptionError(_beyond(method, target - last, horizon, skill))
    return Extrapolation(None, target, last, method, {}, skill, horizon, (), ())


def _write_family(
    found: MatchedSeries,
    made: Trajectory,
    test: Backtest,
    result: Extrapolation,
    forecast: NextForecast,
    vectors: Mapping[str, ModelVector],
    extend: Sequence[float],
    *,
    force: bool,
) -> Extrapolation:
    """A model for each factor c: W_T + c·Δ̂."""
    for factor, folder in zip_longest(extend, result.folders):
        place = replace(result, out=folder, models=())
        scaled = replace(forecast, scale=factor)
        written = _write(found, made, test, place, scaled, vectors, force=force)
        notes = dict.fromkeys([*result.notes, *written.notes])
        models = (*result.models, *written.models)
        result = replace(result, chosen=written.chosen, notes=tuple(notes), models=models)
    return result


def _refuse_of_next(
    *, is_next: bool, extend: Sequence[float], origins: int | None, whole_model: bool
) -> None:
    """What has a meaning for `next` alone, and numbers that cannot be."""
    if not all(map(math.isfinite, extend)) or len({f"{c:g}" for c in extend}) < len(extend):
        given = ",".join(map(repr, extend))
        raise OptionError(f"`extend` {given}: finite numbers, each once, are needed")
    if origins is not None and origins < 1:
        raise OptionError(f"`origins` {origins}: at least one is needed")
    given = {"extend": bool(extend), "origins": origins is not None, "whole_model": whole_model}
    if not is_next and any(given.values()):
        name = next(name for name, is_given in given.items() if is_given)
        raise OptionError(f"`{name}` works only with `method` next; leave it out")


def _tried(found: MatchedSeries, forecast: NextForecast) -> str:
    count = len(forecast.origins)
    at = ", ".join(f"{found.steps[origin]:g}" for origin in forecast.origins)
    where = f"step {at}" if count == 1 else f"steps {at}"
    lacking = f"; a credible horizon takes {HORIZON_ORIGINS} (`origins`)"
    others = "norms and biases are as in the last checkpoint (`whole_model` predicts them)"
    if forecast.vectors:
        others = f"{len(forecast.vectors)} norms and biases are predicted, and not backtested"
    return (
        f"next: its held-out skill is that of networks trained again at {where} on what was "
        f"known there{lacking if count < HORIZON_ORIGINS else ''}; {others}"
    )


def _beyond(method: str, ahead: int, horizon: float, skill: float | None) -> str:
    known = "unknown" if skill is None else f"{skill:.2f}"
    credible = f"only up to {horizon:g} steps" if horizon else "at no distance"
    return (
        f"`target` is {ahead} steps ahead, but {method} is credible {credible} (held-out skill "
        f"{known}); choose a nearer `target`, or use `force`"
    )


# --- the model that is written --------------------------------------------------------------------


def _write(
    found: MatchedSeries,
    made: Trajectory,
    test: Backtest,
    result: Extrapolation,
    forecast: NextForecast | None,
    vectors: Mapping[str, ModelVector],
    *,
    force: bool,
) -> Extrapolation:
    last = _models(found)[-1][0]
    stored = {_stored(found, name): name for name in made.increments}
    stored |= {vector.places[-1][1]: name for name, vector in vectors.items()}
    replaced = {
        place: last.tensors[place].dtype
        for place, name in stored.items()
        if result.chosen[name] != "hold"
    }
    plan = plan_model(last, replaced, {"geoscope_version": __version__, "extrapolated": "true"})
    travelling, _ = last.source.travelling()
    sizes = {
        **plan.sizes,
        **{name: file_size(source) for name, source in travelling.items()},
        RECORD: record_size(len(stored)),
    }
    held: dict[str, str] = {}
    with output_of(result.out, sizes, force=force, inputs=input_paths(found)) as folder:

        def replacement(place: str) -> Tensor | None:
            if place not in replaced:
                return None
            name = stored[place]

            def predicted() -> Tensor:
                if name in vectors:
                    return _moved_vector(vectors[name], name, test, result.chosen[name], forecast)
                return _predicted(found, made, test, name, result, forecast)

            weight, reason = _predicted_or_held(last, place, predicted)
            if reason is not None:
                held[stored[place]] = reason
            return weight

        write_model(folder, "", last, plan, replacement)
        for name, source in travelling.items():
            folder.copy(name, source)
        scale = None if forecast is None else forecast.scale
        result = _with_held(result, held)
        folder.write(RECORD, record_bytes(_record(found, test, result, scale)))
    if isinstance(folder, MemoryFolder):
        return replace(result, models=(folder.tensors_in("."),))
    return result


def _with_held(result: Extrapolation, held: Mapping[str, str]) -> Extrapolation:
    """The result, with matrices that are as the last checkpoint has them though a method was
    chosen. held: name → why."""
    notes = tuple(f"{name}: {reason}; copied" for name, reason in held.items())
    chosen = {**result.chosen, **dict.fromkeys(held, "hold")}
    return replace(result, chosen=chosen, notes=(*result.notes, *notes))


def _write_adapter(
    found: MatchedSeries,
    made: Trajectory,
    test: Backtest,
    result: Extrapolation,
    options: FollowOptions,
    *,
    rank: int | None,
    force: bool,
) -> Extrapolation:
    def predict(name: str, updates: list[Product]) -> Product:
        method, inc = result.chosen.get(name, "hold"), made.increments.get(name)
        if method == "hold" or inc is None:
            return updates[-1]
        seen = MethodInput(inc, made.paths.get(name), factors=test.factors)
        return METHODS[method].predict(seen, result.target).of(updates)

    record = _record(found, test, result, None)
    written = write_adapter(
        found,
        predict,
        result.out,
        record,
        base=options.base,
        rank=rank,
        force=force,
    )
    return replace(
        _with_held(result, written.held),
        rank=written.rank,
        discarded=written.discarded,
        config=written.config,
        models=written.models,
    )


def _models(found: MatchedSeries) -> tuple[tuple[Checkpoint, str], ...]:
    return _model_tensor(found, next(iter(found.tensors))).places


def _model_tensor(found: MatchedSeries, name: str) -> ModelTensor:
    tensor = found.tensors[name]
    assert isinstance(tensor, ModelTensor)  # adapters were refused
    return tensor


def _stored(found: MatchedSeries, name: str) -> str:
    """The name of a tensor in the last checkpoint."""
    return _model_tensor(found, name).places[-1][1]


def _predicted_or_held(
    last: Checkpoint, stored: str, predicted: Callable[[], Tensor]
) -> tuple[Tensor, str | None]:
    """The prediction; where it fails, or is not finite, the last weight, and why."""
    try:
        with matrix_boundary():
            weight = predicted()
            if not bool(torch.isfinite(weight).all()):
                raise NumericsError(f"the prediction overflows {weight.dtype}")
        return weight, None
    except NumericsError as error:
        weight = last.read(stored)
        turned = weight.T.contiguous() if last.tensors[stored].transposed else weight
        return turned, f"{Status.NOT_CONVERGED.value}: {error}"


def _predicted(
    found: MatchedSeries,
    made: Trajectory,
    test: Backtest,
    name: str,
    result: Extrapolation,
    forecast: NextForecast | None,
) -> Tensor:
    """The weight at the target step, as the last checkpoint's file would hold it."""
    step = None if forecast is None else forecast.pairs[name] * forecast.scale
    seen = MethodInput(made.increments[name], made.paths.get(name), step, test.factors)
    prediction = METHODS[result.chosen[name]].predict(seen, result.target)
    return _written(_model_tensor(found, name), prediction)


def _moved_vector(
    vector: ModelVector, name: str, test: Backtest, method: str, forecast: NextForecast | None
) -> Tensor:
    assert forecast is not None  # `next` alone predicts vectors
    factor = 1.0 if method == NEXT else test.factors[NEXT]
    return vector.moved(factor * forecast.scale * forecast.vectors[name])


def _written(tensor: ModelTensor, prediction: Prediction) -> Tensor:
    """W_0 + ΔŴ in fp64, block by block in the order of the file."""
    checkpoint, stored = tensor.places[-1]
    info = checkpoint.tensors[stored]
    dtype = getattr(torch, info.dtype)
    m, n = info.shape
    out = torch.empty(m * n, dtype=torch.float64 if prediction.pairs else dtype)
    width = max(1, _BLOCK // len(tensor.places))
    for start in range(0, m * n, width):
        stop = min(start + width, m * n)
        out[start:stop] = _combination(tensor, prediction.weights, start, stop).to(out.dtype)
    weight = out.reshape((n, m) if info.transposed else (m, n))
    for pair in prediction.pairs:
        weight.add_(pair.dense().T if info.transposed else pair.dense())
    return weight.to(dtype)


def _combination(tensor: ModelTensor, weights: Tensor, start: int, stop: int) -> Tensor:
    """W_0 + Σw_i(W_i − W_0) of the entries start … stop−1; W_T itself where it is held."""
    blocks = [
        (weight, place)
        for weight, place in zip(weights.tolist(), tensor.places[1:], strict=True)
        if weight
    ]
    if [weight for weight, _ in blocks] == [1.0] and blocks[0][1] is tensor.places[-1]:
        checkpoint, stored = tensor.places[-1]
        return checkpoint.read_part(stored, start, stop).double()
    checkpoint, stored = tensor.places[0]
    base = checkpoint.read_part(stored, start, stop).double()
    total = base.clone()
    for weight, (checkpoint, stored) in blocks:
        block = checkpoint.read_part(stored, start, stop).double()
        total.add_(block.sub_(base), alpha=weight)
    return total


def _not_followed(found: MatchedSeries, made: Trajectory) -> tuple[str, ...]:
    """Notes on the matrices that the output has as the last checkpoint has them."""
    failed = tuple(f"{one.name}: {one.reason}; copied" for one in made.failed)
    if not found.missing:
        return failed
    names = f"{len(found.missing)} not followed: {first_names(found.missing)}"
    return (*failed, f"{names}; copied from the last checkpoint")


def _record(
    found: MatchedSeries, test: Backtest, result: Extrapolation, scale: float | None
) -> dict[str, Any]:
    return {
        "schema": EXTRAPOLATION,
        "geoscope_version": __version__,
        "method": result.method,
        "to_step": result.target,
        "steps": list(found.steps),
        "points": list(found.points),
        "base": found.refs[0].given,
        "horizon": result.horizon,
        "skill": result.skill,
        "factors": test.factors,
        "scale": scale,
        "tensors": dict(result.chosen),
        "notes": list(result.notes),
    }
