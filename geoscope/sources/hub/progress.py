"""How is a download watched without a progress bar of huggingface_hub on the user's terminal?

Its downloads draw through a class that mimics tqdm and may be given: ours draws nothing and calls
back.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["OnDownload", "ignore", "quiet_download"]

OnDownload = Callable[[str, int, int], None]
"""(file, bytes done, bytes in all)."""


def quiet_download(
    repo: str, path: str, commit: str, size: int, on_progress: OnDownload | None
) -> Path:
    """The file in huggingface_hub's cache; downloaded now. Raises what huggingface_hub raises."""
    from huggingface_hub import hf_hub_download

    report = on_progress if on_progress is not None else ignore
    report(path, 0, size)
    bar: Any = _bar(path, size, report)
    local = hf_hub_download(repo, path, revision=commit, tqdm_class=bar)
    report(path, size, size)
    return Path(local)


def ignore(file: str, done: int, total: int) -> None:
    """Tells nobody."""


def _bar(file: str, size: int, report: OnDownload) -> type[Any]:
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
