"""Train the tiny run that `geoscope demo` reads: a base, GRPO that learns, GRPO that fails, SFT.

Task: three-digit addition, least significant digit first. The prompt `321+654=` asks for 123 + 456
and the right completion is `9750<eos>`. The reward is verifiable: 1 where the whole answer is
right, else 0. The held-out problems are never drawn in training.

Model: Qwen2 architecture, 4 layers, hidden size 64, intermediate size 176, 4 heads, 2 key-value
heads, a vocabulary of 14 characters, untied embeddings.

Method: `base/` is pre-trained by next-token prediction on whole sequences and stopped as soon as
greedy accuracy on validation problems reaches 0.35. `grpo/checkpoint-N/` are checkpoints of GRPO on
all weights from that base: 32 prompts x 16 samples, advantages normalised within the group, the
clipped objective without KL term, AdamW at 2e-5, two optimiser steps a rollout.
`grpo-failed/checkpoint-40` is the same at a hundred times the rate: it unlearns the task. `sft/` is
supervised tuning from the same base on the right answers to the same prompts, as many steps, AdamW
at 4e-5. Training keeps float32 masters; what is saved, measured and started from is bf16.

Figures reached with the default seed: accuracy is greedy and reward is sampled at temperature 1,
both on 1024 held-out problems with the stored weights and float32 arithmetic; the relative update
is ‖W - W0‖ / ‖W0‖ over the linear layers of the blocks.

    model                  accuracy   reward   relative update
    base (1260 steps)         0.367    0.250                 -
    grpo/checkpoint-40        0.513    0.373            0.0095
    grpo/checkpoint-80        0.564    0.427            0.0149
    grpo/checkpoint-120       0.688    0.480            0.0209
    grpo/checkpoint-160       0.687    0.507            0.0263
    grpo/checkpoint-200       0.770    0.547            0.0309
    grpo/checkpoint-240       0.834    0.582            0.0357
    grpo/checkpoint-280       0.844    0.633            0.0402
    grpo/checkpoint-320       0.864    0.649            0.0450
    grpo-failed/...-40        0.000    0.000            0.3715
    sft (320 steps)           0.963    0.810            0.0790

It takes about five minutes on one CPU core. The run is seeded and repeats exactly with the same
number of threads on the same kind of CPU with the same version of torch (2.13.0 for the figures
above); elsewhere rounding differs and the figures move a little. It needs torch, transformers (4.56
or newer) and safetensors.

    python examples/tiny_rlvr.py --out tiny-run --pack run.zip
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging as transformers_logging

VOCABULARY = "0123456789+="
PLUS, EQUALS, EOS, PAD = 10, 11, 12, 13
DIGITS = 3
LIMIT = 10**DIGITS
PROMPT_LENGTH = 2 * DIGITS + 2
ANSWER_LENGTH = DIGITS + 2  # the digits of the sum and the end-of-sequence token


@dataclass(frozen=True)
class Settings:
    """Everything that decides the run; the defaults gave the figures in the module docstring."""

    seed: int = 0
    # model
    hidden: int = 64
    intermediate: int = 176
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    # pre-training
    pretrain_lr: float = 1e-3
    pretrain_batch: int = 512
    pretrain_warmup: int = 100
    pretrain_check: int = 10
    pretrain_limit: int = 20_000
    pretrain_target: float = 0.35
    # GRPO, and SFT on the same prompts
    steps: int = 320
    save_steps: int = 40
    logging_steps: int = 5
    prompts: int = 32
    samples: int = 16
    reuse: int = 2
    clip: float = 0.2
    grpo_lr: float = 2e-5
    failed_lr: float = 2e-3
    failed_steps: int = 40
    sft_lr: float = 4e-5
    grad_norm: float = 1.0
    # evaluation
    held_out: int = 1024
    eval_samples: int = 4


# --- task ---------------------------------------------------------------------------------------


def digits(numbers: Tensor, count: int) -> Tensor:
    """Decimal digits of each number, least significant first: shape (n, count)."""
    return torch.stack([numbers // 10**place % 10 for place in range(count)], dim=1)


def encode(problems: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts `321+654=` and answers `9750<eos>` of problem numbers a * LIMIT + b, as token ids."""
    a, b = problems // LIMIT, problems % LIMIT
    column = torch.ones(len(problems), 1, dtype=torch.long)
    prompts = torch.cat(
        [digits(a, DIGITS), PLUS * column, digits(b, DIGITS), EQUALS * column], dim=1
    )
    answers = torch.cat([digits(a + b, DIGITS + 1), EOS * column], dim=1)
    return prompts, answers


def seeded(settings: Settings, stream: int) -> torch.Generator:
    """An independent random stream of this run."""
    return torch.Generator().manual_seed(1000 * settings.seed + stream)


class Problems:
    """All LIMIT² sums, with two disjoint held-out sets that training never draws."""

    def __init__(self, settings: Settings) -> None:
        order = torch.randperm(LIMIT * LIMIT, generator=seeded(settings, 1))
        self.test = order[: settings.held_out]
        self.validation = order[settings.held_out : 2 * settings.held_out]
        self.train = order[2 * settings.held_out :]

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` training problems, with replacement."""
        return self.train[torch.randint(len(self.train), (count,), generator=generator)]


# --- model --------------------------------------------------------------------------------------


def new_model(settings: Settings) -> Qwen2ForCausalLM:
    """A freshly initialised model in float32."""
    torch.manual_seed(settings.seed)
    config = Qwen2Config(
        vocab_size=len(VOCABULARY) + 2,
        hidden_size=settings.hidden,
        intermediate_size=settings.intermediate,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return Qwen2ForCausalLM(config)


def load_model(folder: Path) -> Qwen2ForCausalLM:
    """A saved model: its bf16 weights, with float32 arithmetic."""
    return Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)


@torch.no_grad()
def complete(
    model: Qwen2ForCausalLM, prompts: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """ANSWER_LENGTH tokens after each prompt: sampled at temperature 1, greedy without generator.

    Whatever follows an end-of-sequence token is replaced by padding.
    """
    tokens, cache, completion = prompts, None, []
    finished = torch.zeros(len(prompts), 1, dtype=torch.bool)
    for _ in range(ANSWER_LENGTH):
        output = model(input_ids=tokens, past_key_values=cache, use_cache=True)
        logits, cache = output.logits[:, -1].float(), output.past_key_values
        if generator is None:
            tokens = logits.argmax(dim=-1, keepdim=True)
        else:
            tokens = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
        tokens = tokens.masked_fill(finished, PAD)
        finished = finished | (tokens == EOS)
        completion.append(tokens)
    return torch.cat(completion, dim=1)


def reward(completions: Tensor, answers: Tensor) -> Tensor:
    """The verifier: 1 where every token of the answer is right, else 0."""
    return (completions == answers).all(dim=1).float()


def accuracy(model: Qwen2ForCausalLM, problems: Tensor) -> float:
    """Share of problems solved by greedy decoding."""
    prompts, answers = encode(problems)
    return reward(complete(model, prompts), answers).mean().item()


def evaluate(model: Qwen2ForCausalLM, settings: Settings) -> dict[str, float]:
    """Greedy accuracy and mean reward at temperature 1, both on the held-out test problems."""
    test = Problems(settings).test
    prompts, answers = encode(test.repeat_interleave(settings.eval_samples))
    samples = complete(model, prompts, seeded(settings, 2))
    return {"accuracy": accuracy(model, test), "reward": reward(samples, answers).mean().item()}


def save_model(
    model: Qwen2ForCausalLM, folder: Path, settings: Settings, facts: dict[str, float]
) -> dict[str, float]:
    """Write a bf16 copy, read it back, measure what was read and write that to `run.json`."""
    stored = copy.deepcopy(model).bfloat16()
    stored.save_pretrained(folder)
    record = facts | evaluate(load_model(folder), settings)
    write_json(folder / "run.json", record)
    print(folder.name, record, flush=True)
    return record


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


# --- training -----------------------------------------------------------------------------------


def descend(
    model: Qwen2ForCausalLM, optimizer: torch.optim.Optimizer, loss: Tensor, settings: Settings
) -> None:
    """One optimiser step on a loss, with clipped gradient norm."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_norm)
    optimizer.step()


def pretrain(settings: Settings, problems: Problems) -> tuple[Qwen2ForCausalLM, int]:
    """Next-token prediction on whole sequences until validation accuracy reaches the target."""
    model = new_model(settings)
    optimizer = torch.optim.AdamW(model.parameters(), settings.pretrain_lr, weight_decay=0.01)
    generator = seeded(settings, 3)
    for step in range(1, settings.pretrain_limit + 1):
        for group in optimizer.param_groups:
            group["lr"] = settings.pretrain_lr * min(1.0, step / settings.pretrain_warmup)
        tokens = torch.cat(encode(problems.draw(settings.pretrain_batch, generator)), dim=1)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        descend(model, optimizer, loss, settings)
        if step % settings.pretrain_check == 0:
            solved = accuracy(model, problems.validation)
            print(f"pretrain {step}: loss {loss.item():.3f}, accuracy {solved:.3f}", flush=True)
            if solved >= settings.pretrain_target:
                return model, step
    raise RuntimeError(
        f"no accuracy of {settings.pretrain_target} in {settings.pretrain_limit} steps"
    )


def training_batches(settings: Settings, problems: Problems) -> Iterator[tuple[Tensor, Tensor]]:
    """Prompts and right answers, `reuse` optimiser steps each; GRPO and SFT see the same ones."""
    generator = seeded(settings, 4)
    for _ in range(settings.steps // settings.reuse):
        yield encode(problems.draw(settings.prompts, generator))


def token_logprobs(
    model: Qwen2ForCausalLM, prompts: Tensor, completions: Tensor
) -> tuple[Tensor, Tensor]:
    """Log-probability of each completion token, and the entropy at its position."""
    tokens = torch.cat([prompts, completions], dim=1)
    logits = model(input_ids=tokens, use_cache=False).logits[:, PROMPT_LENGTH - 1 : -1]
    logprobs = logits.float().log_softmax(dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(dim=-1).detach()
    return logprobs.gather(2, completions.unsqueeze(2)).squeeze(2), entropy


def group_advantages(rewards: Tensor, samples: int) -> Tensor:
    """Rewards normalised within the group of samples of one prompt."""
    groups = rewards.view(-1, samples)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, keepdim=True) + 1e-4)).flatten()


@dataclass(frozen=True)
class Rollout:
    """Samples of the current model with what the objective needs of them."""

    prompts: Tensor
    completions: Tensor
    mask: Tensor
    logprobs: Tensor
    rewards: Tensor
    advantages: Tensor


@torch.no_grad()
def roll_out(
    model: Qwen2ForCausalLM,
    batch: tuple[Tensor, Tensor],
    settings: Settings,
    generator: torch.Generator,
) -> Rollout:
    """Sample a group of completions for each prompt and judge them."""
    prompts, answers = (tokens.repeat_interleave(settings.samples, 0) for tokens in batch)
    completions = complete(model, prompts, generator)
    rewards = reward(completions, answers)
    return Rollout(
        prompts=prompts,
        completions=completions,
        mask=(completions != PAD).float(),
        logprobs=token_logprobs(model, prompts, completions)[0],
        rewards=rewards,
        advantages=group_advantages(rewards, settings.samples),
    )


def grpo_loss(
    model: Qwen2ForCausalLM, rollout: Rollout, settings: Settings
) -> tuple[Tensor, dict[str, float]]:
    """The clipped objective (mean over tokens, then over samples) and what is logged with it."""
    logprobs, entropy = token_logprobs(model, rollout.prompts, rollout.completions)
    ratio = (logprobs - rollout.logprobs).exp()
    clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
    advantages, mask = rollout.advantages.unsqueeze(1), rollout.mask
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    loss = -((objective * mask).sum(dim=1) / mask.sum(dim=1)).mean()
    return loss, {
        "loss": loss.item(),
        "reward": rollout.rewards.mean().item(),
        "reward_std": rollout.rewards.view(-1, settings.samples).std(dim=1).mean().item(),
        "entropy": ((entropy * mask).sum() / mask.sum()).item(),
        "clip_ratio": (((ratio != clipped) * mask).sum() / mask.sum()).item(),
    }


def grpo(base: Path, out: Path, settings: Settings, problems: Problems) -> None:
    """GRPO on all weights from the base; each rollout serves `reuse` optimiser steps."""
    model = load_model(base)
    optimizer = torch.optim.AdamW(model.parameters(), settings.grpo_lr, weight_decay=0.0)
    generator = seeded(settings, 5)
    history: list[dict[str, float]] = []
    recent: list[dict[str, float]] = []
    step = 0
    for batch in training_batches(settings, problems):
        rollout = roll_out(model, batch, settings, generator)
        for _ in range(settings.reuse):
            step += 1
            loss, figures = grpo_loss(model, rollout, settings)
            descend(model, optimizer, loss, settings)
            recent.append(figures)
            if step % settings.logging_steps == 0:
                means = {key: sum(row[key] for row in recent) / len(recent) for key in figures}
                history.append({"step": step, "learning_rate": settings.grpo_lr} | means)
                recent = []
            if step % settings.save_steps == 0:
                folder = out / f"checkpoint-{step}"
                save_model(model, folder, settings, {"step": step})
                write_json(folder / "trainer_state.json", trainer_state(step, settings, history))


def trainer_state(
    step: int, settings: Settings, history: list[dict[str, float]]
) -> dict[str, object]:
    """What the Hugging Face Trainer keeps beside a checkpoint, as far as it applies here."""
    return {
        "global_step": step,
        "max_steps": settings.steps,
        "save_steps": settings.save_steps,
        "logging_steps": settings.logging_steps,
        "train_batch_size": settings.prompts * settings.samples,
        "log_history": history,
    }


def sft(base: Path, out: Path, settings: Settings, problems: Problems) -> None:
    """Cross-entropy on the right answers to the same prompts, for as many optimiser steps."""
    model = load_model(base)
    optimizer = torch.optim.AdamW(model.parameters(), settings.sft_lr, weight_decay=0.0)
    for prompts, answers in training_batches(settings, problems):
        for _ in range(settings.reuse):
            logprobs, _ = token_logprobs(model, prompts, answers)
            descend(model, optimizer, -logprobs.mean(), settings)
    save_model(model, out, settings, {"step": settings.steps})


# --- checks, summary and packing ----------------------------------------------------------------


def model_folders(out: Path) -> list[Path]:
    """Every model of a finished run: base, GRPO checkpoints by step, those that failed, SFT."""
    checkpoints = [
        path
        for run in ("grpo", "grpo-failed")
        for path in sorted(
            (out / run).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1])
        )
    ]
    return [out / "base", *checkpoints, out / "sft"]


def relative_update(base: Path, tuned: Path) -> float:
    """‖W - W0‖ / ‖W0‖ (Frobenius) over the linear layers of the blocks."""
    start, end = (load_file(path / "model.safetensors") for path in (base, tuned))
    moved = total = 0.0
    for name, weight in start.items():
        if name.startswith("model.layers.") and weight.ndim == 2:
            moved += (end[name].double() - weight.double()).square().sum().item()
            total += weight.double().square().sum().item()
    return math.sqrt(moved / total)


def check(out: Path, settings: Settings) -> None:
    """Load every model again and compare what it does with its `run.json`."""
    for folder in model_folders(out):
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        for key, value in evaluate(load_model(folder), settings).items():
            if value != record[key]:
                raise RuntimeError(f"{folder}: {key} is {value}, run.json says {record[key]}")


def summary(out: Path) -> str:
    """A table of the run, one line for each model."""
    lines = ["| folder | step | accuracy | reward | relative update |", "|---|---|---|---|---|"]
    for folder in model_folders(out):
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        update = relative_update(out / "base", folder)
        lines.append(
            f"| {folder.relative_to(out).as_posix()} | {record['step']} | {record['accuracy']:.3f} "
            f"| {record['reward']:.3f} | {update:.4f} |"
        )
    return "\n".join(lines)


def readme(out: Path, settings: Settings) -> str:
    """The description that lies beside the weights."""
    record = json.loads((out / "base" / "run.json").read_text(encoding="utf-8"))
    parameters = sum(p.numel() for p in load_model(out / "base").parameters())
    return f"""# A tiny, real RLVR run

Made with `examples/tiny_rlvr.py` of geoscope; licensed under Apache-2.0.

A Qwen2-architecture model ({parameters:,} parameters, {settings.layers} layers, hidden size \
{settings.hidden}) adds two
three-digit numbers, least significant digit first: the prompt `321+654=` asks for 123 + 456 and
the right completion is `9750<eos>`. The token ids are the places of the characters in
`{VOCABULARY}`, then {EOS} for `<eos>` and {PAD} for padding.

- `base/`: next-token pre-training, stopped early after {record["pretrain_steps"]} steps.
- `grpo/checkpoint-N/`: GRPO on all weights from the base, AdamW, learning rate \
{settings.grpo_lr:g},
  {settings.prompts} prompts x {settings.samples} samples, reward 1 where the whole answer is \
right and else 0.
  `trainer_state.json` holds the training curve.
- `grpo-failed/checkpoint-N/`: the same with learning rate {settings.failed_lr:g}, far too large: \
the model
  unlearns the task.
- `sft/`: supervised tuning from the base on the right answers to the same prompts, as many steps,
  AdamW, learning rate {settings.sft_lr:g}.

All weights are stored in bf16; training kept float32 masters. Accuracy (greedy) and reward (mean of
{settings.eval_samples} samples a problem at temperature 1) are measured on {settings.held_out} \
held-out problems, with the stored
weights and float32 arithmetic; bf16 arithmetic moves them by up to about 0.02. The relative update
is the Frobenius norm of the weight difference over that of the base, in the linear layers of the
blocks.

{summary(out)}

It is a very small model with a large learning rate: it shows what the reports look like, and is no
evidence about large models.
"""


def pack(out: Path, archive: Path, settings: Settings) -> None:
    """Zip a finished run; equal content gives equal bytes."""
    (out / "README.md").write_text(readme(out, settings), encoding="utf-8")
    files = [out / "README.md"]
    for folder in model_folders(out):
        files += [path for path in folder.iterdir() if path.suffix in {".json", ".safetensors"}]
    named = sorted((path.relative_to(out).as_posix(), path) for path in files)
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w") as target:
        for name, path in named:
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.external_attr = 0o644 << 16
            target.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED, compresslevel=9)


def check_archive(archive: Path, settings: Settings) -> None:
    """Unpack an archive into a temporary folder and check every model in it."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(archive) as source:
        source.extractall(folder)
        check(Path(folder), settings)


def train(out: Path, settings: Settings) -> None:
    """The whole run: base, then GRPO, GRPO that fails, and SFT, all from the bf16 base."""
    problems = Problems(settings)
    model, steps = pretrain(settings, problems)
    save_model(model, out / "base", settings, {"step": 0, "pretrain_steps": steps})
    grpo(out / "base", out / "grpo", settings, problems)
    too_fast = replace(settings, grpo_lr=settings.failed_lr, steps=settings.failed_steps)
    grpo(out / "base", out / "grpo-failed", too_fast, problems)
    sft(out / "base", out / "sft", settings, problems)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default 1)")
    parser.add_argument("--seed", type=int, default=Settings.seed, help="seed (default 0)")
    parser.add_argument("--pack", type=Path, metavar="FILE", help="also zip the run into FILE")
    parser.add_argument(
        "--no-train", action="store_true", help="only check (and pack) the run already in --out"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    transformers_logging.disable_progress_bar()
    settings = Settings(seed=arguments.seed)
    start = time.perf_counter()
    if not arguments.no_train:
        if arguments.out.exists() and any(arguments.out.iterdir()):
            parser.error(f"{arguments.out} is not empty")
        train(arguments.out, settings)
        print(f"trained in {time.perf_counter() - start:.0f} s")
    check(arguments.out, settings)
    print(summary(arguments.out))
    if arguments.pack:
        pack(arguments.out, arguments.pack, settings)
        check_archive(arguments.pack, settings)
        print(f"{arguments.pack}: {arguments.pack.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
