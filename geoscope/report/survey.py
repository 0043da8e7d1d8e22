"""What `inspect` and `--dry-run` show: tensors, pairing and plan, known from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from geoscope.records import Pairing, Survey, TensorInfo
from geoscope.report.plain import plain

__all__ = ["render_survey"]


def render_survey(survey: Survey, *, verbose: bool) -> str:
    """The survey as text of at most 80 columns (names excepted with `verbose`)."""
    survey = plain(survey)
    lines: list[str] = []
    for role, model in zip(("base", "tuned"), survey.models, strict=False):
        lines += _model(role if survey.paired else "model", model)
    pairing = survey.pairing
    lines += ["", *_kinds(pairing)]
    lines += ["", *_left_out(pairing, verbose=verbose)]
    if survey.paired:
        lines += ["", *_correspondence(pairing)]
    lines += ["", *_work(survey)]
    lines += [f"note: {note}" for note in survey.notes]
    if verbose:
        lines += ["", "matrices"]
        lines += [
            f"  {matrix.name}  {_by(matrix.shape)}  {_dtypes(matrix.base, matrix.tuned)}"
            for matrix in pairing.matrices
        ]
    return "\n".join(lines)


def _model(role: str, model: Mapping[str, Any]) -> list[str]:
    size = f"{model['tensors']} tensors, {model['parameters'] / 1e6:.3g} M parameters"
    family = f"  {model['model_type']}" if model["model_type"] else ""
    return [
        f"{role:<6} {model['given']}{family}",
        f"       {size}, {_bytes(model['bytes'])}, {model['storage_dtype']}",
    ]


def _kinds(pairing: Pairing) -> list[str]:
    """Matrices in scope by module kind and shape."""
    groups: dict[tuple[str, tuple[int, ...], str], list[int | None]] = {}
    for matrix in pairing.matrices:
        key = (matrix.module, matrix.shape, _dtypes(matrix.base, matrix.tuned))
        groups.setdefault(key, []).append(matrix.layer)
    lines = [f"{len(pairing.matrices)} matrices in scope"]
    for (module, shape, dtype), layers in groups.items():
        lines.append(f"  {len(layers):>4} × {module:<22} {_by(shape):<14} {dtype:<20}".rstrip())
    if pairing.vectors:
        lines.append(f"  {len(pairing.vectors)} norms and biases: norm of change only")
    return lines


def _left_out(pairing: Pairing, *, verbose: bool) -> list[str]:
    if not pairing.skipped:
        return ["nothing left out"]
    if verbose:
        return ["left out", *(f"  {one.name}: {one.reason}" for one in pairing.skipped)]
    reasons = Counter(one.reason for one in pairing.skipped)
    return ["left out", *(f"  {count:>4} × {reason}" for reason, count in reasons.most_common())]


def _correspondence(pairing: Pairing) -> list[str]:
    lines = [f"{len(pairing.matrices)} matrices correspond"]
    for label, names in (
        ("only in base", pairing.base_only),
        ("only in tuned", pairing.tuned_only),
        ("shape differs", [one.name for one in pairing.shape_mismatch]),
        ("matched through another name", [one.base for one in pairing.renamed]),
    ):
        if names:
            lines.append(f"  {len(names)} {label}: {_first(names)}")
    if pairing.missing:
        lines.append(f"  PARTIAL: {len(pairing.missing)} in scope would not be compared")
    return lines


def _first(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def _work(survey: Survey) -> list[str]:
    matrices = survey.pairing.matrices  # of one model with itself, or of an adapter over nothing
    read = sum(matrix.tuned.nbytes + survey.paired * matrix.base.nbytes for matrix in matrices)
    lines = [f"would read {_bytes(read)}"]
    if survey.bytes_to_fetch:
        lines[0] += f", after fetching {_bytes(survey.bytes_to_fetch)}"
        lines[0] += f" ({_bytes(survey.free_disk or 0)} free)"
    where = f"on {survey.device} ({survey.workers} workers)"
    if survey.tasks:
        where = f"on {survey.workers} cores for each of {survey.tasks} tasks of the Ray cluster"
    if survey.paired:
        lines.append(
            f"would take about {_seconds(survey.seconds)} {where}, at most {_bytes(survey.memory)}"
        )
    return lines


def _dtypes(base: TensorInfo, tuned: TensorInfo) -> str:
    return base.dtype if base.dtype == tuned.dtype else f"{base.dtype} / {tuned.dtype}"


def _by(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return "a second"
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
