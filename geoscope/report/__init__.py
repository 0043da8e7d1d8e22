"""Reports for people and programs: pure functions of a `Report`, without torch.

`write` takes the format from the suffix; rich and matplotlib are imported only when they are used.
"""

from __future__ import annotations

from geoscope.report.files import STYLES, SUFFIXES, check_output, read, write
from geoscope.report.text import render_headline, render_text

__all__ = ["STYLES", "SUFFIXES", "check_output", "read", "render_headline", "render_text", "write"]
