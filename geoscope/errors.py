"""What can go wrong, as one tree; the command line catches `GeoscopeError` in one place.

GeoscopeError
  + CheckpointError        a path, file or Hub id cannot be used
    - CheckpointNotFound   nothing there, or not for us (private, gated, offline)
    - UnsupportedFormat    there, but in a format that is refused by name
    - HubError             the Hub refused, or did not answer
      - HubNotFound        it has no such thing, or not for us; a CheckpointNotFound, too
  + PairingError           two checkpoints do not correspond
  + NumericsError          no method converged, or another failure of one matrix
    - NonFiniteError       the matrix holds NaN or Inf
  + OptionError            an option, or a combination of options, makes no sense
  + ReportError            a report cannot be read, written or rendered
Stopped                    not an error: a signal asks to stop (Ctrl-C, SIGTERM)

Every message is one line: what was found, what was needed, what to do. Parameters stand in
backticks, by their names in Python; the command line shows the options in their place.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "CheckpointError",
    "CheckpointNotFound",
    "GeoscopeError",
    "HubError",
    "HubNotFound",
    "NonFiniteError",
    "NumericsError",
    "OptionError",
    "PairingError",
    "ReportError",
    "Stopped",
    "UnsupportedFormat",
    "first_names",
]


class GeoscopeError(Exception):
    """Base of every error that geoscope raises on purpose."""


class CheckpointError(GeoscopeError):
    """A path, file or Hub id cannot be used."""


class CheckpointNotFound(CheckpointError):
    """Nothing is there, or it may not be read (private, gated, offline)."""


class UnsupportedFormat(CheckpointError):
    """The weights are there, in a format that geoscope refuses by name."""


class HubError(CheckpointError):
    """The Hub refused, or did not answer."""


class HubNotFound(HubError, CheckpointNotFound):
    """The Hub has no such repository, revision or file, or none for us (private, gated)."""


class PairingError(GeoscopeError):
    """Two checkpoints do not correspond."""


class NumericsError(GeoscopeError):
    """No method converged, or another failure of one matrix."""


class NonFiniteError(NumericsError):
    """The matrix holds NaN or Inf."""


class OptionError(GeoscopeError):
    """An option, or a combination of options, makes no sense."""


class ReportError(GeoscopeError):
    """A report cannot be read, written or rendered."""


class Stopped(BaseException):
    """A signal asks to stop; like KeyboardInterrupt, it passes through `except Exception`."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """128 + signal number: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.signum


def first_names(names: Sequence[str], limit: int = 3) -> str:
    """The first few of a list of offenders, with the count of the rest: "a, b, c and 9 more"."""
    shown = ", ".join(names[:limit])
    rest = len(names) - limit
    return f"{shown} and {rest} more" if rest > 0 else shown
