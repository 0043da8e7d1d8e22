"""Which device and precision computes, and what is refused in one line."""

from __future__ import annotations

import pytest
import torch

from geoscope.engine import device, free_memory, resolve_devices, resolve_dtype
from geoscope.errors import OptionError

CPU, CUDA, MPS = (torch.device(kind) for kind in ("cpu", "cuda", "mps"))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch):
    """A machine with so many CUDA devices, and with or without MPS."""

    def build(*, cuda: int = 0, mps: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    build()
    return build


def refusal(given: str) -> str:
    with pytest.raises(OptionError) as caught:
        resolve_devices(given)
    message = str(caught.value)
    assert "\n" not in message
    assert "`device`" in message
    return message


def test_auto_takes_cuda_where_there_is_one_else_the_cpu(machine) -> None:
    assert resolve_devices("auto") == (CPU,)
    machine(cuda=1)
    assert resolve_devices("auto") == (torch.device("cuda", 0),)


def test_auto_never_takes_mps_for_it_has_no_fp64(machine) -> None:
    machine(mps=True)
    assert resolve_devices("auto") == (CPU,)
    assert resolve_devices("mps") == (MPS,)


def test_the_cpu_is_always_there(machine) -> None:
    machine(cuda=2, mps=True)
    assert resolve_devices("cpu") == (CPU,)


def test_without_a_number_every_cuda_device_is_taken_and_with_one_that_one(machine) -> None:
    machine(cuda=3)
    every = tuple(torch.device("cuda", i) for i in range(3))
    assert resolve_devices("cuda") == resolve_devices("auto") == every
    assert resolve_devices("cuda:1") == every[1:2]


def test_what_torch_keeps_for_reuse_counts_as_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 200)
    assert free_memory(torch.device("cuda", 0)) == 1500


@pytest.mark.parametrize(("given", "present"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_cuda_that_is_not_there_is_refused_with_the_count(machine, given, present) -> None:
    machine(cuda=present)
    message = refusal(given)
    assert f"{present} CUDA devices" in message
    assert "`device` cpu" in message  # what to do


def test_mps_that_is_not_there_is_refused(machine) -> None:
    assert "no MPS device" in refusal("mps")


@pytest.mark.parametrize(
    "given",
    [
        "",
        "gpu",
        "CPU",
        "cpu:0",
        "cpu:",
        "mps:0",
        "cuda:",
        "cuda:x",
        "cuda:-1",
        "cuda:²",
        "cuda:0:1",
    ],
)
def test_what_is_no_device_is_refused_even_where_all_are_there(machine, given: str) -> None:
    machine(cuda=4, mps=True)
    message = refusal(given)
    assert repr(given) in message
    for choice in ("auto", "cpu", "cuda", "cuda:N", "mps"):
        assert choice in message


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_cpu_and_cuda_compute_in_either_precision(device: torch.device, dtype: str) -> None:
    assert resolve_dtype(dtype, device) == dtype


def test_mps_wants_float32_said_aloud() -> None:
    assert resolve_dtype("float32", MPS) == "float32"
    with pytest.raises(OptionError, match="`dtype` float32") as caught:
        resolve_dtype("float64", MPS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("given", ["", "bfloat16", "float16", "fp32", "double"])
def test_other_dtypes_are_refused(given: str) -> None:
    with pytest.raises(OptionError, match="float64, float32") as caught:
        resolve_dtype(given, CPU)
    assert repr(given) in str(caught.value)


def test_available_memory_is_that_of_the_tightest_control_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = {
        "/proc/meminfo": "MemTotal: 64 kB\nMemAvailable:    4096 kB\n",
        "/proc/self/cgroup": "4:memory:/job\n3:cpu:/\n0::/jobs/mine\n",
        "/sys/fs/cgroup/memory/job/memory.limit_in_bytes": "3000000\n",
        "/sys/fs/cgroup/memory/job/memory.usage_in_bytes": "1000000\n",
        "/sys/fs/cgroup/jobs/mine/memory.max": "max\n",
        "/sys/fs/cgroup/jobs/mine/memory.current": "10\n",
        "/sys/fs/cgroup/jobs/memory.max": "1500000\n",
        "/sys/fs/cgroup/jobs/memory.current": "500000\n",
    }
    monkeypatch.setattr(device, "_text", lambda path: files.get(str(path), ""))
    assert device.available_memory() == 1_000_000
    del files["/sys/fs/cgroup/jobs/memory.max"]
    assert device.available_memory() == 2_000_000
    del files["/proc/self/cgroup"]
    assert device.available_memory() == 4096 * 1024
    files.clear()  # another system: all the memory that there is
    assert device.available_memory() > 10**8
