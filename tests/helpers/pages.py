"""The pages of the documentation, and what stands under which anchor."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])

_CODE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose_of(page: Path) -> str:
    """The page without its blocks of code."""
    return _CODE.sub("", text_of(page))


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@cache
def sections(page: Path) -> dict[str, str]:
    """Anchor of each heading, as GitHub makes it → what stands between it and the next one."""
    parts = re.split(r"^#+ (.*)$", prose_of(page), flags=re.MULTILINE)
    return {_slug(head): body for head, body in zip(parts[1::2], parts[2::2], strict=True)}


def _slug(head: str) -> str:
    return re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-")
