"""What is an adapter on this disk? A config, and tensors that are read module by module.

    adapter_config.json                                  what kind, and the scaling of its factors
    adapter_model.safetensors (or .bin, or shards)       the factors, and what is replaced whole

Each type of PEFT has a file of its own beside this one and a line in `_TYPES`, or is merged by PEFT
itself (`library.py`); the others are refused by name. Headers are read here; data on demand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geoscope.errors import CheckpointNotFound, OptionError, UnsupportedFormat
from geoscope.foreign import is_folder, local_path, resolved
from geoscope.formats.container import Container
from geoscope.formats.refused import refuse_kohya
from geoscope.models.conv1d import is_conv1d
from geoscope.models.opening import storage_dtype
from geoscope.names import in_natural_order
from geoscope.peft.adalora import adalora_modules
from geoscope.peft.config import (
    ADAPTER_CONFIG,
    check_type,
    drawn_start,
    read_config,
    start_of,
)
from geoscope.peft.extras import Rows, Vector, replacements, token_rows
from geoscope.peft.file import open_adapter_file
from geoscope.peft.folder import adapter_folder, record_beside
from geoscope.peft.ia3 import ia3_modules
from geoscope.peft.keys import MERGE
from geoscope.peft.library import LIBRARY_TYPES, LibraryModule, library_modules
from geoscope.peft.lora import LoraModule, expert_parts, lora_modules
from geoscope.peft.lycoris import loha_modules, lokr_modules
from geoscope.peft.miss import miss_modules
from geoscope.peft.module import AdapterModule
from geoscope.peft.packing import Sides, base_sides, packed_by_base
from geoscope.peft.rotations import boft_modules, oft_modules
from geoscope.peft.tinylora import tinylora_modules
from geoscope.peft.vera import vera_modules
from geoscope.records import ModelRef, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ADAPTER_CONFIG", "Adapter", "adapter_of", "read_adapter", "with_recorded_start"]

# peft_type → its modules, from the config and the header. Another type is one more line.
_Modules = Callable[[Mapping[str, Any], Mapping[str, TensorInfo], str], Mapping[str, AdapterModule]]
_TYPES: dict[str, _Modules] = {
    "LORA": lora_modules,
    "ADALORA": adalora_modules,
    "VERA": vera_modules,
    "IA3": ia3_modules,
    "MISS": miss_modules,
    "LOHA": loha_modules,
    "LOKR": lokr_modules,
    "TINYLORA": tinylora_modules,
    "OFT": oft_modules,
    "BOFT": boft_modules,
    **dict.fromkeys(LIBRARY_TYPES, library_modules),
}
_WITH_ALPHA = ("LORA", "ADALORA")


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter, known by its config and header. Made by `read_adapter`.

    modules: name of the adapted module → how it is changed, in natural order.
    replaced: name of a base tensor → the stored tensor that takes its place whole: of
    `modules_to_save`, of `bias`, and the base of an adapted or resized embedding, which the update
    of its module is added to. It lies there as the base's own file has it: of Conv1D (in, out).
    rows: name of a base tensor → its new rows (trainable tokens).
    vectors: name of a base tensor → a change of a bias: `lora_bias`, IA3 (where there is a bias).
    others: stored tensors that are no factors of `modules`.
    initial: why the product was not zero before training ("init_lora_weights is 'pissa'"), so
    that scaling · B·A is not an update of the original base; None where nothing says so.
    Names of base tensors are those of the live model: `model.embed_tokens.weight`.
    beside: a remark on what else lies in its folder.
    path: its folder; None for one in memory.
    """

    given: str
    path: Path | None
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    modules: Mapping[str, AdapterModule]
    replaced: Mapping[str, str]
    rows: Mapping[str, Rows]
    vectors: Mapping[str, Vector]
    others: tuple[str, ...]
    initial: str | None
    container: Container = field(repr=False)
    at: str | None = None
    commit: str | None = None
    beside: str | None = None

    def __repr__(self) -> str:
        kind = self.config["peft_type"]
        return f"<geoscope.Adapter {self.given}: {kind}, {len(self.modules)} modules>"

    @property
    def resolved(self) -> str:
        """The path, or org/name@commit."""
        return self.at or str(self.path)

    @property
    def ref(self) -> ModelRef:
        """The adapter as a model of a report."""
        stored = f"adapter, {storage_dtype(self.tensors.values())}"
        return ModelRef(self.given, self.resolved, self.commit, stored)

    @property
    def base(self) -> str | None:
        """`base_model_name_or_path`, None where it says nothing."""
        return self.config.get("base_model_name_or_path") or None

    @property
    def base_folder(self) -> Path | None:
        """The folder that `base` names, from here or from the adapter's own; None for none."""
        return base_folder(self.path, self.base)

    @property
    def base_reference(self) -> str | None:
        """The base as a reference that opens from here: its folder in full, or its revision."""
        if self.base is None or self.base_folder is not None:
            return None if self.base is None else str(self.base_folder)
        return self.base if self.revision is None else f"{self.base}@{self.revision}"

    @property
    def layout(self) -> str | None:
        """`residual`, `mirror` or `anchor`, by its folder; None where nothing tells it."""
        return None if self.path is None else adapter_folder(self.path).layout

    @property
    def revision(self) -> str | None:
        """`revision` of the base, None where it says nothing."""
        return self.config.get("revision") or None

    def read(self, name: str) -> Tensor:
        """One tensor as it is stored."""
        return self.container.read(name, None)

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """B (E, m, r) and A (E, r, n) of a module; E = 1 but for stacked experts.

        The update is modules[module].scaling · B·A, of the shape of the weight as a base is read:
        (out, in), of an embedding (vocab, dim), of Conv1D (out, in). In storage dtypes; fp64 where
        a stored diagonal is multiplied in. Raises UnsupportedFormat for kind "base".
        """
        return self.modules[module].factors(self.read)

    def updated(self, name: str, weight: Tensor) -> Tensor:
        """What the base's tensor becomes, in fp64.

        name: of a module or its weight, or a base tensor of `rows`, `vectors` or `replaced`.
        weight: W as a base is read, (out, in); of stacked experts (E, out, in). A base of its own
        that the adapter brings for the module (`replaced`) takes the place of W, with its own
        number of rows.
        Raises CheckpointError where W cannot be the adapted tensor, KeyError for other names.
        """
        module = self.modules.get(name) or self.modules.get(name.removesuffix(".weight"))
        tensor = name if module is None or module.is_stack else f"{module.name}.weight"
        if tensor in self.replaced and (module is None or not module.is_stack):
            weight = self._replacement(tensor, weight)
        if module is not None:
            return module.updated(weight, self.read)
        if (change := self.rows.get(name) or self.vectors.get(name)) is not None:
            return change.updated(name, weight, self.read)
        if name not in self.replaced:
            raise KeyError(name)
        return weight.double()

    def _replacement(self, tensor: str, weight: Tensor) -> Tensor:
        """The stored tensor that takes the place of W, turned as W is."""
        stored = self.read(self.replaced[tensor])
        if stored.dim() != 2 or not is_conv1d(tensor):
            return stored
        is_square = stored.shape[0] == stored.shape[1]
        turned = (
            bool(self.config.get("fan_in_fan_out")) if is_square else (stored.shape != weight.shape)
        )
        return stored.T if turned else stored

    def with_base(
        self, base: Mapping[str, TensorInfo], config: Mapping[str, Any] | None = None
    ) -> Adapter:
        """The same with what only the base tells: the inner sides of IA3 and VeRA, and how stacks
        of experts are packed.

        base: name of a module → its weight in the base, as read (out, in). config: config.json of
        the base. Raises CheckpointError where a packing is not told.
        """
        known = {name: one.with_base(base) for name, one in self.modules.items()}
        sides = {name: self.sides_of(name, base, config or {}) for name in known}
        told = {name: one for name, one in sides.items() if one is not None}
        packed = packed_by_base(known, told, self.config, config or {}, self.given)
        return replace(self, modules=packed)

    def renamed(self, names: Mapping[str, str]) -> Adapter:
        """The same with other names of the modules and tensors of the base: here → there."""

        def new(key: str) -> str:
            path = key.removesuffix(".weight")
            return f"{names[path]}{key[len(path) :]}" if path in names else key

        return replace(
            self,
            modules={new(name): one.renamed(new) for name, one in self.modules.items()},
            replaced={new(key): one for key, one in self.replaced.items()},
            rows={new(key): one for key, one in self.rows.items()},
            vectors={new(key): one for key, one in self.vectors.items()},
        )

    def sides_of(
        self, name: str, base: Mapping[str, TensorInfo], config: Mapping[str, Any]
    ) -> Sides | None:
        """The sides of a stack of experts in the base, (out, in); None for what is not a stack
        there, or does not tell its sides."""
        module = self.modules[name]
        if not module.is_stack or module.experts == 1:
            return None
        return base_sides(module, base, config, expert_parts(module, base))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know of how the factors are read."""
        notes = [one for one in (self.beside, drawn_start(self.config)) if one is not None]
        if any(isinstance(module, LibraryModule) for module in self.modules.values()):
            kind = self.config["peft_type"]
            notes.append(f"{kind} is merged by PEFT itself, so that its update is dense")
        turned = sum(module.is_turned is True for module in self.modules.values())
        if not turned:
            return tuple(notes)
        return (
            *notes,
            f"the factors of {turned} stacks of experts are those of the transposed update, as "
            "PEFT packed them by the order of their sides; they are turned",
        )

    @property
    def not_plain(self) -> str | None:
        """What makes it more than LoRA on matrices and whole replaced tensors; None for that."""
        for module in self.modules.values():
            if not isinstance(module, LoraModule) or module.kind == "base":
                return module.called
            if module.is_embedding:
                return f"an adapted embedding, {module.name}"
        if self.rows:
            return "trainable tokens"
        if self.vectors:
            return "a bias on lora_B"
        bias = self.config.get("bias", "none")
        return None if bias == "none" else f"bias is {bias!r}"

    def refuse_more_than_plain(self, who: str) -> None:
        """Raises UnsupportedFormat for `who` takes plain LoRA alone."""
        if (more := self.not_plain) is not None:
            raise UnsupportedFormat(
                f"{self.given}: {who} reads plain LoRA only, and this adapter is more ({more}). "
                f"{MERGE}"
            )


def read_adapter(folder: Path, given: str | None = None, *, alpha: float | None = None) -> Adapter:
    """The adapter in a folder, from its config and header; no tensor data is read.

    given: how messages name the folder, where that is not its path.
    alpha: in place of the config's `lora_alpha`, which some tools write as 0; `alpha_pattern`
    stays.
    Raises CheckpointNotFound, UnsupportedFormat (a type or an extra that is not read),
    CheckpointError for a damaged or contradictory folder, OptionError for an alpha that is not a
    positive number or that the type has no use for.
    """
    folder, given = local_path(folder), str(folder) if given is None else given
    if not is_folder(folder):
        raise CheckpointNotFound(f"{given}: no such folder; give the folder of an adapter")
    config = read_config(folder, given, _TYPES)
    container = open_adapter_file(folder, given)
    return with_recorded_start(adapter_of(given, folder.resolve(), config, container, alpha=alpha))


def adapter_of(
    given: str,
    path: Path | None,
    config: Mapping[str, Any],
    container: Container,
    *,
    alpha: float | None = None,
) -> Adapter:
    """The adapter of a config and the tensors in a container, wherever they lie.

    path: of its folder; None for one in memory.

    alpha: see `read_adapter`. Raises as that does.
    """
    check_type(config, given, _TYPES)
    if alpha is not None:
        config = _with_alpha(config, alpha, given)
    tensors = dict(sorted(container.header.tensors.items()))
    refuse_kohya(tensors, given)
    found = _TYPES[config["peft_type"]](config, tensors, given)
    modules = {name: found[name] for name in in_natural_order(found)}
    _refuse_dtypes([info for one in modules.values() for info in one.stored], given)
    used = {info.name for one in modules.values() for info in one.stored}
    vectors = {name: one for module in modules.values() for name, one in module.vectors.items()}
    used |= {vector.stored for vector in vectors.values()}
    others = tuple(name for name in tensors if name not in used)
    return Adapter(
        given=given,
        path=path,
        config=config,
        tensors=tensors,
        modules=modules,
        replaced=replacements(others, tensors, given),
        rows=token_rows(config, tensors, given),
        vectors=vectors,
        others=others,
        initial=start_of(config),
        container=container,
    )


def _refuse_dtypes(factors: Iterable[TensorInfo], given: str) -> None:
    for factor in factors:
        if factor.dtype not in ("float64", "float32", "float16", "bfloat16"):
            raise UnsupportedFormat(
                f"{given}: {factor.name} is {factor.dtype}; geoscope reads fp64, fp32, fp16 "
                "and bf16 factors: save the adapter in one of these"
            )


def _with_alpha(config: Mapping[str, Any], alpha: float, given: str) -> dict[str, Any]:
    kind = config["peft_type"]
    if kind not in _WITH_ALPHA:
        raise OptionError(f"{given}: {kind} has no lora_alpha; leave `lora_alpha` out")
    if not (math.isfinite(alpha) and alpha > 0):
        raise OptionError(f"{given}: `lora_alpha` {alpha:g}: must be a number above 0")
    return {**config, "lora_alpha": alpha}


def base_folder(adapter: Path | None, base: Any) -> Path | None:
    """The folder that `base_model_name_or_path` names; a relative path is told from here, or from
    the folder of the adapter."""
    if not isinstance(base, str) or not base:
        return None
    own = () if adapter is None else (adapter / base,)
    for path in (local_path(base), *own):
        if is_folder(path):
            return resolved(path)
    return None


def with_recorded_start(adapter: Adapter) -> Adapter:
    """The same with what our commands wrote of its start, where its config says nothing."""
    return adapter if adapter.initial else replace(adapter, initial=_recorded_start(adapter))


def _recorded_start(adapter: Adapter) -> str | None:
    """Why the product is not zero before training, by what our commands wrote; None where it is."""
    if adapter.layout in ("residual", "anchor"):
        return f"its layout is {adapter.layout}"
    named = adapter.base_folder
    if named is not None and record_beside(str(named)).get("layout") == "residual":
        return f"its base {adapter.base} is a rewritten one"
    return None
