"""Writes folders of shards as trainers do: FSDP2 on gloo, one process a rank. Run as a program.

    python write_shards.py FOLDER        four ranks; see `_write` for what lies where

What the shards hold is said by `whole` and `lora`, without any reader.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard import sharded_tensor
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor.shard import Shard as LocalShard
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.multiprocessing.spawn import start_processes

WORLD = 4
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 12,
    "vocab_size": 33,
    "num_attention_heads": 2,
    "tie_word_embeddings": False,
}
# Rows on four ranks: 33 uneven, 3 with an empty last shard, 8 and 12 even.
SHAPES = {
    "model.embed_tokens.weight": (33, 8),
    "model.layers.0.self_attn.q_proj.weight": (8, 8),
    "model.layers.0.self_attn.o_proj.weight": (8, 8),
    "model.layers.0.mlp.up_proj.weight": (12, 8),
    "model.layers.0.mlp.down_proj.weight": (8, 12),
    "model.layers.0.mlp.router.weight": (3, 8),
    "model.layers.0.input_layernorm.weight": (8,),
    "model.norm.weight": (8,),
    "lm_head.weight": (33, 8),
}
Q = "model.layers.0.self_attn.q_proj"


def whole(step: int = 0) -> dict[str, Tensor]:
    """The weights of a step; bf16, but for the norms."""
    generator = torch.Generator().manual_seed(1)
    start = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    generator = torch.Generator().manual_seed(2 + step)
    made: dict[str, Tensor] = {}
    for name, weight in start.items():
        change = torch.randn(weight.shape, generator=generator)
        dtype = torch.float32 if "norm" in name else torch.bfloat16
        made[name] = (weight + 0.1 * step * change).to(dtype)
    return made


def stack() -> Tensor:
    """Experts on top of one another, five of (6, 7)."""
    return torch.randn(5, 6, 7, generator=torch.Generator().manual_seed(5))


def lora() -> dict[str, Tensor]:
    """The same as PEFT wraps it for q_proj, rank 2."""
    generator = torch.Generator().manual_seed(9)
    tensors: dict[str, Tensor] = {}
    for name, weight in whole().items():
        kept = name.replace(f"{Q}.", f"{Q}.base_layer.")
        tensors[f"base_model.model.{kept}"] = weight
    for side, shape in (("A", (2, 8)), ("B", (8, 2))):
        name = f"base_model.model.{Q}.lora_{side}.default.weight"
        tensors[name] = torch.randn(shape, generator=generator)
    return tensors


def module_of(tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module whose state dict has these names."""
    root = nn.Module()
    for name, tensor in tensors.items():
        at = root
        *path, leaf = name.split(".")
        for part in path:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        at.register_parameter(leaf, nn.Parameter(tensor.clone(), requires_grad=False))
    return root


class Verl:
    """Writes as verl's checkpoint manager does."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank

    def save(self, name: str, state: Mapping[str, Any], config: Mapping[str, Any] = CONFIG) -> None:
        actor = self.folder / name
        (actor / "huggingface").mkdir(parents=True, exist_ok=True)
        torch.save(dict(state), actor / f"model_world_size_{WORLD}_rank_{self.rank}.pt")
        if self.rank == 0:
            text = json.dumps({"FSDP_version": 2, "world_size": WORLD})
            (actor / "fsdp_config.json").write_text(text)
            (actor / "huggingface" / "config.json").write_text(json.dumps(config))
            (actor / "optim_world_size_4_rank_0.pt").touch()
            (actor / "extra_state_world_size_4_rank_0.pt").touch()


def sharded(tensors: Mapping[str, Tensor], mesh: DeviceMesh) -> dict[str, Any]:
    """The state dict of the model under FSDP2."""
    module = module_of(tensors)
    fully_shard(module, mesh=mesh)
    return module.state_dict()


def _write(rank: int, folder: Path) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", rank=rank, world_size=WORLD, init_method=f"file://{folder}/store"
    )
    line = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("fsdp",))
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ddp", "fsdp"))
    verl = Verl(folder, rank)
    for step in (0, 1, 2, 3):
        verl.save(f"run/global_step_{step}/actor", sharded(whole(step), line))
    verl.save("grid", sharded(whole(), grid))
    verl.save("lora", sharded(lora(), line))
    _write_tensors(verl, line, rank)
    _write_dcp(folder, line, grid)
    dist.barrier()
    dist.destroy_process_group()


def _write_tensors(verl: Verl, line: DeviceMesh, rank: int) -> None:
    """DTensors and plain tensors of single kinds."""
    up = whole()["model.layers.0.mlp.up_proj.weight"]
    name = "model.layers.0.mlp.up_proj.weight"
    verl.save(
        "columns",
        {
            name: distribute_tensor(up, line, [Shard(1)]),
            "model.layers.0.mlp.gate_proj.weight": distribute_tensor(up, line, [Replicate()]),
            "scale": distribute_tensor(torch.tensor(3.5), line, [Replicate()]),
            "model.layers.0.mlp.experts.down_proj": distribute_tensor(stack(), line, [Shard(0)]),
            "model.layers.0.mlp.experts.gate_up_proj": distribute_tensor(stack(), line, [Shard(2)]),
        },
    )
    parts = DTensor.from_local(up.float(), line, [Partial()], run_check=False)
    verl.save("partial", {name: parts})
    parallel = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    verl.save("parallel", {name: distribute_tensor(up, parallel, [Shard(0), Shard(1)])})
    ones = torch.ones(8, dtype=torch.float32)
    verl.save(
        "plain",
        {
            name: up.chunk(WORLD)[rank].clone(),
            "model.norm.weight": ones[:2].clone(),  # equal on all ranks, and yet parts
            "model.layers.0.input_layernorm.weight": ones,
            "model.rotary_emb.inv_freq": torch.arange(4.0),
        },
    )
    local = LocalShard(
        up[3 * rank : 3 * rank + 3].clone(),
        ShardMetadata([3 * rank, 0], [3, 8], f"rank:{rank}/cpu"),
    )
    old = sharded_tensor.init_from_local_shards([local], 12, 8)
    verl.save("old", {name: old})
    verl.save("plain_odd", {"some.weight": up[: rank + 1].clone()})


def _write_dcp(folder: Path, line: DeviceMesh, grid: DeviceMesh) -> None:
    model = sharded(whole(), line)
    moments = {f"state.{name}.exp_avg": value for name, value in model.items()}
    save({"model": model}, checkpoint_id=folder / "checkpoint-5" / "pytorch_model_fsdp_0")
    save({"app": {"model": model, "optim": moments}}, checkpoint_id=folder / "nested")
    save(model, checkpoint_id=folder / "flat")
    save({"model": sharded(whole(), grid)}, checkpoint_id=folder / "dcp_grid")
    save({"optim": moments}, checkpoint_id=folder / "optimizer_0")
    wide = whole()["model.layers.0.mlp.up_proj.weight"]
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    save(
        {
            "columns": distribute_tensor(wide, line, [Shard(1)]),
            "square": distribute_tensor(wide, square, [Shard(0), Shard(1)]),
            "turned": wide.T,
            "scalar": torch.tensor(3.5),
            "rows": wide[2:5],
            "stack": distribute_tensor(stack(), square, [Shard(2), Shard(0)]),
        },
        checkpoint_id=folder / "odd",
    )
    for step in (1, 2, 3):
        weights = folder / "nemo" / f"step_{step}" / "policy" / "weights"
        save({"model": sharded(whole(step), line)}, checkpoint_id=weights)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    # fork, so that torch is imported once
    start_processes(_write, (folder,), nprocs=WORLD, start_method="fork")


if __name__ == "__main__":
    main()
