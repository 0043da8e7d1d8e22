"""Are the shards of a real LoRA run divided into its base and its adapter?"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from geoscope.formats.shard_names import lora_names, trained_biases
from geoscope.peft.adapter import Adapter, read_adapter
from geoscope.sources.open import open_checkpoint
from geoscope.sources.series import open_series
from geoscope.sources.shard_folder import open_shard_base, open_shards
from tests.helpers.files import assert_equal_bits
from tests.helpers.running import run as run_command

WRITER = Path(__file__).parents[1] / "helpers" / "write_lora_shards.py"


@pytest.mark.slow
def test_base_and_adapter_are_those_that_were_wrapped(tmp_path: Path) -> None:
    pytest.importorskip("peft")  # and with it transformers, for the process that writes
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, str(WRITER), str(run)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    actor = run / "actor"

    expected = open_checkpoint(str(run / "base"))
    base = open_shard_base(actor, "actor")
    # The head is in the state dict of a tied model, and in no file of transformers.
    assert set(base.tensors) == {*expected.tensors, "lm_head.weight"}
    assert base.tied_to == expected.tied_to == {"lm_head.weight": "model.embed_tokens.weight"}
    for name in expected.tensors:
        assert_equal_bits(base.read(name), expected.read(name))

    saved = read_adapter(actor / "lora_adapter")
    found = open_shards(actor, "actor")
    assert isinstance(found, Adapter)
    alone = tmp_path / "global_step_7" / "actor"
    shutil.copytree(actor, alone, ignore=shutil.ignore_patterns("lora_adapter"))
    (point,) = open_series([str(tmp_path / "global_step_7")]).points
    assert point.adapter is not None and point.place == "actor/: shards, read as an adapter"
    assert len(saved.modules) == 4
    for one in (found, point.adapter):
        assert list(one.modules) == list(saved.modules)
        for name, module in saved.modules.items():
            assert one.modules[name].scaling == module.scaling == 2
            for factor, kept in zip(one.factors(name), saved.factors(name), strict=True):
                assert_equal_bits(factor, kept)
                assert factor.count_nonzero() > 0

    # Alone, the run brings its own base: the same as the adapter over the model before it.
    asked = ("--json", "--no-resume")
    alone_out = run_command("collapse", run / "base", alone.parent, *asked).out
    over_out = run_command("collapse", run / "base", actor / "lora_adapter", *asked).out
    assert json.loads(alone_out)["layers"] == json.loads(over_out)["layers"]
    listed = run_command("inspect", alone.parent)
    assert listed.code == 0
    assert "q_proj" in listed.out


@pytest.mark.parametrize(
    ("bias", "found"),
    [
        ("none", ()),
        ("all", ("l.0.mlp.up.bias", "l.0.q.base_layer.bias")),
        ("lora_only", ("l.0.q.base_layer.bias",)),
    ],
)
def test_biases_that_the_run_trained_are_of_the_adapter(bias: str, found: tuple[str, ...]) -> None:
    prefix = "base_model.model."
    stored = [
        f"{prefix}{one}"
        for one in (
            "l.0.q.base_layer.weight", "l.0.q.base_layer.bias", "l.0.q.lora_A.default.weight",
            "l.0.q.lora_B.default.weight", "l.0.mlp.up.weight", "l.0.mlp.up.bias",
        )
    ]  # fmt: skip
    names = lora_names(stored)
    assert names is not None
    assert trained_biases(names, bias) == tuple(f"{prefix}{one}" for one in found)
