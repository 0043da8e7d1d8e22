"""The callback inside of real trainers: what it logs, and that training ends as without it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import geoscope
from geoscope.errors import OptionError
from tests.helpers.tiny_models import VOCABULARY, live, llama

with warnings.catch_warnings():  # of packages that these import
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    from geoscope.integrations import loggers
    from geoscope.integrations import transformers as module
    from geoscope.integrations.transformers import GeoscopeCallback

pytestmark = pytest.mark.filterwarnings("ignore")  # of trainers, among themselves
STEPS = 4
IDS = ("update.stable_rank", "update.effective_rank", "update.entropy_rank", "update.top_share@1")


class Recorder:
    """A logger that keeps what it is given."""

    def __init__(self) -> None:
        self.logged: dict[int, dict[str, float]] = {}
        self.closed = 0

    def log(self, step: int, values: Mapping[str, float]) -> None:
        assert step not in self.logged
        self.logged[step] = dict(values)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(module, "_loggers_of", lambda _: [made])
    return made


def adapted(base: Path) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
    return peft.get_peft_model(live(base), config)


def train(model: Any, folder: Path, *callbacks: Any, **settings: Any) -> dict[str, Tensor]:
    """A few steps on fixed tokens; the weights at the end."""
    draws = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCABULARY, (8, 6), generator=draws)
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    how: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": STEPS, "learning_rate": 1e-2, "seed": 0,
        "per_device_train_batch_size": 2, "save_steps": 1, "logging_steps": 1, "use_cpu": True,
        "report_to": "none", "disable_tqdm": True, **settings,
    }  # fmt: skip
    arguments = transformers.TrainingArguments(**how)
    transformers.Trainer(
        model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks)
    ).train()
    return {name: one.detach().clone() for name, one in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].nan_to_num(7.0), other[name].nan_to_num(7.0)) for name in one
    )


def saves(run: Path) -> set[str]:
    return {path.name for path in run.glob("checkpoint-*")}


def test_an_adapter_has_the_numbers_of_its_saved_checkpoints(
    tmp_path: Path, recorder: Recorder
) -> None:
    base = llama(tmp_path / "base")
    plain = train(adapted(base), tmp_path / "plain")
    watched = train(adapted(base), tmp_path / "run", GeoscopeCallback())
    assert same(plain, watched)
    assert sorted(recorder.logged) == [1, 2, 3, 4] and recorder.closed == 1
    for step, values in recorder.logged.items():
        report = geoscope.compare(base, tmp_path / "run" / f"checkpoint-{step}")
        for key in IDS:
            assert values[f"geoscope/{key}"] == pytest.approx(report[key].value, rel=1e-5)
            layer = [row[key].value for row in report.layers if row.layer == 1]
            mean = sum(layer) / len(layer)  # type: ignore[arg-type]
            assert values[f"geoscope/layer_1/{key}"] == pytest.approx(mean, rel=1e-5)
        assert values["geoscope/rank"] == 4


def test_it_measures_every_n_steps_without_a_save(tmp_path: Path, recorder: Recorder) -> None:
    model = adapted(llama(tmp_path / "base"))
    train(model, tmp_path / "run", GeoscopeCallback(every=2), save_strategy="no")
    assert sorted(recorder.logged) == [2, 4]
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    with pytest.raises(OptionError, match="`every` 0"):
        GeoscopeCallback(every=0)


def test_checkpoints_that_are_rotated_are_measured_all_the_same(
    tmp_path: Path, recorder: Recorder
) -> None:
    base = llama(tmp_path / "base")
    plain = train(adapted(base), tmp_path / "plain", save_total_limit=2)
    watched = train(adapted(base), tmp_path / "run", GeoscopeCallback(), save_total_limit=2)
    assert same(plain, watched) and sorted(recorder.logged) == [1, 2, 3, 4]
    assert saves(tmp_path / "run") == saves(tmp_path / "plain") == {"checkpoint-3", "checkpoint-4"}


class Poison(transformers.TrainerCallback):
    """Makes the second step's weights NaN, as a loss that diverged does."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **has: Any) -> None:
        if state.global_step == 1:
            with torch.no_grad():
                next(p for p in has["model"].parameters() if p.requires_grad).fill_(float("nan"))


def test_a_run_that_diverges_ends_as_it_would(
    tmp_path: Path, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    base = llama(tmp_path / "base")
    plain = train(adapted(base), tmp_path / "plain", Poison())
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        watched = train(adapted(base), tmp_path / "run", Poison(), GeoscopeCallback())
    assert same(plain, watched) and any(one.isnan().any() for one in watched.values())
    assert "its factors hold NaN or Inf" in caplog.text
    assert all(value == value for one in recorder.logged.values() for value in one.values())


class Full(Recorder):
    """A logger on a disk that is full."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        raise OSError(28, "No space left on device")


def test_a_full_disk_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_loggers_of", lambda _: [Full()])
    base = llama(tmp_path / "base")
    plain = train(adapted(base), tmp_path / "plain")
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        assert same(plain, train(adapted(base), tmp_path / "run", GeoscopeCallback()))
    assert caplog.text.count("No space left on device") == 1


def test_a_disk_that_is_full_from_the_start_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Unopened(Recorder):
        def __init__(self, *_: Any) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setitem(loggers.LOGGERS, "tensorboard", Unopened)
    callback, state = GeoscopeCallback(), transformers.TrainerState(is_world_process_zero=True)
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to="none")
    arguments.report_to = ["tensorboard"]
    model: Any = adapted(llama(tmp_path / "base"))
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        callback.on_train_begin(arguments, state, None, model=model)
        for step in (1, 2):
            state.global_step = step
            callback.on_save(arguments, state, None, model=model)
        callback.on_train_end(arguments, state, None, model=model)
    assert caplog.text.count("No space left on device") == 1


def test_what_cannot_be_measured_is_said_once(
    tmp_path: Path, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    model = adapted(llama(tmp_path / "base"))
    model.merge_adapter()  # its factors are in the base
    state = transformers.TrainerState(is_world_process_zero=True)
    callback = GeoscopeCallback()
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        for step in (1, 2):
            state.global_step = step
            callback.on_save(None, state, None, model=model)
    assert caplog.text.count("call unmerge_adapter() first") == 1 and recorder.logged == {}


def test_other_processes_measure_nothing(tmp_path: Path, recorder: Recorder) -> None:
    state = transformers.TrainerState(is_world_process_zero=False)
    GeoscopeCallback().on_save(None, state, None, model=adapted(llama(tmp_path / "base")))
    assert recorder.logged == {}


@pytest.mark.slow
def test_a_whole_model_is_measured_beside_the_run(tmp_path: Path, recorder: Recorder) -> None:
    base = llama(tmp_path / "base")
    plain = train(live(base), tmp_path / "plain", max_steps=2)
    callback = GeoscopeCallback(base=str(base), metrics=("relative_update",), seconds=120)
    watched = train(live(base), tmp_path / "run", callback, max_steps=2)
    assert same(plain, watched)
    assert sorted(recorder.logged) == [1, 2]
    for step, values in recorder.logged.items():
        report = geoscope.compare(base, tmp_path / "run" / f"checkpoint-{step}")
        assert values["geoscope/relative_update"] == report["relative_update"].value
    assert callback._watcher is not None and callback._watcher.process.poll() is not None


@pytest.mark.slow
@pytest.mark.parametrize("trouble", ["nan", "disk", "rotated"])
def test_a_run_of_a_whole_model_ends_as_it_would(
    tmp_path: Path, recorder: Recorder, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    base, run = llama(tmp_path / "base"), tmp_path / "run"
    others = [Poison()] if trouble == "nan" else []
    how: dict[str, Any] = {"max_steps": 3, "save_total_limit": 2 if trouble == "rotated" else None}
    if trouble == "disk":
        (run / "geoscope.jsonl").mkdir(parents=True)  # its own file cannot be written
    plain = train(live(base), tmp_path / "plain", *others, **how)
    callback = GeoscopeCallback(base=str(base), metrics=("relative_update",), seconds=60)
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        watched = train(live(base), run, *others, callback, **how)
    assert same(plain, watched) and saves(run) == saves(tmp_path / "plain")
    assert callback._watcher is not None and callback._watcher.process.poll() is not None
    values = [value for one in recorder.logged.values() for value in one.values()]
    assert all(value == value for value in values)
    if trouble == "disk":
        assert recorder.logged == {} and "geoscope.jsonl" in caplog.text
    else:
        assert 3 in recorder.logged or trouble == "nan"


def test_a_base_that_is_not_there_is_said(
    tmp_path: Path, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    model = live(llama(tmp_path / "base"))
    model.config._name_or_path = model.name_or_path = ""
    with caplog.at_level(logging.WARNING, logger=module.__name__):
        train(model, tmp_path / "run", GeoscopeCallback(), max_steps=1)
    assert "give the one it started from as `base`" in caplog.text


def scalars(folder: Path) -> dict[int, dict[str, float]]:
    """Step → what geoscope's event files of TensorBoard hold."""
    reader: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (events,) = folder.rglob("geoscope/events*")
    found = reader.EventAccumulator(str(events.parent))
    found.Reload()
    steps: dict[int, dict[str, float]] = {}
    for key in found.Tags()["scalars"]:
        for each in found.Scalars(key):
            steps.setdefault(each.step, {})[key] = each.value
    return steps


def test_tensorboard_has_what_report_to_names(tmp_path: Path) -> None:
    model = adapted(llama(tmp_path / "base"))
    train(model, tmp_path / "run", GeoscopeCallback(), report_to=["tensorboard"])
    found = scalars(tmp_path)
    report = geoscope.anisotropy(tmp_path / "run" / "checkpoint-4")
    assert found[4]["geoscope/update.stable_rank"] == pytest.approx(
        report["stable_rank"].value, rel=1e-5
    )


@pytest.mark.slow
def test_grpo_of_trl_is_measured(tmp_path: Path) -> None:
    """The event files of TensorBoard, read back, hold what `compare` says of the checkpoints."""
    trl = pytest.importorskip("trl")
    pytest.importorskip("datasets")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", "<pad>", *map(str, range(VOCABULARY - 4))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>",
    )  # fmt: skip

    def even(completions: list[str], **_: Any) -> list[float]:
        numbers = [[int(w) for w in one.split() if w.isdigit()] for one in completions]
        return [sum(n % 2 == 0 for n in own) / max(1, len(own)) for own in numbers]

    base = llama(tmp_path / "base")
    settings = trl.GRPOConfig(
        output_dir=str(tmp_path / "run"), max_steps=3, learning_rate=1e-2, seed=0,
        per_device_train_batch_size=8, num_generations=4, max_completion_length=8, bf16=False,
        use_cpu=True, logging_steps=1, save_steps=1, report_to="tensorboard", disable_tqdm=True,
        save_total_limit=2,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        model=adapted(base), reward_funcs=even, args=settings, processing_class=tokenizer,
        train_dataset=Dataset.from_dict({"prompt": [f"{a} {a + 1}" for a in range(8)]}),
        callbacks=[GeoscopeCallback()],
    )  # fmt: skip
    trainer.train()
    logged = scalars(tmp_path)
    assert sorted(logged) == [1, 2, 3]
    for step in (2, 3):
        report = geoscope.compare(base, tmp_path / "run" / f"checkpoint-{step}")
        for key in IDS:
            found = logged[step].get(f"geoscope/{key}")
            assert found is None or found == pytest.approx(report[key].value, rel=1e-5)
        assert f"geoscope/{IDS[0]}" in logged[step]
