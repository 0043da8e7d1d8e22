"""Where do the tensors and files go that a command makes? Onto the disk, or into memory.

with output_of(out, sizes, force=force) as folder:     an `OutputFolder`, or a `MemoryFolder`
    with folder.tensors("model.safetensors", plan) as writer: …
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Protocol

from geoscope.errors import CheckpointError
from geoscope.formats.safetensors_writer import FilePlan
from geoscope.outputs.output_folder import OutputFolder

if TYPE_CHECKING:
    from torch import Tensor

    from geoscope.formats.container import Container
    from geoscope.formats.safetensors_file import SafetensorsFile

__all__ = ["MemoryFolder", "Output", "TensorOutput", "file_size", "output_of"]


class TensorOutput(Protocol):
    """Takes the tensors of a plan, in its order."""

    def write(self, name: str, tensor: Tensor) -> None: ...

    def copy(self, name: str, source: SafetensorsFile) -> None: ...


class Output(Protocol):
    """Takes the files of a folder."""

    def tensors(self, name: str, plan: FilePlan) -> AbstractContextManager[TensorOutput]: ...

    def write(self, name: str, data: bytes) -> None: ...

    def copy(self, name: str, source: Path | bytes) -> None: ...


class MemoryFolder:
    """A folder that is not written: its tensors and small files, by their names.

    As of `OutputFolder`, tensors are those of the plan, each in memory of its own.
    """

    def __init__(self) -> None:
        self._tensors: dict[str, dict[str, Tensor]] = {}
        self.files: dict[str, bytes] = {}

    def __enter__(self) -> MemoryFolder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        return None

    @contextmanager
    def tensors(self, name: str, plan: FilePlan) -> Iterator[TensorOutput]:
        """The tensors of a file, in the order of its plan."""
        yield _Kept(self._tensors.setdefault(str(PurePosixPath(name).parent), {}))

    def write(self, name: str, data: bytes) -> None:
        """A small file."""
        self.files[name] = data

    def copy(self, name: str, source: Path | bytes) -> None:
        """A small file out of a folder, where it stays: it is no result."""

    def tensors_in(self, folder: str) -> Mapping[str, Tensor]:
        """Name → tensor of all weight files right in a folder, "." for the outermost."""
        return self._tensors.get(folder, {})


class _Kept:
    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def write(self, name: str, tensor: Tensor) -> None:
        import torch

        plain = tensor.detach().to("cpu")
        self._tensors[name] = plain.clone(memory_format=torch.contiguous_format)

    def copy(self, name: str, source: Container) -> None:
        self._tensors[name] = source.read(name, None)


def output_of(
    out: Path | None,
    sizes: Mapping[str, int],
    *,
    force: bool = False,
    inputs: Collection[Path] = (),
    meanwhile: int = 0,
) -> OutputFolder | MemoryFolder:
    """The folder `out`, see `OutputFolder`; without one a folder in memory."""
    if out is None:
        return MemoryFolder()
    return OutputFolder(out, sizes, force=force, inputs=inputs, meanwhile=meanwhile)


def file_size(source: Path | bytes) -> int:
    """Bytes of a small file that is copied, or of its text. Raises CheckpointError."""
    if isinstance(source, bytes):
        return len(source)
    try:
        return source.stat().st_size
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read: {error.strerror or error}") from None
