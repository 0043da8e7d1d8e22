"""geoscope: what post-training did to the weights.

>>> import geoscope
>>> report = geoscope.compare("base/", "tuned/", kind="collapse")  # doctest: +SKIP

`compare`, `follow`, `initialise` and `verify_adapter` are what the commands call; `read_report`
opens what they wrote; `geora` initialises one matrix. The names below are loaded when they are
first used, so that `geoscope --help` needs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from geoscope._version import __version__ as __version__

if TYPE_CHECKING:
    from geoscope.adapters import LoraFactors, geora
    from geoscope.errors import GeoscopeError
    from geoscope.metrics import METRICS
    from geoscope.records import LayerRecord, Report, Status
    from geoscope.report import read as read_report
    from geoscope.report import write as write_report
    from geoscope.verbs.adapters.initialise import initialise
    from geoscope.verbs.adapters.options import InitOptions
    from geoscope.verbs.adapters.verify import verify_adapter
    from geoscope.verbs.options import Interrupted, Options, Progress
    from geoscope.verbs.pairs.compare import compare
    from geoscope.verbs.series.follow import follow
    from geoscope.verbs.series.options import FollowOptions

__all__ = [
    "METRICS",
    "FollowOptions",
    "GeoscopeError",
    "InitOptions",
    "Interrupted",
    "LayerRecord",
    "LoraFactors",
    "Options",
    "Progress",
    "Report",
    "Status",
    "compare",
    "follow",
    "geora",
    "initialise",
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
    "LoraFactors": ("geoscope.adapters", "LoraFactors"),
    "Options": ("geoscope.verbs.options", "Options"),
    "Progress": ("geoscope.verbs.options", "Progress"),
    "Report": ("geoscope.records", "Report"),
    "Status": ("geoscope.records", "Status"),
    "compare": ("geoscope.verbs.pairs.compare", "compare"),
    "follow": ("geoscope.verbs.series.follow", "follow"),
    "geora": ("geoscope.adapters", "geora"),
    "initialise": ("geoscope.verbs.adapters.initialise", "initialise"),
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
