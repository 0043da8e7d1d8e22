"""Matches regular expressions in a process of its own, which can be ended: see patterns.py.

Run as a script. A line in: [pattern, text, what]; a line out: [answer, seconds]. what: "search",
"match", "fullmatch", or a replacement for `re.sub` as ["sub", REPL].
"""

import json
import os
import re
import time

__all__: list[str] = []


def _answer(pattern: str, text: str, what: str | list[str]) -> bool | str:
    if isinstance(what, list):
        return re.sub(pattern, what[1], text)
    return getattr(re, what)(pattern, text) is not None


def _serve() -> None:
    with os.fdopen(0, encoding="utf-8") as asked, os.fdopen(1, "w", encoding="utf-8") as told:
        for line in asked:
            start = time.perf_counter()
            answer = _answer(*json.loads(line))
            told.write(json.dumps([answer, time.perf_counter() - start]) + "\n")
            told.flush()


if __name__ == "__main__":
    _serve()
