"""Which tensors of an adapter's file belong to one module, and what is each of them?

    base_model.model.<module>.lora_A.weight                 as PEFT saves it
    base_model.model.<module>.lora_A.default.weight         a raw state dict, any adapter name
    base_model.model.<module>.lora_embedding_A[.default]    without .weight

Marks of wrappers (`_fsdp_wrapped_module.`, `_orig_mod.`, …) are taken off.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from geoscope.errors import CheckpointError, UnsupportedFormat, first_names
from geoscope.names import without_wrappers
from geoscope.records import TensorInfo

__all__ = ["MERGE", "by_module", "refuse_flat", "refuse_partial"]

MERGE = "Merge it into its base (PeftModel.merge_and_unload) and use the merged folder"

_NAME = r"(?!(?:weight|bias)$)[^.]+"


def by_module(
    tensors: Mapping[str, TensorInfo], roles: Iterable[str], label: str
) -> dict[str, dict[str, TensorInfo]]:
    """Path of a module → role → tensor; `lora_B.bias` is the role of a bias on lora_B.

    roles: parts of a key that end the path, `lora_A`. Raises CheckpointError where there is none at
    all, where the file holds several adapters, or the same tensor twice.
    """
    wanted = tuple(roles)
    key = re.compile(
        rf"(?P<path>.+)\.(?P<role>{'|'.join(wanted)})(?:\.(?P<adapter>{_NAME}))?"
        r"(?:\.(?:weight|(?P<bias>bias)))?"
    )
    found: dict[str, dict[str, TensorInfo]] = {}
    adapters: set[str] = set()
    for name, info in tensors.items():
        match = key.fullmatch(without_wrappers(name))
        if match is None:
            continue
        adapters.add(match["adapter"] or "default")
        role = f"{match['role']}.bias" if match["bias"] else match["role"]
        of_module = found.setdefault(match["path"], {})
        if role in of_module:
            raise CheckpointError(
                f"{label}: {role} of {match['path']} occurs twice; save one adapter in a file"
            )
        of_module[role] = info
    if len(adapters) > 1:
        raise CheckpointError(
            f"{label}: holds {len(adapters)} adapters ({first_names(sorted(adapters))}); "
            "save one adapter in a file"
        )
    if not found and (short := _without_its_name(tensors, wanted)):
        raise CheckpointError(
            f"{label}: PEFT removed the adapter's name from keys such as {short} and damaged "
            f"{wanted[0]}. No loader can read them. Save the adapter under a name that does not "
            "occur in its keys"
        )
    if not found:
        raise CheckpointError(
            f"{label}: no {' or '.join(wanted[:2])} among its {len(tensors)} tensors; "
            "save the adapter again with PeftModel.save_pretrained"
        )
    return found


def _without_its_name(tensors: Iterable[str], roles: Iterable[str]) -> str | None:
    """The first key of an adapter that was called as its keys begin, `lora`: `q_proj_A.weight`."""
    ends = tuple(f"{role[role.index('_') :]}.weight" for role in roles if "_" in role)
    return next((name for name in tensors if name.endswith(ends)), None)


def refuse_partial(
    found: Mapping[str, Mapping[str, TensorInfo]], needed: tuple[str, ...], label: str
) -> None:
    """Raises CheckpointError where a module has some of the needed tensors and not all."""
    partial = [path for path, roles in found.items() if not all(one in roles for one in needed)]
    if partial:
        first = found[partial[0]]
        lacking = next(one for one in needed if one not in first)
        has = sum(one in first for one in needed)
        counts = {2: "two", 3: "three", 4: "four"}[len(needed)]
        raise CheckpointError(
            f"{label}: {len(partial)} modules have {'one' if has == 1 else has} factor"
            f"{'' if has == 1 else 's'} of {counts}, first {partial[0]} without {lacking}; "
            "save the adapter again"
        )


def refuse_flat(infos: Iterable[TensorInfo], label: str) -> None:
    """Raises CheckpointError for factors that were not gathered, UnsupportedFormat for kernels."""
    every = list(infos)
    kernels = [info for info in every if len(info.shape) > 2 and 0 not in info.shape]
    if kernels and all(".experts." in info.name for info in kernels):
        raise UnsupportedFormat(
            f"{label}: {len(kernels)} factors are of all experts at once, first {kernels[0].name} "
            f"{kernels[0].shape}, as Tinker writes them; geoscope reads the keys of PEFT. Merge it "
            "with tinker_cookbook (weights.build_hf_model) and give the merged folder"
        )
    if kernels:
        raise UnsupportedFormat(
            f"{label}: {len(kernels)} factors are of convolutions, first {kernels[0].name} "
            f"{kernels[0].shape}; geoscope reads adapters of linear layers and embeddings. {MERGE}"
        )
    flat = [info for info in every if len(info.shape) != 2 or 0 in info.shape]
    if flat:
        raise CheckpointError(
            f"{label}: {len(flat)} factors are no matrices, first {flat[0].name} "
            f"{flat[0].shape}: a ZeRO-3 or FSDP save whose shards were not gathered; "
            "gather them and save again"
        )
