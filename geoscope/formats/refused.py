"""Which weights are refused, by what sign are they known, and what should the user do instead?

The signs are looked at in this order: the names and dtypes of the tensors, what config.json claims
of those that are packed, the names of the files. A claim that no tensor bears out is a note. Each
refusal is one line: what was found, what is needed, what to do.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

from geoscope.errors import UnsupportedFormat, first_names
from geoscope.formats.fp8 import DEFAULT_BLOCK, FP8, block_size, scale_of
from geoscope.records import TensorInfo

__all__ = [
    "GIVE_BF16",
    "Refused",
    "block_of",
    "by_claim",
    "by_config",
    "by_files",
    "by_tensors",
    "is_adapter_file",
    "is_never_opened",
    "is_torch_dist",
    "odd_shards",
    "refusal",
    "refuse_kohya",
    "refuse_mlx",
    "unmet_claim",
]

_PRECISIONS = "geoscope reads fp32, fp16, bf16, FP8 with its scales, MXFP4 and bitsandbytes 4-bit."
_PEFT = "geoscope reads the keys of PEFT."
_WHOLE = "geoscope compares whole weights."
_PARTS = "geoscope reads them together, from their folder."
_DTENSORS = "geoscope reads shards of DTensors, each split along one dimension."

_SOURCE = "Use the checkpoint it was quantised from."
_BITSANDBYTES = "Merge the adapter into the bf16 base; for QLoRA that is the unquantised base."
_COMPRESSED = "Use the source checkpoint."
GIVE_BF16 = "Use a bf16 conversion."
_CONVERT = "Convert it to safetensors."
_BESIDE = "geoscope reads adapters by their folder."
_ADAPTER = "Give the folder that holds adapter_config.json; where a model is wanted, base+adapter."
_MERGE_LORA = "Merge it into its base and give the merged weights."
_FUSE = (
    "Fuse it with `mlx_lm.fuse --model BASE --adapter-path {ref} --save-path OUT` (with "
    "--dequantize over a quantised base) and give OUT."
)
_SAVE_MERGED = (
    "Save it merged (`save_adapters: False` in the training config), convert that to the names of "
    "transformers, and give the result."
)
_MERGER = (
    "Run `python -m verl.model_merger merge --backend fsdp --local_dir {ref} --target_dir OUT` "
    "(it casts to bf16) and give OUT."
)
_MEGATRON = (
    "Export it with the framework's own converter, for verl `python -m verl.model_merger merge "
    "--backend megatron --local_dir … --target_dir OUT`, and give OUT."
)
# DeepSpeed's script takes the folder above the shards, and their own as the tag.
_ZERO = (
    "Run `python {above}/zero_to_fp32.py {above} OUT --safe_serialization --tag {tag}` (DeepSpeed "
    "writes the script there) and give OUT."
)
_ZERO_HERE = "Run `python {here}/zero_to_fp32.py {here} OUT --safe_serialization` and give OUT."
_ZERO_PARALLEL = (
    "Export it with the trainer: `zero_to_fp32.py` does not join the parts of tensor parallelism."
)
_TOGETHER = "Give the folder that holds them all, on this disk."


@dataclass(frozen=True)
class Refused:
    """A format that is refused, the sign it was known by, and the way out."""

    format: str
    evidence: str
    hint: str
    needs: str = _PRECISIONS


def odd_shards(evidence: str) -> Refused:
    """FSDP shards whose parts are no slices of one tensor each."""
    return Refused("FSDP shards of a kind that is not read", evidence, _MERGER, _DTENSORS)


def refusal(reference: str, refused: Refused) -> UnsupportedFormat:
    """The one line for the user."""
    hint = refused.hint.replace("{ref}", reference)
    shards = PurePosixPath(reference)
    shards = shards.parent if shards.suffix in (".pt", ".py") else shards
    places = {"here": str(shards), "above": str(shards.parent), "tag": shards.name}
    for place, path in places.items():
        hint = hint.replace(f"{{{place}}}", shlex.quote(path))
    return UnsupportedFormat(
        f"`{reference}`: weights are {refused.format} ({refused.evidence}). {refused.needs} {hint}"
    )


# --- config.json --------------------------------------------------------------------------------

# quant_method → (how it is called, what to do). Every other name is refused under its own name.
_METHODS = {
    "gptq": ("GPTQ", _SOURCE),
    "awq": ("AWQ", _SOURCE),
    "compressed-tensors": ("compressed-tensors", _COMPRESSED),
    "mxfp4": ("MXFP4", GIVE_BF16),
    "mxfp8": ("MXFP8", GIVE_BF16),
    "nvfp4": ("NVFP4", GIVE_BF16),
    "fp8": ("FP8", GIVE_BF16),
    "fbgemm_fp8": ("FP8", GIVE_BF16),
}


def by_config(config: Mapping[str, Any]) -> Refused | None:
    """What `quantization_config` says, here or in the text part of a multimodal model."""
    quantization = _quantization(config)
    if not quantization or _is_block_fp8(quantization):
        return None
    return _by_method(quantization)


def by_claim(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> Refused | None:
    """What config.json claims, where a tensor is packed; by_tensors knows those of known names."""
    claim, packed = by_config(config), _packed(tensors)
    if claim is None or packed is None:
        return None
    evidence = f"{claim.evidence}, tensor {packed} is {tensors[packed].dtype}"
    return replace(claim, evidence=evidence)


def unmet_claim(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> str | None:
    """A remark on a quantisation that config.json claims of tensors which are plain."""
    quantization = _quantization(config)
    if not quantization or _packed(tensors) is not None:
        return None
    return (
        f"config.json claims {_by_method(quantization).format}, and no tensor is packed: they are "
        "read as stored; take quantization_config out of it before a loader believes it"
    )


def _packed(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The first tensor of codes in place of numbers; buffers such as masks are none."""
    return _first(
        tensors,
        lambda name: (
            len(tensors[name].shape) >= 2
            and tensors[name].dtype.startswith(_CODES)
            and not name.endswith((".bias", "mask"))
        ),
    )


_CODES = ("int8", "uint8", "int16", "int32", "float8_", "float6_", "float4_")


def block_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Sides of an FP8 block, as config.json has them; 128 × 128 where it is silent."""
    return block_size(_quantization(config)) or DEFAULT_BLOCK


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any]:
    text = config.get("text_config")
    for where in (config, text if isinstance(text, Mapping) else {}):
        quantization = where.get("quantization_config")
        if isinstance(quantization, Mapping) and quantization:
            return quantization
    return {}


def _is_block_fp8(quantization: Mapping[str, Any]) -> bool:
    return quantization.get("quant_method") == "fp8" and block_size(quantization) is not None


def _by_method(quantization: Mapping[str, Any]) -> Refused:
    bits = {4: quantization.get("load_in_4bit"), 8: quantization.get("load_in_8bit")}
    name = quantization.get("quant_method")
    if name is None:
        name = "bitsandbytes" if any(bits.values()) else "quantised"
    evidence = f"quant_method {str(name)!r} in config.json"
    if name == "bitsandbytes":
        width = 8 if bits[8] and not bits[4] else 4
        return Refused(f"bitsandbytes {width}-bit", evidence, _BITSANDBYTES)
    called, hint = _METHODS.get(str(name), (str(name), _SOURCE))
    return Refused(called, evidence, hint)


# --- names and dtypes of tensors ----------------------------------------------------------------


def by_tensors(tensors: Mapping[str, TensorInfo], unscaled: str | None = None) -> Refused | None:
    """What the tensors themselves show. They come sorted by name: the first one is the evidence.

    Of a quantised model what is left once the weights that are read have their parts.
    unscaled: an FP8 tensor without a scale that fits.
    """
    for test in (_packed_integers, _bitsandbytes, _packed_floats, _adapter):
        refused = test(tensors)
        if refused is not None:
            return refused
    if unscaled is not None:
        return _without_scale(unscaled, tensors)
    return None


def _without_scale(name: str, tensors: Mapping[str, TensorInfo]) -> Refused:
    scale = scale_of(name, tensors)
    if scale is None:
        return Refused("FP8", f"tensor {name} is {FP8} without {name}_scale_inv", GIVE_BF16)
    sides = " × ".join(map(str, scale.shape)) or "one number"
    evidence = (
        f"tensor {scale.name}: {scale.dtype}, {sides}, is not a scale by block, row or tensor"
    )
    return Refused("FP8", evidence, GIVE_BF16)


def _packed_integers(tensors: Mapping[str, TensorInfo]) -> Refused | None:
    qweight = _first(tensors, lambda name: name.endswith(".qweight"))
    if qweight is not None:
        group = _first(tensors, lambda name: name.endswith(".g_idx"))
        return Refused("AWQ" if group is None else "GPTQ", f"tensor {qweight}", _SOURCE)
    packed = _first(tensors, lambda name: name.endswith(".weight_packed"))
    if packed is not None:
        if f"{packed.removesuffix('_packed')}_global_scale" in tensors:
            return Refused("NVFP4", f"tensor {packed}", GIVE_BF16)
        return Refused("compressed-tensors", f"tensor {packed}", _COMPRESSED)
    return None


def _bitsandbytes(tensors: Mapping[str, TensorInfo]) -> Refused | None:
    four = _first(tensors, lambda name: ".quant_state." in name or name.endswith(".absmax"))
    if four is not None:
        return Refused("bitsandbytes 4-bit", f"tensor {four}", _BITSANDBYTES)
    eight = _first(tensors, lambda name: name.endswith(".SCB"))
    if eight is not None:
        return Refused("bitsandbytes 8-bit", f"tensor {eight}", _BITSANDBYTES)
    return None


def _packed_floats(tensors: Mapping[str, TensorInfo]) -> Refused | None:
    blocks = _first(
        tensors,
        lambda name: (
            name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in tensors
        ),
    )
    if blocks is not None:
        return Refused("MXFP4", f"tensor {blocks}", GIVE_BF16)
    for suffix, called in (
        (".weight_scale_2", "NVFP4"),
        (".weight_scale", "FP8"),
    ):
        scale = _first(tensors, lambda name, suffix=suffix: name.endswith(suffix))
        if scale is not None:
            weight = tensors.get(scale.removesuffix("_scale"))
            if weight is not None and weight.dtype == "int8":
                return Refused("8-bit integers", f"tensor {scale}", _SOURCE)
            return Refused(called, f"tensor {scale}", GIVE_BF16)
    narrow = _first(
        tensors,
        lambda name: (
            tensors[name].dtype.startswith(("float8_", "float6_", "float4_"))
            and tensors[name].dtype != FP8
            and not name.endswith(("_scale_inv", "_scale", ".scale"))
        ),
    )
    if narrow is not None:
        dtype = tensors[narrow].dtype
        called = "FP8" if dtype.startswith("float8") else "packed floats"
        return Refused(called, f"tensor {narrow} is {dtype}", GIVE_BF16)
    return None


_ADAPTER_TENSOR = re.compile(
    r"(?:^|\.)(?:lora_(?:A|B|E|embedding_A|embedding_B|magnitude_vector)|vera_lambda_[bd]|ia3_l)"
    r"(?:\.|$)"
)
# Names of Mistral's own code, which no model of transformers has.
_MISTRAL_TENSOR = re.compile(
    r"layers\.\d+\.(?:attention\.w[qkvo]|feed_forward\.w[123])\.lora_[AB]\."
)
_KOHYA_TENSOR = re.compile(
    r"^lora_(?:unet|te\d?)_|(?:^|[._])lora(?:_linear_layer)?[._](?:down|up)\.weight$"
)


def refuse_kohya(tensors: Mapping[str, TensorInfo], reference: str) -> None:
    """Raises UnsupportedFormat where an adapter's keys are kohya's or of old diffusers."""
    if (found := _kohya(tensors, _PEFT)) is not None:
        raise refusal(reference, found)


def refuse_mlx(names: Collection[str], reference: str) -> None:
    """Raises UnsupportedFormat where the files of a folder are those of an mlx-lm adapter."""
    if "adapters.safetensors" in names:
        raise refusal(
            reference, Refused("an mlx-lm adapter", "adapters.safetensors", _FUSE, _WHOLE)
        )


def _kohya(tensors: Mapping[str, TensorInfo], needs: str) -> Refused | None:
    name = _first(tensors, lambda name: _KOHYA_TENSOR.search(name) is not None)
    if name is None:
        return None
    return Refused("a kohya or diffusers LoRA", f"tensor {name}", _MERGE_LORA, needs)


def _adapter(tensors: Mapping[str, TensorInfo]) -> Refused | None:
    if (mlx := _first(tensors, lambda name: name.endswith((".lora_a", ".lora_b")))) is not None:
        return Refused("an mlx-lm adapter", f"tensor {mlx}", _FUSE, _WHOLE)
    mistral = _first(tensors, lambda name: _MISTRAL_TENSOR.match(name) is not None)
    if mistral is not None:
        return Refused("a mistral-finetune LoRA", f"tensor {mistral}", _SAVE_MERGED, _WHOLE)
    if (kohya := _kohya(tensors, _WHOLE)) is not None:
        return kohya
    factor = _first(tensors, lambda name: _ADAPTER_TENSOR.search(name) is not None)
    if factor is not None:
        return Refused("a PEFT adapter", f"tensor {factor}", _ADAPTER, _BESIDE)
    return None


def _first(names: Collection[str], test: Callable[[str], bool]) -> str | None:
    return next((name for name in names if test(name)), None)


# --- names of files -----------------------------------------------------------------------------

_NEVER = re.compile(
    r"(?:optimizer|scheduler|scaler)\.(?:pt|bin)$|optim_|extra_state_|rng_state|training_args\.bin$"
)
_ADAPTER_FILE = re.compile(r"adapter_model(?:-\d+-of-\d+)?\.(?:safetensors|bin)$")
# Megatron's own formats; its torch_dist is DCP with one file more, and is read.
_MEGATRON_FILE = re.compile(r"(?:common\.pt|model_optim_rng\.pt|distrib_optim\.pt)$")
_MEGATRON_COMMON = "common.pt"
_FRAMEWORKS = (
    (
        _MEGATRON_FILE,
        "a Megatron checkpoint",
        _MEGATRON,
        _PRECISIONS,
    ),
    (re.compile(r"model_world_size_\d+_rank_\d+\.pt$"), "verl FSDP shards", _TOGETHER, _PARTS),
    (re.compile(r"(?:\.metadata|.*\.distcp)$"), "a DCP checkpoint", _TOGETHER, _PARTS),
)
_ZERO_FILE = re.compile(
    r"(?:.*zero_pp_rank_(?P<rank>\d+)_)?(?:.*mp_rank_(?P<part>\d+)_)(?P<what>model|optim)_states\.pt$"
)
_ZERO_SCRIPT = "zero_to_fp32.py"
_SUFFIXES = {
    ".gguf": "GGUF",
    ".msgpack": "Flax",
    ".h5": "TensorFlow",
    ".onnx": "ONNX",
}


def is_never_opened(name: str) -> bool:
    """Whether a file holds the state of a trainer (optimizer, scheduler, RNG) and no weights."""
    return _NEVER.match(name) is not None


def is_adapter_file(name: str) -> bool:
    """Whether a file holds the factors of a PEFT adapter."""
    return _ADAPTER_FILE.match(name) is not None


def is_torch_dist(names: Collection[str]) -> bool:
    """Whether a folder with these files is DCP that Megatron wrote."""
    return ".metadata" in names and _MEGATRON_COMMON in names


def by_files(names: Collection[str]) -> Refused | None:
    """What the names of files show, for a folder without weights that can be read."""
    ordered = sorted(names)
    adapter = [name for name in ordered if is_adapter_file(name)]
    if adapter or "adapter_config.json" in names:
        evidence = [name for name in ordered if name == "adapter_config.json"] + adapter
        return Refused("a PEFT adapter", ", ".join(evidence[:2]), _ADAPTER, _BESIDE)
    if (zero := _deepspeed(ordered)) is not None:
        return zero
    for pattern, called, hint, needs in _FRAMEWORKS:
        found = [name for name in ordered if pattern.match(name)]
        if found:
            return Refused(called, first_names(found, 1), hint, needs)
    for name in ordered:
        suffix = PurePosixPath(name).suffix
        if suffix in _SUFFIXES:
            return Refused(_SUFFIXES[suffix], name, _CONVERT)
    return None


def _deepspeed(names: Collection[str]) -> Refused | None:
    """Shards of DeepSpeed ZeRO, with the stage and the number of ranks that their names tell, and
    the command that converts this very folder."""
    shards = {name: match for name in names if (match := _ZERO_FILE.match(name)) is not None}
    if not shards:
        if _ZERO_SCRIPT not in names:
            return None
        return Refused("DeepSpeed ZeRO shards", _ZERO_SCRIPT, _ZERO_HERE)
    ranks = {match["rank"] for match in shards.values()} - {None}
    parts = {match["part"] for match in shards.values()}
    is_third = any(shard["rank"] and shard["what"] == "model" for shard in shards.values())
    called = "DeepSpeed ZeRO shards"
    if ranks:
        stage = "ZeRO-3" if is_third else "ZeRO-1 or ZeRO-2"
        called = f"DeepSpeed {stage} shards of {len(ranks)} rank{'s' * (len(ranks) > 1)}"
    hint = _ZERO if len(parts) == 1 else _ZERO_PARALLEL
    return Refused(called, first_names(sorted(shards), 1), hint)
