"""The versions that the numbers of a run depend on, without importing what has them."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

__all__ = ["versions"]

_PACKAGES = (
    ("torch", "numpy", "scipy"),
    ("safetensors", "huggingface-hub", "peft", "transformers"),
)


def versions() -> str:
    """Python, the machine, and what is installed of the packages, a line for each group."""
    machine = f"{platform.system()} {platform.machine()}"
    lines = [[f"Python {platform.python_version()}", machine]]
    for group in _PACKAGES:
        lines.append([f"{name} {known}" for name in group for known in _installed(name)])
    return "\n".join(" · ".join(line) for line in lines if line)


def _installed(name: str) -> Iterator[str]:
    try:
        yield version(name)
    except PackageNotFoundError:
        return
