"""What GeoscopeCallback costs a step of training with a LoRA, on this machine, in this process.

Seconds of the clock, and of all cores of this process, which other work leaves as they are.
A model of the shapes of Qwen2.5-0.5B with drawn weights and a LoRA on every linear layer; steps of
`transformers.Trainer`, each measured by the callback. Prints one line of JSON.

    python benchmarks/callback.py [--steps 3] [--tokens 512] [--rank 16]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from statistics import median
from typing import Any

import torch

SHAPES = {
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_attention_heads": 14,
    "num_hidden_layers": 24,
    "num_key_value_heads": 2,
    "vocab_size": 32768,  # a fifth of the original's, which makes a step shorter
    "tie_word_embeddings": True,
}


def adapted(rank: int) -> Any:
    """The model under a LoRA whose factors are drawn, as after some training."""
    import peft
    import transformers

    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SHAPES))
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=1e-3)
    return wrapped


def now() -> tuple[float, float]:
    """Seconds of the clock, and of all cores of this process."""
    return time.perf_counter(), time.process_time()


def timed(steps: int, tokens: int, rank: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each step, and of the callback in it."""
    import transformers

    from geoscope.integrations.transformers import GeoscopeCallback

    found: dict[str, list[tuple[float, float]]] = {"step": [], "callback": []}

    class Timed(GeoscopeCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **has: Any) -> None:
            self.begun = now()

        def on_step_end(self, args: Any, state: Any, control: Any, **has: Any) -> None:
            begun = now()
            super().on_step_end(args, state, control, **has)
            for name, first, last in (("step", self.begun, begun), ("callback", begun, now())):
                found[name].append((last[0] - first[0], last[1] - first[1]))

    draws = torch.Generator().manual_seed(1)
    rows = torch.randint(SHAPES["vocab_size"], (2 * steps, tokens // 2), generator=draws)
    with tempfile.TemporaryDirectory() as folder:
        settings = transformers.TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=2, use_cpu=True,
            save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        transformers.Trainer(
            model=adapted(rank), args=settings, callbacks=[Timed(every=1)],
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],  # type: ignore[arg-type]
        ).train()  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    chosen = parser.parse_args()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = timed(chosen.steps, chosen.tokens, chosen.rank)
    clock, cores = ({name: median(s[i] for s in found[name]) for name in found} for i in (0, 1))
    facts = {
        "threads": torch.get_num_threads(),
        "tokens": chosen.tokens,
        "rank": chosen.rank,
        "step_seconds": round(clock["step"], 3),
        "callback_seconds": round(clock["callback"], 3),
        "share": round(clock["callback"] / clock["step"], 4),
        "step_core_seconds": round(cores["step"], 3),
        "callback_core_seconds": round(cores["callback"], 3),
        "core_share": round(cores["callback"] / cores["step"], 4),
    }
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
