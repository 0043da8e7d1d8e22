"""Inputs that were valid until a seeded hand changed them, and what every command owes to them.

A `Door` is a place where foreign bytes come in: a folder of valid inputs, the file that is changed
and the commands that read it. `trial` changes the file, runs one of the commands, and says what it
did that it must not do: a traceback, a hang, more than one line, raw letters, a changed input.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import random
import re
import signal
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from geoscope.foreign import printable
from tests.helpers.examples import example
from tests.helpers.matrices import gaussian, save_model, updated
from tests.helpers.running import Done, run, weights

__all__ = [
    "DOORS", "LONG", "ODD", "PACKED", "SECONDS", "Door", "TooLong", "changed_bytes",
    "changed_json", "faults", "limit", "trial",
]  # fmt: skip

SECONDS = 30  # of a wall clock beside other work
_WORDS = ("FULL", "a", "model", "q_proj", "7", "-1", "r", "weight")

# Values as JSON spells them, each with what it may break: a type, a size, a depth, a terminal.
_SHORT = (
    *("null", "true", "false", "0", "-1", "2.5", "1e308", "1e999", "NaN", "-Infinity"),
    *('""', '"x"', r'"\u001b[31mred"', r'"a\nb"', r'"\u0000"', r'"\ud800"', r'"\u009b2J"'),
    *('"=1+1"', '"../../etc/passwd"', '"~nosuchuser/x"', '"(a+)+b"', '"("', '"a{99999999999}"'),
    *('"NaN"', '"1"', '"/dev/zero"', '"."', "[]", "{}", "[[]]", '["llama"]', "[1, 2]", "[null]"),
    *('{"a": 1}', '{"a": {"b": [null]}}'),
)
LONG = {
    "10^30": "1" + "0" * 30,
    "400 nines": "9" * 400,
    "5000 ones": "1" * 5000,
    "100000 brackets": "[" * 100_000 + "]" * 100_000,
    "900 braces": '{"a":' * 900 + "1" + "}" * 900,
    "300 letters": json.dumps("x" * 300),
    "3000 folders": json.dumps("y/" * 3000),
}
ODD = (*_SHORT, *LONG.values())


def changed_json(value: Any, rng: random.Random) -> bytes:
    """A document with one to three changes, or with changed bytes."""
    text = json.dumps(value)
    if rng.random() < 0.15:
        return changed_bytes(text.encode(), rng)
    document = json.loads(text)
    marks: dict[str, str] = {}
    for _ in range(rng.randint(1, 3)):
        mark = f"@{len(marks)}@"
        marks[json.dumps(mark)] = rng.choice(ODD)
        document = _changed(document, mark, rng)
    text = json.dumps(document)
    for mark, odd in marks.items():
        text = text.replace(mark, odd)
    return text.encode()


def _changed(value: Any, mark: str, rng: random.Random) -> Any:
    """One place of a document, at any depth: another value, gone, under another name, or twice."""
    keys: list[Any] = list(value) if isinstance(value, dict) else []
    keys += range(len(value)) if isinstance(value, list) else []
    if not keys or rng.random() < 0.1:
        return mark
    key = rng.choice(keys)
    if isinstance(value[key], (dict, list)) and rng.random() < 0.75:
        value[key] = _changed(value[key], mark, rng)
        return value
    what = rng.random()
    if what < 0.6:
        value[key] = mark
    elif what < 0.75:
        del value[key]
    elif isinstance(value, dict):
        value[rng.choice(_WORDS) if what < 0.9 else "\x1b[1m" + str(key)] = value.pop(key)
    else:
        value.append(value[key])
    return value


def changed_bytes(raw: bytes, rng: random.Random) -> bytes:
    """Bits flipped, a part cut out, doubled or replaced, the end cut off."""
    data = bytearray(raw)
    begin = rng.randrange(len(data) + 1)
    end = min(len(data), begin + rng.choice((1, 4, 40)))
    match rng.randrange(5):
        case 0:
            for _ in range(rng.randint(1, 8)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 1:
            del data[begin:end]
        case 2:
            data[begin:begin] = data[begin:end]
        case 3:
            data[begin:end] = rng.randbytes(end - begin)
        case _:
            del data[begin:]
    return bytes(data)


@dataclass(frozen=True)
class Door:
    """make: valid inputs under a folder → the file that is changed. change: its new content.
    commands: words of each, in which {} is the folder."""

    make: Callable[[Path], Path]
    change: Callable[[bytes, random.Random], bytes]
    commands: Sequence[str]


def trial(door: Door, root: Path, target: Path, seed: int) -> str | None:
    """What a command did with a changed file that it must not do; None where all is well.

    root: filled by `door.make`, which gave `target`; it is left as it was.
    """
    rng, valid = random.Random(seed), target.read_bytes()
    target.write_bytes(door.change(valid, rng))
    out = root.parent / f"{root.name}-out"
    words = [word.format(root, out=out) for word in rng.choice(door.commands).split()]
    before = _contents(root)
    try:
        with limit():
            done = run(*words)
        said = [*faults(done), *(["an input was changed"] if _contents(root) != before else [])]
    except TooLong:
        said = [f"no end after {SECONDS} s"]
    finally:
        content = target.read_bytes()
        target.write_bytes(valid)
        for path in sorted(out.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    return f"seed {seed}: {' '.join(words)}: {said}: {content[:2000]!r}" if said else None


def faults(done: Done) -> Iterator[str]:
    """What no command may do."""
    said = done.err.splitlines()
    if done.code not in (0, 1, 2, 3):
        yield f"exit code {done.code}"
    if "Traceback" in done.err or "fault of geoscope" in done.err:
        yield done.err
    if done.code and (not said or not said[-1].startswith(("geoscope: ", "Error: "))):
        if not done.out:
            yield f"code {done.code} and no word of why: {done.err!r}"
    if printable(done.err, lines=True) != done.err or printable(done.out, lines=True) != done.out:
        yield f"raw letters: {done.err!r}"


def _contents(root: Path) -> dict[str, str]:
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class TooLong(BaseException):
    """The limit of time is over."""


@contextmanager
def limit() -> Iterator[None]:
    """Raises TooLong after SECONDS."""

    def over(_signum: int, _frame: FrameType | None) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --- valid inputs -------------------------------------------------------------------------------

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 24,
    "intermediate_size": 40, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50,
    "num_hidden_layers": 1, "tie_word_embeddings": False, "torch_dtype": "float32",
    "text_config": {"model_type": "llama"}, "quantization_config": {},
}  # fmt: skip
ADAPTER = {
    "peft_type": "LORA", "base_model_name_or_path": "base", "revision": None, "r": 2,
    "lora_alpha": 4, "lora_dropout": 0.0, "bias": "none", "use_rslora": False, "use_dora": False,
    "target_modules": ["q_proj", "down_proj"], "exclude_modules": None, "rank_pattern": {},
    "alpha_pattern": {r"layers\.0\.self_attn\.q_proj": 4}, "layers_to_transform": None,
    "modules_to_save": None, "init_lora_weights": True, "fan_in_fan_out": False,
    "target_parameters": None, "trainable_token_indices": None, "peft_version": "0.20.0",
}  # fmt: skip
_SHAPES = {"self_attn.q_proj": (24, 24), "mlp.down_proj": (24, 40)}


def _models(root: Path, *, shards: int = 1) -> Path:
    save_model(root / "base", weights(layers=1), config=CONFIG)
    return save_model(root / "tuned", weights(100, layers=1), config=CONFIG, shards=shards)


def _adapter(root: Path) -> Path:
    save_model(root / "base", weights(layers=1), config=CONFIG)
    folder = root / "adapter"
    folder.mkdir()
    factors = {}
    for seed, (name, (m, n)) in enumerate(_SHAPES.items()):
        path = f"base_model.model.model.layers.0.{name}"
        factors[f"{path}.lora_A.weight"] = gaussian(2, n, seed=seed).float()
        factors[f"{path}.lora_B.weight"] = gaussian(m, 2, seed=seed + 9).float()
    save_file(factors, folder / "adapter_model.safetensors")
    config = {**ADAPTER, "base_model_name_or_path": str(root / "base")}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _written_adapter(root: Path) -> Path:
    save_model(root / "base", weights(layers=1), config=CONFIG)
    done = run("init-adapter", root / "base", "-r", "2", "-o", root / "adapter", "-q")
    assert done.code == 0, done.err
    return root / "adapter" / "geoscope.json"


def _steps(root: Path) -> Path:
    base = weights(layers=1)
    save_model(root / "base", base, config=CONFIG)
    for step in (10, 20, 30):
        tuned = {
            name: updated(tensor.double(), gaussian(*tensor.shape, seed=step), 1e-3 * step).float()
            if tensor.dim() == 2
            else tensor
            for name, tensor in base.items()
        }
        save_model(root / "run" / f"checkpoint-{step}", tuned, config=CONFIG)
    return root / "run"


def _log(root: Path) -> Path:
    path = _steps(root) / "checkpoint-30" / "trainer_state.json"
    history = [{"step": step, "reward": step / 30, "loss": 1 / step} for step in (10, 20, 30)]
    path.write_text(json.dumps({"log_history": history, "global_step": 30}))
    return path


def _table(root: Path) -> Path:
    _steps(root)
    (root / "log.csv").write_text("step,reward,loss\n10,.1,.5\n20,.2,.4\n30,.4,.3\n")
    return root / "log.csv"


def _report(kind: str) -> Callable[[Path], Path]:
    def make(root: Path) -> Path:
        path = root / "report.json"
        path.write_text(example(kind=kind, layers=2).dumps())
        return path

    return make


def _pickle(root: Path) -> Path:
    tuned = _models(root)
    path = tuned / "pytorch_model.bin"
    torch.save(load_file(tuned / "model.safetensors"), path)
    (tuned / "model.safetensors").unlink()
    return path


# --- changes ------------------------------------------------------------------------------------


def _json(raw: bytes, rng: random.Random) -> bytes:
    return changed_json(json.loads(raw), rng)


def _header(raw: bytes, rng: random.Random) -> bytes:
    """The header of a safetensors file, or any of its bytes."""
    if rng.random() < 0.2:
        return changed_bytes(raw, rng)
    (length,) = struct.unpack("<Q", raw[:8])
    text = changed_json(json.loads(raw[8 : 8 + length]), rng)
    claimed = len(text) if rng.random() < 0.9 else rng.choice((0, 1 << 20, 1 << 40, (1 << 64) - 1))
    return struct.pack("<Q", claimed) + text + raw[8 + length :]


def _row(raw: bytes, rng: random.Random) -> bytes:
    """A cell of a CSV, or any of its bytes."""
    if rng.random() < 0.4:
        return changed_bytes(raw, rng)
    cells = re.split(rb"([,\n])", raw)
    odd = rng.choice((*ODD, "\x1b[31m", "\x00", "é", "1_000", "0x1", "\r", '"', "step")).strip('"')
    cells[2 * rng.randrange(len(cells) // 2)] = odd.encode("utf-8", "surrogatepass")
    return b"".join(cells)


def _objects(_: bytes, rng: random.Random) -> bytes:
    """A pickle of tables, tensors and whatever else torch packs."""
    import io

    stream = io.BytesIO()
    if rng.random() < 0.15:
        pickle.dump({"a": rng.random()}, stream)
    else:
        torch.save(_object(rng, 0), stream)
    raw = stream.getvalue()
    return changed_bytes(raw, rng) if rng.random() < 0.2 else raw


# What a pickle of weights may hold in place of a matrix.
PACKED: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "number": lambda: 3,
    "text": lambda: "text",
    "ones": lambda: torch.ones(24, 24),
    "parameter": lambda: torch.nn.Parameter(torch.ones(24, 24)),
    "expanded": lambda: torch.ones(24, 1).expand(24, 24),
    "meta": lambda: torch.ones(24, 24, device="meta"),
    "sparse": lambda: torch.ones(24, 24).to_sparse(),
    "empty": lambda: torch.zeros(0, 24),
    "complex": lambda: torch.ones(24, 24, dtype=torch.complex64),
    "denormal": lambda: torch.full((24, 24), 1e-42),
    "1e300": lambda: torch.full((24, 24), 1e300, dtype=torch.float64),
    "nan": lambda: torch.full((24, 24), torch.nan),
    "three axes": lambda: torch.ones(3, 24, 24),
    "bool": lambda: torch.ones(24, 24, dtype=torch.bool),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(24, 24), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "size": lambda: torch.Size([3]),
}


def _object(rng: random.Random, depth: int) -> Any:
    name = "model.layers.0.self_attn.q_proj.weight"
    if depth < 3 and (depth == 0 or rng.random() < 0.4):
        keys = [name, "model", "state_dict", "\x1b[1m.weight", 3, "lm_head.weight", "a" * 2000]
        table = {rng.choice(keys): _object(rng, depth + 1) for _ in range(rng.randint(0, 3))}
        if rng.random() < 0.15:
            table["model"] = table
        return table
    return rng.choice(list(PACKED.values()))()


_COMPARES = (
    "compare {}/base {}/tuned --no-resume",
    "inspect {}/base {}/tuned",
    "collapse {}/base {}/tuned --json --no-resume",
    "init-adapter {}/tuned -r 2 -o {out}/made",
)
_ADAPTERS = (
    "compare {}/base {}/adapter --no-resume",
    "capacity {}/adapter --no-resume",
    "inspect {}/base {}/adapter",
    "verify-adapter {}/adapter",
    "convert-adapter {}/adapter {}/adapter -o {out}/made",
)
_SHOWS = (
    "show {}/report.json",
    "show {}/report.json --explain --verbose",
    "show {}/report.json --json",
    "show {}/report.json -o {out}.csv -o {out}.md --force",
)
DOORS = {
    "config.json": Door(lambda root: _models(root) / "config.json", _json, _COMPARES),
    "header": Door(lambda root: _models(root) / "model.safetensors", _header, _COMPARES),
    "index": Door(
        lambda root: _models(root, shards=2) / "model.safetensors.index.json", _json, _COMPARES
    ),
    "pickle": Door(_pickle, _objects, _COMPARES),
    "adapter_config.json": Door(
        lambda root: _adapter(root) / "adapter_config.json", _json, _ADAPTERS
    ),
    "factors": Door(lambda root: _adapter(root) / "adapter_model.safetensors", _header, _ADAPTERS),
    "geoscope.json": Door(_written_adapter, _json, _ADAPTERS[1:]),
    "trainer_state.json": Door(
        _log, _json, ("trajectory {}/run --metrics {}/run/checkpoint-30/trainer_state.json",)
    ),
    "metrics.csv": Door(_table, _row, ("trajectory {}/run --metrics {}/log.csv",)),
    **{
        f"report of {kind}": Door(_report(kind), _json, _SHOWS)
        for kind in ("compare", "trajectory", "capacity", "init-adapter")
    },
}
