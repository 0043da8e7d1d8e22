"""`--fail-on EXPR[,EXPR…]`: what makes a report exit with 3 (docs/verdict.md#failing-a-script)."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from geoscope.errors import OptionError
from geoscope.kinds import KINDS
from geoscope.records import Report, Verdict

__all__ = ["Condition", "holding", "parse_fail_on"]


@dataclass(frozen=True)
class Condition:
    """CODE (sign ""), CODE>SHARE, ID>NUMBER or ID<NUMBER."""

    text: str
    subject: str
    sign: str
    limit: float
    is_code: bool

    def holds(self, report: Report) -> bool:
        """Whether it holds for the report's model, or for any of several."""
        if self.is_code:
            return any(self._holds_for(verdict) for verdict in _verdicts(report))
        models = [run.model for run in report.summary.runs] or [report.summary.model]
        known = [value for model in models if (value := model.get(self.subject)) is not None]
        if self.sign == ">":
            return any(value > self.limit for value in known)
        return any(value < self.limit for value in known)

    def _holds_for(self, verdict: Verdict) -> bool:
        if not self.sign:
            return verdict.code == self.subject
        return verdict.shares.get(self.subject, 0.0) > self.limit


def _verdicts(report: Report) -> list[Verdict]:
    """Of each tuned model, and of the report where these have one answer together."""
    several = [run.verdict for run in report.summary.runs if run.verdict is not None]
    is_joint = report.kind in KINDS and KINDS[report.kind].answer.is_joint
    own = [one for one in (report.summary.verdict,) if one is not None]
    return several + own if is_joint or not several else several


def parse_fail_on(
    text: str | None, *, kind: str, codes: Collection[str], ids: Collection[str]
) -> tuple[Condition, ...]:
    """The conditions of `--fail-on`, for a report of `kind` with these verdict codes and ids.

    Raises OptionError for anything that could never hold.
    """
    if text is None:
        return ()
    return tuple(_parse(part.strip(), kind, codes, ids) for part in text.split(","))


def _parse(text: str, kind: str, codes: Collection[str], ids: Collection[str]) -> Condition:
    match = re.fullmatch(r"([\w.@()]+)\s*(?:([<>])\s*([-+.\deE]+))?", text)
    if match is None:
        raise OptionError(f"--fail-on {text!r}: write CODE, CODE>SHARE, ID>NUMBER or ID<NUMBER")
    subject, sign, number = match.group(1), match.group(2) or "", match.group(3)
    try:
        limit = float(number) if number else 0.0
    except ValueError:
        raise OptionError(f"--fail-on {text!r}: {number!r} is not a number") from None
    if subject.isupper():
        if not codes:
            raise OptionError(f"--fail-on {text!r}: a {kind} report has no verdict")
        if subject not in codes:
            raise OptionError(f"--fail-on {text!r}: the codes are {', '.join(codes)}")
        if sign == "<":
            raise OptionError(f"--fail-on {text!r}: a code's share is compared with > only")
        return Condition(text, subject, sign, limit, is_code=True)
    if subject not in ids:
        near = [id_ for id_ in ids if subject.split("@")[0] in id_][:3]
        hint = f"such as {', '.join(near)}" if near else "see geoscope metrics"
        raise OptionError(f"--fail-on {text!r}: a {kind} report has no {subject!r}; {hint}")
    if not sign:
        raise OptionError(f"--fail-on {text!r}: an id needs > or < and a number")
    return Condition(text, subject, sign, limit, is_code=False)


def holding(conditions: Sequence[Condition], report: Report) -> list[str]:
    """The conditions that the report meets, as they were written."""
    return [condition.text for condition in conditions if condition.holds(report)]
