"""Writes torch_dist checkpoints with megatron-core on the CPU. Run as a program.

    python write_megatron.py FOLDER [--logits]

FOLDER/<case>/ is the checkpoint, FOLDER/<case>.pt {"weights": the module's own state dict,
"ids", "logits"}. The cases are CASES: what `TransformerConfig` takes beside the common sizes.
"""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

LAYERS, HIDDEN, HEADS, GROUPS, SIZE, INNER, EXPERTS, VOCABULARY = 2, 64, 4, 2, 24, 96, 3, 128
CASES: dict[str, dict[str, Any]] = {
    "qwen2": {"add_qkv_bias": True},
    "qwen3": {"qk_layernorm": True},
    "qwen3_moe": {
        "qk_layernorm": True,
        "num_moe_experts": EXPERTS,
        "moe_router_topk": 2,
        "moe_ffn_hidden_size": 40,
    },
    "layers apart": {"hetereogenous_dist_checkpoint": True},
}


def _write(folder: Path, name: str, choices: dict[str, Any]) -> None:
    from megatron.core import dist_checkpointing  # pyright: ignore[reportMissingImports]
    from megatron.core.models.gpt import GPTModel  # pyright: ignore[reportMissingImports]
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # pyright: ignore[reportMissingImports]
    from megatron.core.transformer.transformer_config import TransformerConfig  # pyright: ignore[reportMissingImports]

    torch.manual_seed(1)
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=SIZE,
        ffn_hidden_size=INNER,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        layernorm_epsilon=1e-6,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cpu_initialization=True,
        **choices,
    )
    spec = get_gpt_layer_local_spec(
        num_experts=choices.get("num_moe_experts"),
        moe_grouped_gemm=False,
        qk_layernorm=choices.get("qk_layernorm", False),
        normalization="RMSNorm",
    )
    model = GPTModel(
        config,
        spec,
        vocab_size=VOCABULARY,
        max_sequence_length=32,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=False,
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases are not their first values
            parameter.add_(0.05 * torch.randn_like(parameter))
    kept: dict[str, Any] = {"weights": dict(model.state_dict())}
    if "--logits" in sys.argv:
        ids = torch.randint(VOCABULARY, (1, 7))
        places = torch.arange(7)[None]
        mask = torch.ones(1, 1, 7, 7).triu(1).bool()
        with torch.no_grad():
            kept |= {"ids": ids, "logits": model(ids, places, mask)}
    (folder / name).mkdir(parents=True)
    dist_checkpointing.save(model.sharded_state_dict(prefix=""), str(folder / name))
    kept["weights"] = {
        key: value for key, value in kept["weights"].items() if isinstance(value, torch.Tensor)
    }
    torch.save(kept, folder / f"{name}.pt")


def main() -> None:
    """All cases, in one process of a world of one."""
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=0, world_size=1
    )
    # megatron-core asks for a GPU where it needs none.
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    from megatron.core import parallel_state  # pyright: ignore[reportMissingImports]
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker  # pyright: ignore[reportMissingImports]
    from megatron.core.transformer.moe import moe_utils  # pyright: ignore[reportMissingImports]

    CudaRNGStatesTracker.fork = lambda *_: nullcontext()
    vars(moe_utils).setdefault("te_general_gemm", None)
    parallel_state.initialize_model_parallel(1, 1)
    for name, choices in CASES.items():
        _write(folder, name, choices)


if __name__ == "__main__":  # its writer starts processes of its own
    main()
