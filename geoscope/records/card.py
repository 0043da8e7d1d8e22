"""README.md of an adapter folder: what it is, the command that made it, and how trainers load it.

The recipes are those of PEFT, TRL, verl and vLLM for each layout; each layout has one rule about
the KL reference, which is printed, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from geoscope.digits import number

__all__ = [
    "UNNAMED",
    "AdapterCard",
    "ConversionCard",
    "adapter_card",
    "conversion_card",
    "kl_rule",
    "layout_words",
]

# In place of the reference of a base that is in memory and has none.
UNNAMED = "(the base, in memory)"
_LAYOUTS = {
    "residual": "a rewritten base (`residual/`) and an adapter (`adapter/`) that belong together",
    "mirror": "one adapter of twice the rank on the untouched base, whose product is zero at the "
    "start (experimental: not yet tested by RL on a real model)",
    "anchor": "a trainable adapter (`adapter/`) and a frozen one (`anchor/`) on the untouched "
    "base, both active; for your own training loop",
    "": "an adapter on the untouched base",
}
_KL = {
    "residual": "The base without the adapter is W_res, a damaged model. Wherever the KL "
    "reference is `adapter off` (verl with the reference inside the actor) KL has to be off. TRL "
    "copies the adapter, so its reference is right.",
    "mirror": "Without the adapter the model is the original base, so `adapter off` is the right "
    "KL reference everywhere.",
    "anchor": "Keep both adapters active, in the reference, too. TRL with beta ≠ 0 drops the "
    "second one without a word: own loops only.",
    "": "Without the adapter the model is the original base, so `adapter off` is the right KL "
    "reference everywhere.",
}


@dataclass(frozen=True)
class AdapterCard:
    """What the card tells.

    folder: how the recipes name the folder. base: reference of the original model. layout:
    residual, mirror, anchor, or empty where the method has none. rank, alpha: as in the config.
    served_rank: what vLLM has to be told, None where it serves no such rank.
    start_errors: dtype → largest relative error of a weight at the start.
    """

    folder: str
    base: str
    commit: str | None
    method: str
    layout: str
    rank: int
    alpha: float
    served_rank: int | None
    command: str
    version: str
    matrices: int
    start_errors: Mapping[str, float]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConversionCard:
    """What the card of a converted adapter tells.

    discarded: share of the update's energy that the rank leaves out, None where it is exact.
    served_rank: what vLLM has to be told, None where it does not serve the adapter.
    """

    folder: str
    base: str
    commit: str | None
    rank: int
    alpha: float
    served_rank: int | None
    discarded: float | None
    command: str
    version: str
    notes: tuple[str, ...] = ()


def layout_words(layout: str) -> str:
    """What a layout is, in a sentence's part."""
    return _LAYOUTS[layout]


def kl_rule(layout: str) -> str:
    """The rule about the KL reference."""
    return _KL[layout]


def adapter_card(card: AdapterCard) -> str:
    """The card as Markdown with front matter."""
    parts = [
        _front_matter(card.base, card.method),
        f"# {_title(card)}\n",
        f"Initial weights, before any training: {layout_words(card.layout)}. "
        f"{card.matrices} weight matrices are adapted, rank {card.rank}, lora_alpha "
        f"{card.alpha:g}{'; lora_dropout has to stay 0' if card.layout else ''}.\n",
        "Made by geoscope " + card.version + ":\n",
        f"```\n{card.command}\n```\n",
        "## How exact is the start?\n",
        _errors(card),
        "## KL reference\n",
        kl_rule(card.layout) + "\n",
        "## How trainers load it\n",
        *_recipes(card),
    ]
    return "\n".join([*parts, *_remarks(card.notes)])


def conversion_card(card: ConversionCard) -> str:
    """The card of a converted adapter as Markdown with front matter."""
    at = f" at revision {card.commit}" if card.commit else ""
    lost = (
        "It is the trained update exactly, but for rounding to fp32."
        if card.discarded is None
        else f"The rank leaves out {number(card.discarded)} of the update's energy."
    )
    lines = [
        "import torch",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({card.base!r}, dtype=torch.bfloat16)",
        f"model = PeftModel.from_pretrained(base, {card.folder!r})",
    ]
    parts = [
        _front_matter(card.base, "converted"),
        f"# Trained adapter of {card.base}\n",
        f"A plain LoRA on the original model{at}, converted from a trained adapter that did not "
        f"start at zero: rank {card.rank}, lora_alpha {card.alpha:g}. {lost}\n",
        f"Made by geoscope {card.version}:\n",
        f"```\n{card.command}\n```\n",
        "## How to load it\n",
        f"PEFT:\n\n```python\n{chr(10).join(lines)}\n```\n",
    ]
    if card.served_rank is not None:
        parts.append(
            f"vLLM:\n\n```\nvllm serve {card.base} --enable-lora --max-lora-rank "
            f"{card.served_rank} --lora-modules converted={card.folder}\n```\n"
        )
    return "\n".join([*parts, *_remarks(card.notes)])


def _remarks(notes: tuple[str, ...]) -> list[str]:
    return ["## Remarks\n", "".join(f"- {note}\n" for note in notes)] if notes else []


def _title(card: AdapterCard) -> str:
    kind = f", {card.layout} layout" if card.layout else ""
    return f"{card.method} initialisation of {card.base}{kind}"


def _front_matter(base: str, method: str) -> str:
    name = json.dumps(base, ensure_ascii=False)  # a JSON string is a YAML string
    tags = ", ".join(dict.fromkeys(("lora", method, "geoscope")))
    return (
        f"---\nbase_model: {name}\nbase_model_relation: adapter\nlibrary_name: peft\n"
        f"tags: [{tags}]\n---\n"
    )


def _errors(card: AdapterCard) -> str:
    rows = [f"| {dtype} | {number(error)} |" for dtype, error in card.start_errors.items()]
    words = "Largest error of an adapted weight at the start, ‖W_start − W‖/‖W‖, by the dtype in "
    words += "which a trainer holds the base:\n\n| dtype | error |\n|---|--:|\n"
    text = words + "\n".join(rows) + "\n"
    if card.layout == "residual":
        text += (
            "\nAn RLVR run of full weights is about 1e-3 of ‖W‖. A trainer that rounds the "
            "residual to bf16 perturbs the policy as much before step 1: load it in float32, or "
            "take the layout `mirror`, exact in every dtype. transformers 5 and vLLM load a model "
            "in the dtype that its config.json names, bf16 for most, unless told otherwise.\n"
        )
    return text


def _recipes(card: AdapterCard) -> list[str]:
    base = f"{card.folder}/residual" if card.layout == "residual" else card.base
    split = card.layout in ("residual", "anchor")
    adapter = f"{card.folder}/adapter" if split else card.folder
    parts = [f"PEFT:\n\n```python\n{_peft(card, base, adapter)}\n```\n"]
    if card.layout == "anchor":
        return parts
    return [
        *parts,
        "TRL: give the loaded `model` to `GRPOTrainer(model=model, …)` and no `peft_config`; a "
        "`peft_config` would start a fresh LoRA. The TRL command line cannot load an adapter.\n",
        f"verl (FSDP):\n\n```\n{_verl(card, base, adapter)}\n```\n",
        _vllm(card, base, adapter),
        "Where the rollout merges the adapter in place, load the base in float32.\n",
    ]


def _peft(card: AdapterCard, base: str, adapter: str) -> str:
    dtype = "float32" if card.layout == "residual" else "bfloat16"
    lines = [
        "import torch",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM",
        "",
        f"base = AutoModelForCausalLM.from_pretrained({base!r}, dtype=torch.{dtype})",
        f"model = PeftModel.from_pretrained(base, {adapter!r}, is_trainable=True)",
    ]
    if card.layout == "anchor":
        lines += [
            f"model.load_adapter({card.folder + '/anchor'!r}, 'anchor', is_trainable=False)",
            "model.base_model.set_adapter(['default', 'anchor'])  # makes both trainable",
            "for name, parameter in model.named_parameters():",
            "    if '.anchor.' in name:",
            "        parameter.requires_grad_(False)",
        ]
    return "\n".join(lines)


def _verl(card: AdapterCard, base: str, adapter: str) -> str:
    lines = [
        f"actor_rollout_ref.model.path={base}",
        f"actor_rollout_ref.model.lora_adapter_path={adapter}",
        f"actor_rollout_ref.model.lora_rank={card.rank}",
        f"actor_rollout_ref.model.lora_alpha={card.alpha:g}",
        "actor_rollout_ref.rollout.load_format=safetensors",
        "actor_rollout_ref.rollout.layered_summon=True",
        "actor_rollout_ref.model.use_shm=True",
    ]
    if card.layout == "residual":
        lines += [
            "actor_rollout_ref.actor.use_kl_loss=False",
            "algorithm.use_kl_in_reward=False",
        ]
    return " \\\n".join(lines)


def _vllm(card: AdapterCard, base: str, adapter: str) -> str:
    if card.served_rank is None:
        return f"vLLM serves no adapter of rank {card.rank}.\n"
    warning = "# the base's own name serves W_res, a damaged model\n"
    command = (
        f"vllm serve {base} --enable-lora --max-lora-rank {card.served_rank} "
        f"--lora-modules {card.method}={adapter}"
    )
    return f"vLLM:\n\n```\n{warning if card.layout == 'residual' else ''}{command}\n```\n"
