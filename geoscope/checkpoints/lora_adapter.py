"""How does a LoRA adapter of PEFT name, scale and lay out its factors?

    base_model.model.<module>.lora_{A,B}.weight            A (r, in), B (out, r)
    ….lora_A.<adapter>.weight                              the same, from a raw state dict
    ….experts.base_layer.lora_{A,B}.weight, ….experts.lora_{A,B}.weight
        stacked experts (`target_parameters`), first and second parameter: A (E·r, in) with rows
        e·r + j, B (out, r·E) with columns j·E + e

scaling = lora_alpha/r, with `use_rslora` lora_alpha/√r; r and alpha of a module are those of the
first key of `rank_pattern` and `alpha_pattern` that matches `(.*\\.)?(key)$`, else the global ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from geoscope.errors import CheckpointError, UnsupportedFormat, first_names
from geoscope.names import in_natural_order, layer_index
from geoscope.records import TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LoraModule", "expert_parts", "is_targeted", "lora_modules", "stacked", "unstacked"]

_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<path>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight"
)
_BASE_LAYER = ".base_layer"

# Parameter that holds a block's experts → what files call the matrices on top of one another in it.
_EXPERT_LEAVES = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
_EXPERT_HOLDERS = (".mlp.experts", ".block_sparse_moe.experts")

# Extras of `LoraConfig` that make the update something else than scaling·B·A.
_EXTRAS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "lora_bias": "a bias on lora_B",
    "layer_replication": "layer replication",
    "alora_invocation_tokens": "activated LoRA",
    "trainable_token_indices": "trainable tokens",
    "arrow_config": "Arrow routing",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA",
}
_OTHER_TENSORS = (
    (re.compile(r"\.lora_embedding_[AB]"), "an adapted embedding"),
    (re.compile(r"\.lora_magnitude_vector"), "DoRA"),
    (re.compile(r"\.lora_[AB](?:\.[^.]+)?\.bias$"), "a bias on lora_B"),
    (re.compile(r"\.trainable_tokens_delta"), "trainable tokens"),
    (re.compile(r"^lora_(?:unet|te\d?)_|\.lora_(?:down|up)\."), "a kohya or diffusers LoRA"),
)
_MERGE = "Merge it into its base (PeftModel.merge_and_unload) and use the merged folder"


@dataclass(frozen=True)
class LoraModule:
    """One adapted module: update = scaling · B·A, of shape (out, in).

    name: path of the module in the live model, `model.layers.0.self_attn.q_proj`; of stacked
    experts the path of the parameter, `model.layers.0.mlp.experts.gate_up_proj`. path: the same
    as it stands in the keys. experts: how many matrices the factors hold, 1 but for stacks.
    """

    name: str
    path: str
    A: TensorInfo
    B: TensorInfo
    rank: int
    alpha: float
    scaling: float
    experts: int = 1
    is_stack: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix, or of each of the experts'."""
        return self.B.shape[0], self.A.shape[1]


def lora_modules(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], label: str
) -> dict[str, LoraModule]:
    """Every adapted module by name, in natural order.

    Raises UnsupportedFormat for extras that change the update, CheckpointError for factors that
    lack their partner or contradict the config.
    """
    _refuse_extras(config, tensors, label)
    found: dict[str, dict[str, TensorInfo]] = {}
    adapters: set[str] = set()
    for name, info in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None:
            continue
        adapters.add(match["adapter"] or "default")
        sides = found.setdefault(match["path"], {})
        if match["side"] in sides:
            raise CheckpointError(
                f"{label}: lora_{match['side']} of {match['path']} stands there twice; "
                "save one adapter in a file"
            )
        sides[match["side"]] = info
    if len(adapters) > 1:
        raise CheckpointError(
            f"{label}: holds {len(adapters)} adapters ({first_names(sorted(adapters))}); "
            "save one adapter in a file"
        )
    if not found:
        raise CheckpointError(
            f"{label}: no lora_A or lora_B among its {len(tensors)} tensors; "
            "save the adapter again with PeftModel.save_pretrained"
        )
    _refuse_halves(found, label)
    modules = [_module(path, sides, config, label) for path, sides in found.items()]
    by_name = {one.name: one for one in modules}
    return {name: by_name[name] for name in in_natural_order(by_name)}


def _refuse_extras(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], label: str
) -> None:
    for option, called in _EXTRAS.items():
        if config.get(option):
            raise UnsupportedFormat(
                f"{label}: {called} ({option} in adapter_config.json); "
                f"geoscope reads plain LoRA. {_MERGE}"
            )
    if config.get("bias", "none") != "none":
        raise UnsupportedFormat(
            f"{label}: bias is {config['bias']!r} in adapter_config.json; "
            f"geoscope reads adapters with bias 'none'. {_MERGE}"
        )
    for pattern, called in _OTHER_TENSORS:
        name = next((name for name in tensors if pattern.search(name)), None)
        if name is not None:
            raise UnsupportedFormat(
                f"{label}: {called} (tensor {name}); geoscope reads plain LoRA. {_MERGE}"
            )


def _refuse_halves(found: Mapping[str, Mapping[str, TensorInfo]], label: str) -> None:
    halves = [path for path, sides in found.items() if len(sides) == 1]
    if halves:
        (side,) = found[halves[0]]
        lacking = "B" if side == "A" else "A"
        raise CheckpointError(
            f"{label}: {len(halves)} modules have one factor of two, first {halves[0]} "
            f"without lora_{lacking}; save the adapter again"
        )
    infos = [info for sides in found.values() for info in sides.values()]
    flat = [info for info in infos if len(info.shape) != 2 or 0 in info.shape]
    if flat:
        raise CheckpointError(
            f"{label}: {len(flat)} factors are no matrices, first {flat[0].name} "
            f"{flat[0].shape}: a ZeRO-3 or FSDP save whose shards were not gathered; "
            "gather them and save again"
        )


def _module(
    path: str,
    sides: Mapping[str, TensorInfo],
    config: Mapping[str, Any],
    label: str,
) -> LoraModule:
    A, B = sides["A"], sides["B"]
    parameter = _parameter(path, config)
    name = path if parameter is None else f"{path.removesuffix(_BASE_LAYER)}.{parameter}"
    rank = _pattern(config, "rank_pattern", name, config.get("r"), label)
    alpha = _pattern(config, "alpha_pattern", name, config.get("lora_alpha"), label)
    experts = A.shape[0] // int(rank) if parameter is not None and int(rank) == rank else 1
    if A.shape[0] != B.shape[1] or A.shape[0] != rank * max(experts, 1):
        raise CheckpointError(
            f"{label}: {name} has lora_A {A.shape} and lora_B {B.shape}, the config rank {rank:g}; "
            "factors and adapter_config.json are of different saves: copy both again"
        )
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LoraModule(name, path, A, B, int(rank), alpha, scaling, experts, parameter is not None)


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
        return targets != "all-linear" and re.fullmatch(targets, module) is not None
    return any(module == one or module.endswith(f".{one}") for one in targets)


def _pattern(config: Mapping[str, Any], field: str, module: str, default: Any, label: str) -> float:
    """The value of the first key that matches, else the default; a number above zero."""
    patterns = config.get(field) or {}
    value = next(
        (value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)),
        default,
    )
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        name = "lora_alpha" if field == "alpha_pattern" else "r"
        raise CheckpointError(
            f"{label}: {name} of {module} is {value!r} in adapter_config.json, and must be a "
            "number above 0; set it there to what the adapter was trained with"
        )
    return float(value)


def expert_parts(module: LoraModule, known: Collection[str]) -> tuple[tuple[str, ...], ...]:
    """The experts' own modules that a stack stands for: of each expert, from top to bottom.

    known: paths of modules; () where they do not hold all of them, and for what is no stack.
    """
    holder, _, leaf = module.name.rpartition(".")
    for leaves in _EXPERT_LEAVES.get(leaf, ()) if module.is_stack else ():
        for name in _EXPERT_HOLDERS:
            above = holder.replace(_EXPERT_HOLDERS[0], name)
            parts = tuple(
                tuple(f"{above}.{e}.{one}" for one in leaves) for e in range(module.experts)
            )
            if all(path in known for row in parts for path in row):
                return parts
    return ()


def stacked(module: LoraModule, B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """From the stored form to B (E, m, r), A (E, r, n)."""
    m, n = module.shape
    rank = A.shape[0] // module.experts
    B = B.reshape(m, rank, module.experts).permute(2, 0, 1)
    return B, A.reshape(module.experts, rank, n)


def unstacked(B: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """From B (E, m, r), A (E, r, n) to the stored form, contiguous: the inverse of `stacked`."""
    experts, m, rank = B.shape
    flat = B.permute(1, 2, 0).reshape(m, rank * experts)
    return flat.contiguous(), A.reshape(experts * rank, -1).contiguous()
