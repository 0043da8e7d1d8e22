"""geoscope: what post-training did to the weights.

>>> import geoscope
>>> report = geoscope.compare("base/", "tuned/", kind="collapse")  # doctest: +SKIP
>>> report = geoscope.compare(before, model, include="q_proj")  # doctest: +SKIP

Every command has its function: `inspect`, `collapse`, `anisotropy`, `alignment`, `compare`,
`capacity`, `lineage`, `follow` (of `geoscope trajectory`), `extrapolate`, `init_adapter`,
`verify_adapter`, `convert_adapter`. `measure` takes a pair of matrices, `geora` initialises one;
`read_report` opens what was saved. The names below are loaded when they are first used, so that
`geoscope --help` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from geoscope._version import __version__ as __version__

if TYPE_CHECKING:
    from geoscope.adapters.factors import LoraFactors
    from geoscope.adapters.geora import geora
    from geoscope.errors import GeoscopeError
    from geoscope.metrics import METRICS
    from geoscope.records import LayerRecord, Report, Status
    from geoscope.report import read as read_report
    from geoscope.report import write as write_report
    from geoscope.sources.open import open_adapter, open_checkpoint
    from geoscope.verbs.adapters.converted import convert_adapter
    from geoscope.verbs.adapters.initialise import initialise
    from geoscope.verbs.adapters.initialise import initialise as init_adapter
    from geoscope.verbs.adapters.options import InitOptions
    from geoscope.verbs.adapters.verify import verify_adapter
    from geoscope.verbs.lineage.lineage import lineage
    from geoscope.verbs.lineage.options import LineageOptions
    from geoscope.verbs.options import Interrupted, Options, Progress
    from geoscope.verbs.pairs.calls import (
        alignment,
        anisotropy,
        capacity,
        collapse,
        inspect,
        measure,
    )
    from geoscope.verbs.pairs.compare import compare
    from geoscope.verbs.series.extrapolate import extrapolate
    from geoscope.verbs.series.follow import follow
    from geoscope.verbs.series.options import FollowOptions

__all__ = [
    "METRICS",
    "FollowOptions",
    "GeoscopeError",
    "InitOptions",
    "Interrupted",
    "LayerRecord",
    "LineageOptions",
    "LoraFactors",
    "Options",
    "Progress",
    "Report",
    "Status",
    "alignment",
    "anisotropy",
    "capacity",
    "collapse",
    "compare",
    "convert_adapter",
    "extrapolate",
    "follow",
    "geora",
    "init_adapter",
    "initialise",
    "inspect",
    "lineage",
    "measure",
    "open_adapter",
    "open_checkpoint",
    "read_report",
    "verify_adapter",
    "write_report",
]

# public name → where it lives
_HOMES = {
    "METRICS": ("geoscope.metrics", "METRICS"),
    "FollowOptions": ("geoscope.verbs.series.options", "FollowOptions"),
    "GeoscopeError": ("geoscope.errors", "GeoscopeError"),
    "InitOptions": ("geoscope.verbs.adapters.options", "InitOptions"),
    "Interrupted": ("geoscope.verbs.options", "Interrupted"),
    "LayerRecord": ("geoscope.records", "LayerRecord"),
    "LineageOptions": ("geoscope.verbs.lineage.options", "LineageOptions"),
    "LoraFactors": ("geoscope.adapters.factors", "LoraFactors"),
    "Options": ("geoscope.verbs.options", "Options"),
    "Progress": ("geoscope.verbs.options", "Progress"),
    "Report": ("geoscope.records", "Report"),
    "Status": ("geoscope.records", "Status"),
    "alignment": ("geoscope.verbs.pairs.calls", "alignment"),
    "anisotropy": ("geoscope.verbs.pairs.calls", "anisotropy"),
    "capacity": ("geoscope.verbs.pairs.calls", "capacity"),
    "collapse": ("geoscope.verbs.pairs.calls", "collapse"),
    "compare": ("geoscope.verbs.pairs.compare", "compare"),
    "convert_adapter": ("geoscope.verbs.adapters.converted", "convert_adapter"),
    "extrapolate": ("geoscope.verbs.series.extrapolate", "extrapolate"),
    "follow": ("geoscope.verbs.series.follow", "follow"),
    "geora": ("geoscope.adapters.geora", "geora"),
    "init_adapter": ("geoscope.verbs.adapters.initialise", "initialise"),
    "initialise": ("geoscope.verbs.adapters.initialise", "initialise"),
    "inspect": ("geoscope.verbs.pairs.calls", "inspect"),
    "lineage": ("geoscope.verbs.lineage.lineage", "lineage"),
    "measure": ("geoscope.verbs.pairs.calls", "measure"),
    "open_adapter": ("geoscope.sources.open", "open_adapter"),
    "open_checkpoint": ("geoscope.sources.open", "open_checkpoint"),
    "read_report": ("geoscope.report", "read"),
    "verify_adapter": ("geoscope.verbs.adapters.verify", "verify_adapter"),
    "write_report": ("geoscope.report", "write"),
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'geoscope' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
