"""Where one matrix ends: what is raised while it is computed is told of it alone.

Every command that walks over matrices computes each inside `matrix_boundary`, and so has one kind
of error to tell in its row, its check or its refusal.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from geoscope.errors import GeoscopeError, NumericsError

__all__ = ["matrix_boundary", "told_failure"]


@contextmanager
def matrix_boundary(name: str | None = None) -> Iterator[None]:
    """Whatever computing raises comes out as a NumericsError of one line; `name` is put in front.

    What is not of one matrix passes: other errors of geoscope (a file, an option), OSError of
    reading, and a stop, which is not an Exception.
    """
    prefix = "" if name is None else f"{name}: "
    try:
        yield
    except NumericsError as error:
        raise type(error)(f"{prefix}{error}") from error
    except (GeoscopeError, OSError):
        raise
    except Exception as error:
        raise NumericsError(f"{prefix}{_reason(error)}") from error


@contextmanager
def told_failure(failed: dict[str, str], name: str) -> Iterator[None]:
    """`matrix_boundary` for a walk that goes on: the reason goes into `failed` by name."""
    try:
        with matrix_boundary():
            yield
    except NumericsError as error:
        failed[name] = str(error)


def _reason(error: Exception) -> str:
    """The first line of what was raised, and its kind where the words do not tell it."""
    lines = str(error).strip().splitlines()
    words = lines[0].rstrip(".") if lines else ""
    if isinstance(error, MemoryError):
        return "memory ran out"
    if isinstance(error, OverflowError):
        return "a number overflows fp64"
    if isinstance(error, RuntimeError) and words:
        return words
    return f"{type(error).__name__}: {words}" if words else type(error).__name__
