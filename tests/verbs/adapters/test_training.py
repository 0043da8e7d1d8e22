"""Does GRPO train what init-adapter writes, and does convert-adapter give back what it made of it?

TRL trains the residual and the mirror layout, a loop of our own the anchor, which needs two active
adapters. Model, tokenizer and prompts are made on the spot; no socket is opened. The reward can be
checked: the share of even numbers in a completion.
"""

from __future__ import annotations

import socket
import warnings
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from geoscope.adapters.peft_names import lora_keys
from geoscope.formats.hashes import file_sha256, tensor_sha256
from geoscope.verbs.adapters.convert import conversion_of, discarded_share
from geoscope.verbs.adapters.converted import write_conversion
from geoscope.verbs.adapters.initialise import initialise
from geoscope.verbs.adapters.options import InitOptions
from tests.helpers import tiny_models
from tests.helpers.tiny_models import VOCABULARY, assert_same_logits, live, logits
from tests.helpers.trained import DEPRECATION, peft

with warnings.catch_warnings():  # of packages that these import
    warnings.simplefilter("ignore")
    trl = pytest.importorskip("trl")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(f"ignore:{DEPRECATION}:FutureWarning"),
]

RANK, STEPS, RATE = 4, 3, 1e-2
GROUP, PROMPTS, LENGTH = 4, 2, 8  # completions a prompt, prompts a step, tokens a completion
START = 2e-6  # relative difference of logits, fp32, from the original before training
SAME = 1e-5  # and from the trained model after conversion

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No Hub and no telemetry; torch's global generator is put back, which trainers seed."""
    tried: list[Any] = []

    def refuse(_: socket.socket, address: Any) -> None:
        tried.append(address)
        raise OSError("the test is offline")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with torch.random.fork_rng(devices=[]):
        yield
    assert tried == []


def tokenizer() -> PreTrainedTokenizerFast:
    """Four special tokens and the numbers 0 … 43: one word, one token."""
    words = (*SPECIAL, *map(str, range(VOCABULARY - len(SPECIAL))))
    vocabulary = {word: number for number, word in enumerate(words)}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    unk, bos, eos, pad = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token=unk, bos_token=bos, eos_token=eos, pad_token=pad,
        padding_side="left",
    )  # fmt: skip


def even_numbers(completions: list[str], **_: Any) -> list[float]:
    """Share of the completion's tokens that are even numbers."""
    words = [[word for word in text.split() if word.isdecimal()] for text in completions]
    return [sum(int(word) % 2 == 0 for word in row) / LENGTH for row in words]


# --- layouts ------------------------------------------------------------------------------------


def made(folder: Path, layout: str, family: Any = tiny_models.llama) -> tuple[Path, Path]:
    """The original model with its tokenizer, and the output of init-adapter for it.

    layout: or the method of one that has none.
    """
    original = family(folder / "original", bos_token_id=1, eos_token_id=2, pad_token_id=3)
    tokenizer().save_pretrained(original)
    out = folder / "out"
    method: dict[str, Any] = {"method" if layout == "rlpo" else "layout": layout}
    initialise(str(original), out, InitOptions(rank=RANK, **method))
    return original, out


def loaded(base: Path, adapter: Path) -> Any:
    """PEFT's model, to be trained; a warning, such as one about missing keys, is an error."""
    return peft.PeftModel.from_pretrained(live(base), adapter, is_trainable=True).eval()


def with_anchor(original: Path, out: Path, adapter: Path) -> Any:
    """Both adapters active, the anchor frozen: the recipe of the layout."""
    model = loaded(original, adapter)
    model.load_adapter(out / "anchor", "anchor", is_trainable=False)
    model.base_model.set_adapter(["default", "anchor"])
    for name, parameter in model.named_parameters():
        if ".anchor." in name:
            parameter.requires_grad_(False)
    return model.eval()


def adapter_of(model: Any, adapter: str = "default") -> dict[str, Tensor]:
    """A copy of the factors under their names in the model."""
    named = model.named_parameters()
    return {name: p.detach().clone() for name, p in named if f".{adapter}." in name}


def base_hashes(model: Any) -> dict[str, str]:
    """Every parameter and buffer that is not a factor of an adapter → hash of its bytes."""
    named = model.state_dict()
    return {name: tensor_sha256(one) for name, one in named.items() if ".lora_" not in name}


def file_hashes(*folders: Path) -> dict[Path, str]:
    files = (file for folder in folders for file in folder.rglob("*") if file.is_file())
    return {file: file_sha256(file) for file in files}


def assert_trained(model: Any, before: dict[str, Tensor], history: list[dict[str, float]]) -> None:
    """The rewards told completions apart, and every factor moved, to finite values."""
    assert len(history) == STEPS
    for step in history:
        assert isfinite(step["loss"]) and step["reward_std"] > 0 and step["grad_norm"] > 0
    after = adapter_of(model)
    assert after.keys() == before.keys() and len(after) > 0
    for name, factor in after.items():
        assert factor.isfinite().all()
        assert not torch.equal(factor, before[name]), name


# --- GRPO ---------------------------------------------------------------------------------------


def grpo(model: Any, base: Path, folder: Path, *, beta: float) -> list[dict[str, float]]:
    """Steps of TRL's GRPOTrainer; saves the adapter in `folder`, returns what was logged of each.

    What TRL, transformers and accelerate warn of among themselves is theirs.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from datasets import Dataset
        from transformers import AutoTokenizer

        settings = trl.GRPOConfig(
            output_dir=str(folder), max_steps=STEPS, learning_rate=RATE, beta=beta, seed=0,
            per_device_train_batch_size=GROUP * PROMPTS, num_generations=GROUP,
            max_completion_length=LENGTH, lr_scheduler_type="constant", bf16=False, use_cpu=True,
            logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        prompts = [f"{a} {a + b}" for a in range(4) for b in range(1, 5)]
        trainer = trl.GRPOTrainer(
            model=model,
            reward_funcs=even_numbers,
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            processing_class=AutoTokenizer.from_pretrained(base),
        )
        trainer.train()
        trainer.save_model(str(folder))
    assert trainer.model is model
    model.eval()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def own_grpo(model: Any) -> list[dict[str, float]]:
    """GRPO in its plainest form: one update a batch, no reference, nothing clipped.

    loss = −mean of advantage · ratio, with advantage = (reward − group mean) / group deviation and
    ratio = p / p as sampled, which is 1 and has the gradient of log p.
    """
    torch.manual_seed(0)
    words, trainable = tokenizer(), [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=RATE)
    prompts = torch.tensor([[4, 5], [6, 9]]).repeat_interleave(GROUP, 0)
    history: list[dict[str, float]] = []
    for _ in range(STEPS):
        with torch.no_grad():
            rows = model.generate(
                input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=True,
                top_k=0, min_new_tokens=LENGTH, max_new_tokens=LENGTH,
            )  # fmt: skip
        completions = rows[:, prompts.shape[1] :]
        rewards = torch.tensor(even_numbers(words.batch_decode(completions)))
        groups = rewards.view(PROMPTS, GROUP)
        deviation = groups.std(1, keepdim=True)
        advantages = ((groups - groups.mean(1, keepdim=True)) / (deviation + 1e-4)).view(-1, 1)
        said = model(input_ids=rows).logits[:, prompts.shape[1] - 1 : -1].log_softmax(-1)
        chosen = said.gather(-1, completions[..., None]).squeeze(-1)
        loss = -(advantages * (chosen - chosen.detach()).exp()).mean()
        optimiser.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trainable, 1.0).item()
        optimiser.step()
        history.append({"loss": loss.item(), "reward_std": rewards.std().item(), "grad_norm": norm})
    return history


# --- after training -----------------------------------------------------------------------------


def assert_converts(original: Path, out: Path, trained: Path, expected: Tensor) -> None:
    """The plain LoRA of twice the rank on the original base says what the trained model says."""
    conversion = conversion_of(str(out), str(trained))
    plain = trained.parent / "plain"
    assert write_conversion(conversion, plain).modules == ()
    assert conversion.config["r"] == 2 * RANK
    assert conversion.config["base_model_name_or_path"] == str(original)
    assert_same_logits(logits(loaded(original, plain)), expected, SAME)


def tails(adapter: Path, rank: int) -> dict[str, tuple[float, float]]:
    """Module path → ‖ΔW‖_F² and the part of it beyond the rank, by a full SVD in fp64."""
    factors = load_file(adapter / "adapter_model.safetensors")
    config = peft.LoraConfig.from_pretrained(adapter)
    found: dict[str, tuple[float, float]] = {}
    for path in {name.partition(".lora_")[0] for name in factors}:
        key_A, key_B = lora_keys(path.removeprefix("base_model.model."))
        update = factors[key_B].double() @ factors[key_A].double() * config.lora_alpha / config.r
        energies = torch.linalg.svdvals(update).square()
        name = path.removeprefix("base_model.model.")
        found[name] = (energies.sum().item(), energies[rank:].sum().item())
    return found


def assert_compresses(original: Path, out: Path, trained: Path, expected: Tensor) -> None:
    """A mirror of half its rank, and what that leaves out."""
    conversion = conversion_of(str(out), str(trained), rank=RANK)
    small = trained.parent / "small"
    energies = write_conversion(conversion, small).modules
    exact = tails(trained, RANK)
    assert {one.name.removesuffix(".weight") for one in energies} == exact.keys()
    for one in energies:
        energy, tail = exact[one.name.removesuffix(".weight")]
        assert one.energy == pytest.approx(energy, rel=1e-5)
        assert one.discarded == pytest.approx(tail, rel=1e-4, abs=1e-9 * energy)
    assert 0 < discarded_share(energies) < 1
    # What is written has lost that much and no more, and the model is nearer than the original is.
    written = tails(small, 0)
    for one in energies:
        kept, _ = written[one.name.removesuffix(".weight")]
        assert kept == pytest.approx(one.energy - one.discarded, rel=1e-5)
    distance = (logits(loaded(original, small)) - expected).norm()
    assert distance < (logits(live(original)) - expected).norm()


# --- the tests ----------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.parametrize("layout", ["residual", "mirror", "rlpo"])
def test_grpo_with_trl(layout: str, beta: float, tmp_path: Path) -> None:
    """beta > 0: TRL's reference is a copy of the initial adapter, which says what W says."""
    family = tiny_models.llama if layout == "residual" else tiny_models.qwen2_tied
    original, out = made(tmp_path, layout, family)
    base, initial = (out / "residual", out / "adapter") if layout == "residual" else (original, out)
    files = file_hashes(original, out)
    says = logits(live(original))

    model = loaded(base, initial)
    assert_same_logits(logits(model), says, 0.0 if layout == "rlpo" else START)
    before, weights, of_base = adapter_of(model), base_hashes(model), logits(live(base))
    trained = tmp_path / "trained"
    history = grpo(model, base, trained, beta=beta)

    assert_trained(model, before, history)
    assert base_hashes(model) == weights
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(logits(model), of_base)
    if beta:
        assert abs(history[0]["kl"]) < 1e-6 < history[-1]["kl"]
        reference = adapter_of(model, "ref")
        assert len(reference) == len(before)
        for name, factor in reference.items():
            assert torch.equal(factor, before[name.replace(".ref.", ".default.")])
    says_now = logits(model)
    assert (says_now - says).norm() > 1e-3 * says.norm()

    if layout == "residual":
        assert_converts(original, out, trained, says_now)
    else:
        assert_same_logits(logits(loaded(original, trained)), says_now, SAME)
    if layout == "mirror":
        assert_compresses(original, out, trained, says_now)
    assert file_hashes(original, out) == files


def test_grpo_of_our_own_with_an_anchor(tmp_path: Path) -> None:
    original, out = made(tmp_path, "anchor")
    files = file_hashes(original, out)
    says = logits(live(original))

    model = with_anchor(original, out, out / "adapter")
    assert_same_logits(logits(model), says, START)
    before, weights, anchor = adapter_of(model), base_hashes(model), adapter_of(model, "anchor")
    assert len(anchor) == len(before)
    history = own_grpo(model)

    assert_trained(model, before, history)
    assert base_hashes(model) == weights
    assert all(torch.equal(one, anchor[name]) for name, one in adapter_of(model, "anchor").items())
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(logits(model), says)
    says_now = logits(model)
    assert (says_now - says).norm() > 1e-3 * says.norm()

    trained = tmp_path / "trained"
    model.save_pretrained(trained, selected_adapters=["default"])
    assert_same_logits(logits(with_anchor(original, out, trained)), says_now, SAME)
    assert_converts(original, out, trained, says_now)
    assert file_hashes(original, out) == files
