"""How does a LoRA adapter of PEFT name, scale and lay out its factors?

    <module>.lora_{A,B}.weight                  A (r, in), B (out, r)
    <module>.lora_embedding_{A,B}               A (r, vocab), B (dim, r): ΔW (vocab, dim) = s·(B·A)ᵀ
    <module>.lora_magnitude_vector              DoRA: m of W′ = m·V/‖V‖, V = W + s·B·A
    <module>.lora_B.bias                        `lora_bias`: b′ = b + s·(this)
    ….experts.base_layer.lora_{A,B}.weight, ….experts.lora_{A,B}.weight
        stacked experts (`target_parameters`), first and second parameter: A (E·r, in) with rows
        e·r + j, B (out, r·E) with columns j·E + e; or both of the transpose (`packing`)

scaling = lora_alpha/r, with `use_rslora` lora_alpha/√r; r and alpha of a module are those of the
first key of `rank_pattern` and `alpha_pattern` that matches `(.*\\.)?(key)$`, else the global ones.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from geoscope.errors import CheckpointError, UnsupportedFormat
from geoscope.names import layer_index
from geoscope.patterns import fullmatches
from geoscope.peft.config import finds, value_of
from geoscope.peft.extras import Vector
from geoscope.peft.keys import MERGE, by_module, refuse_flat, refuse_partial
from geoscope.peft.module import AdapterModule, Kind, Read
from geoscope.peft.packing import packed_by_shapes
from geoscope.records import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LoraModule", "expert_parts", "is_targeted", "lora_modules", "stacked", "unstacked"]

_BASE_LAYER = ".base_layer"
_LINEAR, _EMBEDDING = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")
_MAGNITUDE, _BIAS = "lora_magnitude_vector", "lora_B.bias"

# Parameter that holds a block's experts → what files call the matrices on top of one another in it.
_EXPERT_LEAVES = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
_EXPERT_HOLDERS = (".mlp.experts", ".block_sparse_moe.experts")

# Extras of `LoraConfig` that make the update something that is not read.
_EXTRAS = {
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "layer_replication": "layer replication",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
}


@dataclass(frozen=True, kw_only=True)
class LoraModule(AdapterModule):
    """A module with LoRA: update = scaling · B·A; with a magnitude (DoRA) it needs the base.

    A, B: as stored. is_embedding: they are (r, vocab) and (dim, r), and are turned on reading.
    bias: of `lora_bias`, which the bias of the module is changed by.
    """

    A: TensorInfo
    B: TensorInfo
    is_embedding: bool = False
    magnitude: TensorInfo | None = None
    bias: TensorInfo | None = None

    @property
    def kind(self) -> Kind:
        return "factors" if self.magnitude is None else "base"

    @property
    def called(self) -> str:
        return "LoRA" if self.magnitude is None else "DoRA"

    @property
    def vectors(self) -> Mapping[str, Vector]:
        if self.bias is None:
            return {}
        return {f"{self.name}.bias": Vector(self.bias.name, self.scaling)}

    def factors(self, read: Read) -> tuple[Tensor, Tensor]:
        if self.magnitude is not None:
            raise self.no_factors()
        return self._stored_factors(read)

    def updated(self, weight: Tensor, read: Read) -> Tensor:
        """With a magnitude m: m·V/‖V‖, V = W + s·B·A, norms along rows (of an embedding along
        columns, as PEFT has it); a zero row of V is not a number there, as in PEFT."""
        if self.magnitude is None:
            return super().updated(weight, read)
        self.check_fits(tuple(weight.shape))
        B, A = (factor.double() for factor in self._stored_factors(read))
        changed = weight.double() + self.scaling * (B @ A).reshape(weight.shape)
        along = -2 if self.is_embedding else -1
        magnitude = read(self.magnitude.name).double().unsqueeze(along)
        return magnitude * (changed / changed.norm(dim=along, keepdim=True))

    def _stored_factors(self, read: Read) -> tuple[Tensor, Tensor]:
        B, A = read(self.B.name), read(self.A.name)
        return (A.T[None], B.T[None]) if self.is_embedding else stacked(self, B, A)


def lora_modules(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], label: str
) -> dict[str, LoraModule]:
    """Every adapted module by name.

    Raises UnsupportedFormat for extras that change the update, CheckpointError for factors that
    lack their partner or contradict the config.
    """
    for option, called in _EXTRAS.items():
        if config.get(option):
            raise UnsupportedFormat(
                f"{label}: {called} ({option} in adapter_config.json), which is not read. {MERGE}"
            )
    found = by_module(tensors, (*_LINEAR, *_EMBEDDING, _MAGNITUDE), label)
    embeddings = {path: one for path, one in found.items() if not one.keys().isdisjoint(_EMBEDDING)}
    linear = {path: one for path, one in found.items() if path not in embeddings}
    factors: list[TensorInfo] = []
    for group, sides in ((linear, _LINEAR), (embeddings, _EMBEDDING)):
        refuse_partial(group, sides, label)
        factors += [roles[side] for roles in group.values() for side in sides]
    refuse_flat(factors, label)
    if config.get("lora_bias") and not any(_BIAS in roles for roles in found.values()):
        raise CheckpointError(
            f"{label}: lora_bias is true in adapter_config.json and no {_BIAS} is stored; "
            "factors and adapter_config.json are of different saves: copy both again"
        )
    modules = [_module(path, roles, config, label) for path, roles in found.items()]
    return packed_by_shapes({module.name: module for module in modules})


def _module(
    path: str, roles: Mapping[str, TensorInfo], config: Mapping[str, Any], label: str
) -> LoraModule:
    is_embedding = _EMBEDDING[0] in roles
    A, B = (roles[side] for side in (_EMBEDDING if is_embedding else _LINEAR))
    parameter = _parameter(path, config)
    name = path if parameter is None else f"{path.removesuffix(_BASE_LAYER)}.{parameter}"
    rank = value_of(config, "r", name, label)
    alpha = value_of(config, "lora_alpha", name, label)
    experts = A.shape[0] // int(rank) if parameter is not None and int(rank) == rank else 1
    if A.shape[0] != B.shape[1] or A.shape[0] != rank * max(experts, 1):
        raise CheckpointError(
            f"{label}: {name} has lora_A {A.shape} and lora_B {B.shape}, the config rank {rank:g}; "
            "factors and adapter_config.json are of different saves: copy both again"
        )
    sides = B.shape[0], A.shape[1]
    magnitude = _vector(roles, _MAGNITUDE, sides[0], label)
    if bool(config.get("use_dora")) is not (magnitude is not None):
        has, says = ("no ", "true") if magnitude is None else ("a ", "not true")
        raise CheckpointError(
            f"{label}: {name} has {has}{_MAGNITUDE} and use_dora is {says} in adapter_config.json; "
            "factors and adapter_config.json are of different saves: copy both again"
        )
    return LoraModule(
        name=name,
        path=path,
        shape=(sides[1], sides[0]) if is_embedding else sides,
        rank=int(rank),
        scaling=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank),
        stored=(A, B) if magnitude is None else (A, B, magnitude),
        alpha=alpha,
        experts=experts,
        is_stack=parameter is not None,
        is_turned=None if parameter is not None and experts > 1 else False,
        A=A,
        B=B,
        is_embedding=is_embedding,
        magnitude=magnitude,
        bias=_vector(roles, _BIAS, sides[0], label),
    )


def _vector(
    roles: Mapping[str, TensorInfo], role: str, length: int, label: str
) -> TensorInfo | None:
    """A vector of one number for each row of B; None where there is none."""
    info = roles.get(role)
    if info is not None and info.shape != (length,):
        raise CheckpointError(
            f"{label}: {info.name} is {info.shape}, needs ({length},): a ZeRO-3 or FSDP save whose "
            "shards were not gathered, or of another module; save the adapter again"
        )
    return info


def _parameter(path: str, config: Mapping[str, Any]) -> str | None:
    """The leaf of the parameter that a key of `target_parameters` belongs to; None for a module.

    Of two parameters of one module PEFT wraps the first inside the second, as `base_layer`.
    """
    holder = path.removesuffix(_BASE_LAYER)
    targets = [str(one).rpartition(".") for one in config.get("target_parameters") or ()]
    leaves = _in_order([leaf for above, _, leaf in targets if f".{holder}".endswith(above)])
    if not leaves or (path == holder and is_targeted(config, path)):
        return None
    return leaves[-1] if path == holder else leaves[0]


def _in_order(leaves: Sequence[str]) -> list[str]:
    """As the modules of transformers hold them: PEFT's list comes from a set, in any order."""
    return sorted(dict.fromkeys(leaves), key=lambda leaf: leaf == "down_proj")


def is_targeted(config: Mapping[str, Any], module: str) -> bool:
    """Whether `target_modules` names the module, by PEFT's rule.

    A list holds exact names and suffixes after a dot; a text is a regular expression for the whole
    path. "all-linear" names no module here: what is linear only the live model knows.
    `exclude_modules` takes away by the same rule, `layers_to_transform` all other blocks.
    """
    layers = config.get("layers_to_transform")
    if layers is not None and layer_index(f"{module}.") not in (
        [layers] if isinstance(layers, int) else layers
    ):
        return False
    excluded = _named(config.get("exclude_modules"), module)
    return _named(config.get("target_modules"), module) and not excluded


def _named(targets: Any, module: str) -> bool:
    if not targets:
        return False
    if isinstance(targets, str):
        return targets != "all-linear" and finds(fullmatches, targets, module)
    return any(module == target or module.endswith(f".{target}") for target in targets)


def expert_parts(module: AdapterModule, known: Collection[str]) -> tuple[tuple[str, ...], ...]:
    """The experts' own modules that a stack stands for: of each expert, from top to bottom.

    known: paths of modules; () where they do not hold all of them, and for what is not a stack.
    """
    holder, _, leaf = module.name.rpartition(".")
    for leaves in _EXPERT_LEAVES.get(leaf, ()) if module.is_stack else ():
        for name in _EXPERT_HOLDERS:
            above = holder.replace(_EXPERT_HOLDERS[0], name)
            parts = tuple(
                tuple(f"{above}.{e}.{leave}" for leave in leaves) for e in range(module.experts)
            )
            if all(path in known for row in parts for path in row):
                return parts
    return ()


def stacked(module: AdapterModule, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """From the stored form to B (E, m, r), A (E, r, n); those of ΔWᵀ are turned."""
    rank = A.shape[0] // module.experts
    B = B.reshape(B.shape[0], rank, module.experts).permute(2, 0, 1)
    A = A.reshape(module.experts, rank, A.shape[1])
    return (A.mT, B.mT) if module.is_turned else (B, A)


def unstacked(B: Tensor, A: Tensor, *, is_turned: bool | None = False) -> tuple[Tensor, Tensor]:
    """From B (E, m, r), A (E, r, n) to the stored form, contiguous: the inverse of `stacked`."""
    if is_turned:
        B, A = A.mT, B.mT
    experts, m, rank = B.shape
    flat = B.permute(1, 2, 0).reshape(m, rank * experts)
    return flat.contiguous(), A.reshape(experts * rank, -1).contiguous()
