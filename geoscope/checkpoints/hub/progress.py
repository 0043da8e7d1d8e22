"""How is a download watched without a progress bar of huggingface_hub on the user's terminal?

Its downloads draw through a class that mimics tqdm and may be given: ours draws nothing and calls
back. Versions before 1.0 take no such class; there the bars are switched off and the callback hears
of the end of each file only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["Report", "ignore", "quiet_download"]

Report = Callable[[str, int, int], None]
"""(file, bytes done, bytes in all)."""


def quiet_download(
    repo: str, path: str, commit: str, size: int, on_progress: Report | None
) -> Path:
    """The file in huggingface_hub's cache; downloaded now. Raises what huggingface_hub raises."""
    from huggingface_hub import hf_hub_download

    report = on_progress if on_progress is not None else ignore
    report(path, 0, size)
    if "tqdm_class" in inspect.signature(hf_hub_download).parameters:
        bar: Any = _bar(path, size, report)
        local = hf_hub_download(repo, path, revision=commit, tqdm_class=bar)
    else:
        local = _download_without_bars(repo, path, commit)
    report(path, size, size)
    return Path(local)


def ignore(file: str, done: int, total: int) -> None:
    """Tells nobody."""


def _download_without_bars(repo: str, path: str, commit: str) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        return hf_hub_download(repo, path, revision=commit)
    disable_progress_bars()
    try:
        return hf_hub_download(repo, path, revision=commit)
    finally:
        enable_progress_bars()


def _bar(file: str, size: int, report: Report) -> type[Any]:
    """A stand-in for tqdm that reports the bytes of one file."""

    class Bar:
        def __init__(self, *_: Any, initial: int = 0, total: int | None = None, **__: Any) -> None:
            self.n = initial
            self.total = total

        def update(self, count: float | None = 1) -> None:
            self.n += int(count or 0)
            report(file, min(self.n, size), size)

        def update_transfer(self, count: float | None = 1) -> None:
            """Bytes on the wire; having it keeps a second bar from being made for them."""

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def __getattr__(self, name: str) -> Callable[..., None]:
            """Titles, rates, refreshes: all that only a drawn bar needs."""
            if name.startswith("__"):
                raise AttributeError(name)
            return lambda *_, **__: None

    return Bar
