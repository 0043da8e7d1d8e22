"""The Markdown of a run: whole pairs, floor, single matrices, and what each peer leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

__all__ = ["markdown"]

Json = dict[str, Any]

# Cores busy with other work, above which a figure is marked.
DISTURBED = 0.2

_MICRO = {
    "svd": "torch.linalg.svd fp32",
    "svdvals64": "torch.linalg.svdvals fp64",
    "leading": "geoscope, leading {k} triplets",
    "check": "its completeness check (Cholesky)",
    "all": "geoscope, all singular values",
    "all+leading": "geoscope, all values and leading {k} triplets",
    "update svd": "update: torch.linalg.svd fp32",
    "update pair": "update: geoscope, leading pair",
    "update all": "update: geoscope, all singular values",
}


def markdown(found: Json, *, naive: str, floor: str) -> str:
    """The whole document."""
    parts = [_about(found["about"]), _pairs(found["lines"], naive, floor)]
    parts += [_floor(found["lines"].get(floor, ())), _peers(found["lines"]), _micro(found["micro"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _about(about: Json) -> str:
    flags = ", ".join(f"{name} {'yes' if has else 'no'}" for name, has in about["flags"].items())
    before, after = (about["load average"][when][0] for when in ("before", "after"))
    shapes = dict.fromkeys(f"{m}×{n}" for m, n in about["shapes"].values())
    variables, ours = about["variables"], "set by geoscope for itself"
    return "\n".join(
        [
            f"# {about['family']}, layers: {about['layers']}, rounds: {about['rounds']}",
            "",
            f"- {about['date']}; {about['cpu']}, {about['cores']} cores ({flags})",
            f"- geoscope {about['geoscope']} (source {about['code']}), Python {about['python']}, "
            f"torch {about['torch']}, numpy {about['numpy']}, scipy {about['scipy']}",
            f"- {len(about['shapes'])} matrices a layer: {', '.join(shapes)}; base and tuned in "
            "bf16, synthetic (benchmarks/synthetic.py)",
            f"- load average {before:.1f} before, {after:.1f} after",
            f"- variables geoscope sets for itself: {_mapping(variables[ours])}; "
            f"of the environment: {_mapping(variables['found'])}; "
            f"set aside: {_mapping(variables['set aside'])}",
        ]
    )


def _mapping(values: Json) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items()) or "none"


# --- whole pairs --------------------------------------------------------------------------------


def _pairs(lines: Json, naive: str, floor: str) -> str:
    threads = next((run["answer"]["threads"] for run in lines[naive] if run["answer"]), "?")
    rows = [
        "## Whole pairs",
        "",
        "Median (least-most). Speed-up: naive/line within a round, median (least-most). Others: "
        f"cores busy with other work; above {DISTURBED} a line is marked (!) and not for quoting. "
        f"The naive loop has {threads} BLAS threads.",
        "",
        "| line | seconds | speed-up | CPU s | memory MB | others |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for label, runs in lines.items():
        if label == floor:
            continue
        failure = next((run["failure"] for run in runs if run["failure"]), None)
        if failure:
            rows.append(f"| {label} | failed: {_cell(failure)} | | | | |")
            continue
        rows.append(f"| {' | '.join(_row(label, runs, lines.get(naive, ())))} |")
        rows += _variants(runs)
    return "\n".join(rows)


def _row(label: str, runs: Sequence[Json], naive: Sequence[Json]) -> list[str]:
    others = [run["others"] for run in runs if run["others"] is not None]
    disturbed = bool(others) and median(others) > DISTURBED
    ratios = [
        other["seconds"] / run["seconds"]
        for run, other in zip(runs, naive, strict=False)
        if not other["failure"]
    ]
    return [
        label + (" (!)" if disturbed else ""),
        _spread([run["seconds"] for run in runs]),
        _spread(ratios),
        _number(median(run["cpu"] for run in runs)),
        f"{median(run['memory'] for run in runs) / 1e6:.0f}",
        f"{median(others):.2f}" if others else "?",
    ]


def _variants(runs: Sequence[Json]) -> list[str]:
    """Of a peer with several variants, the seconds of each."""
    names = ((runs[0]["answer"] or {}).get("variants") or {}).keys()
    if len(names) < 2:
        return []
    found = []
    for name in names:
        seconds = [run["answer"]["variants"][name] for run in runs]
        known = [one for one in seconds if one is not None]
        found.append(f"| · {name} | {_spread(known) if known else 'failed'} | | | | |")
    return found


# --- the floor ----------------------------------------------------------------------------------


def _floor(runs: Sequence[Json]) -> str:
    answers = [run["answer"] for run in runs if run["answer"] and not run["failure"]]
    if not answers:
        return ""
    flops = answers[0]["flops"]
    whole = answers[0]["reading"]["bytes"] / 1e9
    reading = [one["reading"]["seconds"] for one in answers]
    rows = [
        "## Floor",
        "",
        "| | GFLOP/s one thread | all cores |",
        "|---|--:|--:|",
    ]
    for library in answers[0]["peaks"]:
        one, every = (
            max(found["peaks"][library][threads] for found in answers) / 1e9
            for threads in ("one", "all")
        )
        rows.append(f"| fp64 product, {library} | {one:.0f} | {every:.0f} |")
    least = min(found["seconds"] for found in answers)
    rows += [
        "",
        f"Gram matrices (half, by symmetry) {flops['gram'] / 1e12:.2f} TFLOP and tridiagonal forms "
        f"{flops['tridiagonal'] / 1e12:.2f} TFLOP of base, tuned and update, at the best of these "
        f"rates: **{_number(least)} s**. The second part runs at the speed of memory, so no method "
        "reaches this.",
        "",
        f"Reading {whole:.2f} GB into one buffer: {_spread(reading)} s (from the page cache).",
    ]
    return "\n".join(rows)


# --- peers --------------------------------------------------------------------------------------


def _peers(lines: Json) -> str:
    rows = []
    for label, runs in lines.items():
        if not label.startswith("peer: "):
            continue
        answer = runs[0]["answer"]
        if answer:
            rows.append(
                f"- **{answer['name']} {answer['version']}**: {answer['computes']}. "
                f"Not computed: {answer['omits']}."
            )
        else:
            rows.append(f"- **{label.removeprefix('peer: ')}**: {runs[0]['failure']}.")
    return "\n".join(["## Peers", "", *rows]) if rows else ""


# --- single matrices ----------------------------------------------------------------------------


def _micro(found: Json | str | None) -> str:
    if found is None:
        return ""
    if isinstance(found, str):
        return f"## Single matrices\n\nfailed: {found}"
    parts = [
        "## Single matrices",
        "",
        "One BLAS thread each. Ratio: to torch.linalg.svd fp32 of the same matrix in the same "
        "round, median (least-most). Error: of values, relative to σ1; sine: of the subspace, "
        "worse side; truth is the fp64 SVD.",
    ]
    for shape in found["shapes"]:
        parts += ["", *_matrix(shape, found["k"])]
    return "\n".join(parts)


def _matrix(shape: Json, k: int) -> list[str]:
    lines = shape["lines"]
    rows = [
        f"| {'×'.join(map(str, shape['shape']))} | seconds | ratio | to fp64 svdvals | error/σ1 "
        "| sine | remarks |",
        "|---|--:|--:|--:|--:|--:|---|",
    ]
    for name, line in lines.items():
        single = lines["update svd" if name.startswith("update") else "svd"]["seconds"]
        rows.append(
            f"| {_MICRO[name].format(k=k)} | {_spread(line['seconds'])} "
            f"| {_spread(_ratios(line['seconds'], single))} "
            f"| {_spread(_ratios(line['seconds'], lines['svdvals64']['seconds']))} "
            f"| {_power(line.get('value'))} | {_power(line.get('sine'))} | {_remarks(line)} |"
        )
    both = [
        sum(pair)
        for pair in zip(lines["leading"]["seconds"], lines["check"]["seconds"], strict=True)
    ]
    rows.append(
        f"| leading {k} with check | {_spread(both)} "
        f"| {_spread(_ratios(both, lines['svd']['seconds']))} "
        f"| {_spread(_ratios(both, lines['svdvals64']['seconds']))} | | | |"
    )
    return rows


def _ratios(seconds: Sequence[float], reference: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(seconds, reference, strict=True)]


def _remarks(line: Json) -> str:
    found = []
    if "dimension" in line:
        found.append(f"Krylov dimension {line['dimension']}, bound {line['bound']:.0e}")
    if line.get("converged") is False:
        found.append("not converged")
    if "complete" in line:
        found.append("complete" if line["complete"] else "a triplet is missing")
        found.append(
            "notices a missing one" if line["notices a missing one"] else "BLIND to a missing one"
        )
    if line.get("how"):
        found.append(line["how"])
    if line.get("fallback"):
        found.append(_cell(line["fallback"]))
    return "; ".join(found)


# --- numbers ------------------------------------------------------------------------------------


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{_number(median(values))} ({_number(min(values))}-{_number(max(values))})"


def _number(value: float) -> str:
    return f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:.0f}"


def _power(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())
