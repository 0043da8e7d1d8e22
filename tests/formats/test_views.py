"""Are the entries of a part of a stored tensor the right ones, in order, and no others read?"""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from geoscope.formats import safetensors_file
from geoscope.formats.views import Blocks, View, gather
from geoscope.models.checkpoint import Checkpoint
from geoscope.models.split import split
from geoscope.sources.open import open_checkpoint

MATRICES, ROWS, COLUMNS = 3, 12, 10
STACK = torch.arange(MATRICES * ROWS * COLUMNS)

BLOCKS = {
    "one row": Blocks(4, 1),
    "rows side by side": Blocks(2, 5),
    "all": Blocks(0, 10),
    "every second": Blocks(1, 1, 2, 5),
    "pairs, four apart": Blocks(2, 2, 4, 2),
}


def chosen(blocks: Blocks) -> list[int]:
    """The rows (or columns) one by one, without arithmetic on entries."""
    return [
        blocks.start + number * blocks.stride + inside
        for number in range(blocks.repeats)
        for inside in range(blocks.count)
    ]


@pytest.mark.parametrize("itemsize", [1, 1 << 20], ids=["short runs", "long runs"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
def test_a_part_is_what_indexing_gives(blocks: Blocks, axis: int, itemsize: int) -> None:
    matrix = STACK.reshape(MATRICES, ROWS, COLUMNS)[1]
    expected = matrix[chosen(blocks)] if axis == 0 else matrix[:, chosen(blocks)]
    view = View("x", ROWS, COLUMNS, blocks, axis, matrix=1)
    assert view.shape == tuple(expected.shape)
    flat, count = expected.reshape(-1), expected.numel()
    for begin, end in itertools.combinations(sorted({0, 1, 3, count // 2, count - 1, count}), 2):
        found = gather(view, begin, end, lambda a, b: STACK[a:b], itemsize=itemsize)
        assert torch.equal(found, flat[begin:end]), (begin, end)


def test_runs_are_as_long_as_they_can_be() -> None:
    """Three whole rows of a row-major matrix are one read; a column is one for each row."""
    rows = View("x", ROWS, COLUMNS, Blocks(2, 3), matrix=2)
    start = (2 * ROWS + 2) * COLUMNS
    assert list(rows.runs(0, 30)) == [(start, start + 30)]
    column = View("x", ROWS, COLUMNS, Blocks(4, 1), axis=1)
    assert list(column.runs(0, 3)) == [(4, 5), (14, 15), (24, 25)]


# --- files ----------------------------------------------------------------------------------------

H, INNER, EXPERTS = 64, 48, 5


def stacked_model(folder: Path, *, turned: bool = False, config: str | None = None) -> Checkpoint:
    """A layer of experts in one file, fp32; every entry is its own number."""
    wide = (EXPERTS, H, 2 * INNER) if turned else (EXPERTS, 2 * INNER, H)
    down = (EXPERTS, INNER, H) if turned else (EXPERTS, H, INNER)
    folder.mkdir(parents=True, exist_ok=True)
    block = "model.layers.0.mlp.experts"
    tensors = {
        f"{block}.{leaf}": torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
        for leaf, shape in (("gate_up_proj", wide), ("down_proj", down))
    }
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(f'{{"model_type": "{config}"}}')
    return open_checkpoint(str(folder))


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The length of every read from a safetensors file."""
    found: list[int] = []
    fill = safetensors_file._fill

    def counted(target: memoryview, place: tuple[Path, int], label: str) -> None:
        found.append(len(target))
        fill(target, place, label)

    monkeypatch.setattr(safetensors_file, "_fill", counted)
    return found


def test_one_expert_is_read_without_the_stack(tmp_path: Path, bytes_read: list[int]) -> None:
    model = split(stacked_model(tmp_path))
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    assert model.tensors[name].shape == (INNER, H)
    expected = torch.arange(EXPERTS * 2 * INNER * H, dtype=torch.float32).reshape(-1, H)
    begin = (3 * 2 + 1) * INNER
    assert torch.equal(model.read(name), expected[begin : begin + INNER])
    assert bytes_read == [model.tensors[name].nbytes] == [4 * INNER * H]


def test_columns_of_one_expert_take_no_other_expert(tmp_path: Path, bytes_read: list[int]) -> None:
    model = split(stacked_model(tmp_path, turned=True))
    name = "model.layers.0.mlp.experts.2.gate_proj.weight"
    assert model.tensors[name].shape == (INNER, H) and model.tensors[name].transposed
    whole = torch.arange(EXPERTS * H * 2 * INNER, dtype=torch.float32)
    assert torch.equal(model.read(name), whole.reshape(EXPERTS, H, -1)[2, :, :INNER].T)
    assert sum(bytes_read) == 4 * 2 * INNER * H  # the rows of this expert, gate and up


def test_long_runs_of_columns_are_read_alone(tmp_path: Path, bytes_read: list[int]) -> None:
    """From 4 KiB on a read for each row is cheaper than what lies between."""
    name, width = "h.0.attn.c_attn.weight", 1024
    whole = torch.arange(8 * 3 * width, dtype=torch.float32).reshape(8, 3 * width)
    save_file({name: whole}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(f'{{"model_type": "gpt2", "n_embd": {width}}}')
    info = open_checkpoint(str(tmp_path)).tensors[name]
    assert info.transposed
    model = split(open_checkpoint(str(tmp_path)))
    found = model.read(name.replace("c_attn", "k_proj"))
    assert torch.equal(found, whole[:, width : 2 * width].T)
    assert bytes_read == [4 * width] * 8


@pytest.mark.parametrize("turned", [False, True])
def test_a_buffer_and_parts_give_what_reading_gives(tmp_path: Path, turned: bool) -> None:
    model = split(stacked_model(tmp_path, turned=turned, config="gpt_oss"))
    for name, info in model.tensors.items():
        whole = model.read(name)
        buffer = torch.empty(info.memory_bytes + 7, dtype=torch.uint8)
        inside = model.read(name, buffer=buffer)
        assert torch.equal(inside, whole)
        assert inside.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        ordered = (whole.T if info.transposed else whole).reshape(-1)
        for begin, end in ((0, whole.numel()), (1, 2), (INNER - 1, 3 * INNER + 5)):
            assert torch.equal(model.read_part(name, begin, end), ordered[begin:end])


def test_alternating_columns_belong_to_gpt_oss_alone(tmp_path: Path) -> None:
    gate = "model.layers.0.mlp.experts.0.gate_proj.weight"
    rows = torch.arange(H * 2 * INNER, dtype=torch.float32).reshape(H, 2 * INNER)
    oss = split(stacked_model(tmp_path / "oss", turned=True, config="gpt_oss"))
    assert torch.equal(oss.read(gate), rows[:, ::2].T)
    other = split(stacked_model(tmp_path / "llama4", turned=True, config="llama4_text"))
    assert torch.equal(other.read(gate), rows[:, :INNER].T)


def test_a_split_checkpoint_leaves_the_stored_one_as_it_is(tmp_path: Path) -> None:
    stored = stacked_model(tmp_path)
    parts = split(stored)
    assert (len(stored.tensors), len(parts.tensors)) == (2, 3 * EXPERTS)
    assert stored.stored == parts.stored == 2
    sizes = [sum(math.prod(one.shape) for one in x.tensors.values()) for x in (stored, parts)]
    assert sizes[0] == sizes[1]
    assert split(parts).tensors == parts.tensors
