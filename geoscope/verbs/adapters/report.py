"""From the facts of initial factors to a Report of kind `init-adapter`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from geoscope._version import __version__
from geoscope.adapters.factors import LoraFactors
from geoscope.names import layer_index, module_kind
from geoscope.records import (
    Coverage,
    LayerRecord,
    Layers,
    ModelRef,
    Provenance,
    Report,
    Summary,
    Values,
)
from geoscope.verbs.adapters.options import InitOptions
from geoscope.verbs.adapters.targets import Targets

__all__ = ["KIND", "adapter_report"]

KIND = "init-adapter"
# A largest error and a smallest gap tell more than a mean one.
_EXTREMES: dict[str, Callable[[list[float]], float]] = {"reconstruction_error": max, "gap": min}


def adapter_report(
    base: ModelRef,
    written: ModelRef,
    targets: Targets,
    options: InitOptions,
    made: Mapping[str, tuple[LoraFactors, Mapping[str, float]]],
    *,
    device: str,
    notes: Sequence[str],
    argv: tuple[str, ...],
    seconds: float,
) -> Report:
    """The report of one initialisation.

    written: the output. made: name → its factors and start errors by dtype.
    """
    layers = tuple(_record(name, shape, *made[name]) for name, shape in targets.shapes.items())
    modules = dict.fromkeys(layer.module for layer in layers)
    by_module = {
        module: [layer for layer in layers if layer.module == module] for module in modules
    }
    return Report(
        kind=KIND,
        provenance=Provenance(
            tool_version=__version__,
            argv=argv,
            refs=(base, written),
            device=device,
            compute_dtype="float64",
            seed=options.seed,
            parameters=_parameters(options, notes),
            seconds=seconds,
        ),
        coverage=Coverage(matched=tuple(targets.shapes), skipped=targets.skipped),
        layers=Layers(layers),
        summary=Summary(
            model=_combined([layer.values for layer in layers]),
            nulls=_mean_nulls(layers),
            modules={
                module: _combined([layer.values for layer in own])
                for module, own in by_module.items()
            },
            module_nulls={module: _mean_nulls(own) for module, own in by_module.items()},
            verdict=None,
        ),
    )


def _record(
    name: str, shape: tuple[int, ...], factors: LoraFactors, errors: Mapping[str, float]
) -> LayerRecord:
    facts = dict(factors.facts)
    facts["reconstruction_error"] = errors.get("written", errors["float32"])
    status = {key: one for key, one in factors.status.items() if key != "reconstruction_error"}
    return LayerRecord(
        name=name,
        layer=layer_index(name),
        module=module_kind(name),
        shape=shape,
        values=facts,
        nulls=dict(factors.nulls),
        status=status,
        method=factors.method,
        notes=factors.notes,
    )


def _combined(rows: Sequence[Values]) -> Values:
    """The mean over the matrices that have a number, or an extreme; None where none has."""
    combined: dict[str, float | None] = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        numbers = [float(row[key]) for row in rows if row.get(key) is not None]  # pyright: ignore[reportArgumentType]
        combined[key] = _EXTREMES.get(key, _mean)(numbers) if numbers else None
    return combined


def _mean(numbers: Sequence[float]) -> float:
    return math.fsum(numbers) / len(numbers)


def _mean_nulls(layers: Sequence[LayerRecord]) -> dict[str, float]:
    keys = dict.fromkeys(key for layer in layers for key in layer.nulls)
    found = {key: [layer.nulls[key] for layer in layers if key in layer.nulls] for key in keys}
    return {key: _mean(numbers) for key, numbers in found.items()}


def _parameters(options: InitOptions, notes: Sequence[str]) -> dict[str, object]:
    return {
        "method": options.method,
        "rank": options.rank,
        "alpha": options.chosen_alpha,
        "layout": options.chosen_layout or None,
        "residual_dtype": options.residual_dtype,
        "targets": list(options.targets),
        **{key: value for key, value in options.method_options.items() if key != "seed"},
        "include": list(options.include),
        "exclude": list(options.exclude),
        "layers": None if options.layers is None else sorted(options.layers),
        "notes": list(notes),
    }
