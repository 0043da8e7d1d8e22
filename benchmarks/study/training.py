"""One base by supervised tuning, and one GRPO run from it: seeded, logged, resumable.

A run leaves `start/` (the adapter before its first step), `checkpoint-N/`, `log.jsonl` (a line a
rollout) and, last and whole, `record.json`. While it runs, `state.pt` holds what a killed run needs
to go on from its last checkpoint; it goes on to the same bytes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.study.design import Run
from benchmarks.study.methods import Trained, started
from benchmarks.study.model import Size, complete, logits, new_weights
from benchmarks.study.tasks import PAD, Problems, stream

__all__ = ["Settings", "evaluate", "make_base", "trained_run"]


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    size: Size = field(default_factory=Size)
    device: str = "cpu"
    # base
    base_batch: int = 256
    base_limit: int = 6000
    base_target: float = 0.25
    # GRPO
    steps: int = 120
    save_steps: int = 10
    prompts: int = 32
    samples: int = 8
    reuse: int = 2
    clip: float = 0.2
    kl: float = 0.1
    grad_norm: float = 1.0


def write_json(path: Path, content: object) -> None:
    """Write the whole file, or leave what was there."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def evaluate(
    weights: Mapping[str, Tensor], problems: Problems, places: Tensor, size: Size
) -> dict[str, float]:
    """Greedy accuracy; accuracy and mean token entropy (nats) of a sample at temperature 1."""
    prompts, answers = (
        each.to(weights["lm_head.weight"].device) for each in problems.task.encode(places)
    )
    length = answers.shape[1]
    greedy, _ = complete(weights, prompts, length, size)
    sampled, entropy = complete(weights, prompts, length, size, generator=stream(7, 7))
    mask = sampled != PAD
    return {
        "accuracy": (greedy == answers).all(dim=1).float().mean().item(),
        "reward": (sampled == answers).all(dim=1).float().mean().item(),
        "entropy": ((entropy * mask).sum() / mask.sum().clamp_min(1)).item(),
    }


def make_base(folder: Path, task: str, seed: int, settings: Settings) -> None:
    """Train a base on right answers until the reward on validation problems reaches the target."""
    if (folder / "record.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    problems, size = Problems(task, seed), settings.size
    weights = {
        name: each.to(settings.device).requires_grad_(True)
        for name, each in new_weights(size, stream(seed, 2)).items()
    }
    rate = problems.task.base_rate
    optimizer = torch.optim.AdamW(weights.values(), rate, weight_decay=0.01)
    generator = stream(seed, 3)
    for step in range(1, settings.base_limit + 1):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, step / 50)
        prompts, answers = problems.draw(settings.base_batch, generator)
        tokens = torch.cat([prompts, answers], dim=1).to(settings.device)
        loss = -_logprobs(weights, tokens, answers.shape[1], size)[0].mean()
        _descend(optimizer, loss, list(weights.values()), settings)
        if step % 5 == 0:
            with torch.no_grad():
                solved = evaluate(weights, problems, problems.validation, size)
            if solved["reward"] >= settings.base_target:
                break
    else:
        raise RuntimeError(f"{task}, seed {seed}: no reward of {settings.base_target}")
    save_file(
        {name: each.detach().cpu() for name, each in weights.items()}, folder / "model.safetensors"
    )
    record = {"steps": step} | evaluate(weights, problems, problems.test, size)
    write_json(folder / "record.json", record)


def _descend(
    optimizer: torch.optim.Optimizer, loss: Tensor, leaves: list[Tensor], settings: Settings
) -> float:
    """One step on a loss with clipped gradient; the norm before clipping."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(leaves, settings.grad_norm)
    optimizer.step()
    return float(norm)


@dataclass(frozen=True)
class Rollout:
    """Samples of the current model: whole sequences, completions, their mask, reference
    log-probabilities, rewards and advantages. The first step on them finds their own."""

    sequences: Tensor
    completions: Tensor
    mask: Tensor
    reference: Tensor | None
    rewards: Tensor
    advantages: Tensor


def _logprobs(
    weights: Mapping[str, Tensor], rollout_tokens: Tensor, length: int, size: Size
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy at each of the last `length` tokens."""
    scores, _ = logits(weights, rollout_tokens[:, :-1], size)
    logprobs = scores[:, -length:].log_softmax(dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(dim=-1).detach()
    return logprobs.gather(2, rollout_tokens[:, -length:].unsqueeze(2)).squeeze(2), entropy


@torch.no_grad()
def _rolled_out(
    weights: Mapping[str, Tensor],
    reference: Mapping[str, Tensor] | None,
    batch: tuple[Tensor, Tensor],
    settings: Settings,
    generator: torch.Generator,
) -> Rollout:
    prompts, answers = (each.to(settings.device) for each in batch)
    length, size = answers.shape[1], settings.size
    completions, _ = complete(
        weights, prompts, length, size, samples=settings.samples, generator=generator
    )
    sequences = torch.cat([prompts.repeat_interleave(settings.samples, 0), completions], dim=1)
    right = completions == answers.repeat_interleave(settings.samples, 0)
    rewards = right.all(dim=1).float()
    groups = rewards.view(-1, settings.samples)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return Rollout(
        sequences=sequences,
        completions=completions,
        mask=(completions != PAD).float(),
        reference=None if reference is None else _logprobs(reference, sequences, length, size)[0],
        rewards=rewards,
        advantages=(centred / (groups.std(dim=1, keepdim=True) + 1e-4)).flatten(),
    )


def _loss(
    weights: Mapping[str, Tensor], rollout: Rollout, old: Tensor | None, settings: Settings
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """Clipped objective, mean over tokens then samples, with the k3 estimate of KL to the base.

    old: log-probabilities before the first step on this rollout, which gets None and returns them.
    """
    length = rollout.completions.shape[1]
    logprobs, entropy = _logprobs(weights, rollout.sequences, length, settings.size)
    old = logprobs.detach() if old is None else old
    ratio = (logprobs - old).exp()
    clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
    advantages, mask = rollout.advantages.unsqueeze(1), rollout.mask
    objective = torch.minimum(ratio * advantages, clipped * advantages)
    divergence = torch.zeros_like(objective)
    if rollout.reference is not None:
        gap = rollout.reference - logprobs
        divergence = gap.exp() - gap - 1
        objective = objective - settings.kl * divergence
    lengths = mask.sum(dim=1).clamp_min(1)  # 0 where padding was sampled first
    loss = -((objective * mask).sum(dim=1) / lengths).mean()
    total = mask.sum().clamp_min(1)
    return (
        loss,
        old,
        {
            "loss": loss.item(),
            "reward": rollout.rewards.mean().item(),
            "entropy": ((entropy * mask).sum() / total).item(),
            "clipped": (((ratio != clipped) * mask).sum() / total).item(),
            "kl": ((divergence * mask).sum() / total).item(),
        },
    )


class _Progress:
    """What a run needs to go on: parameters, optimiser, streams, step, curves."""

    def __init__(
        self, run: Run, folder: Path, base: Mapping[str, Tensor], settings: Settings
    ) -> None:
        self.folder = folder
        self.trained: Trained = started(run.method, base, settings.size, run.seed)
        self.leaves = list(self.trained.parameters.values())
        self.optimizer = torch.optim.AdamW(self.leaves, run.rate, weight_decay=0.0)
        self.problems = Problems(run.task, run.seed)
        self.streams = {"problems": stream(run.seed, 4), "samples": stream(run.seed, 5)}
        self.step, self.seconds = 0, 0.0
        self.curve: list[dict[str, float]] = []
        self.log: list[dict[str, float]] = []

    def state(self) -> dict[str, Any]:
        return {
            "parameters": {name: each.detach() for name, each in self.trained.parameters.items()},
            "optimizer": self.optimizer.state_dict(),
            "streams": {name: each.get_state() for name, each in self.streams.items()},
            **{name: getattr(self, name) for name in ("step", "seconds", "curve", "log")},
        }

    def save(self) -> None:
        partial = self.folder / "state.partial"
        torch.save(self.state(), partial)
        partial.replace(self.folder / "state.pt")

    def resume(self) -> None:
        if not (self.folder / "state.pt").exists():
            return
        state = torch.load(self.folder / "state.pt", weights_only=True)
        with torch.no_grad():
            for name, each in self.trained.parameters.items():
                each.copy_(state["parameters"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, each in self.streams.items():
            each.set_state(state["streams"][name])
        for name in ("step", "seconds", "curve", "log"):
            setattr(self, name, state[name])


def trained_run(run: Run, root: Path, settings: Settings) -> None:
    """One run from the base of its task and seed; nothing where its record is already there."""
    folder, base_folder = root / "runs" / run.name, root / "bases" / run.base
    if (folder / "record.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    base = {
        name: each.to(settings.device)
        for name, each in load_file(base_folder / "model.safetensors").items()
    }
    progress = _Progress(run, folder, base, settings)
    progress.trained.save(folder / "start", base_folder)
    progress.resume()
    finite = _train(run, progress, base, base_folder, settings)
    lines = "".join(json.dumps(row) + "\n" for row in progress.log)
    (folder / "log.jsonl").write_text(lines, encoding="utf-8")
    record = {
        **run.facts,
        "base": json.loads((base_folder / "record.json").read_text(encoding="utf-8")),
        "curve": progress.curve,
        "finite": finite,
        "seconds": round(progress.seconds, 1),
    }
    write_json(folder / "record.json", record)
    (folder / "state.pt").unlink(missing_ok=True)


def _train(
    run: Run,
    progress: _Progress,
    base: Mapping[str, Tensor],
    base_folder: Path,
    settings: Settings,
) -> bool:
    """All steps that are left, up to the first number that is not finite; whether none was."""
    while progress.step < settings.steps:
        began = time.perf_counter()
        batch = progress.problems.draw(settings.prompts, progress.streams["problems"])
        with torch.no_grad():
            weights = progress.trained.weights()
        rollout = _rolled_out(
            weights, base if run.kl else None, batch, settings, progress.streams["samples"]
        )
        old, figures = None, dict[str, float]()
        for _ in range(settings.reuse):
            loss, old, figures = _loss(progress.trained.weights(), rollout, old, settings)
            if not math.isfinite(figures["loss"]):
                return False
            figures["gradient"] = _descend(progress.optimizer, loss, progress.leaves, settings)
            progress.step += 1
        progress.log.append({"step": float(progress.step), **figures})
        progress.seconds += time.perf_counter() - began
        if progress.step % settings.save_steps == 0:
            _checkpoint(progress, base_folder, settings)
    return all(bool(torch.isfinite(each).all()) for each in progress.leaves)


def _checkpoint(progress: _Progress, base_folder: Path, settings: Settings) -> None:
    """Store what was trained, evaluate it, and keep what a killed run needs."""
    progress.trained.save(progress.folder / f"checkpoint-{progress.step}", base_folder)
    with torch.no_grad():
        weights = progress.trained.weights()
    figures = evaluate(weights, progress.problems, progress.problems.test, settings.size)
    progress.curve.append({"step": float(progress.step), **figures})
    progress.save()
