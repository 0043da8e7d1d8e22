"""What is an adapter, here or on the Hub? A config, and factors that are read module by module.

    adapter_config.json                                  what kind, and the scaling of its factors
    adapter_model.safetensors (or .bin)                  the factors

Each type of PEFT has a file of its own beside this one and a line in `_TYPES`; types without one
are refused by name. Headers are read here; data on demand.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geoscope.checkpoints.container import Container
from geoscope.checkpoints.layout import parse_object
from geoscope.checkpoints.lora_adapter import LoraModule, lora_modules, stacked
from geoscope.checkpoints.readers import open_container
from geoscope.checkpoints.reference import HubReference, parse_reference
from geoscope.errors import CheckpointError, CheckpointNotFound, UnsupportedFormat, first_names
from geoscope.records import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ADAPTER_CONFIG", "Adapter", "factors_file", "open_adapter"]

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

# peft_type → its modules, from the config and the header. Another type is one more line.
_Modules = Callable[[Mapping[str, Any], Mapping[str, TensorInfo], str], Mapping[str, LoraModule]]
_TYPES: dict[str, _Modules] = {"LORA": lora_modules}


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter, known by its config and header. Made by `open_adapter`.

    modules: name of the adapted module → its factors and scaling, in natural order.
    others: tensors that are no factors: full weights of `modules_to_save`.
    path: its folder on this disk. at, commit: org/name@commit of one on the Hub.
    """

    given: str
    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    modules: Mapping[str, LoraModule]
    others: tuple[str, ...]
    container: Container = field(repr=False)
    at: str | None = None
    commit: str | None = None

    @property
    def resolved(self) -> str:
        """The path, or org/name@commit."""
        return self.at or str(self.path)

    @property
    def base(self) -> str | None:
        """`base_model_name_or_path`, None where it says nothing."""
        return self.config.get("base_model_name_or_path") or None

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored."""
        return self.container.read(name, None)

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """B (E, m, r) and A (E, r, n) of a module, in their storage dtypes; E = 1 but for stacked
        experts. The update is modules[module].scaling · B·A."""
        one = self.modules[module]
        return stacked(one, self.read(one.B.name), self.read(one.A.name))


def open_adapter(
    path: str | Path,
    *,
    given: str | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Adapter:
    """The adapter in a folder, from its config and header; no tensor data is read.

    path: a folder; a string may be a reference to the Hub, whose files are fetched (on_progress: as
    of `open_checkpoint`). given: how messages name the folder, where that is not its path.
    Raises CheckpointNotFound, UnsupportedFormat (a type or an extra that is not read yet), or
    CheckpointError for a damaged or contradictory folder.
    """
    reference = _on_the_hub(path)
    if reference is not None:
        from geoscope.checkpoints.hub_adapter import fetch_adapter, open_fetched

        return open_fetched(fetch_adapter(reference, on_progress), given or reference.given)
    folder, given = Path(path).expanduser(), str(path) if given is None else given
    if not folder.is_dir():
        raise CheckpointNotFound(f"{given}: no such folder; give the folder of an adapter")
    config = _config(folder, given)
    container = _weights(folder, given)
    tensors = dict(sorted(container.header.tensors.items()))
    modules = _TYPES[config["peft_type"]](config, tensors, given)
    factors = {info.name for one in modules.values() for info in (one.A, one.B)}
    others = tuple(name for name in tensors if name not in factors)
    return Adapter(given, folder.resolve(), config, tensors, modules, others, container)


def _on_the_hub(path: str | Path) -> HubReference | None:
    if isinstance(path, Path):
        return None
    parsed = parse_reference(path)
    return parsed if isinstance(parsed, HubReference) else None


def _config(folder: Path, given: str) -> dict[str, Any]:
    """adapter_config.json, of a type that is read."""
    try:
        text = (folder / ADAPTER_CONFIG).read_text(encoding="utf-8")
    except FileNotFoundError:
        below = [f"{given}/{one.parent.name}" for one in sorted(folder.glob(f"*/{ADAPTER_CONFIG}"))]
        hint = f"give {first_names(below)}" if below else "give the folder of a PEFT adapter"
        raise CheckpointNotFound(f"{given}: holds no {ADAPTER_CONFIG}; {hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{given}/{ADAPTER_CONFIG}: cannot be read: {error}") from None
    config = parse_object(text, f"{given}/{ADAPTER_CONFIG}")
    kind = config.get("peft_type")
    if kind not in _TYPES:
        raise UnsupportedFormat(
            f"{given}: peft_type is {kind!r}; geoscope reads {', '.join(_TYPES)} adapters. "
            "Merge it into its base (PeftModel.merge_and_unload) and use the merged folder"
        )
    return config


def _weights(folder: Path, given: str) -> Container:
    name = factors_file([one.name for one in folder.iterdir() if one.is_file()], given)
    return open_container(folder / name, f"{given}/{name}")


def factors_file(names: Collection[str], given: str) -> str:
    """Which of the files of an adapter's folder holds the factors.

    Safetensors before the pickle, as PEFT chooses. Raises UnsupportedFormat, CheckpointNotFound.
    """
    for name in _WEIGHTS:
        if name in names:
            return name
    shards = sorted(one for one in names if fnmatchcase(one, "adapter_model-*-of-*"))
    if shards:
        raise UnsupportedFormat(
            f"{given}: the factors are in {len(shards)} shards ({first_names(shards, 1)}); "
            f"geoscope reads one {_WEIGHTS[0]}: load the adapter with PEFT and save it again"
        )
    raise CheckpointNotFound(
        f"{given}: {ADAPTER_CONFIG} without factors; copy {' or '.join(_WEIGHTS)} beside it"
    )
