"""What does the model say when PEFT itself loads the adapter? Here alone transformers is needed.

Logits of a fixed batch of tokens, in fp32: of the original model, and of the adapted one enabled,
disabled and merged. One model is in memory at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geoscope.errors import CheckpointError, OptionError, first_names
from geoscope.models.checkpoint import Checkpoint
from geoscope.sources.reference import HubReference, parse_reference

__all__ = ["LogitDifferences", "logit_differences"]

_ROWS, _TOKENS = 2, 16


@dataclass(frozen=True)
class LogitDifferences:
    """‖logits − original‖_F / ‖original‖_F of the adapter enabled, disabled and merged.

    complaints: what PEFT warned of while it loaded the adapter, keys missing or left over.
    """

    enabled: float
    disabled: float
    merged: float
    complaints: tuple[str, ...]


def logit_differences(
    base: Checkpoint, adapter: Path, *, residual: Path | None = None, anchor: Path | None = None
) -> LogitDifferences:
    """The adapter on `residual`, or on the base where there is none, against the base.

    Raises OptionError without transformers and peft, CheckpointError where they cannot load it.
    """
    try:
        import peft
        import transformers
    except ImportError as error:
        raise OptionError(
            f"`with_peft` loads the model with transformers and peft, and {error.name} is not "
            "installed; run `pip install 'geoscope[peft]'`"
        ) from None
    with _without_bars(transformers):
        return _differences(peft, transformers, base, adapter, residual, anchor)


@contextmanager
def _without_bars(transformers: Any) -> Iterator[None]:
    """No progress bars of transformers, which belong to its own users; then as before."""
    logging = transformers.utils.logging
    had_bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if had_bars:
            logging.enable_progress_bar()


def _differences(
    peft: Any,
    transformers: Any,
    base: Checkpoint,
    adapter: Path,
    residual: Path | None,
    anchor: Path | None,
) -> LogitDifferences:
    where, settings = _location(base)
    original = _load(transformers, where, settings)
    said = _logits(original)
    if residual is not None:
        del original
        original = _load(transformers, str(residual), {})
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            model = peft.PeftModel.from_pretrained(original, str(adapter))
            tuner: Any = model.base_model
            # the first call does not tell what is left over; the same again does
            left = model.load_adapter(str(adapter), "default").unexpected_keys
            if anchor is not None:
                model.load_adapter(str(anchor), "anchor")
                tuner.set_adapter(["default", "anchor"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{adapter}: PEFT cannot load it: {reason}") from None
    model.eval()
    enabled = _relative(_logits(model), said)
    with model.disable_adapter():
        disabled = _relative(_logits(model), said)
    tuner.merge_adapter()
    merged = _relative(_logits(model), said)
    texts = (" ".join(str(one.message).split()) for one in heard)
    complaints = tuple(text for text in texts if "adapter keys" in text or "nexpected" in text)
    if left:
        complaints += (f"{len(left)} keys are used by no module: {first_names(sorted(left))}",)
    return LogitDifferences(enabled, disabled, merged, complaints)


def _location(base: Checkpoint) -> tuple[str, dict[str, Any]]:
    """Folder or Hub id of the original, as from_pretrained takes it."""
    parsed = parse_reference(base.ref.given)
    if isinstance(parsed, HubReference):
        return parsed.repo, {"revision": base.ref.commit, "subfolder": parsed.folder}
    return str(parsed.path), {}


def _load(transformers: Any, where: str, settings: dict[str, Any]) -> Any:
    """The causal language model in fp32; no code of its repository is run."""
    major, minor = (int(part) for part in transformers.__version__.split(".")[:2])
    dtype = "dtype" if (major, minor) >= (4, 56) else "torch_dtype"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers about itself; nothing to be done here
        try:
            model = transformers.AutoModelForCausalLM.from_pretrained(
                where, **{dtype: torch.float32}, **settings
            )
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{where}: transformers cannot load it: {reason}") from None
    return model.eval()


def _logits(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else None
    vocabulary = (text or model.config).vocab_size
    shape = (_ROWS, _TOKENS)
    tokens = torch.randint(0, vocabulary, shape, generator=generator, device="cpu")
    with torch.no_grad():
        return model(input_ids=tokens).logits


def _relative(actual: Tensor, expected: Tensor) -> float:
    gap = torch.linalg.vector_norm(actual - expected, dtype=torch.float64)
    return float(gap / torch.linalg.vector_norm(expected, dtype=torch.float64))
