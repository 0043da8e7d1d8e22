"""`verify_adapter`: is an adapter folder what its layout promises, and will frameworks load it?

Keys and shapes against the modules of the base, both ways; W_res + s·B·A = W; untouched tensors
bit for bit; a mirror's product zero, an anchor opposite; vLLM's rules; the hashes of geoscope.json.
One matrix at a time; nothing is written. See docs/methods.md#layouts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from geoscope.adapters.layouts import MIRROR_TOLERANCE, effective_error, largest_product
from geoscope.adapters.peft_config import max_lora_rank, vllm_findings
from geoscope.adapters.peft_names import module_paths
from geoscope.adapters.table import starts_on_base
from geoscope.engine import told_failure
from geoscope.errors import OptionError, first_names
from geoscope.formats.container import files_of
from geoscope.formats.hashes import file_sha256, tensor_sha256
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.ungathered import refuse_ungathered
from geoscope.peft.adapter import Adapter
from geoscope.peft.folder import CONVERTED, RECORD
from geoscope.profile import stage
from geoscope.sources.memory import Model, as_model_or_reference
from geoscope.thresholds import LOSSY
from geoscope.verbs.adapters.initialised import Initialised
from geoscope.verbs.adapters.keys import (
    Check,
    keys_check,
    packing_checks,
    renamed_notes,
    shapes_check,
    spelling_check,
    tied_checks,
)
from geoscope.verbs.adapters.match import AdapterMatch, Piece
from geoscope.verbs.adapters.origin import AdapterOrigin, origin_of, original_model
from geoscope.verbs.adapters.peft_logits import LogitDifferences, logit_differences

__all__ = ["Check", "Verification", "verify_adapter"]


@dataclass(frozen=True)
class Verification:
    """All checks of one folder, in the order in which they were made."""

    folder: str
    layout: str | None
    base: str
    checks: tuple[Check, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)


def verify_adapter(
    folder: Model | Initialised,
    *,
    base: Model | None = None,
    allow_lossy: bool = False,
    with_peft: bool = False,
    on_module: Callable[[int, int], None] | None = None,
) -> Verification:
    """Every check that applies to the folder's layout.

    folder: the output of `init-adapter`, or an adapter folder; a PEFT model, what `open_adapter`
    made of a state dict, or what `init_adapter` returned. base: the original model, of any form,
    where neither geoscope.json nor the adapter's config tells it. allow_lossy: an error above
    1e-5 is told and is not a failure. with_peft: load it with transformers and PEFT, too.
    on_module(done, all) is called as matrices are read. Raises OptionError or CheckpointError where
    something cannot be read at all; what can be and is wrong is a check that is not ok.

    >>> verify_adapter("OUT/").ok  # doctest: +SKIP
    True
    """
    named = None if base is None else as_model_or_reference(base, "base")
    origin = origin_of(folder, "folder")
    adapter = origin.adapter
    more = adapter.not_plain
    layout = _layout(origin, adapter) if more is None else origin.layout
    original = original_model(origin, layout, named)
    refuse_ungathered(original)
    residual = origin.residual(original.config) if layout == "residual" else None
    live = module_paths(list(original.tensors), original.config)
    match = AdapterMatch.of(adapter, original, live.paths)
    tick = _Counter(len(match.pieces), on_module)
    if more is not None and layout is None:
        checks = _checks_of_another_type(match, more)
    else:
        adapter.refuse_more_than_plain(f"layout {layout}")
        checks = [
            _layout_check(origin, adapter, layout),
            spelling_check(adapter),
            keys_check(match),
            shapes_check(match),
            *packing_checks(match),
            *tied_checks(match),
            *([_config_check(adapter)] if layout else []),
            _vllm_check(origin, adapter),
        ]
    if residual is not None:
        checks += [
            _weights_check(match, original, residual, tick, allow_lossy=allow_lossy),
            _untouched_check(match, original, residual),
        ]
    if layout == "mirror" or (more is None and starts_on_base(origin.record.get("method"))):
        checks.append(_product_check(match, original, tick))
    if layout == "anchor" and origin.anchor is not None:
        checks.append(_anchor_check(adapter, origin.anchor))
    if origin.record and more is None:
        checks.append(_hashes_check(origin.record, match, original))
    if with_peft and checks[0].ok:
        found = _differences(origin, original, layout)
        checks += _peft_checks(found, layout, allow_lossy=allow_lossy)
    notes = (*live.notes, *renamed_notes(match))
    return Verification(origin.given, layout, original.ref.given, tuple(checks), notes)


def _differences(
    origin: AdapterOrigin, original: Checkpoint, layout: str | None
) -> LogitDifferences:
    """What PEFT says of the folders. Raises OptionError for what is in memory."""
    folder = origin.folder
    if folder is None or original.ref.is_in_memory:
        raise OptionError(
            "`with_peft` loads folders, and the adapter or its base is in memory; write them, and "
            "give their paths"
        )
    return logit_differences(
        original,
        folder.adapter,
        residual=folder.residual if layout == "residual" else None,
        anchor=folder.anchor if layout == "anchor" else None,
    )


def _checks_of_another_type(match: AdapterMatch, called: str) -> list[Check]:
    """What can be told of an adapter that is more than plain LoRA."""
    count = len(match.adapter.modules)
    vllm = f"vLLM serves plain LoRA alone, and this is {called}; merge it into the base"
    return [
        Check("layout", True, f"{called} on its base, {count} modules"),
        keys_check(match),
        shapes_check(match),
        *packing_checks(match),
        *tied_checks(match),
        Check("vllm", True, vllm, is_warning=True),
    ]


# --- the layout ---------------------------------------------------------------------------------


def _layout(origin: AdapterOrigin, adapter: Adapter) -> str | None:
    """As recorded or seen in the folders; without either, a mirror is known by its halves."""
    if origin.layout is not None or origin.record:
        return origin.layout
    first = next(iter(adapter.modules))
    B, A = adapter.factors(first)
    pairs = A.shape[-2] % 2 == 0 and bool(A.any()) and torch.equal(A[:, 0::2], A[:, 1::2])
    return "mirror" if pairs and torch.equal(B[..., 0::2], -B[..., 1::2]) else None


def _layout_check(origin: AdapterOrigin, adapter: Adapter, layout: str | None) -> Check:
    told = f"by {RECORD}" if origin.record else f"by the folders, no {RECORD}"
    count = f"{len(adapter.modules)} modules of rank {_ranks(adapter)}"
    if layout is None:
        origins = "converted, " if origin.record.get("method") == CONVERTED else ""
        return Check("layout", True, f"{origins}plain LoRA on its base, {count}")
    beside = {"residual": origin.has_residual, "anchor": origin.has_anchor, "mirror": True}
    if layout not in beside:
        return Check("layout", False, f"{layout!r} in {RECORD} is not a layout; write it again")
    if not beside[layout]:
        return Check(
            "layout", False, f"{layout}, {told}, but {layout}/ is missing; write the folder again"
        )
    return Check("layout", True, f"{layout}, {told}, {count}")


def _ranks(adapter: Adapter) -> str:
    return ", ".join(
        str(rank) for rank in sorted({module.rank for module in adapter.modules.values()})
    )


# --- what the config says -----------------------------------------------------------------------


def _config_check(adapter: Adapter) -> Check:
    """Words that make a loader start elsewhere than at the factors that are stored."""
    init = adapter.config.get("init_lora_weights", True)
    dropout = adapter.config.get("lora_dropout") or 0.0
    wrong: list[str] = []
    if init is not True:
        wrong.append(
            f"init_lora_weights is {init!r}: PEFT would initialise again while it loads; set true"
        )
    if dropout != 0:
        wrong.append(f"lora_dropout is {dropout:g}: it moves the start in training; set 0.0")
    if wrong:
        return Check("config", False, "; ".join(wrong))
    return Check("config", True, "init_lora_weights is true, lora_dropout 0")


def _vllm_check(origin: AdapterOrigin, adapter: Adapter) -> Check:
    """A failure where vLLM is promised: the card of a start has a recipe for it, but for anchors
    and ranks that it does not serve. Elsewhere what it refuses may never be served by it."""
    found = vllm_findings(adapter.config)
    if not found:
        return Check("vllm", True, "vLLM's rules are met")
    is_start = origin.layout in ("residual", "mirror") or starts_on_base(
        origin.record.get("method")
    )
    rank = adapter.config.get("r")
    served = isinstance(rank, int) and max_lora_rank(rank) is not None
    is_promised = bool(origin.record) and is_start and served
    text = f"vLLM: {'; '.join(found)}"
    return Check("vllm", not is_promised, text, is_warning=not is_promised)


# --- the weights --------------------------------------------------------------------------------


class _Counter:
    def __init__(self, count: int, on_module: Callable[[int, int], None] | None) -> None:
        self._count, self._done, self._call = count, 0, on_module

    def __call__(self) -> None:
        self._done += 1
        if self._call is not None:
            self._call(self._done, self._count)


def _factors_by_piece(match: AdapterMatch) -> Iterator[tuple[Piece, Tensor, Tensor]]:
    """Every piece with its B (m, r) and A (r, n); a module's factors are read once."""
    held: tuple[str, Tensor, Tensor] | None = None
    for piece in match.pieces:
        if held is None or held[0] != piece.module.name:
            held = (piece.module.name, *match.adapter.factors(piece.module.name))
        yield piece, held[1][piece.expert][piece.rows], held[2][piece.expert]


def _kept(checkpoint: Checkpoint) -> Callable[[str], Tensor]:
    """`read` that keeps the last tensor: experts of one stack are asked for in turn."""
    last: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        if name not in last:
            last.clear()
            last[name] = checkpoint.read(name)
        return last[name]

    return read


@stage("weights")
def _weights_check(
    match: AdapterMatch,
    base: Checkpoint,
    residual: Checkpoint,
    tick: _Counter,
    *,
    allow_lossy: bool,
) -> Check:
    """‖W_res + s·B·A − W‖/‖W‖ of every adapted weight, from the files as they are."""
    errors: dict[str, float] = {}
    failed: dict[str, str] = {}
    read_base, read_residual = _kept(base), _kept(residual)
    for piece, B, A in _factors_by_piece(match):
        tick()
        if piece.name not in residual.tensors:
            continue  # told by `untouched`, which lists what lacks
        W, kept = (piece.of(read(piece.name)) for read in (read_base, read_residual))
        if W.shape == kept.shape:
            with told_failure(failed, piece.name):
                found = effective_error(W, kept, A, B, piece.module.scaling)
                errors[piece.name] = max(found, errors.get(piece.name, 0.0), key=_badness)
    if failed:
        return _not_computed("weights", failed)
    if not errors:
        return Check("weights", False, "no adapted weight could be compared with the base")
    name = max(errors, key=lambda name: _badness(errors[name]))
    worst, mean = errors[name], sum(errors.values()) / len(errors)
    exact = worst <= LOSSY
    accepted = allow_lossy and math.isfinite(worst)
    text = f"W_res + s·B·A misses W by at most {worst:.1e} of ‖W‖, {mean:.1e} on average"
    if not exact:
        text += f" ({LOSSY:.0e} needed), worst {name}: {_why_lossy(residual, name, accepted)}"
    return Check("weights", exact or accepted, text, _number(worst), name)


def _not_computed(check: str, failed: Mapping[str, str]) -> Check:
    """A check that could not be made on some matrices; the first of them says why."""
    text = f"not computed for {len(failed)} matrices ({first_names([*failed])}), first: "
    return Check(check, False, text + next(iter(failed.values())), name=next(iter(failed)))


def _badness(error: float) -> float:
    """For comparisons: what is not a number is worst."""
    return error if error == error else float("inf")


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _why_lossy(residual: Checkpoint, name: str, accepted: bool) -> str:
    if accepted:
        return "accepted, `allow_lossy`"
    dtype = residual.tensors[name].dtype
    if dtype in ("bfloat16", "float16"):
        return (
            f"{dtype} is too coarse for a residual; write it with `residual_dtype` float32, "
            "choose `layout` mirror, or accept it with `allow_lossy`"
        )
    return "residual, adapter and base are not of one run, or lora_alpha was changed"


@stage("bytes")
def _untouched_check(match: AdapterMatch, base: Checkpoint, residual: Checkpoint) -> Check:
    """Tensors that are not adapted, bit for bit; and no tensor lost or added."""
    lost = [n for n in base.tensors if n not in residual.tensors and n not in base.tied_to]
    added = [name for name in residual.tensors if name not in base.tensors]
    changed = [
        name
        for name, info in base.tensors.items()
        if name in residual.tensors and name not in match.adapted
        if residual.tensors[name].shape != info.shape
        or residual.tensors[name].dtype != info.dtype
        or not _same_bytes(base.read(name), residual.read(name))
    ]
    problems = {"missing from": lost, "added to": added, "changed in": changed}
    said = [
        f"{len(names)} tensors {what} the residual: {first_names(names)}"
        for what, names in problems.items()
        if names
    ]
    if said:
        first = next(names[0] for names in problems.values() if names)
        return Check("untouched", False, "; ".join(said) + "; write it again", name=first)
    count = len(base.tensors) - len(match.adapted)
    return Check("untouched", True, f"the {count} tensors that are not adapted are identical")


def _same_bytes(one: Tensor, two: Tensor) -> bool:
    left, right = (x.contiguous().reshape(-1).view(torch.uint8) for x in (one, two))
    return torch.equal(left, right)


@stage("products")
def _product_check(match: AdapterMatch, base: Checkpoint, tick: _Counter) -> Check:
    """max|s·B·A| against max|W|, in fp64: an adapter that starts at zero."""
    shares: dict[str, float] = {}
    failed: dict[str, str] = {}
    read = _kept(base)
    for piece, B, A in _factors_by_piece(match):
        tick()
        weight = piece.of(read(piece.name))
        with told_failure(failed, piece.name):
            largest = float(weight.abs().max())
            product = largest_product(A, B, piece.module.scaling)
            share = product / largest if largest > 0 else product
            shares[piece.name] = max(share, shares.get(piece.name, 0.0), key=_badness)
    if failed:
        return _not_computed("product", failed)
    if not shares:
        return Check("product", False, "no product could be compared with a weight of the base")
    name = max(shares, key=lambda name: _badness(shares[name]))
    worst = shares[name]
    zero = worst <= MIRROR_TOLERANCE
    text = f"max|s·B·A| is at most {worst:.1e} of max|W|"
    if not zero:
        text += f" ({MIRROR_TOLERANCE:.0e} needed), worst {name}: trained already, or damaged"
    return Check("product", zero, text, _number(worst), name)


def _anchor_check(adapter: Adapter, anchor: Adapter) -> Check:
    """The frozen adapter is the trainable one with B negated, bit for bit."""
    wrong = [
        name
        for name in {**adapter.modules, **anchor.modules}
        if not _is_opposite(adapter, anchor, name)
    ]
    if wrong:
        return Check(
            "anchor",
            False,
            f"{len(wrong)} modules of anchor/ are not the opposite of adapter/: "
            f"{first_names(wrong)}; trained already, or of another run",
            name=wrong[0],
        )
    return Check("anchor", True, "anchor/ is adapter/ with B negated: both together are zero")


def _is_opposite(adapter: Adapter, anchor: Adapter, name: str) -> bool:
    if name not in adapter.modules or name not in anchor.modules:
        return False
    if adapter.modules[name].scaling != anchor.modules[name].scaling:
        return False
    (B, A), (B0, A0) = adapter.factors(name), anchor.factors(name)
    return torch.equal(A, A0) and torch.equal(B, -B0)


# --- hashes -------------------------------------------------------------------------------------


@stage("hashes")
def _hashes_check(record: Mapping[str, Any], match: AdapterMatch, base: Checkpoint) -> Check:
    """The factors, and the files of the base, are those that geoscope.json was written with."""
    recorded = record.get("matrices") or {}
    changed: list[str] = []
    compared = 0
    # The experts of a stack are recorded together or not at all: their parts are no file's tensors.
    known = {
        piece.module.name: (piece.module, recorded.get(piece.name, {}))
        for piece in match.pieces
        if not piece.module.is_stack
    } | {
        piece.module.name: (piece.module, recorded[piece.module.name])
        for piece in match.pieces
        if piece.module.name in recorded
    }
    for module, facts in known.values():
        for side, info in zip(("sha256_A", "sha256_B"), module.stored, strict=True):
            if side in facts:
                compared += 1
                if tensor_sha256(match.adapter.read(info.name)) != facts[side]:
                    changed.append(info.name)
    for file, expected in ((record.get("base") or {}).get("sha256") or {}).items():
        path = _path_of(base, file)
        compared += path is not None
        if path is not None and file_sha256(path) != expected:
            changed.append(f"{file} of the base")
    if changed:
        return Check(
            "sha256",
            False,
            f"{len(changed)} differ from {RECORD}: {first_names(changed)}; trained or changed "
            "since, or another base",
            name=changed[0],
        )
    return Check("sha256", True, f"{compared} hashes of {RECORD} agree")


def _path_of(base: Checkpoint, file: str) -> Path | None:
    """Where a weight file of the base lies; None for a file that holds none of its tensors."""
    containers = [base.source.open(one) for one in {info.source for info in base.tensors.values()}]
    return next(
        (path for container in containers for path in files_of(container) if path.name == file),
        None,
    )


# --- PEFT ---------------------------------------------------------------------------------------


def _peft_checks(found: LogitDifferences, layout: str | None, *, allow_lossy: bool) -> list[Check]:
    """What the loaded model says, against what the layout promises."""
    loads = not found.complaints
    checks = [
        Check("peft-loads", loads, "PEFT uses every key" if loads else "; ".join(found.complaints))
    ]
    starts = layout is not None
    for way, error in (("enabled", found.enabled), ("merged", found.merged)):
        same = error <= LOSSY or ((allow_lossy or not starts) and math.isfinite(error))
        text = f"{way}: logits differ by {error:.1e} from the original"
        if not same:
            text += f" ({LOSSY:.0e} allowed); training would not start at the model"
        checks.append(Check(f"peft-{way}", same, text, _number(error)))
    text = f"disabled: logits differ by {found.disabled:.1e} from the original"
    if layout == "residual":
        text += ": it is W_res, not the model, and no KL reference"
        return [*checks, Check("peft-disabled", True, text, found.disabled)]
    return [*checks, Check("peft-disabled", found.disabled == 0, text, found.disabled)]
