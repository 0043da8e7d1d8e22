"""What is an adapter on this disk? A config, and factors that are read module by module.

    adapter_config.json                                  what kind, and the scaling of its factors
    adapter_model.safetensors (or .bin)                  the factors

Each type of PEFT has a file of its own beside this one and a line in `_TYPES`; types without one
are refused by name. Headers are read here; data on demand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geoscope.checkpoints.container import Container
from geoscope.checkpoints.layout import parse_object
from geoscope.checkpoints.lora_adapter import LoraModule, lora_modules, stacked
from geoscope.checkpoints.readers import open_container
from geoscope.errors import CheckpointError, CheckpointNotFound, UnsupportedFormat, first_names
from geoscope.records import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ADAPTER_CONFIG", "Adapter", "adapter_of", "open_adapter"]

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
    """

    given: str
    path: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    modules: Mapping[str, LoraModule]
    others: tuple[str, ...]
    container: Container = field(repr=False)

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


def open_adapter(path: str | Path, *, given: str | None = None) -> Adapter:
    """The adapter in a local folder, from its config and header; no tensor data is read.

    given: how messages name the folder, where that is not its path.
    Raises CheckpointNotFound, UnsupportedFormat (a type or an extra that is not read yet), or
    CheckpointError for a damaged or contradictory folder.
    """
    folder, given = Path(path).expanduser(), str(path) if given is None else given
    if not folder.is_dir():
        raise CheckpointNotFound(f"{given}: no such folder; give the folder of an adapter")
    config = _config(folder, given)
    return adapter_of(given, folder.resolve(), config, _weights(folder, given))


def adapter_of(given: str, path: Path, config: Mapping[str, Any], container: Container) -> Adapter:
    """The adapter of a config and the tensors in a container, wherever they lie.

    Raises as `open_adapter` does.
    """
    _refuse_type(config, given)
    tensors = dict(sorted(container.header.tensors.items()))
    modules = _TYPES[config["peft_type"]](config, tensors, given)
    factors = {info.name for one in modules.values() for info in (one.A, one.B)}
    others = tuple(name for name in tensors if name not in factors)
    return Adapter(given, path, config, tensors, modules, others, container)


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
    _refuse_type(config, given)
    return config


def _refuse_type(config: Mapping[str, Any], given: str) -> None:
    kind = config.get("peft_type")
    if kind not in _TYPES:
        raise UnsupportedFormat(
            f"{given}: peft_type is {kind!r}; geoscope reads {', '.join(_TYPES)} adapters. "
            "Merge it into its base (PeftModel.merge_and_unload) and use the merged folder"
        )


def _weights(folder: Path, given: str) -> Container:
    """The file of factors; safetensors before the pickle, as PEFT chooses."""
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return open_container(folder / name, f"{given}/{name}")
    shards = sorted(one.name for one in folder.glob("adapter_model-*-of-*"))
    if shards:
        raise UnsupportedFormat(
            f"{given}: the factors are in {len(shards)} shards ({first_names(shards, 1)}); "
            f"geoscope reads one {_WEIGHTS[0]}: load the adapter with PEFT and save it again"
        )
    raise CheckpointNotFound(
        f"{given}: {ADAPTER_CONFIG} without factors; copy {' or '.join(_WEIGHTS)} beside it"
    )
