"""The base among the checkpoints, by any path or as a copy; and epochs that count from 0."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from geoscope.errors import OptionError
from geoscope.records import Report
from geoscope.verbs.series.extrapolate import extrapolate
from geoscope.verbs.series.follow import follow
from geoscope.verbs.series.options import FollowOptions
from tests.helpers.matrices import save_model
from tests.helpers.runs import Run, lora_run, same_numbers

STEPS = (0, 10, 20, 30, 40)


def followed(points: list[str], **options: str) -> Report:
    chosen = FollowOptions(**options, jobs=1, directions=False)  # pyright: ignore[reportArgumentType]
    return follow(points, options=chosen)


def notes(report: Report) -> str:
    return "\n".join(report.provenance.parameters["notes"])


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run whose base lies among the checkpoints, as checkpoint-0."""
    found = Run.write(tmp_path, STEPS, drift=0.2)
    shutil.copytree(found.base, found.points[0].with_name("checkpoint-0"))
    return found


def as_is(path: Path) -> str:
    return str(path)


def trailing(path: Path) -> str:
    return f"{path}/"


def relative(path: Path) -> str:
    return os.path.relpath(path)


def linked(path: Path) -> str:
    link = path.parent.parent / "start"
    link.symlink_to(path)
    return str(link)


def dotted(path: Path) -> str:
    return f"{path.parent}/../{path.parent.name}/{path.name}"


@pytest.mark.parametrize("spelling", [as_is, trailing, relative, linked, dotted])
def test_the_base_among_the_checkpoints_is_taken_out(
    run: Run, spelling: Callable[[Path], str]
) -> None:
    start = run.points[0].with_name("checkpoint-0")
    found = followed([run.folder], base=spelling(start))
    assert found.summary.steps == STEPS
    assert f"{start}: is the base; taken out of the series" in notes(found)
    shutil.rmtree(start)
    same_numbers(found, followed([run.folder], base=str(run.base)), rel=0)


def test_a_copy_of_the_base_at_step_0_is_known_by_its_weights(run: Run) -> None:
    found = followed([run.folder], base=str(run.base))
    assert found.summary.steps == STEPS
    assert "checkpoint-0: holds the weights of the base; taken out" in notes(found)


def test_other_weights_at_step_0_are_refused_with_the_way_out(run: Run) -> None:
    path = run.points[0].with_name("checkpoint-0") / "model-00001-of-00002.safetensors"
    save_file({k: 1.01 * v for k, v in load_file(path).items()}, path)
    with pytest.raises(OptionError, match=r"checkpoint-0: step 0 must come after .*`steps`$"):
        followed([run.folder], base=str(run.base))


def test_a_base_at_a_later_step_keeps_it(run: Run) -> None:
    later = [str(point) for point in run.points]
    found = followed(later, base=later[0])
    assert found.summary.steps == STEPS[1:]
    with pytest.raises(OptionError, match=r"checkpoint-10: step 10 must come after .*, step 20\)"):
        followed(later, base=later[1])


def test_extrapolate_takes_it_out_too(run: Run, tmp_path: Path) -> None:
    start = str(run.points[0].with_name("checkpoint-0"))
    options = FollowOptions(base=start, jobs=1)
    made = extrapolate([run.folder], 50, tmp_path / "out", method="hold", options=options)
    assert any("is the base" in note for note in made.notes)


def test_a_base_of_another_kind_than_the_series(tmp_path: Path) -> None:
    """A whole model at step 0, adapters after it."""
    run, adapters, _ = lora_run(tmp_path, STEPS, from_zero=True)
    start = shutil.copytree(run.base, adapters / "checkpoint-0")
    found = followed([str(adapters)], base=str(start))
    assert found.summary.steps == STEPS


@pytest.mark.parametrize("from_zero", [True, False])
def test_the_adapter_before_training_among_the_checkpoints(tmp_path: Path, from_zero: bool) -> None:
    _, adapters, initial = lora_run(tmp_path, STEPS, from_zero=from_zero)
    alone = followed([str(adapters)], initial_adapter=str(initial))
    start = shutil.copytree(initial, adapters / "checkpoint-0")
    for given in (str(start), str(initial)):  # itself, and a copy of it
        found = followed([str(adapters)], initial_adapter=given)
        same_numbers(found, alone, rel=0)
    if from_zero:
        same_numbers(followed([str(adapters)]), alone, rel=1e-12)
    else:
        with pytest.raises(OptionError, match=r"step 0 must come after .*the base"):
            followed([str(adapters)])


def test_whole_models_have_no_adapter_before_training(tmp_path: Path) -> None:
    run, _, initial = lora_run(tmp_path, STEPS, from_zero=True)
    with pytest.raises(OptionError, match="`initial_adapter` is for series of adapters"):
        followed([run.folder], base=str(run.base), initial_adapter=str(initial))


# --- epochs ---------------------------------------------------------------------------------------


def epochs(run: Run, first: int) -> list[Path]:
    """The checkpoints of a run as epochs from `first` on."""
    root = Path(run.folder).with_name("epochs")
    return [
        shutil.copytree(point, root / f"epoch_{first + i}") for i, point in enumerate(run.points)
    ]


def test_epoch_0_is_trained_where_it_is_not_the_base(tmp_path: Path) -> None:
    run = Run.write(tmp_path, STEPS, drift=0.2)
    folder = str(epochs(run, 0)[0].parent)
    found = followed([folder], base=str(run.base))
    assert found.summary.steps == (0, 1, 2, 3, 4)
    assert "epoch_0 is read as epoch 1" in notes(found) and "`steps`" in notes(found)
    # relative to the first checkpoint no number changes
    assert followed([folder]).summary.steps == (0, 1, 2, 3)


def test_epochs_beside_epoch_0_are_shifted_without_it(tmp_path: Path) -> None:
    run = Run.write(tmp_path, STEPS, drift=0.2)
    later = [str(path) for path in epochs(run, 0)[1:]]
    assert followed(later, base=str(run.base)).summary.steps == (0, 2, 3, 4)


def test_epochs_from_1_on_stay(tmp_path: Path) -> None:
    run = Run.write(tmp_path, STEPS, drift=0.2)
    folder = str(epochs(run, 1)[0].parent)
    assert followed([folder], base=str(run.base)).summary.steps == (0, 1, 2, 3, 4)


def test_epoch_0_that_is_the_base_is_no_training(tmp_path: Path) -> None:
    run = Run.write(tmp_path, STEPS, drift=0.2)
    folder = epochs(run, 1)[0].parent
    save_model(folder / "epoch_0", run.models[0])
    found = followed([str(folder)], base=str(run.base))
    assert found.summary.steps == (0, 1, 2, 3, 4)
    assert "epoch_0: holds the weights of the base" in notes(found)


def test_adapters_of_epochs_from_0_on(tmp_path: Path) -> None:
    _, adapters, _ = lora_run(tmp_path, STEPS, from_zero=True)
    for i, step in enumerate(STEPS[1:]):
        (adapters / f"checkpoint-{step}").rename(adapters / f"epoch_{i}")
    found = followed([str(adapters)])
    assert found.summary.steps == (0, 1, 2, 3, 4)
    assert torch.tensor(found.layers[0].gram).shape == (4, 4)
