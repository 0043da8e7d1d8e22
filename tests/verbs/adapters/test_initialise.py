"""init-adapter from end to end: real models in, folders that PEFT loads out, inputs untouched."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from geoscope import report as reports
from geoscope.adapters.table import INITIALISATIONS
from geoscope.cli import app
from geoscope.errors import CheckpointError, GeoscopeError, NumericsError, OptionError
from geoscope.verbs.adapters import initialise as module
from geoscope.verbs.adapters.initialise import default_output, initialise
from geoscope.verbs.adapters.options import InitOptions
from geoscope.verbs.adapters.verify import verify_adapter
from tests.helpers import tiny_models
from tests.helpers.matrices import gaussian, save_model

MODELS = ("llama", "qwen2_tied", "gpt2", "qwen3_moe")
LAYOUTS = ("residual", "mirror", "anchor")
NAME = "model.layers.{}.self_attn.{}.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: getattr(tiny_models, name)(root / name) for name in MODELS}


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def small(folder: Path, **tensors: torch.Tensor) -> Path:
    """A checkpoint of two matrices, some replaced."""
    base = {
        NAME.format(i, kind): gaussian(20, 16, seed=10 * i + j).float()
        for i in range(2)
        for j, kind in enumerate(("q_proj", "k_proj"))
    }
    return save_model(folder, base | tensors)


# --- what is written ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_the_output_is_the_model_and_verifies(
    models: dict[str, Path], tmp_path: Path, model: str, layout: str
) -> None:
    before = hashes(models[model])
    made = initialise(str(models[model]), tmp_path / "out", InitOptions(rank=4, layout=layout))
    assert hashes(models[model]) == before
    found = verify_adapter(str(tmp_path / "out"), with_peft=True)
    assert found.ok, [check for check in found.checks if not check.ok]
    assert found.layout == layout
    assert made.card.rank == (8 if layout == "mirror" else 4)
    assert made.card.start_errors["float32"] < 1e-6
    bfloat16 = made.card.start_errors["bfloat16"]
    assert (bfloat16 > 1e-4) == (layout == "residual")


@pytest.mark.parametrize("method", [name for name in INITIALISATIONS if name != "geora"])
def test_every_method_starts_at_the_model(
    models: dict[str, Path], tmp_path: Path, method: str
) -> None:
    initialise(str(models["llama"]), tmp_path / "out", InitOptions(method=method, rank=3))
    assert verify_adapter(str(tmp_path / "out"), with_peft=True).ok


def test_a_residual_keeps_what_it_does_not_adapt(models: dict[str, Path], tmp_path: Path) -> None:
    source, out = models["llama"], tmp_path / "out"
    initialise(str(source), out, InitOptions(rank=2, targets=("q_proj",)))
    shards = {path.name for path in source.glob("*.safetensors")}
    assert {path.name for path in (out / "residual").glob("*.safetensors")} == shards
    for name in shards:
        before, after = load_file(source / name), load_file(out / "residual" / name)
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            assert torch.equal(tensor, after[key]) != ("q_proj" in key)
    config = json.loads((out / "adapter/adapter_config.json").read_text())
    assert config["target_modules"] == ["q_proj"]
    for name in ("config.json", "generation_config.json"):
        assert (out / "residual" / name).read_bytes() == (source / name).read_bytes()


def test_equal_input_gives_equal_bytes_with_any_number_of_workers(
    models: dict[str, Path], tmp_path: Path
) -> None:
    found = []
    for jobs in (1, 2):
        out = tmp_path / "out"  # which the configuration and the card name
        initialise(str(models["llama"]), out, InitOptions(rank=4, jobs=jobs))
        found.append(hashes(out))
        out.rename(tmp_path / str(jobs))
    assert found[0] == found[1]


@pytest.mark.parametrize(("jobs", "expected"), [(None, 3), (2, 2)])
def test_as_many_work_as_there_are_cores(
    jobs: int | None, expected: int, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    whole = module.computed

    def computed(*given: Any, workers: int, room: int) -> Any:
        used.append(workers)
        return whole(*given, workers=workers, room=room)

    monkeypatch.setattr(module, "computed", computed)
    monkeypatch.setattr(module, "cores", lambda: 3)
    initialise(str(models["llama"]), rank=2, jobs=jobs, device="cpu", cache=None)
    assert used == [expected]


@pytest.mark.parametrize(
    ("free", "workers", "copies"),
    [(10**12, 1, 6), (10**12, 8, 27), (8 * 100 * 12, 8, 12), (0, 8, 6)],
)
def test_by_default_the_memory_serves_every_worker(
    free: int, workers: int, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three fp32 copies for each and for one that waits, in half of what is free; six at least."""
    monkeypatch.setattr(module, "available_memory", lambda: free)
    assert module._room(InitOptions(), 100, workers) == 100 * copies
    assert module._room(InitOptions(max_memory="min"), 100, workers) == 0


def test_a_residual_is_named_by_its_whole_path(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = initialise(str(models["llama"]), Path("out"), InitOptions(rank=2))
    config = json.loads((tmp_path / "out/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "out" / "residual")
    assert made.readme == Path("out/adapter/README.md")
    assert made.report.provenance.refs[1].resolved == str(tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "stored"),
    [
        ({}, "float32"),
        ({"residual_dtype": "bfloat16"}, "mixed: bfloat16 14, float32 7"),
        ({"layout": "mirror", "include": ("q_proj",)}, "float32"),
    ],
)
def test_the_report_tells_the_dtype_that_was_written(
    models: dict[str, Path], tmp_path: Path, options: dict[str, Any], stored: str
) -> None:
    made = initialise(str(models["llama"]), tmp_path / "out", InitOptions(rank=2, **options))
    assert made.report.provenance.refs[1].storage_dtype == stored


def test_the_models_gap_is_the_smallest_and_its_error_the_largest(
    models: dict[str, Path], tmp_path: Path
) -> None:
    report = initialise(str(models["llama"]), tmp_path / "out", InitOptions(rank=2)).report
    rows = [layer.values for layer in report.layers]
    for key, extreme in (("gap", min), ("reconstruction_error", max)):
        assert report.summary.model[key] == extreme(row[key] for row in rows)  # type: ignore[type-var]


def test_what_a_method_has_not_is_in_no_table(models: dict[str, Path], tmp_path: Path) -> None:
    report = initialise(
        str(models["llama"]), tmp_path / "out", InitOptions(method="pissa", rank=2)
    ).report
    text = reports.render_text(report, width=140, colour=False, details=True)
    assert "captured energy" not in text.split("(…)")[0]
    assert "Jaccard" not in text
    assert "mask" not in text.split("(…)")[0]
    assert "head energy" in text
    assert "~" not in text
    lora = InitOptions(method="lora", rank=2)
    made = initialise(str(models["llama"]), tmp_path / "lora", lora)
    text = reports.render_text(made.report, width=140, colour=False, details=True)
    assert "head energy" not in text.split("(…)")[0]  # of a product that is zero
    reports.write(report, tmp_path / "figure.svg")
    figure = (tmp_path / "figure.svg").read_text()
    assert "What the initial adapter holds" in figure
    assert "masks" not in figure


def test_lora_draws_another_A_for_every_matrix(models: dict[str, Path], tmp_path: Path) -> None:
    for seed in (0, 1):
        options = InitOptions(method="lora", rank=4, seed=seed)
        initialise(str(models["llama"]), tmp_path / str(seed), options)
    tensors = [load_file(tmp_path / str(seed) / "adapter_model.safetensors") for seed in (0, 1)]
    first = [tensor for key, tensor in tensors[0].items() if "lora_A" in key]
    assert not any(
        torch.equal(a, b) for i, a in enumerate(first) for b in first[:i] if a.shape == b.shape
    )
    assert all(
        not torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0] if "_A" in key
    )
    assert all(not tensor.any() for key, tensor in tensors[0].items() if "lora_B" in key)


def test_the_record_and_the_report_tell_the_same(models: dict[str, Path], tmp_path: Path) -> None:
    made = initialise(str(models["llama"]), tmp_path / "out", InitOptions(rank=4, rho=0.3))
    record = json.loads((tmp_path / "out/geoscope.json").read_text())
    assert record["rho"] == 0.3
    for layer in made.report.layers:
        facts = record["matrices"][layer.name]["facts"]
        assert all(layer.values[key] == value for key, value in facts.items() if value is not None)
        assert 0.25 < layer.values["density_spec"] < 0.35  # type: ignore[operator]
        assert layer.nulls["head_energy"] == 4 / layer.shape[1]
        assert layer.values["reconstruction_error"] < 1e-7  # type: ignore[operator]
    path = tmp_path / "report.json"
    reports.write(made.report, path)
    assert reports.read(path) == made.report
    for suffix in ("png", "md", "csv"):
        reports.write(made.report, tmp_path / f"report.{suffix}")
    text = reports.render_text(made.report, width=100, colour=False, details=True)
    assert "density of the mask" in text
    assert "COMPLETE 14 of 14" in text


def test_a_card_names_base_command_and_rule(models: dict[str, Path], tmp_path: Path) -> None:
    words = ["geoscope", "init-adapter", "MODEL"]
    for layout, told in (("residual", "KL has to be off"), ("mirror", "right KL")):
        out = tmp_path / layout
        initialise(str(models["llama"]), out, InitOptions(rank=8, layout=layout), command=words)
        where = out / "adapter/README.md" if layout == "residual" else out / "README.md"
        card = where.read_text()
        assert "geoscope init-adapter MODEL" in card
        assert told in " ".join(card.split())
        assert f"--max-lora-rank {8 if layout == 'residual' else 16}" in card
        assert ("use_kl_loss=False" in card) == (layout == "residual")


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"rank": 17}, OptionError, ("_proj.weight", "`rank` 17", "16")),
        ({"rank": 0}, OptionError, ("`rank` 0",)),
        ({"rho": 1.0}, OptionError, ("`rho`", "between 0 and 1")),
        ({"rho": 0.2, "method": "pissa"}, OptionError, ("`rho`", "pissa")),
        ({"method": "lora", "layout": "mirror"}, OptionError, ("`layout`",)),
        ({"layout": "sideways"}, OptionError, ("`layout`",)),
        ({"layout": "mirror", "residual_dtype": "bfloat16"}, OptionError, ("`residual_dtype`",)),
        ({"targets": ("z_proj",)}, OptionError, ("z_proj", "q_proj")),
        ({"alpha": -1.0}, OptionError, ("alpha",)),
        ({"alpha": 0.0}, OptionError, ("`alpha` 0",)),
        ({"alpha": float("nan")}, OptionError, ("`alpha` nan",)),
        ({"scale_convention": "peft"}, OptionError, ("`scale_convention`", "geora, pissa")),
        ({"spec_rank": 0}, OptionError, ("`spec_rank` 0",)),
        ({"spec_rank": 17}, OptionError, ("_proj.weight", "`spec_rank` 17", "16")),
        ({"include": ("(",)}, OptionError, ("`include`", "regular expression")),
        ({"exclude": ("proj",)}, CheckpointError, ("no matrix",)),
    ],
)
def test_what_cannot_be_is_one_line(
    tmp_path: Path, options: dict[str, Any], error: type[GeoscopeError], words: tuple[str, ...]
) -> None:
    model = small(tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")  # which is the next thing to refuse
    with pytest.raises(error) as caught:
        initialise(str(model), tmp_path / "out", InitOptions(**{"rank": 2, **options}))
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert not _loadable(tmp_path / "out")


@pytest.mark.parametrize("bad", ["nan", "inf", "zero"])
def test_a_matrix_without_directions_is_named(tmp_path: Path, bad: str) -> None:
    weight = gaussian(20, 16, seed=3).float()
    if bad == "zero":
        weight.zero_()
    else:
        weight[2, 3] = float(bad)
    model = small(tmp_path / "model", **{NAME.format(1, "k_proj"): weight})
    with pytest.raises(NumericsError) as caught:
        initialise(str(model), tmp_path / "out", InitOptions(rank=2))
    assert NAME.format(1, "k_proj") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not _loadable(tmp_path / "out")


def test_a_tied_matrix_is_refused_in_the_residual_and_adapted_elsewhere(
    models: dict[str, Path], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"rank": 2, "include": ("embed_tokens",)}
    with pytest.raises(CheckpointError, match="tied"):
        initialise(str(models["qwen2_tied"]), tmp_path / "out", InitOptions(**options))


def test_a_head_that_is_not_stored_is_told_by_its_tie(
    models: dict[str, Path], tmp_path: Path
) -> None:
    options = InitOptions(rank=2, include=("lm_head",), layout="mirror")
    words = r"lm_head\.weight is tied to model\.embed_tokens\.weight"
    with pytest.raises(CheckpointError, match=words):
        initialise(str(models["qwen2_tied"]), tmp_path / "out", options)


def test_another_layout_in_the_same_folder_is_refused(
    models: dict[str, Path], tmp_path: Path
) -> None:
    for first, second in (("residual", "mirror"), ("mirror", "anchor"), ("anchor", "residual")):
        out = tmp_path / first
        initialise(str(models["llama"]), out, InitOptions(rank=2, layout=first))
        before = hashes(out)
        with pytest.raises(CheckpointError, match=r"adapter_config\.json.* another output"):
            initialise(str(models["llama"]), out, InitOptions(rank=2, layout=second, force=True))
        assert hashes(out) == before
        assert verify_adapter(str(out)).ok


def test_only_an_original_model_is_initialised(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, out = str(models["llama"]), tmp_path / "out"
    initialise(original, out, InitOptions(rank=2))
    words = f"give the original model, {original}"
    for part in ("residual", "adapter", ""):
        with pytest.raises(CheckpointError) as caught:
            initialise(str(out / part), tmp_path / "again", InitOptions(rank=2))
        told = str(caught.value)
        assert "\n" not in told
        assert words in told
    monkeypatch.chdir(out / "residual")
    with pytest.raises(CheckpointError, match="a base rewritten by init-adapter"):
        initialise(".", tmp_path / "again", InitOptions(rank=2))
    assert not (tmp_path / "again").exists()


def test_the_factors_on_their_way_count_for_the_disk(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, int] = {}

    def measured(path: Path, needed: int, meanwhile: int) -> None:
        seen.update(needed=needed, meanwhile=meanwhile)

    monkeypatch.setattr("geoscope.outputs.output_folder._refuse_full_disk", measured)
    for layout in LAYOUTS:
        out = tmp_path / layout
        initialise(str(models["llama"]), out, InitOptions(rank=2, layout=layout))
        adapters = [*out.rglob("adapter_model.safetensors")]
        written = sum(
            tensor.numel() * 4 for file in adapters for tensor in load_file(file).values()
        )
        assert seen["meanwhile"] == written


def test_a_full_folder_needs_force_and_inputs_are_never_written_to(
    models: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = InitOptions(rank=2, layout="mirror")
    initialise(str(models["llama"]), out, options)
    with pytest.raises(CheckpointError, match="`force`"):
        initialise(str(models["llama"]), out, options)
    initialise(str(models["llama"]), out, InitOptions(rank=2, layout="mirror", force=True))
    with pytest.raises(CheckpointError, match="input"):
        initialise(str(models["llama"]), models["llama"], InitOptions(rank=2, force=True))


def test_an_error_on_the_way_leaves_nothing_loadable_behind(tmp_path: Path) -> None:
    weight = gaussian(20, 16, seed=3).float()
    weight[0, 0] = float("nan")
    model = small(tmp_path / "model", **{NAME.format(1, "q_proj"): weight})
    for layout in LAYOUTS:
        with pytest.raises(NumericsError):
            initialise(str(model), tmp_path / layout, InitOptions(rank=2, layout=layout))
        assert not (tmp_path / layout).exists()


def _loadable(folder: Path) -> list[Path]:
    found = [*folder.rglob("config.json"), *folder.rglob("adapter_config.json")]
    return [*found, *folder.rglob("*.index.json")]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL")
def test_a_killed_process_leaves_no_loadable_folder(tmp_path: Path) -> None:
    tensors = {
        f"model.layers.{i}.mlp.up_proj.weight": gaussian(300, 200, seed=i).float()
        for i in range(24)
    }
    model, out = save_model(tmp_path / "model", tensors), tmp_path / "out"
    words = ["-m", "geoscope", "init-adapter", str(model), "-o", str(out), "--rank", "4", "-q"]
    process = subprocess.Popen(
        [sys.executable, *words],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while not out.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    killed = process.wait() == -signal.SIGKILL
    assert not killed or not [*out.rglob("adapter_config.json"), *out.rglob("config.json")]


# --- the command ----------------------------------------------------------------------------------


def run(*words: str) -> Any:
    return CliRunner().invoke(app, [*words], catch_exceptions=True)


def test_the_command_repeats_itself_from_its_card(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = str(models["llama"])
    words = [
        "init-adapter",
        model,
        "--rank",
        "4",
        "--layout",
        "mirror",
        "--targets",
        "q_proj,v_proj",
    ]
    assert run(*words, "-q").exit_code == 0
    out = tmp_path / "llama-geora-r4"
    card = (out / "README.md").read_text()
    command = next(line for line in card.splitlines() if line.startswith("geoscope init-adapter"))
    first = hashes(out)
    assert run(*command.split()[1:], "-q", "--force").exit_code == 0
    assert hashes(out) == first
    assert run("verify-adapter", str(out)).exit_code == 0


def test_the_current_folder_is_the_model_where_it_holds_one(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models["gpt2"])
    done = run("init-adapter", "--rank", "2", "-o", str(tmp_path / "out"), "--json", "-q")
    assert done.exit_code == 0
    card = (tmp_path / "out/adapter/README.md").read_text()
    assert f'base_model: "{models["gpt2"]}"' in card
    assert f"geoscope init-adapter {models['gpt2']}" in card
    assert json.loads(done.stdout)["kind"] == "init-adapter"
    monkeypatch.chdir(tmp_path)
    done = run("init-adapter", "--rank", "2")
    assert isinstance(done.exception, OptionError)
    assert "no MODEL given" in str(done.exception)


def test_what_is_said_beside_the_report(models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("init-adapter", str(models["llama"]), "--rank", "2", "-o", str(out))
    first, *lines = done.stderr.splitlines()
    assert first == f"geora of rank 2 for 14 matrices of {models['llama']}, to {out}"
    assert all(len(line) <= 80 or str(out) in line for line in lines)
    assert f"{out}/adapter/README.md tells how to load it" in " ".join(done.stderr.split())
    assert not run(
        "init-adapter", str(models["llama"]), "--rank", "2", "-o", f"{out}-2", "-q"
    ).stderr


def test_a_record_is_not_shown_as_a_report(models: dict[str, Path], tmp_path: Path) -> None:
    initialise(str(models["llama"]), tmp_path / "out", InitOptions(rank=2))
    done = run("show", str(tmp_path / "out/geoscope.json"))
    assert "record of an adapter folder" in str(done.exception)
    assert "verify-adapter" in str(done.exception)


def test_the_default_name_tells_model_method_and_rank() -> None:
    options = InitOptions(method="pissa", rank=32)
    assert default_output("org/name@main", options) == Path("name-pissa-r32")
    assert default_output("models/tiny/", options) == Path("tiny-pissa-r32")


def test_verify_fails_on_a_changed_folder(models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    initialise(str(models["llama"]), out, InitOptions(rank=2, residual_dtype="bfloat16"))
    done = run("verify-adapter", str(out))
    assert done.exit_code == 1
    title, _, rest = done.stdout.partition("\n\n")
    assert title.startswith(str(out))
    headline, *lines = rest.splitlines()
    marks = [line[:4] for line in lines if line[:4] in ("ok  ", "FAIL", "warn")]
    assert headline == f"NOT SOUND: {marks.count('FAIL')} of {len(marks)} checks failed."
    assert 0 < marks.count("FAIL") < len(marks)
    assert run("verify-adapter", str(out), "-q").stdout == f"{headline}\n"
    assert run("verify-adapter", str(out), "--allow-lossy").exit_code == 0


def test_convert_writes_a_plain_adapter(models: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    initialise(str(models["llama"]), out, InitOptions(rank=2))
    words = ["convert-adapter", str(out), str(out / "adapter"), "-o", str(tmp_path / "plain")]
    done = run(*words)
    assert done.exit_code == 0, done.exception
    assert "\n\nPLAIN LORA OF RANK 4: exact.\n" in done.stdout
    config = json.loads((tmp_path / "plain/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["base_model_name_or_path"] == str(models["llama"])
    done = run(*words, "--rank", "2", "--force", "--json")
    assert json.loads(done.stdout)["discarded"] == 0  # nothing was trained
