"""What trains in each method, and how it is stored: whole weights, or an adapter as PEFT has it.

Starts come from geoscope's own initialisations. DoRA is LoRA with the norm of each row trained
apart, m·V/‖V‖ with V = W + s·B·A and ‖V‖ held constant in the gradient, as PEFT does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.study.model import MATRICES, Size, matrix_names
from geoscope.adapters.layouts import mirror
from geoscope.adapters.peft_config import adapter_config
from geoscope.adapters.table import INITIALISATIONS

__all__ = ["METHODS", "Method", "Trained", "started", "stored_weights"]

_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Method:
    """start: name in INITIALISATIONS, or empty: all weights train.

    rank: of the start; a mirror stores twice as much. layout: mirror, residual, or empty. dora:
    whether the norms of rows train apart.
    """

    start: str = ""
    rank: int = 0
    layout: str = ""
    dora: bool = False

    @property
    def stored_rank(self) -> int:
        return 2 * self.rank if self.layout == "mirror" else self.rank

    @property
    def scaling(self) -> float:
        """alpha/stored rank, alpha = 2·rank."""
        return 2.0 * self.rank / self.stored_rank


METHODS: Mapping[str, Method] = {
    "full": Method(),
    "lora-r2": Method("lora", 2),
    "lora-r8": Method("lora", 8),
    "lora-r32": Method("lora", 32),
    "pissa": Method("pissa", 8, "residual"),
    "milora": Method("milora", 8, "residual"),
    "olora": Method("olora", 8, "residual"),
    "geora-residual": Method("geora", 8, "residual"),
    "geora-mirror": Method("geora", 8, "mirror"),
    "rlpo": Method("rlpo", 8),
    "dora": Method("lora", 8, dora=True),
}


@dataclass
class Trained:
    """fixed: weights that stay, a residual in place of its matrix. parameters: what trains, by the
    name in the stored file. compose: parameters → the weights of the model."""

    method: Method
    fixed: Mapping[str, Tensor]
    parameters: dict[str, Tensor]

    def weights(self) -> dict[str, Tensor]:
        """The weights of the model as it stands, with their gradients."""
        return composed(self.method, self.fixed, self.parameters)

    def save(self, folder: Path, base: Path) -> None:
        """Write the trained tensors as a trainer would."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: each.detach().cpu().contiguous() for name, each in self.parameters.items()}
        if not self.method.start:
            save_file(tensors, folder / "model.safetensors")
            return
        save_file(tensors, folder / "adapter_model.safetensors")
        config = adapter_config(
            base=str(base),
            rank=self.method.stored_rank,
            alpha=2.0 * self.method.rank,
            targets=[part.split(".")[-1] for part in MATRICES],
        )
        config |= {"use_dora": True} if self.method.dora else {}
        (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def _key(name: str, role: str) -> str:
    tail = "" if role == "lora_magnitude_vector" else ".weight"
    return f"{_PREFIX}{name}.{role}{tail}"


def composed(
    method: Method, fixed: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The weights of the model: those that are trained as they are, or base + s·B·A."""
    if not method.start:
        return dict(parameters)
    weights = dict(fixed)
    for key in parameters:
        if key.endswith(".lora_A.weight"):
            name = key[len(_PREFIX) : -len(".lora_A.weight")]
            A, B = parameters[key], parameters[_key(name, "lora_B")]
            changed = fixed[f"{name}.weight"] + method.scaling * (B @ A)
            if method.dora:
                m = parameters[_key(name, "lora_magnitude_vector")]
                changed = changed * (m / changed.detach().norm(dim=1)).unsqueeze(1)
            weights[f"{name}.weight"] = changed
    return weights


def started(name: str, base: Mapping[str, Tensor], size: Size, seed: int) -> Trained:
    """The method before its first step, on a base; the start is computed on the CPU in fp64."""
    method = METHODS[name]
    if not method.start:
        return Trained(method, {}, {key: _leaf(each) for key, each in base.items()})
    fixed, parameters = dict(base), {}
    for matrix in matrix_names(size):
        W = base[f"{matrix}.weight"].cpu()
        A, B, product = _factors(method, W, crc32(f"{seed} {matrix}".encode()) % 2**31)
        device = base[f"{matrix}.weight"].device
        parameters[_key(matrix, "lora_A")] = _leaf(A.to(device))
        parameters[_key(matrix, "lora_B")] = _leaf(B.to(device))
        if method.dora:
            norms = base[f"{matrix}.weight"].norm(dim=1)
            parameters[_key(matrix, "lora_magnitude_vector")] = _leaf(norms)
        if product is not None:
            fixed[f"{matrix}.weight"] = (W - product).to(device)
    return Trained(method, fixed, parameters)


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(True)


def _factors(method: Method, W: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """A, B, and the product that a residual takes out of W."""
    start = INITIALISATIONS[method.start]
    options = {"seed": seed} if start.is_drawn else {}
    factors = start(W, method.rank, **options)
    if method.layout == "mirror":
        return *mirror(factors), None
    product = factors.scaling * (factors.B @ factors.A)
    return factors.A, factors.B, product if method.layout == "residual" else None


def stored_weights(
    name: str, base: Mapping[str, Tensor], start: Path, checkpoint: Path
) -> dict[str, Tensor]:
    """The weights of a stored checkpoint; `start` is the folder of the method's first step."""
    method = METHODS[name]
    if not method.start:
        return load_file(checkpoint / "model.safetensors")
    fixed = dict(base)
    if method.layout == "residual":
        first = load_file(start / "adapter_model.safetensors")
        for key, A in first.items():
            if key.endswith(".lora_A.weight"):
                matrix = key[len(_PREFIX) : -len(".lora_A.weight")]
                product = method.scaling * (first[_key(matrix, "lora_B")] @ A)
                fixed[f"{matrix}.weight"] = base[f"{matrix}.weight"] - product
    return composed(method, fixed, load_file(checkpoint / "adapter_model.safetensors"))
