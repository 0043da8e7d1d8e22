"""A function for each command on pairs, with its name, and one for a pair of matrices."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from geoscope.errors import OptionError
from geoscope.records import LayerRecord, Report, Survey
from geoscope.sources.memory import Model, as_model_or_reference
from geoscope.verbs.choices import chosen
from geoscope.verbs.options import Options
from geoscope.verbs.pairs.compare import compare, measure_adapter
from geoscope.verbs.pairs.prepare import prepare, survey

__all__ = ["alignment", "anisotropy", "capacity", "collapse", "inspect", "measure"]


def collapse(base: Model, tuned: Model, **how: Any) -> Report:
    """Spectral collapse of one update: shift, ranks, intruders, verdict.

    how: as of `compare`, and fields of `Options`. Raises as `compare` does.
    """
    return compare(base, tuned, kind="collapse", **how)


def alignment(base: Model, *tuned: Model, **how: Any) -> Report:
    """Whether updates lie on or off the principal directions of the base.

    how: as of `compare`, and fields of `Options`. Raises as `compare` does.
    """
    return compare(base, *tuned, kind="alignment", **how)


def anisotropy(base: Model, tuned: Model | None = None, **how: Any) -> Report:
    """How many directions an update uses; with one argument that of an adapter without its base.

    how: as of `compare`, and fields of `Options`. Raises as `compare` does.
    """
    return _alone_or_pair("anisotropy", base, tuned, how)


def capacity(base: Model, tuned: Model | None = None, **how: Any) -> Report:
    """The rank that an adapter uses, and the ranks that would hold an update.

    With one argument of an adapter without its base. how: as of `compare`, and fields of `Options`.
    Raises as `compare` does.
    """
    return _alone_or_pair("capacity", base, tuned, how)


def _alone_or_pair(kind: str, base: Model, tuned: Model | None, how: dict[str, Any]) -> Report:
    if tuned is None:
        return measure_adapter(base, kind, **how)
    return compare(base, tuned, kind=kind, **how)


def inspect(
    model: Model, tuned: Model | None = None, *, options: Options | None = None, **named: Any
) -> Survey:
    """Tensors, pairing and plan, from headers alone. Raises GeoscopeError."""
    first = as_model_or_reference(model, "model")
    other = first if tuned is None else as_model_or_reference(tuned, "tuned")
    prepared = prepare(first, other, chosen(Options, options, named))
    return survey(prepared, paired=tuned is not None)


def measure(base: Tensor, tuned: Tensor, *, kind: str = "compare", **how: Any) -> LayerRecord:
    """All numbers of a pair of matrices W0 and W1 (m, n), each with its null and status.

    kind, how: as of `compare`, and fields of `Options`. Raises OptionError for what is not a pair
    of matrices of one shape with two rows and columns at least, and as `compare` does.

    >>> measure(W0, W1)["update.effective_rank"].value  # doctest: +SKIP
    """
    for name, matrix in (("base", base), ("tuned", tuned)):
        if not isinstance(matrix, Tensor) or matrix.dim() != 2 or min(matrix.shape) < 2:
            shape = tuple(getattr(matrix, "shape", ())) or type(matrix).__name__
            raise OptionError(f"`{name}` {shape}: a matrix of two rows and columns is needed")
    if base.shape != tuned.shape:
        shapes = " and ".join(str(tuple(one.shape)) for one in (base, tuned))
        raise OptionError(f"base and tuned are of different shapes: {shapes}")
    report = compare({"matrix": base}, {"matrix": tuned}, kind=kind, **how)
    if not report.layers:
        reasons = "; ".join(one.reason for one in report.coverage.skipped)
        raise OptionError(f"the pair was not measured: {reasons}")
    return report.layers[0]
