"""Synthetic reports that look like real ones: any number of layers, mixed statuses, curves.

The numbers follow the formulas of the quantities roughly; they are for rendering, not for reading.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from geoscope.records import (
    Coverage,
    Curve,
    LayerRecord,
    Layers,
    ModelRef,
    Overlap,
    Provenance,
    Rename,
    Report,
    Run,
    Skipped,
    Status,
    Summary,
    Verdict,
)
from geoscope.report import render_text

STEPS = (0, 10, 20, 40, 50, 100)
FALLBACK = "subspace bound 5.3e-09 above 4e-09 at k in [8, 64]"
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ATTENTION = MODULES[:4]
_ADAPTER = (
    *("tau_spec", "tau_euc", "density_spec", "density_euc", "density_union"),
    *("density_intersection", "jaccard", "masked_energy", "captured_energy", "gap"),
    *("head_energy", "relative_norm", "reconstruction_error"),
)
_DRIFT = (
    *("drift_fraction", "drift_fraction_corrected", "drift_p", "increment_cosine"),
    *("increment_cosine_corrected", "straightness", "curvature"),
)
_CAPACITY = (
    *("nominal_rank", "effective_rank_share", "entropy_rank_share", "k90_share", "k99_share"),
    *("tail_ratio", "suggested_rank"),
)
_LINEAGE = (
    *("base_cosine", "lineage_angle", "growth", "equal_embeddings", "merge_weight", "copy_share"),
)
_METHODS = ("two_point", "linear", "damped(linear)", "relex", "relex_pinned", "auto")
_TRAJECTORY_NULLS = {
    "relative_update": 0.009,
    "changed_share": 0.22,
    "sync_share": 0.66,
    "drift_fraction": 0.0,
    "drift_fraction_corrected": 0.0,
    "increment_cosine": 0.0,
    "increment_cosine_corrected": 0.0,
    "straightness": 0.45,
    "curvature": 1.41,
    "temporal_pc1": 0.82,
    "temporal_pc1_centred": 0.65,
    "rank1_coefficient_r2": 0.96,
    "linear_r2": 0.63,
    "linear_r2_origin": 0.81,
    "rank1_share_last": 0.02,
    "norm_fraction": 0.14,
}
_FLAGGED = ("ON_PRINCIPAL", "SATURATED", "IDLE")
_THRESHOLDS = {
    "distorted.nss": 0.05,
    "distorted.angle": 0.1745329,
    "distorted.angle_over_null": 1.5,
}


def example(
    kind: str = "compare",
    *,
    layers: int = 4,
    modules: Sequence[str] = MODULES,
    ks: Sequence[int] = (8, 64),
    hidden: int = 192,
    rho: float = 0.02,
    runs: int = 1,
    seed: int = 0,
    partial: bool = False,
) -> Report:
    """A report of `layers` blocks; `rho` decides how much is below the resolution of bfloat16."""
    generator = random.Random(seed)
    records = [
        _matrix(generator, kind, layer, module, hidden, ks, rho, run if runs > 1 else None)
        for run in range(1, runs + 1)
        for layer in range(layers)
        for module in modules
    ]
    if partial and records:
        records[-1] = _not_finite(records[-1])
    missing = (records[-1].name,) if partial and records else ()
    return Report(
        kind=kind,
        provenance=_provenance(runs),
        coverage=_coverage(records, missing),
        layers=Layers(records),
        summary=_summary(kind, records, runs),
        vectors=Layers(_vectors(layers)),
        overlaps=_overlaps(records) if runs > 1 else (),
    )


def all_null(report: Report) -> Report:
    """The same report when nothing changed: every number null, and so every aggregate."""
    layers = tuple(
        replace(
            layer,
            values=dict.fromkeys(layer.values),
            status=dict.fromkeys(layer.values, Status.ZERO_UPDATE),
            curves={},
            series={},
            gram=(),
        )
        for layer in report.layers
    )
    summary = replace(
        report.summary,
        model=dict.fromkeys(report.summary.model),
        modules={name: dict.fromkeys(row) for name, row in report.summary.modules.items()},
        series={},
    )
    return replace(report, layers=layers, summary=summary)


def _shape(module: str, hidden: int) -> tuple[int, int]:
    narrow, wide = hidden // 3, hidden * 8 // 3
    shapes = {"k_proj": (narrow, hidden), "v_proj": (narrow, hidden), "down_proj": (hidden, wide)}
    shapes |= dict.fromkeys(("gate_proj", "up_proj"), (wide, hidden))
    return shapes.get(module, (hidden, hidden))


def _matrix(
    generator: random.Random,
    kind: str,
    layer: int,
    module: str,
    hidden: int,
    ks: Sequence[int],
    rho: float,
    tuned: int | None,
) -> LayerRecord:
    m, n = _shape(module, hidden)
    size = rho * math.exp(generator.gauss(0, 0.4))
    if kind == "trajectory":
        return _followed(generator, layer, module, (m, n), size, tuned)
    k_v = max(1, min(64, min(m, n) // 8))
    values, nulls = _numbers(generator, m, n, size, sorted({*ks, k_v}))
    wanted = [key for key in values if _belongs(key, kind)]
    status, raw = _statuses(values, wanted, m, n, sorted({*ks, k_v}))
    parent = "self_attn" if module in _ATTENTION else "mlp"
    judge = {"collapse": _matrix_verdict, "compare": _matrix_verdict, "capacity": _rank_verdict}
    return LayerRecord(
        name=f"model.layers.{layer}.{parent}.{module}.weight",
        layer=layer,
        module=module,
        shape=(m, n),
        values={k: None if status.get(k, Status.OK).is_null else values[k] for k in wanted},
        nulls={key: nulls[key] for key in wanted if key in nulls},
        status=status,
        raw=raw,
        verdict=judge[kind](values, k_v) if kind in judge else None,
        method=_method(fell_back=layer == 1),
        curves=_curves(generator, m, n, values, ks),
        notes=("stored as float32, holds only bfloat16 numbers",) if module == "o_proj" else (),
        tuned=tuned,
    )


def _followed(
    generator: random.Random,
    layer: int,
    module: str,
    shape: tuple[int, int],
    size: float,
    tuned: int | None,
) -> LayerRecord:
    """A matrix over STEPS: drift and noise of equal size in a few dimensions, H from them."""
    T, dimensions = len(STEPS) - 1, 40
    parent = "self_attn" if module in _ATTENTION else "mlp"
    drift = [generator.gauss(0, 1) for _ in range(dimensions)]
    taken = [
        [size / T * (one + generator.gauss(0, 1)) / dimensions**0.5 for one in drift]
        for _ in range(T)
    ]
    gram = tuple(tuple(_dot(one, other) for other in taken) for one in taken)
    norms = tuple(
        sum(gram[i][j] for i in range(t) for j in range(t)) ** 0.5 for t in range(1, T + 1)
    )
    share = tuple(generator.uniform(0.2, 0.5) for _ in norms)
    noise = 1.66e-3 / size
    unresolved = dict.fromkeys(_DRIFT, Status.BELOW_RESOLUTION) if noise > 0.6 else {}
    cautious = dict.fromkeys(_DRIFT, Status.CAUTION) if noise > 0.2 else {}
    status = unresolved or cautious
    values = _trajectory_numbers(generator, size)
    return LayerRecord(
        name=f"model.layers.{layer}.{parent}.{module}.weight",
        layer=layer,
        module=module,
        shape=shape,
        values={key: None if key in unresolved else value for key, value in values.items()},
        nulls=_TRAJECTORY_NULLS,
        status=status,
        raw={key: values[key] for key in unresolved},
        series={
            "update_norm_by_step": norms,
            "step_norm": tuple(gram[i][i] ** 0.5 for i in range(T)),
            "relative_update_by_step": norms,
            "relative_step": tuple(gram[i][i] ** 0.5 for i in range(T)),
            "rank1_share": share,
            "sigma1": tuple(one * part**0.5 for one, part in zip(norms, share, strict=True)),
            "direction_cosine": tuple(generator.uniform(0.5, 1) for _ in norms[1:]),
            "changed_share_by_step": tuple(0.2 for _ in norms),
            "changed_share_null": tuple(0.22 for _ in norms),
        },
        gram=gram,
        tuned=tuned,
    )


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))


def _trajectory_numbers(generator: random.Random, size: float) -> dict[str, float]:
    return {
        "relative_update": size,
        "path_length": 1.6 * size,
        "changed_share": 0.2,
        "sync_share": 0.6,
        "sync_share_gaps": 0.4,
        "sync_break_even": 1 / 3,
        "sync_bytes": 44237.0,
        "step_precision_ratio": 1.66e-3 / size,
        **{key: generator.uniform(0.3, 0.6) for key in _DRIFT},
        "temporal_pc1": 0.98,
        "temporal_pc1_centred": 0.95,
        "rank1_coefficient_r2": 0.99,
        "linear_r2": 0.96,
        "linear_r2_origin": 0.98,
        "rank1_share_last": generator.uniform(0.2, 0.5),
        "norm_fraction": generator.uniform(0.4, 0.7),
        "direction_cosine_mean": generator.uniform(0.5, 1),
        "gap21_last": generator.uniform(0.4, 0.95),
        **{f"skill@{method}": generator.uniform(-0.3, 0.6) for method in _METHODS},
    }


def _method(*, fell_back: bool) -> dict[str, dict[str, Any]]:
    """How the factors were got; the base of a layer that fell back by an exact SVD."""
    gram = {"how": "gram-tridiagonal", "bound": 3e-14, "subspace_bound": 6e-10, "fallback": None}
    exact = {"how": "svd", "bound": 9e-16, "subspace_bound": None, "fallback": FALLBACK}
    return {"base.S": exact if fell_back else gram, "tuned.S": gram, "update.S": gram}


def _belongs(key: str, kind: str) -> bool:
    """Whether a report of this kind holds the id."""
    spectrum = key.startswith(("update.", "base.", "tuned."))
    aligned = key.startswith(("energy_", "lift", "versus", "angle", "gap"))
    size = key in ("relative_update", "precision_ratio", "update_sparsity")
    if key in _ADAPTER or kind == "init-adapter":
        return key in _ADAPTER and kind == "init-adapter"
    if key in _LINEAGE or kind == "lineage":
        return kind == "lineage" and (size or key in _LINEAGE)
    if key in _CAPACITY or kind == "capacity":
        return kind == "capacity" and (size or key in _CAPACITY)
    shown = {
        "collapse": key != "gap@8" and (not spectrum or key == "update.stable_rank"),
        "anisotropy": size or spectrum,
        "alignment": size or aligned,
        "compare": True,
    }
    return shown[kind]


def _numbers(
    generator: random.Random, m: int, n: int, size: float, ks: Iterable[int]
) -> tuple[dict[str, float | int], dict[str, float]]:
    q, wide = min(m, n), max(m, n)
    isotropic = wide * q / (math.sqrt(m) + math.sqrt(n)) ** 2
    share = generator.uniform(0.05, 0.35)
    stable = generator.uniform(2, 6)
    values: dict[str, float | int] = {
        "relative_update": size,
        "precision_ratio": 1.66e-3 / size,
        "update_sparsity": min(0.99, 1.7e-3 / size),
        "update.stable_rank": stable,
        "update.entropy_rank": 4 * stable,
        "update.effective_rank": 0.4 * q,
        "update.top_share@1": 1 / stable,
        "base.stable_rank": 9.1,
        "tuned.stable_rank": 9.0,
        "nss": share * size,
        "spectral_share": share,
        "spectral_lift": share * math.sqrt(wide),
        "rank_ratio": generator.gauss(1, 0.01),
        "intruders": int(generator.random() < 0.25),
    }
    values |= {key: 0.02 * place for place, key in enumerate(_ADAPTER, start=1)}
    used = min(1.0, stable / 4)
    values |= {key: used / place for place, key in enumerate(_CAPACITY[1:-1], start=1)}
    values |= {
        "base_cosine": 1 - size**2 / 2,
        "lineage_angle": 1.2,
        "growth": 0.9,
        "equal_embeddings": 0.5,
        "merge_weight": 0.4,
        "copy_share": 0.1,
    }
    values |= {"nominal_rank": 16, "suggested_rank": round(14 * used)}
    nulls = {
        **dict.fromkeys(_CAPACITY[1:-1], 1.0),
        **dict.fromkeys(("captured_energy", "head_energy", "density_intersection"), 0.04),
        "base_cosine": 0.0,
        "lineage_angle": math.pi / 2,
        "growth": 1.0,
        "update_sparsity": min(0.99, 1.6e-3 / size),
        "update.stable_rank": isotropic,
        "update.entropy_rank": 0.7 * q,
        "update.effective_rank": 0.85 * q,
        "update.top_share@1": 1 / isotropic,
        "nss": size / math.sqrt(wide),
        "spectral_share": 1 / math.sqrt(wide),
        "spectral_lift": 1.0,
        "rank_ratio": 1.0,
    }
    for k in ks:
        _aligned(generator, m, n, size, k, values, nulls)
    return values, nulls


def _aligned(
    generator: random.Random,
    m: int,
    n: int,
    size: float,
    k: int,
    values: dict[str, float | int],
    nulls: dict[str, float],
) -> None:
    lift = generator.uniform(2, 9)
    null = min(1.0, k * k / (m * n))
    captured = null**0.6 if k >= min(m, n) else min(0.9, null * lift)
    values[f"energy_two_sided@{k}"], nulls[f"energy_two_sided@{k}"] = captured, null
    values[f"energy_right@{k}"], nulls[f"energy_right@{k}"] = captured**0.5, min(1.0, k / n)
    values[f"energy_left@{k}"], nulls[f"energy_left@{k}"] = captured**0.6, min(1.0, k / m)
    values[f"lift@{k}"], nulls[f"lift@{k}"] = captured / null, 1.0
    values[f"versus_base@{k}"] = captured / min(1.0, k / min(m, n)) ** 0.5
    values[f"gap@{k}"] = generator.uniform(0.01, 0.1)
    for side in ("left", "right"):
        values[f"angle_{side}_mean@{k}"] = size * generator.uniform(1, 2)
        values[f"angle_{side}_max@{k}"] = size * generator.uniform(3, 9)
        nulls[f"angle_{side}_mean@{k}"] = size * 1.4


def _statuses(
    values: dict[str, float | int], wanted: Sequence[str], m: int, n: int, ks: Iterable[int]
) -> tuple[dict[str, Status], dict[str, float]]:
    """The table of docs/methods.md#floors in short, and what has no meaning at this k."""
    noise = values["precision_ratio"]
    status: dict[str, Status] = {}
    top = ("update.stable_rank", "update.top_share@1", "nss", "spectral_share", "spectral_lift")
    top += tuple(key for key in wanted if key.startswith(("energy_", "lift", "versus")))
    for keys, caution, below in (
        (top, 0.2, 0.6),
        (("update.entropy_rank",), 0.1, 0.2),
        (("update.effective_rank", "effective_rank_share", "tail_ratio"), 0.02, 0.08),
    ):
        level = Status.BELOW_RESOLUTION if noise > below else Status.CAUTION
        status |= dict.fromkeys(keys, level) if noise > caution else {}
    raw = {k: float(values[k]) for k, s in status.items() if s.is_null and k in wanted}
    for k in ks:
        if k >= min(m, n):
            side = "left" if m <= n else "right"
            keys = (f"angle_{side}_mean@{k}", f"angle_{side}_max@{k}")
            status |= dict.fromkeys(keys, Status.NOT_APPLICABLE)
    return {key: status[key] for key in wanted if key in status}, raw


def _matrix_verdict(values: dict[str, float | int], k: int) -> dict[str, object]:
    if values["precision_ratio"] > 0.6:
        return {"code": "UNDETERMINED", "k": k, "clause": "ν 0.83 > 0.6"}
    captured = values[f"energy_two_sided@{k}"]
    if captured > 0.13:
        return {"code": "ON_PRINCIPAL", "k": k, "clause": f"C_LR({k}) {captured:.3g} ≥ 0.5"}
    if captured >= 0.05:
        return {"code": "MIXED", "k": k, "clause": "no rule matched"}
    clause = f"C_LR({k}) {captured:.3g} ≤ 0.05 and mean angle 0.0277 ≤ 0.0318"
    return {"code": "OFF_PRINCIPAL", "k": k, "clause": clause}


def _rank_verdict(values: dict[str, float | int], k: int) -> dict[str, object]:
    used = values["effective_rank_share"]
    if used >= 1:
        return {"code": "SATURATED", "clause": "k90/r_max 1 ≥ 0.75 and σ_r/σ1 0.2 ≥ 0.1"}
    if used < 0.6:
        return {"code": "IDLE", "clause": "k99/r 0.5 ≤ 0.5"}
    return {"code": "USED", "clause": "no rule of misuse matched"}


def _curves(
    generator: random.Random, m: int, n: int, values: dict[str, float | int], ks: Sequence[int]
) -> dict[str, Curve]:
    q = min(m, n)
    points = sorted({round(q ** (i / 63)) for i in range(64)})
    scale = float(values["relative_update"]) * math.sqrt(m * n) * 0.02
    edge = 0.3 * scale / math.sqrt(q)
    slope = generator.uniform(0.5, 0.9)
    curves = {
        "update.S": [(i, scale * i**-slope + edge * (1 - i / (q + 1))) for i in points],
        "base.S": [(i, 30 * i**-0.4) for i in points],
        "update.S_null": [(i, 1.9 * scale / math.sqrt(q) * (1 - 0.9 * i / q)) for i in points],
        "update.S_floor": [(1, edge), (q, edge)],
        "energy_right_null": [(k, k / n) for k in points],
        "energy_left_null": [(k, k / m) for k in points],
        "energy_right": [(k, (k / n) ** 0.7) for k in points],
        "energy_left": [(k, (k / m) ** 0.8) for k in points],
        "energy_base": [(k, (k / q) ** 0.4) for k in points],
    }
    for side in ("left", "right"):
        for k in ks:
            if values.get(f"angle_{side}_mean@{k}") is not None and k < q:
                mean = float(values[f"angle_{side}_mean@{k}"])
                curves[f"angles_{side}@{k}"] = [(i, 2 * mean * i / k) for i in range(1, k + 1)]
    return {key: Curve.through((float(x), y) for x, y in curve) for key, curve in curves.items()}


def _not_finite(layer: LayerRecord) -> LayerRecord:
    return replace(
        layer,
        values=dict.fromkeys(layer.values),
        status=dict.fromkeys(layer.values, Status.NON_FINITE),
        verdict=None if layer.verdict is None else {"code": "UNDETERMINED", "k": None},
        curves={},
        series={},
        gram=(),
    )


def _provenance(runs: int) -> Provenance:
    refs = [ModelRef("runs/tiny/base", "runs/tiny/base", None, "bfloat16")]
    refs += [
        ModelRef(f"runs/tiny/grpo/checkpoint-{240 * run}", "as given", None, "bfloat16")
        for run in range(1, runs + 1)
    ]
    return Provenance(
        tool_version="0.1.0",
        argv=("geoscope", "compare", "base", "tuned"),
        refs=tuple(refs),
        device="cpu",
        compute_dtype="float64",
        seed=0,
        parameters={"k": [8, 64]},
        seconds=1.5,
    )


def _coverage(records: Sequence[LayerRecord], missing: tuple[str, ...]) -> Coverage:
    skipped = (
        Skipped("model.embed_tokens.weight", "embedding"),
        Skipped("lm_head.weight", "output head"),
    )
    bad = tuple(Skipped(name, "holds 3 NaN", missing=True) for name in missing)
    return Coverage(
        matched=tuple(dict.fromkeys(record.name for record in records)),
        skipped=skipped + bad,
        renamed=(Rename("model.norm.weight", "_orig_mod.model.norm.weight", "wrapper _orig_mod."),),
        missing=missing,
    )


def _vectors(layers: int) -> tuple[LayerRecord, ...]:
    return tuple(
        LayerRecord(
            name=f"model.layers.{layer}.input_layernorm.weight",
            layer=layer,
            module="input_layernorm",
            shape=(192,),
            values={"relative_update": 1e-4},
        )
        for layer in range(layers)
    )


def _summary(kind: str, records: Sequence[LayerRecord], runs: int) -> Summary:
    if runs == 1:
        modules, module_nulls = _by_module(records)
        verdict = _verdict(kind, records)
        summary = Summary(*_mean(records), modules, module_nulls, verdict)
        return _with_steps(summary, records) if kind == "trajectory" else summary
    lineage = {"parents": [1, *[None, *[1] * runs][:runs]], "beside": [None] * (runs + 1)}
    answer = _verdict(kind, records) if kind == "lineage" else None
    parts = [
        _run(kind, run, [record for record in records if record.tuned == run])
        for run in range(1, runs + 1)
    ]
    told = lineage if kind == "lineage" else None
    return Summary({}, {}, {}, {}, verdict=answer, runs=tuple(parts), lineage=told)


def _with_steps(summary: Summary, records: Sequence[LayerRecord]) -> Summary:
    """The model's own numbers of a trajectory: series, skill by distance, verdict."""
    keys = ("relative_update_by_step", "relative_step")
    T = len(STEPS) - 1
    series = {
        key: tuple(sum(one.series[key][i] or 0 for one in records if one.series) for i in range(T))
        for key in (keys if records else ())
    }
    series |= {f"{walk}component{i}": tuple(t / (10 * i) for t in range(1, T + 1))
               for walk in ("", "walk_") for i in (1, 2)}  # fmt: skip
    series["distance"] = (10.0, 30.0)
    series["changed_share_by_step"] = (0.2,) * T
    blocks = sorted({one.layer for one in records if one.layer is not None})
    series["depth_centre_by_step"] = (sum(blocks) / max(1, len(blocks)),) * T
    series |= {f"depth_share@{block}_by_step": (1 / len(blocks),) * T for block in blocks}
    series |= {f"skill_by_distance@{method}": (0.5, None) for method in _METHODS}
    verdict = Verdict(
        code="DRIFT",
        share=None,
        shares={},
        flagged=(),
        counts={},
        text="mostly drift: increments share a direction that holds 50 % of the energy of an "
        "interval (φ = 0.500, a walk has 0; sign-flip p = 0.062, T = 5). Best held-out: "
        "damped(linear), skill 0.52 over holding the last checkpoint; no horizon at which that "
        "is credible",
        thresholds={"few": 8.0},
    )
    model = {**summary.model, "horizon": 0.0}
    return replace(summary, model=model, steps=STEPS, series=series, verdict=verdict)


def _run(kind: str, run: int, records: Sequence[LayerRecord]) -> Run:
    return Run(run, *_mean(records), *_by_module(records), _verdict(kind, records))


def _by_module(
    records: Sequence[LayerRecord],
) -> tuple[dict[str, dict[str, float | None]], dict[str, dict[str, float]]]:
    kinds = dict.fromkeys(record.module for record in records)
    means = {kind: _mean([r for r in records if r.module == kind]) for kind in kinds}
    return {k: mean[0] for k, mean in means.items()}, {k: mean[1] for k, mean in means.items()}


def _mean(records: Sequence[LayerRecord]) -> tuple[dict[str, float | None], dict[str, float]]:
    keys = sorted({key for record in records for key in record.values})
    values: dict[str, float | None] = {}
    nulls: dict[str, float] = {}
    for key in keys:
        found = [v for record in records if (v := record.values.get(key)) is not None]
        values[key] = _total(key, found) if found else None
        null = [record.nulls[key] for record in records if key in record.nulls]
        nulls |= {key: sum(null) / len(null)} if null else {}
    return values, nulls


def _total(key: str, found: Sequence[float]) -> float:
    if key == "suggested_rank":
        return max(found)
    return sum(found) if key == "intruders" else sum(found) / len(found)


def _verdict(kind: str, records: Sequence[LayerRecord]) -> Verdict | None:
    if kind == "lineage":
        words = "it is tiny/base, changed by 3.9 %. Behind it, nearest first: tiny/older"
        return Verdict("DESCENDS", None, {}, (), {}, words, _THRESHOLDS)
    if kind not in ("collapse", "compare", "capacity"):
        return None
    codes = [record.verdict["code"] for record in records if record.verdict]
    counts = {code: codes.count(code) for code in sorted(set(codes))}
    shares = {code: count / len(codes) for code, count in counts.items()}
    code = max(shares, key=lambda code: shares[code], default="UNDETERMINED")
    flagged = [r.name for r in records if r.verdict and r.verdict["code"] in _FLAGGED]
    return Verdict(
        code=code,
        share=shares.get(code),
        shares=shares,
        flagged=tuple(flagged),
        counts=counts,
        text=(
            "pattern consistent with an update that is enriched 5× over isotropic on the base's "
            "leading directions but does not live there (clauses C_LR, angle)"
        ),
        thresholds=_THRESHOLDS,
        explain=_explained(len(codes)),
    )


def _explained(count: int) -> tuple[dict[str, Any], ...]:
    rows = (
        ("ON_PRINCIPAL", "C_LR(k) ≥", 0.5, (0.01, 0.1)),
        ("ON_PRINCIPAL", "NSS/ρ ≥", 0.3, (None, None)),
        ("OFF_PRINCIPAL", "mean angle ≤", math.radians(1), (0.01, 0.1)),
    )
    return tuple(
        {
            "code": code,
            "condition": condition,
            "threshold": limit,
            "standing": "ours",
            "holds": 1,
            "of": count,
            "least": met[0],
            "largest": met[1],
        }
        for code, condition, limit, met in rows
    )


def _overlaps(records: Sequence[LayerRecord]) -> tuple[Overlap, ...]:
    names = dict.fromkeys(record.name for record in records)
    values: dict[str, float | None] = {
        "update_cosine": 0.31,
        "mask_jaccard": 0.9,
        "sign_conflict": 0.2,
    }
    nulls = {"update_cosine": 0.0, "mask_jaccard": 0.8, "sign_conflict": 0.5}
    for side in ("left", "right"):
        values |= {f"phi_{side}@{i},{j}": 0.6 for i in (1, 8, 16) for j in (1, 8, 16)}
        values |= {f"phi_{side}@8,16": None, f"update_angle_{side}_mean@8": math.radians(30)}
        values[f"update_angle_{side}_mean@64"] = math.radians(50)
        nulls |= {f"phi_{side}@8,8": 0.1, f"update_angle_{side}_mean@8": math.radians(70)}
    return tuple(Overlap(name, 1, 2, values, nulls) for name in names)


def plain(report: Report, width: int = 80, **options: bool) -> str:
    return render_text(report, width=width, colour=False, details=True, **options)


def lines_with(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip().startswith(start)]
