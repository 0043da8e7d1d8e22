"""Do commands on Hub models transfer what they read and no more, and find what folders give?

The whole command line in processes of its own, over HTTP through huggingface_hub. Models are
written by transformers and PEFT.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.helpers.forked import GEOSCOPE, run_forked
from tests.helpers.hub_server import HubServer, Repo, commit_of
from tests.helpers.running import by_rows

with warnings.catch_warnings():  # of packages that peft imports
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")
    import transformers

pytestmark = pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"
)

SECRET = "hf_aVeryPrivateToken"
LAYERS = 6


def model(seed: int) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=256, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(seed)
    made: Any = transformers.LlamaForCausalLM(config)
    return made.to(torch.bfloat16)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models in three shards each, as transformers cuts them."""
    root = tmp_path_factory.mktemp("pair")
    base = model(1)
    base.save_pretrained(root / "base", max_shard_size="700KB")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in base.parameters():
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
            weight += (0.002 * noise).to(torch.bfloat16)
    base.save_pretrained(root / "tuned", max_shard_size="700KB")
    for side in ("base", "tuned"):
        assert len(list((root / side).glob("model-*.safetensors"))) == 3
    return {side: root / side for side in ("base", "tuned")}


def files(folder: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in folder.iterdir() if one.is_file()}


@pytest.fixture
def hub(pair: dict[str, Path]) -> Iterator[HubServer]:
    repos = {f"org/{side}": Repo(files(folder)) for side, folder in pair.items()}
    with HubServer(repos) as server:
        yield server


class Shell:
    """`geoscope …` with a home of its own."""

    def __init__(self, hub: HubServer, home: Path) -> None:
        self.hub, self.home = hub, home

    def __call__(self, *words: str | Path, **settings: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": os.environ.get("PATH", ""),
            "PYTHONPATH": os.pathsep.join(sys.path),
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.home / "hf"),
            "GEOSCOPE_CACHE": str(self.home / "geoscope"),
            "HF_TOKEN": SECRET,
            "HF_HUB_DISABLE_XET": "1",
            "OPENBLAS_NUM_THREADS": "1",
            **settings,
        }
        argv = ["geoscope", *map(str, words)]
        done = run_forked(GEOSCOPE, argv, env=environment, cwd=self.home)
        assert SECRET not in done.stdout + done.stderr
        return done

    def report(self, *words: str | Path, **settings: str) -> dict[str, Any]:
        done = self(*words, "--json", **settings)
        assert done.returncode == 0, done.stderr
        return by_rows(json.loads(done.stdout))


@pytest.fixture
def shell(hub: HubServer, tmp_path: Path) -> Shell:
    return Shell(hub, tmp_path)


def of_layer(folder: Path, layer: int) -> int:
    """Bytes of the tensors of one layer, by the safetensors library."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                tensor = file.get_tensor(name)
                total += f"layers.{layer}." in name and tensor.numel() * tensor.element_size()
    return total


def transferred(hub: HubServer) -> tuple[int, int]:
    """Bytes of weight files that went out: of requests for headers, and of all others."""
    sent = [one for one in hub.sent if one.range or "safetensors" in one.path]
    headers = sum(one.nbytes for one in sent if one.range.startswith("bytes=0-"))
    return headers, sum(one.nbytes for one in sent) - headers


def test_one_layer_of_a_sharded_pair(hub: HubServer, shell: Shell, pair: dict[str, Path]) -> None:
    wanted = sum(of_layer(folder, 1) for folder in pair.values())
    dry = shell.report("collapse", "org/base", "org/tuned", "--layers", "1", "--dry-run")
    first, rest = transferred(hub)
    assert rest == 0
    assert first <= 6 * 100_001
    assert dry["plan"]["free_disk"] > 0
    told = dry["plan"]["bytes_to_fetch"]
    assert wanted <= told < 1.2 * wanted
    hub.log.clear()
    hub.sent.clear()

    found = shell.report("collapse", "org/base", "org/tuned", "--layers", "1")
    assert transferred(hub) == (0, told)
    assert not list(shell.home.rglob("snapshots/*/*.safetensors"))
    local = shell.report("collapse", pair["base"], pair["tuned"], "--layers", "1", "--no-resume")
    assert found["layers"] == local["layers"]
    assert found["summary"] == local["summary"]

    hub.log.clear()
    hub.sent.clear()
    again = shell("collapse", "org/base", "org/tuned", "--layers", "1", "--no-resume")
    assert again.returncode == 0
    assert "fetching" not in again.stderr
    asked = {path.split("?")[0] for _, path, _ in hub.log if "/org/" in path or "/blobs/" in path}
    assert asked == {"/api/models/org/base", "/api/models/org/tuned"}


@pytest.mark.slow
def test_what_is_to_be_fetched_is_said_with_the_room_for_it(shell: Shell) -> None:
    done = shell("collapse", "org/base", "org/tuned", "--layers", "1")
    assert done.returncode == 0, done.stderr
    line = done.stderr.splitlines()[0]
    assert ", fetching 0.59 MB (" in line and line.endswith(" GB free)")
    dry = shell("collapse", "org/base", "org/tuned", "--layers", "2", "--dry-run")
    assert ", after fetching 591" in dry.stdout and " free)" in dry.stdout


@pytest.mark.slow
def test_a_connection_cut_in_a_range_goes_on(
    hub: HubServer, shell: Shell, pair: dict[str, Path]
) -> None:
    dry = shell.report("collapse", "org/base", "org/tuned", "--layers", "1", "--dry-run")
    hub.log.clear()
    hub.sent.clear()
    shards = sorted(path.name for path in pair["base"].glob("model-*.safetensors"))
    hub.cut = {name: [20_000] for name in shards}
    found = shell.report("collapse", "org/base", "org/tuned", "--layers", "1")
    assert any(not left for left in hub.cut.values())
    assert transferred(hub) == (0, dry["plan"]["bytes_to_fetch"])
    local = shell.report("collapse", pair["base"], pair["tuned"], "--layers", "1", "--no-resume")
    assert found["layers"] == local["layers"]


@pytest.mark.slow
def test_offline_what_was_read_is_read_again(hub: HubServer, shell: Shell) -> None:
    words = ("collapse", "org/base", "org/tuned", "--layers", "1", "--no-resume")
    online = shell.report(*words)
    hub.log.clear()
    offline = shell.report(*words, HF_HUB_OFFLINE="1")
    assert offline["layers"] == online["layers"]
    assert hub.log == []
    other = shell("collapse", "org/base", "org/tuned", "--layers", "2", HF_HUB_OFFLINE="1")
    assert other.returncode == 1
    assert "geoscope: offline, and model-0000" in other.stderr
    assert other.stderr.strip().endswith("is not cached.")


def test_kept_tensors_are_counted_and_cleared(shell: Shell, pair: dict[str, Path]) -> None:
    shell("collapse", "org/base", "org/tuned", "--layers", "1")
    size = sum(of_layer(folder, 1) for folder in pair.values())
    folder = shell.home / "geoscope" / "hub"
    listed = shell("cache", "list").stdout.splitlines()
    assert listed[2:4] == [str(folder), f"18 tensors of Hub models, {size / 1e6:.1f} MB"]
    cleared = shell("cache", "clear").stdout.splitlines()
    assert cleared[1] == f"removed 18 tensors of Hub models from {folder}"
    assert not folder.exists()
    assert shell("cache", "list").stdout.splitlines()[3] == "0 tensors of Hub models, 0.0 MB"


# --- adapters -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The adapter of a run at three steps, as PEFT writes it."""
    root = tmp_path_factory.mktemp("steps")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    adapted = peft.get_peft_model(model(1), config)
    adapted.peft_config["default"].init_lora_weights = True
    found: dict[int, Path] = {}
    generator = torch.Generator().manual_seed(4)
    for step in (10, 20, 30):
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_" in name:
                    weight += 0.01 * torch.randn(weight.shape, generator=generator)
        found[step] = root / f"step_{step}"
        adapted.save_pretrained(found[step])
    return found


def test_branches_with_adapters_are_a_trajectory(
    hub: HubServer, shell: Shell, steps: dict[int, Path]
) -> None:
    branches = {f"step_{step}": files(folder) for step, folder in steps.items()}
    branches["step_30"] = {**branches["step_30"], "optimizer.pt": b"x" * 5000}
    hub.repos["org/lora"] = Repo({"README.md": b""}, branches)
    found = shell.report("trajectory", "org/lora@step_*")
    local = shell.report("trajectory", *steps.values())
    assert set(found) == set(local)
    for key in set(found) - {"provenance", "coverage"}:
        assert found[key] == local[key], key
    commit = commit_of(branches["step_30"])
    assert found["provenance"]["refs"][-1] == {
        "given": "org/lora@step_30", "resolved": f"org/lora@{commit}", "commit": commit,
        "storage_dtype": "adapter, float32",
    }  # fmt: skip
    fetched = {path.name for path in shell.home.rglob("snapshots/*/*")}
    assert fetched == {"adapter_config.json", "adapter_model.safetensors"}
    offline = shell.report("trajectory", "org/lora@step_*", HF_HUB_OFFLINE="1")
    assert offline["layers"] == found["layers"]


@pytest.mark.slow
def test_branches_with_sharded_models_are_a_trajectory_of_ranges(
    pair: dict[str, Path], hub: HubServer, shell: Shell, tmp_path: Path
) -> None:
    """As OLMo and TRL publish them: a branch a step, shards with an index in each."""
    local: dict[int, Path] = {}
    for step in (10, 20, 30):
        local[step] = tmp_path / f"step_{step}"
        shutil.copytree(pair["tuned"], local[step])
        for shard in local[step].glob("*.safetensors"):
            tensors = {name: one * (1 + step / 500) for name, one in load_file(shard).items()}
            save_file(tensors, shard, metadata={"format": "pt"})
    hub.repos["org/run"] = Repo({}, {path.name: files(path) for path in local.values()})
    words = ("--base", "org/base", "--layers", "1", "--no-directions")
    found = shell.report("trajectory", "org/run@step_*", *words)
    headers, rest = transferred(hub)
    wanted = sum(of_layer(folder, 1) for folder in (pair["base"], *local.values()))
    assert wanted * 0.99 <= rest < 1.2 * wanted  # norms are not followed
    assert headers <= 12 * 100_001
    assert not list(shell.home.rglob("snapshots/*/*.safetensors"))
    words = ("--base", str(pair["base"]), *words[2:])
    beside = shell.report("trajectory", *local.values(), *words)
    assert found["layers"] == beside["layers"]
    assert [one["name"] for one in found["layers"]]


NF4 = torch.linspace(-1, 1, 16)


def in_nf4(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices of the layers as bitsandbytes stores them, with absmax of 64 entries in a row."""
    found: dict[str, torch.Tensor] = {}
    for name, one in tensors.items():
        if ".layers." not in name or one.ndim != 2:
            found[name] = one
            continue
        blocks = one.float().reshape(-1, 64)
        absmax = blocks.abs().amax(1)
        codes = ((blocks / absmax[:, None])[..., None] - NF4).abs().argmin(-1).reshape(-1, 2)
        state = {
            "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(one.shape),
        }  # fmt: skip
        text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        found |= {
            name: (codes[:, :1] * 16 + codes[:, 1:]).to(torch.uint8),
            f"{name}.absmax": absmax,
            f"{name}.quant_map": NF4.clone(),
            f"{name}.quant_state.bitsandbytes__nf4": text,
        }
    return found


def test_a_base_of_bitsandbytes_is_read_in_ranges(
    pair: dict[str, Path], hub: HubServer, shell: Shell, tmp_path: Path
) -> None:
    folder = tmp_path / "nf4"
    folder.mkdir()
    shutil.copy(pair["base"] / "config.json", folder)
    whole = {n: t for one in pair["base"].glob("*.safetensors") for n, t in load_file(one).items()}
    save_file(in_nf4(whole), folder / "model.safetensors", metadata={"format": "pt"})
    hub.repos["org/nf4"] = Repo(files(folder))
    words = ("org/tuned", "--layers", "1")
    found = shell.report("collapse", "org/nf4", *words)
    _, rest = transferred(hub)
    wanted = of_layer(folder, 1) + of_layer(pair["tuned"], 1)
    assert wanted * 0.99 <= rest < 1.2 * wanted
    assert not list(shell.home.rglob("snapshots/*/*.safetensors"))
    local = shell.report("collapse", folder, pair["tuned"], *words[1:], "--no-resume")
    assert found["layers"] == local["layers"]
    assert len(found["layers"]) == 7
    assert any("NF4" in note for one in found["layers"] for note in one["notes"])


def test_an_adapter_on_the_hub_lies_over_its_base(
    pair: dict[str, Path], hub: HubServer, shell: Shell, tmp_path: Path
) -> None:
    """Alone, as base+adapter, and without the base: what the folders give."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model(1), config)
    generator = torch.Generator().manual_seed(5)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            weight.data.copy_(torch.randn(weight.shape, generator=generator))
    folder = tmp_path / "lora"
    adapted.save_pretrained(folder)
    hub.repos["org/lora"] = Repo(files(folder))
    expected = shell.report("collapse", pair["base"], folder)
    for words in (("org/base", "org/lora"), ("org/base", "org/base+org/lora")):
        found = shell.report("collapse", *words)
        assert found["layers"] == expected["layers"]
        resolved = found["provenance"]["refs"][1]["resolved"]
        assert resolved.endswith(f"org/lora@{commit_of(files(folder))}")
    whole = shell.report("collapse", pair["base"], pair["base"])
    assert len(expected["layers"]) == LAYERS < len(whole["layers"])
    alone, there = (shell.report("capacity", one) for one in ("org/lora", folder))
    assert alone["layers"] == there["layers"]
    assert alone["summary"]["model"]["nominal_rank"] == 2


@pytest.mark.slow
def test_lineage_fetches_its_sample_alone(
    hub: HubServer, shell: Shell, pair: dict[str, Path]
) -> None:
    found = shell.report("lineage", "org/tuned", "org/base")
    assert (found["summary"]["verdict"]["code"], found["coverage"]["status"]) == (
        "DESCENDS",
        "SAMPLE",
    )
    read = found["layers"]
    wanted = sum(2 * 2 * one["shape"][0] * one["shape"][1] for one in read)  # two models in bf16
    assert wanted <= transferred(hub)[1] < 1.2 * wanted
    assert found["summary"]["model"]["equal_embeddings"] is None
    local = shell.report("lineage", pair["tuned"], pair["base"])
    assert found["layers"] == local["layers"]
    assert local["summary"]["model"]["equal_embeddings"] == 0
