"""Which tensor of a base does an adapter mean by a name? As models pair: exact, then canonical.

A text model and the wrapper of a multimodal one, or two versions of transformers, spell one module
in several ways. Here the adapter's names become those of the base; what was renamed is told.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from geoscope.adapters.peft_names import module_paths
from geoscope.errors import PairingError
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.split import split
from geoscope.names import NameMap
from geoscope.peft.adapter import Adapter
from geoscope.records import Rename, TensorInfo

__all__ = ["BasePaths", "base_paths", "named_as_base"]

_EXPERT = re.compile(r"(?P<holder>.*\.experts)\.\d+\.")
_HOLDERS = (".block_sparse_moe.experts", ".mlp.experts")
_STACKS = ("gate_up_proj", "down_proj")


@dataclass(frozen=True)
class BasePaths:
    """What the modules of a base are called. By live path, each without `.weight`:

    stored: tensors as the files hold them. parts: those that they are compared in, too. tied: names
    that only repeat another tensor, with its header.
    """

    stored: Mapping[str, TensorInfo]
    parts: Mapping[str, TensorInfo]
    tied: Mapping[str, TensorInfo]

    @property
    def every(self) -> dict[str, TensorInfo]:
        return {**self.tied, **self.parts, **self.stored}


def base_paths(whole: Checkpoint, parts: Checkpoint | None = None) -> BasePaths:
    """The modules of a base. parts: the same taken apart, where that is at hand."""
    taken = parts if parts is not None and parts.views else split(whole)
    tied = {
        name: replace(whole.tensors[kept], name=name)
        for name, kept in whole.tied_to.items()
        if name not in whole.tensors and kept in whole.tensors
    }
    of_parts = {name: info for name, info in taken.tensors.items() if name not in tied}
    return BasePaths(
        _by_path(whole.tensors, whole), _by_path(of_parts, whole), _by_path(tied, whole)
    )


def _by_path(tensors: Mapping[str, TensorInfo], whole: Checkpoint) -> dict[str, TensorInfo]:
    if not tensors:
        return {}
    paths = module_paths(list(tensors), whole.config).paths
    return {paths[name]: info for name, info in tensors.items()}


def named_as_base(
    adapter: Adapter, paths: BasePaths, names: NameMap
) -> tuple[Adapter, tuple[Rename, ...]]:
    """The adapter under the names of the base, and what had another one.

    Raises PairingError where two modules mean one tensor.
    """
    every = paths.every
    known = {**dict.fromkeys(every), **dict.fromkeys(_stacks(every))}
    keys = (*adapter.replaced, *adapter.rows, *adapter.vectors)
    own = dict.fromkeys([*adapter.modules, *(key.removesuffix(".weight") for key in keys)])
    unknown = [name for name in own if name not in known]
    if not unknown:
        return adapter, ()
    index = _canonical_index(every, known, names)
    renamed = {name: index[key] for name in unknown if (key := _canonical(name, names)) in index}
    _refuse_repeats(adapter, own, renamed)
    if not renamed:
        return adapter, ()
    told = tuple(
        Rename(_full(base), _full(name), _rules(name, base, names))
        for name, base in renamed.items()
    )
    return adapter.renamed(renamed), told


def _stacks(paths: Iterable[str]) -> set[str]:
    """Paths of the stacks that the live model has in place of the experts' own modules."""
    holders = {match["holder"] for path in paths if (match := _EXPERT.match(path))}
    live = holders | {one.replace(*_HOLDERS) for one in holders}
    return {f"{holder}.{leaf}" for holder in live for leaf in _STACKS}


def _canonical_index(
    every: Mapping[str, TensorInfo], known: Iterable[str], names: NameMap
) -> dict[str, str]:
    """Canonical name → live path, but for names that mean several."""
    found: dict[str, set[str]] = {}
    for path in known:
        spellings = {_canonical(path, names)}
        if path in every:
            spellings.add(names.canonical(every[path].name)[0])
        for spelling in spellings:
            found.setdefault(spelling, set()).add(path)
    return {name: next(iter(paths)) for name, paths in found.items() if len(paths) == 1}


def _full(path: str) -> str:
    """As the parameter is called: `.weight` for all but biases and stacks."""
    is_whole = path.endswith((".bias", *(f".experts.{leaf}" for leaf in _STACKS)))
    return path if is_whole else f"{path}.weight"


def _canonical(path: str, names: NameMap) -> str:
    return names.canonical(_full(path))[0]


def _rules(name: str, base: str, names: NameMap) -> str:
    rules = [*names.canonical(_full(name))[1], *names.canonical(_full(base))[1]]
    return ", ".join(dict.fromkeys(rules))


def _refuse_repeats(adapter: Adapter, own: Mapping[str, None], renamed: Mapping[str, str]) -> None:
    taken = {name: name for name in own if name not in renamed}
    for name, base in renamed.items():
        other = taken.setdefault(base, name)
        if other != name:
            raise PairingError(
                f"{adapter.given}: {other} and {name} mean the same tensor of the base ({base}); "
                "keep one of them"
            )
