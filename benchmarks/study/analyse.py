"""Write every table and figure of docs/study.md from the CSV files.

    python -m benchmarks.study.analyse [--table benchmarks/study] [--page docs/study.md] [--check]

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; figures lie beside the page.
--check writes nothing and ends with 1 where a table of the page is not that of the CSV files.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from benchmarks.study.figures import write_figures
from benchmarks.study.outcomes import study_of
from benchmarks.study.tables import TABLES, Results, results_of

__all__ = ["filled"]

_HERE = Path(__file__).parent
_PLACE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(page: str, results: Results) -> str:
    """The page with every table made anew."""
    return _PLACE.sub(lambda place: f"{place[1]}\n{TABLES[place[2]](results)}\n\n{place[3]}", page)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--table", type=Path, default=_HERE, help="folder of the CSV files")
    page = _HERE.parents[1] / "docs" / "study.md"
    parser.add_argument("--page", type=Path, default=page, help="the page (default docs/study.md)")
    parser.add_argument("--check", action="store_true", help="compare only")
    arguments = parser.parse_args()
    results = results_of(study_of(arguments.table), arguments.table)
    text = arguments.page.read_text(encoding="utf-8")
    new = filled(text, results)
    if arguments.check:
        sys.exit(f"{arguments.page}: its tables are not those of the CSV" if new != text else 0)
    arguments.page.write_text(new, encoding="utf-8")
    write_figures(results, arguments.page.parent / "figures")


if __name__ == "__main__":
    main()
