"""Are the keys of an adapter those that loaders take, and of the modules of its base?"""

from __future__ import annotations

from dataclasses import dataclass

from geoscope.adapters.peft_names import lora_keys, whole_key
from geoscope.errors import first_names
from geoscope.peft.adapter import Adapter
from geoscope.peft.extras import saved_name
from geoscope.peft.packing import is_old
from geoscope.verbs.adapters.match import AdapterMatch

__all__ = [
    "Check",
    "keys_check",
    "packing_checks",
    "renamed_notes",
    "shapes_check",
    "spelling_check",
    "tied_checks",
]


@dataclass(frozen=True)
class Check:
    """One claim about the folder; `text` tells all of it.

    worst: the number it stands on, None where there is none or it is not finite. name: where.
    is_warning: what it says is worth knowing and is not a failure; `ok` is true then.
    """

    id: str
    ok: bool
    text: str
    worst: float | None = None
    name: str | None = None
    is_warning: bool = False


def spelling_check(adapter: Adapter) -> Check:
    """Keys as `PeftModel.save_pretrained` writes them: another one is used by no loader."""
    wanted = {
        info.name: key
        for module in adapter.modules.values()
        for info, key in zip(module.stored, lora_keys(module.path), strict=True)
    }
    wanted |= {stored: whole_key(saved_name(stored)) for stored in adapter.replaced.values()}
    odd = [name for name, key in wanted.items() if name != key]
    if odd:
        return Check(
            "spelling",
            False,
            f"{len(odd)} of {len(wanted)} keys are not as PEFT writes them, and loaders pass them "
            f"over: first {odd[0]} in place of {wanted[odd[0]]}; save the adapter again from the "
            "unwrapped model (PeftModel.save_pretrained), or rename them",
            name=odd[0],
        )
    return Check("spelling", True, f"all {len(wanted)} keys are as PEFT writes them")


def packing_checks(match: AdapterMatch) -> list[Check]:
    """Of stacked experts, whether the PEFT that the config names reads them as they are packed."""
    odd = match.oddly_packed
    if not odd:
        return []
    version = match.adapter.config.get("peft_version")
    text = (
        f"{len(odd)} stacks of experts are packed as PEFT up to 0.18 did, by the order of their "
        "sides; from 0.19 on PEFT refuses them or, where experts are square, takes "
        f"them for another update (peft_version is {version!r}): first {odd[0]}"
    )
    return [Check("packing", is_old(version), text, name=odd[0], is_warning=is_old(version))]


def tied_checks(match: AdapterMatch) -> list[Check]:
    if not match.tied:
        return []
    text = (
        f"{first_names(match.tied)} shares its weight with the embedding (tied), which stays; a "
        "merge changes both, or needs a head of its own (tie_word_embeddings false)"
    )
    return [Check("tied", True, text, name=match.tied[0], is_warning=True)]


def renamed_notes(match: AdapterMatch) -> tuple[str, ...]:
    if not match.renamed:
        return ()
    first = match.renamed[0]
    return (
        f"{len(match.renamed)} modules have other names in the base ({first.tuned} is "
        f"{first.base}, {first.rule}): the adapter loads on a model of the class it was trained in",
    )


def keys_check(match: AdapterMatch) -> Check:
    problems = {
        "modules of the adapter are not in the base": match.unmatched,
        "modules of the base are targeted and have no factors": match.lacking,
        "modules have factors that target_modules does not name, so that PEFT would not use them": (
            match.untargeted
        ),
    }
    said = [
        f"{len(names)} {what}: {first_names(names)}" for what, names in problems.items() if names
    ]
    if said:
        first = next(names[0] for names in problems.values() if names)
        text = "; ".join(said) + "; the adapter is of another model, or was cut: write it again"
        return Check("keys", False, text, name=first)
    count = len(match.adapter.modules)
    return Check(
        "keys", True, f"all {count} modules are in the base, and no targeted one is missing"
    )


def shapes_check(match: AdapterMatch) -> Check:
    if not match.misshapen:
        return Check("shapes", True, "every product has the shape of its weight")
    name, (product, weight) = next(iter(match.misshapen.items()))
    return Check(
        "shapes",
        False,
        f"{len(match.misshapen)} products differ in shape from their weight, first {name}: "
        f"B·A {product}, weight {weight}; the adapter is of another model, or damaged",
        name=name,
    )
