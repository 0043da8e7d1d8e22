"""Does the safetensors library read back what was written, whatever the dtype, bit for bit?"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from geoscope.errors import CheckpointError
from geoscope.formats import safetensors_writer
from geoscope.formats.safetensors_file import SafetensorsFile
from geoscope.formats.safetensors_writer import (
    FilePlan,
    TensorPlan,
    replacing,
    write_tensors,
)
from tests.helpers.files import assert_equal_bits


def plan_of(tensors: dict[str, Tensor], **metadata: str) -> FilePlan:
    return FilePlan({name: TensorPlan.of(one) for name, one in tensors.items()}, metadata)


def write(path: Path, tensors: dict[str, Tensor], **metadata: str) -> FilePlan:
    plan = plan_of(tensors, **metadata)
    with write_tensors(path, plan) as writer:
        for name in plan.order:
            writer.write(name, tensors[name])
    return plan


def of_every_dtype() -> dict[str, Tensor]:
    """One tensor of each dtype, with random bits; odd sizes, so that alignment matters."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for spelled in safetensors_writer._CODES:  # pyright: ignore[reportPrivateUsage]
        dtype = getattr(torch, spelled)
        size = torch.empty((), dtype=dtype).element_size()
        bits = torch.randint(0, 2 if spelled == "bool" else 256, (15 * size,), generator=generator)
        found[f"a.{spelled}"] = bits.to(torch.uint8).view(dtype).reshape(3, 5)
    return {**found, "empty": torch.empty(0, 4), "scalar": torch.tensor(2.5)}


def test_the_library_reads_every_dtype_back(tmp_path: Path) -> None:
    tensors = of_every_dtype()
    plan = write(tmp_path / "x.safetensors", tensors, layout="mirror")
    assert (tmp_path / "x.safetensors").stat().st_size == plan.nbytes
    back = load_file(tmp_path / "x.safetensors")
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert_equal_bits(back[name], tensor)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "layout": "mirror"}


def test_every_tensor_is_aligned_to_its_entries(tmp_path: Path) -> None:
    """Typed views of a file need it; the order that does so is the library's own."""
    tensors = of_every_dtype()
    write(tmp_path / "ours", tensors)
    parsed = SafetensorsFile.open(tmp_path / "ours", "ours").parsed
    for entry in parsed.entries.values():
        size = torch.empty((), dtype=getattr(torch, entry.dtype)).element_size()
        assert (parsed.data_start + entry.begin) % size == 0


def test_the_data_lies_as_the_library_lays_it(tmp_path: Path) -> None:
    names = ("b", "a", "d", "c")
    dtypes = (torch.float32, torch.bfloat16, torch.float32, torch.int64)
    tensors = {
        name: torch.full((3,), i, dtype=dtype)
        for i, (name, dtype) in enumerate(zip(names, dtypes, strict=True))
    }
    write(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    ours, theirs = (
        SafetensorsFile.open(tmp_path / name, name).parsed.entries for name in ("ours", "theirs")
    )
    assert ours == theirs


def test_tensors_are_copied_byte_for_byte_in_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_writer, "_CHUNK", 7)
    tensors = of_every_dtype()
    source = tmp_path / "in.safetensors"
    write(source, tensors)
    container = SafetensorsFile.open(source, "in")
    plan = plan_of(tensors)
    with write_tensors(tmp_path / "out.safetensors", plan) as writer:
        for name in plan.order:
            writer.copy(name, container)
    assert (tmp_path / "out.safetensors").read_bytes() == source.read_bytes()


def test_a_strided_tensor_is_written_as_it_reads(tmp_path: Path) -> None:
    tensor = torch.arange(12.0).reshape(3, 4).T
    write(tmp_path / "x.safetensors", {"turned": tensor})
    assert torch.equal(load_file(tmp_path / "x.safetensors")["turned"], tensor)


def test_equal_input_gives_equal_bytes_in_any_order(tmp_path: Path) -> None:
    tensors = of_every_dtype()
    write(tmp_path / "one", tensors)
    write(tmp_path / "two", dict(reversed(tensors.items())))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(blacklist_categories=["Cs"]), min_size=1, max_size=12).filter(
            lambda name: name != "__metadata__"
        ),
        st.tuples(
            st.sampled_from(["float32", "bfloat16", "int8", "int64"]),
            st.lists(st.integers(0, 4), max_size=3).map(tuple),
        ),
        max_size=8,
    )
)
def test_any_names_and_shapes_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, planned: dict[str, tuple[str, tuple[int, ...]]]
) -> None:
    path = tmp_path_factory.mktemp("any") / "x.safetensors"
    tensors = {
        name: torch.ones(shape, dtype=getattr(torch, dtype))
        for name, (dtype, shape) in planned.items()
    }
    plan = write(path, tensors)
    assert path.stat().st_size == plan.nbytes
    back = load_file(path)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert_equal_bits(back[name], tensor)


def test_no_file_appears_before_it_is_complete(tmp_path: Path) -> None:
    tensors = {"a": torch.ones(3), "b": torch.ones(3)}
    plan = plan_of(tensors)
    with pytest.raises(RuntimeError), write_tensors(tmp_path / "x", plan) as writer:
        writer.write("a", tensors["a"])
        assert not (tmp_path / "x").exists()
        raise RuntimeError
    with pytest.raises(ValueError, match="1 tensors were not written"):
        with write_tensors(tmp_path / "x", plan) as writer:
            writer.write("a", tensors["a"])
    assert list(tmp_path.iterdir()) == []


def test_what_was_not_planned_is_not_written(tmp_path: Path) -> None:
    plan = plan_of({"a": torch.ones(3), "b": torch.ones(3)})
    for name, tensor, words in (
        ("b", torch.ones(3), "b was given, a is next"),
        ("a", torch.ones(4), "planned was"),
        ("a", torch.ones(3).half(), "planned was"),
    ):
        with pytest.raises(ValueError, match=words), write_tensors(tmp_path / "x", plan) as writer:
            writer.write(name, tensor)


def test_an_input_that_shrinks_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "in", {"a": torch.ones(64)})
    container = SafetensorsFile.open(tmp_path / "in", "in")
    os.truncate(tmp_path / "in", container.parsed.data_start + 8)
    plan = plan_of({"a": torch.ones(64)})
    with pytest.raises(CheckpointError, match="ends inside a; it was changed"):
        with write_tensors(tmp_path / "out", plan) as writer:
            writer.copy("a", container)


def test_a_folder_that_takes_no_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be written") as caught:
        with replacing(tmp_path / "absent" / "x"):
            pass
    assert "\n" not in str(caught.value)


def test_a_dtype_without_a_code_is_refused() -> None:
    with pytest.raises(CheckpointError, match="complex128 has no place"):
        TensorPlan.of(torch.zeros(1, dtype=torch.complex128))


def test_the_header_is_padded_to_eight(tmp_path: Path) -> None:
    plan = write(tmp_path / "x", {"name": torch.ones(1)})
    (length,) = struct.unpack("<Q", plan.header[:8])
    assert len(plan.header) % 8 == 0
    assert json.loads(plan.header[8 : 8 + length])["name"]["dtype"] == "F32"
