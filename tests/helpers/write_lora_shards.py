"""Writes the shards of a LoRA run with transformers, PEFT and FSDP2, as verl does. A program.

python write_lora_shards.py FOLDER       two ranks
    actor/model_world_size_2_rank_*.pt, fsdp_config.json, lora_train_meta.json, huggingface/
    actor/lora_adapter/                  the adapter, saved by PEFT before sharding
    base/                                the model before it was wrapped, saved by transformers
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.spawn import start_processes
from transformers import Qwen2Config, Qwen2ForCausalLM

WORLD = 2


def _write(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", rank=rank, world_size=WORLD, init_method=f"file://{folder}/store"
    )
    torch.manual_seed(3)
    config = Qwen2Config(
        hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=31, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).bfloat16()
    actor = folder / "actor"
    if rank == 0:
        model.save_pretrained(folder / "base")
        config.save_pretrained(actor / "huggingface")
    lora = LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj"])
    layers = list(model.model.layers)
    wrapped = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    if rank == 0:
        wrapped.save_pretrained(str(actor / "lora_adapter"))
    dist.barrier()
    mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("fsdp",))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(wrapped, mesh=mesh)
    torch.save(wrapped.state_dict(), actor / f"model_world_size_{WORLD}_rank_{rank}.pt")
    if rank == 0:
        world = {"FSDP_version": 2, "world_size": WORLD}
        (actor / "fsdp_config.json").write_text(json.dumps(world))
        meta = {"r": 3, "lora_alpha": 6, "task_type": "CAUSAL_LM"}
        (actor / "lora_train_meta.json").write_text(json.dumps(meta))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    start_processes(_write, (folder,), nprocs=WORLD, start_method="fork")


if __name__ == "__main__":
    main()
