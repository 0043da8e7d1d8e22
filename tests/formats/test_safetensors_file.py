"""Is a safetensors file read as the safetensors library reads it, and is a broken one refused?"""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from geoscope.errors import CheckpointError, GeoscopeError
from geoscope.formats.safetensors_file import SafetensorsFile
from geoscope.sources.open import open_checkpoint
from tests.helpers.files import assert_equal_bits, llama, raw_safetensors, write_model

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
    torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
    torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip
SHAPES = [(), (0,), (3, 0), (1,), (7,), (3, 5), (2, 3, 5)]


def opened(path: Path) -> SafetensorsFile:
    return SafetensorsFile.open(path, path.name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape_reads_as_the_library_reads_it(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for index, shape in enumerate(SHAPES):
        raw = torch.randint(0, 2, (*shape, 8), dtype=torch.uint8, generator=generator)
        tensors[f"t{index}"] = (
            raw.view(torch.float64)
            .view(torch.uint8)[..., : dtype.itemsize]
            .contiguous()
            .view(dtype)[..., 0]
            .clone()
        )
    path = tmp_path / "all.safetensors"
    save_file(tensors, path)
    ours = opened(path)
    with safe_open(path, framework="pt") as theirs:
        assert set(ours.header.tensors) == set(theirs.keys())
        for name in theirs.keys():
            assert_equal_bits(ours.read(name, None), theirs.get_tensor(name))
            info = ours.header.tensors[name]
            assert info.shape == tuple(theirs.get_slice(name).get_shape())
            assert info.dtype == str(dtype).removeprefix("torch.")


def test_a_buffer_is_read_into_and_may_be_used_again(tmp_path: Path) -> None:
    tensors = llama()
    checkpoint = open_checkpoint(str(write_model(tmp_path / "ein Modell ä", tensors)))
    largest = max(info.nbytes for info in checkpoint.tensors.values())
    buffer = torch.full((largest + 5,), 255, dtype=torch.uint8)
    for name, expected in tensors.items():
        tensor = checkpoint.read(name, buffer=buffer)
        assert tensor.data_ptr() == buffer.data_ptr()
        assert_equal_bits(tensor, expected)
    assert bool((buffer[largest:] == 255).all())


def test_without_a_buffer_the_tensor_owns_its_memory(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_model(tmp_path, llama())))
    first = checkpoint.read("lm_head.weight")
    kept = first.clone()
    checkpoint.read("model.embed_tokens.weight")
    assert torch.equal(first, kept)


@pytest.mark.parametrize(
    "buffer",
    [
        torch.empty(3, dtype=torch.uint8),
        torch.empty(10_000, dtype=torch.int8),
        torch.empty(100, 100, dtype=torch.uint8),
        torch.empty(20_000, dtype=torch.uint8)[::2],
    ],
)
def test_an_unfit_buffer_is_refused(tmp_path: Path, buffer: torch.Tensor) -> None:
    checkpoint = open_checkpoint(str(write_model(tmp_path, llama())))
    with pytest.raises(ValueError, match="needs"):
        checkpoint.read("lm_head.weight", buffer=buffer)


def one(
    dtype: object = "F32", shape: object = (2, 2), offsets: object = (0, 16)
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


BROKEN = {
    "empty file": (b"", "the file has 0 bytes"),
    "seven bytes": (b"\0" * 7, "the file has 7 bytes"),
    "2**63 bytes of header": (raw_safetensors({}, length=2**63), "9223372036854775808 bytes"),
    "over 100 MB of header": (raw_safetensors({}, length=100_000_001), "100000000 are allowed"),
    "header beyond the file": (raw_safetensors({}, length=3000), "the file has 10"),
    "no JSON": (raw_safetensors(b"{'a': 1}"), "no valid JSON"),
    "no UTF-8": (raw_safetensors(b'{"\xff": 1}'), "no valid JSON"),
    "nested JSON": (raw_safetensors(b"[" * 100_000), "no valid JSON"),
    "a list": (raw_safetensors([]), "not a table"),
    "a name twice": (raw_safetensors(b'{"a": 1, "a": 2}'), "'a' occurs twice"),
    "a tensor of text": (raw_safetensors({"a": "F32"}), "a lacks dtype"),
    "no offsets": (raw_safetensors({"a": {"dtype": "F32", "shape": [2]}}), "a lacks dtype"),
    "three offsets": (raw_safetensors({"a": one(offsets=(0, 8, 16))}), "a lacks dtype"),
    "unknown dtype": (raw_safetensors({"a": one("F31")}, b"\0" * 16), "unknown dtype 'F31'"),
    "dtype of a list": (raw_safetensors({"a": one(["F32"])}, b"\0" * 16), "unknown dtype"),
    "negative shape": (raw_safetensors({"a": one(shape=(-2, -2))}, b"\0" * 16), "impossible shape"),
    "fractional shape": (
        raw_safetensors({"a": one(shape=(2.0, 2))}, b"\0" * 16),
        "impossible shape",
    ),
    "shape of truth": (
        raw_safetensors({"a": one(shape=(True, 4))}, b"\0" * 16),
        "impossible shape",
    ),
    "shape of text": (raw_safetensors({"a": one(shape="22")}, b"\0" * 16), "impossible shape"),
    "negative offset": (
        raw_safetensors({"a": one(offsets=(-16, 0))}, b"\0" * 16),
        "impossible off",
    ),
    "offsets backwards": (
        raw_safetensors({"a": one(offsets=(16, 0))}, b"\0" * 16),
        "impossible off",
    ),
    "too few bytes": (raw_safetensors({"a": one(offsets=(0, 8))}, b"\0" * 8), "does not fill 8"),
    "huge shape": (raw_safetensors({"a": one(shape=(2**40, 2**40))}, b"\0" * 16), "does not fill"),
    "overlap": (
        raw_safetensors({"a": one(), "b": one(offsets=(8, 24))}, b"\0" * 24),
        "b at byte 8 overlaps",
    ),
    "same bytes twice": (raw_safetensors({"a": one(), "b": one()}, b"\0" * 16), "overlaps"),
    "hole": (
        raw_safetensors({"a": one(), "b": one(offsets=(20, 36))}, b"\0" * 36),
        "b at byte 20 leaves a hole",
    ),
    "hole at the start": (
        raw_safetensors({"a": one(offsets=(4, 20))}, b"\0" * 20),
        "leaves a hole",
    ),
    "truncated": (raw_safetensors({"a": one()}, b"\0" * 15), "truncated"),
    "bytes left over": (raw_safetensors({"a": one()}, b"\0" * 17), "belong to no tensor"),
    "metadata of numbers": (raw_safetensors({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata of text": (raw_safetensors({"__metadata__": "pt"}), "__metadata__"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    content, reason = BROKEN[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(tmp_path))
    message = str(caught.value)
    assert reason in message
    assert "model.safetensors: header is damaged" in message
    assert "\n" not in message
    with pytest.raises(SafetensorError), safe_open(path, framework="pt"):
        pass


def test_a_git_lfs_pointer_is_called_one(tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (tmp_path / "model.safetensors").write_bytes(pointer)
    with pytest.raises(CheckpointError, match=r"Git LFS pointer.*git lfs pull"):
        open_checkpoint(str(tmp_path))


def test_any_change_to_a_header_is_read_alike_or_refused(tmp_path: Path) -> None:
    """600 single-byte changes: never another exception, never more lenient than the library."""
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}, path)
    good = path.read_bytes()
    end = 8 + int.from_bytes(good[:8], "little")
    chance = random.Random(7)
    accepted = 0
    for _ in range(600):
        changed = bytearray(good)
        changed[chance.randrange(end)] = chance.choice(b'0123456789{}[],:" F\x00\xff\\ab-e.')
        path.write_bytes(changed)
        try:
            ours = {name: (i.shape, i.dtype) for name, i in opened(path).header.tensors.items()}
        except GeoscopeError:
            continue
        accepted += 1
        with safe_open(path, framework="pt") as theirs:
            names = list(theirs.keys())
            assert set(names) == set(ours)
            for name in names:
                expected = theirs.get_tensor(name)
                assert ours[name] == (tuple(expected.shape), str(expected.dtype)[6:])
    assert accepted > 20


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(write_model(tmp_path, llama())))
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match="ends inside"):
        for name in checkpoint.tensors:
            checkpoint.read(name)


PEAK = """
import sys, torch
from pathlib import Path
from geoscope.sources.open import open_checkpoint

def peak():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in l)
    return int(line.split()[1]) / 1024

sum(torch.ones(10))
checkpoints = [open_checkpoint(path) for path in sys.argv[1:]]
buffer = torch.zeros(8 << 20, dtype=torch.uint8)
before = peak()
for checkpoint in checkpoints:
    for name in checkpoint.tensors:
        checkpoint.read(name, buffer=buffer)
    print(round(peak() - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_reading_every_tensor_costs_one_buffer_of_memory(tmp_path: Path) -> None:
    """192 MB in 24 tensors: no more than a few MB from safetensors, 64 MB mapped from a pickle."""
    tensors = {f"layers.{i}.w": torch.ones(2048, 2048, dtype=torch.bfloat16) for i in range(24)}
    save_file(tensors, tmp_path / "big.safetensors")
    torch.save(tensors, tmp_path / "big.bin")
    files = [str(tmp_path / "big.safetensors"), str(tmp_path / "big.bin")]
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *files],
        capture_output=True, text=True, check=True, timeout=120,
        env={"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    safetensors, pickle = (int(line) for line in done.stdout.split())
    assert safetensors < 8
    assert pickle < 100
