"""Every table of docs/study.md as Markdown, from the CSV files."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.study.claims import Test, best_gains, claims, mean_of, method_rows
from benchmarks.study.design import LEVELS
from benchmarks.study.extrapolation_table import extrapolation_rows, next_rows
from benchmarks.study.outcomes import EARLY, END, OUTCOMES, Study
from benchmarks.study.prediction import BASELINES, Line, baseline_aucs, chance_bar, counted, lines
from benchmarks.study.resampling import Estimate, estimate, resamples
from benchmarks.study.standing import standings

__all__ = ["TABLES", "Results", "markdown", "results_of"]

_BEST = 12


def markdown(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; all columns but the first to the right."""
    lines_ = ["| " + " | ".join(heads) + " |", "|---|" + "--:|" * (len(heads) - 1)]
    return "\n".join([*lines_, *("| " + " | ".join(row) + " |" for row in rows)])


def _short(value: float | None, digits: int = 2) -> str:
    """.53, −.20, 1.24; – where undefined."""
    if value is None or not np.isfinite(value):
        return "–"
    text = f"{abs(value):.{digits}f}"
    text = text.removeprefix("0") if text.startswith("0.") else text
    return ("−" if value < 0 and float(text) else "") + text


def interval(estimate: Estimate, digits: int = 2) -> str:
    """.53 [.41, .66]."""
    if estimate.value is None:
        return "–"
    low, high = _short(estimate.low, digits), _short(estimate.high, digits)
    return f"{_short(estimate.value, digits)} [{low}, {high}]"


class Results:
    """What several tables share, computed once."""

    def __init__(self, study: Study, folder: Path) -> None:
        self.study, self.folder = study, folder
        self.lines = {step: lines(study, step) for step in (EARLY, END)}
        self.risk_study = study.part(study.at_risk)
        self.at_risk = {x.name: x for x in lines(self.risk_study, EARLY, adds=False)}
        self.learned = {x.name: x for x in lines(study, EARLY, "learned", adds=False)}
        self.bars = {step: chance_bar(study, step) for step in (EARLY, END)}
        self.tests = claims(study)
        self.standings = standings(study)

    @property
    def extrapolation(self) -> list[dict[str, str]]:
        file = self.folder / "extrapolation.csv"
        if not file.exists():
            return []
        with file.open(encoding="utf-8", newline="") as handle:
            return list(csv.DictReader(handle))


def results_of(study: Study, folder: Path) -> Results:
    """All that the tables need; some ten seconds of a few hundred runs."""
    return Results(study, folder)


def _defined(table: Iterable[Line]) -> list[Line]:
    return [line for line in table if line.auc.value is not None]


def _distance(line: Line) -> float:
    return abs((line.auc.value or 0.5) - 0.5)


def runs_table(results: Results) -> str:
    """Counts of outcomes by block."""
    study = results.study
    rows = []
    for block in dict.fromkeys(study.block):
        own = study.block == block
        counts = [str(int((study.outcomes[own] == each).sum())) for each in OUTCOMES]
        base = study.numbers("accuracy_0")[own][0]
        risk = int((study.at_risk & study.failed & own).sum())
        rows.append([block, str(int(own.sum())), _short(base), *counts, str(risk)])
    total = [str(int((study.outcomes == each).sum())) for each in OUTCOMES]
    risk = str(int((study.at_risk & study.failed).sum()))
    rows.append(["all", str(len(study.runs)), "", *total, risk])
    heads = ["task, seed", "runs", "accuracy of the base", *OUTCOMES, "failed after step 30"]
    return markdown(heads, rows)


def _share(failed: NDArray[np.bool_]) -> str:
    return f"{int(failed.sum())}/{len(failed)}"


def sizes_table(results: Results) -> str:
    """The size of the update by outcome, at both checkpoints."""
    study, rows = results.study, []
    for step in (EARLY, END):
        rho = study.statistic("relative_update", step)
        for each in OUTCOMES:
            own = rho[(study.outcomes == each) & np.isfinite(rho)]
            if len(own):
                quantiles = np.quantile(own, [0, 0.1, 0.5, 0.9, 1])
                rows.append([f"step {step}, {each}", *(f"{value:.2g}" for value in quantiles)])
    return markdown(["ρ at", "least", "10 %", "median", "90 %", "most"], rows)


def fate_table(results: Results) -> str:
    """Runs that were down at the early checkpoint: which came back, and whether ρ tells."""
    study = results.study
    down = study.part(~study.at_risk)
    rho = down.statistic("relative_update", EARLY)
    told = estimate(rho, down.failed, resamples(range(len(down.runs))))
    rows = [
        [name, str(int(own.sum())), str(int((own & study.failed).sum()))]
        for name, own in (("down", ~study.at_risk), ("not down", study.at_risk))
    ]
    rows[0].append(interval(told))
    rows[1].append("–")
    return markdown([f"at step {EARLY}", "runs", "failed in the end", "AUC of ρ among them"], rows)


def methods_table(results: Results) -> str:
    """Best gain, outcomes, and failures at each rate, of each method."""
    study, rows = results.study, []
    whole, levels = study.level % 1 == 0, range(LEVELS)
    for method in dict.fromkeys(study.method):
        own = study.method == method
        best = mean_of(np.array(list(best_gains(study, method).values())))
        counts = [str(int((study.outcomes[own] == each).sum())) for each in OUTCOMES]
        failed = [_share(study.failed[own & (study.level == level)]) for level in levels]
        failed.append(_share(study.failed[own & ~whole]))
        rows.append([method, _short(best.value), *counts, _share(study.failed[own]), *failed])
    heads = ["method", "best gain", *OUTCOMES, "failed", *(f"rate {n + 1}" for n in levels)]
    return markdown([*heads, "boundary"], rows)


def kl_table(results: Results) -> str:
    """Failures with KL and without."""
    study, rows = results.study, []
    for value, name in (("1", "KL"), ("0", "no KL")):
        own = study.column("kl") == value
        failed = mean_of(study.failed[own].astype(float))
        gain = mean_of(study.gain[own & study.learned])
        rows.append([name, str(int(own.sum())), interval(failed), interval(gain)])
    return markdown(["", "runs", "share of failed", "gain of the learned"], rows)


def baselines_table(results: Results) -> str:
    """AUC of what needs no weights, and of ρ."""
    tables = [baseline_aucs(results.study, step) for step in (EARLY, END)]
    risk = baseline_aucs(results.risk_study, EARLY)
    rows = [
        [
            name,
            interval(tables[0][name]),
            "–" if name.endswith("left out") else interval(risk[name]),
            interval(tables[1][name]),
        ]
        for name in tables[0]
    ]
    return markdown(["", f"step {EARLY}", f"step {EARLY}, at risk", f"step {END}"], rows)


def best_table(results: Results) -> str:
    """The statistics that tell most at the early checkpoint."""
    known = counted(results.study, EARLY)
    table = [line for line in _defined(results.lines[EARLY]) if line.name in known]
    early = sorted(table, key=_distance, reverse=True)[:_BEST]
    ends = {line.name: line for line in results.lines[END]}
    rows = []
    for line in early:
        risk = results.at_risk.get(line.name)
        rows.append(
            [
                f"`{line.name}`",
                interval(line.auc),
                interval(line.by_cell),
                "–" if risk is None else interval(risk.auc),
                interval(ends[line.name].auc),
                *(interval(line.adds[name]) for name in BASELINES),
            ]
        )
    heads = ["statistic", f"step {EARLY}", "by configurations", "at risk", f"step {END}"]
    return markdown([*heads, *(f"adds to {name}" for name in BASELINES)], rows)


def added_table(results: Results) -> str:
    """How many statistics add to each baseline, beside chance, and the best of them."""
    rows = []
    for step in (EARLY, END):
        known = counted(results.study, step)
        table = [line for line in _defined(results.lines[step]) if line.name in known]
        passed = sum(_distance(line) > results.bars[step] for line in table)
        bar = f"{_short(results.bars[step])}"
        rows.append(
            [
                f"tells failure, step {step}",
                f"{passed} of {len(table)}",
                f"bar ±{bar}",
                _names(table, _distance),
            ]
        )
        for name in BASELINES:
            adding = [line for line in table if line.adds[name].above > 0]
            chance = f"{0.025 * len(table):.0f}"
            rows.append(
                [
                    f"adds to {name}, step {step}",
                    f"{len(adding)} of {len(table)}",
                    chance,
                    _names(adding, lambda line, name=name: line.adds[name].value or 0.0),
                ]
            )
    return markdown(["", "statistics", "by chance", "the most"], rows)


def _names(table: list[Line], key: Callable[[Line], float]) -> str:
    best = sorted(table, key=key, reverse=True)[:3]
    return ", ".join(f"`{line.name}`" for line in best) or "–"


def claims_table(results: Results) -> str:
    """Every test of a published claim."""
    return markdown(["claim", "number", "here", "null", "units", ""], map(_claim, results.tests))


def _claim(test: Test) -> list[str]:
    return [
        test.claim,
        test.what,
        interval(test.estimate, 3),
        _short(test.null, 2),
        str(test.estimate.count),
        test.verdict,
    ]


def shares_table(results: Results) -> str:
    """On-principal shares, NSS, rotation and rank by method, at the end."""
    study = results.study
    columns = {
        "C_LR(8)": "energy_two_sided@8",
        "its lift": "lift@8",
        "NSS/null": "nss/null",
        "angle/null": "angle@8/null",
        "σ1² share": "update.top_share@1",
        "ρ": "relative_update",
    }
    tables = [method_rows(study, name) for name in columns.values()]
    rows = [[method, *(interval(table[method]) for table in tables)] for method in tables[0]]
    return markdown(["method", *columns], rows)


def limits_table(results: Results) -> str:
    """The standing of every limit."""
    rows = []
    for each in results.standings:
        shares = " / ".join(_short(share) for share in each.shares)
        rows.append(
            [f"`{each.name}`", interval(each.auc), shares, interval(each.apart), each.words]
        )
    heads = ["limit", "AUC in its direction", "failed / others beyond it", "difference", "standing"]
    return markdown(heads, rows)


def codes_table(results: Results) -> str:
    """Verdict codes against outcomes, at both checkpoints."""
    study, rows = results.study, []
    for step in (EARLY, END):
        codes = study.codes("verdict.compare", step)
        for code in sorted(set(codes)):
            own = codes == code
            counts = [str(int((study.outcomes[own] == each).sum())) for each in OUTCOMES]
            share = _short(float(study.failed[own].mean()))
            rows.append([f"step {step}, `{code or 'none'}`", *counts, share])
    return markdown(["verdict", *OUTCOMES, "failed"], rows)


def extrapolation_table(results: Results) -> str:
    """Accuracy of predicted models less that of the last checkpoint, and skill."""
    rows = extrapolation_rows(results.extrapolation)
    heads = ["method", "runs", "accuracy − hold", "better / worse by .02", "skill"]
    return markdown(
        heads,
        [[r.way, str(r.gain.count), interval(r.gain, 3), r.sides, interval(r.skill)] for r in rows],
    )


def next_table(results: Results) -> str:
    """NExt against damped(linear) where both were made."""
    rows = next_rows(results.extrapolation)
    return markdown(
        ["", "runs", "NExt − damped(linear)"],
        [[n, str(e.count), interval(e, 3)] for n, e in rows.items()],
    )


def all_table(results: Results) -> str:
    """Every statistic, the useless ones too."""
    ends, rows = {line.name: line for line in results.lines[END]}, []
    for line in results.lines[EARLY]:
        end, risk = ends[line.name], results.at_risk.get(line.name)
        rows.append(
            [
                f"`{line.name}`",
                interval(line.auc),
                "–" if risk is None else interval(risk.auc),
                interval(end.auc),
                str(end.auc.count),
                interval(results.learned[line.name].auc),
                *(interval(end.adds[name]) if end.adds else "–" for name in BASELINES),
            ]
        )
    heads = [
        "statistic",
        f"step {EARLY}",
        "at risk",
        f"step {END}",
        "runs",
        f"learned, step {EARLY}",
    ]
    return markdown([*heads, *(f"adds to {name}, step {END}" for name in BASELINES)], rows)


TABLES: Mapping[str, Callable[[Results], str]] = {
    "runs": runs_table,
    "sizes": sizes_table,
    "fate": fate_table,
    "methods": methods_table,
    "kl": kl_table,
    "baselines": baselines_table,
    "best": best_table,
    "added": added_table,
    "shares": shares_table,
    "claims": claims_table,
    "extrapolation": extrapolation_table,
    "next": next_table,
    "limits": limits_table,
    "codes": codes_table,
    "all": all_table,
}
