"""One word for what was seen, by rules that can be read and overridden.

See docs/verdict.md#per-matrix. Per matrix the first rule that matches decides; the model takes the
code that holds at least half of the update's energy. A verdict says what a pattern is consistent
with, never what training did.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from geoscope.kinds import FAR, UPDATE
from geoscope.metrics.distance import distance, judge_distance
from geoscope.metrics.judging import (
    Check,
    MatrixVerdict,
    clause,
    explained,
    flagged_names,
    shares_of,
)
from geoscope.metrics.measure import Measured
from geoscope.metrics.quantised import COPY, quantised_words
from geoscope.records import Status, Verdict
from geoscope.thresholds import THRESHOLDS, limits_in_force

__all__ = [
    "CODES",
    "VERDICT_IDS",
    "judge",
    "judge_model",
]

CODES = UPDATE.codes
# Codes that ask for attention; the others are either benign or without a number.
FLAGGED = (*FAR, "INIT_MISMATCH", "RANK_COLLAPSE", "ON_PRINCIPAL", "SPECTRUM_DISTORTED")
# Limits of other rules.
_OF_OTHERS = ("capacity.", "lineage.")

# What the rules take, so that a report with a verdict holds every number behind it.
VERDICT_IDS = (
    "relative_update",
    "precision_ratio",
    "base_cosine",
    "base_share",
    "update.stable_rank",
    "update.top_share@1",
    "energy_right@k",
    "energy_left@k",
    "energy_two_sided@k",
    "lift@k",
    "versus_base@k",
    "energy_of_base@k",
    "angle_left_mean@k",
    "angle_right_mean@k",
    "gap@k",
    "nss",
    "spectral_share",
    "spectral_lift",
    "rank_ratio",
)


class _Numbers:
    """The numbers of one matrix, as the rules see them."""

    def __init__(self, row: Measured, k: int, limits: Mapping[str, float]) -> None:
        self.row, self.k, self.limits = row, k, limits

    def value(self, key: str) -> float | None:
        return self.row.values.get(key)

    def check(self, rule: str, name: str, key: str, sign: str, threshold: str) -> Check:
        return Check(
            code=rule,
            name=name,
            value=self.value(key),
            sign=sign,
            limit=self.limits[threshold],
            standing=THRESHOLDS[threshold].standing,
        )

    def angle(self, rule: str, sign: str, threshold: str) -> Check:
        """Larger of the left and right mean angle, against the larger of limit and null."""
        sides = [f"angle_{side}_mean@{self.k}" for side in ("left", "right")]
        known = [(value, key) for key in sides if (value := self.value(key)) is not None]
        if sign == "≤":
            # An angle below resolution is smaller than what rounding alone turns: that bounds it.
            known += [(self.row.floors[key], key) for key in sides if key in self.row.floors]
        value, side = max(known, default=(None, ""))
        null = self.row.nulls.get(side)
        applies = [self.row.status.get(key) is not Status.NOT_APPLICABLE for key in sides]
        return Check(
            code=rule,
            name="mean angle",
            value=value,
            sign=sign,
            limit=max(
                self.limits[threshold], self.limits[f"{threshold}_over_null"] * (null or 0.0)
            ),
            standing=THRESHOLDS[threshold].standing,
            # Without its null (leading values alone do not give it) an angle cannot be judged.
            left_out=not any(applies) or (bool(side) and null is None),
        )


def judge(row: Measured, k: int, limits: Mapping[str, float] | None = None) -> MatrixVerdict:
    """The verdict on one matrix, `k` = k_v of its shape; `limits` override THRESHOLDS by name."""
    numbers = _Numbers(row, k, limits_in_force(limits))
    if row.status.get("precision_ratio") is Status.ZERO_UPDATE:
        return MatrixVerdict("NO_UPDATE", k, "", "", ())
    far, first = judge_distance(row, k, numbers.limits)
    if far is not None:
        return far
    for status in (Status.NON_FINITE, Status.NOT_CONVERGED):
        if status in row.status.values():
            return MatrixVerdict("UNDETERMINED", k, status.value, "", ())
    seen = [*first]
    for code, alternatives in _rules(numbers):
        fired = None
        for conditions in alternatives:
            seen.extend(conditions)
            usable = [check for check in conditions if not check.left_out]
            if fired is None and usable and all(check.holds for check in usable):
                fired = clause(usable)
        if fired is not None:
            words = _words(numbers) if code == "OFF_PRINCIPAL" else ""
            return MatrixVerdict(code, k, fired, _joined(words, _quantised(numbers)), tuple(seen))
    words = _joined(_words(numbers), _quantised(numbers))
    return MatrixVerdict("MIXED", k, "no rule matched", words, tuple(seen))


def _quantised(numbers: _Numbers) -> str:
    return quantised_words([numbers.row], numbers.limits)


def _joined(*parts: str) -> str:
    return "; ".join(part for part in parts if part)


_Rules = list[tuple[str, list[list[Check]]]]


def _rules(numbers: _Numbers) -> _Rules:
    """The rules in order: code → alternatives, each a conjunction of conditions."""
    return [*_first_rules(numbers), *_principal_rules(numbers), *_last_rules(numbers)]


def _on(numbers: _Numbers, rule: str) -> Callable[..., Check]:
    return lambda name, key, sign, limit: numbers.check(rule, name, key, sign, limit)


def _first_rules(numbers: _Numbers) -> _Rules:
    init = _on(numbers, "INIT_MISMATCH")
    undetermined, rank = _on(numbers, "UNDETERMINED"), _on(numbers, "RANK_COLLAPSE")
    versus = f"versus_base@{numbers.k}"
    return [
        (
            "INIT_MISMATCH",
            [
                [
                    init("ρ", "relative_update", ">", "init_mismatch.relative_update"),
                    init("NSS/ρ", "spectral_share", ">", "init_mismatch.spectral_share"),
                    init(_over_base(numbers), versus, ">", "init_mismatch.versus_base"),
                ]
            ],
        ),
        (
            "UNDETERMINED",
            [[undetermined("ν", "precision_ratio", ">", "undetermined.precision_ratio")]],
        ),
        (
            "RANK_COLLAPSE",
            [[rank("top share", "update.top_share@1", ">", "rank_collapse.top_share")]],
        ),
    ]


def _over_base(numbers: _Numbers) -> str:
    return f"C_LR/E_{numbers.k}"


def _principal_rules(numbers: _Numbers) -> _Rules:
    k, principal = numbers.k, _on(numbers, "ON_PRINCIPAL")
    two_sided, versus = f"energy_two_sided@{k}", f"versus_base@{k}"
    distorted = _on(numbers, "SPECTRUM_DISTORTED")
    return [
        (
            "ON_PRINCIPAL",
            [
                [principal(f"C_LR({k})", two_sided, "≥", "on_principal.energy_two_sided")],
                [
                    principal("NSS/ρ", "spectral_share", "≥", "on_principal.spectral_share"),
                    principal("NSS lift", "spectral_lift", "≥", "on_principal.spectral_lift"),
                    principal(_over_base(numbers), versus, "≥", "on_principal.versus_base"),
                ],
            ],
        ),
        (
            "SPECTRUM_DISTORTED",
            [
                [distorted("NSS", "nss", "≥", "distorted.nss")],
                [distorted("rank ratio", "rank_ratio", "<", "distorted.rank_ratio")],
                [numbers.angle("SPECTRUM_DISTORTED", ">", "distorted.angle")],
            ],
        ),
    ]


def _last_rules(numbers: _Numbers) -> _Rules:
    k, off = numbers.k, _on(numbers, "OFF_PRINCIPAL")
    two_sided, versus = f"energy_two_sided@{k}", f"versus_base@{k}"
    one_sided = [
        off(f"C_{letter}({k})", f"energy_{side}@{k}", "≤", "off_principal.energy_one_sided")
        for letter, side in (("L", "left"), ("R", "right"))
    ]
    return [
        (
            "OFF_PRINCIPAL",
            [
                [
                    off(f"C_LR({k})", two_sided, "≤", "off_principal.energy_two_sided"),
                    off(_over_base(numbers), versus, "≤", "off_principal.versus_base"),
                    *one_sided,
                    numbers.angle("OFF_PRINCIPAL", "≤", "off_principal.angle"),
                ]
            ],
        )
    ]


def _words(numbers: _Numbers) -> str:
    """The words appended to OFF_PRINCIPAL and MIXED."""
    stable = numbers.value("update.stable_rank")
    null = numbers.row.nulls.get("update.stable_rank")
    return appended_words(
        spectral_lift=numbers.value("spectral_lift"),
        lift=numbers.value(f"lift@{numbers.k}"),
        stable_over_null=stable / null if stable is not None and null else None,
        limits=numbers.limits,
    )


def _is_as_of_noise(ratio: float, limits: Mapping[str, float]) -> bool:
    return limits["words.few_directions"] <= ratio <= limits["words.many_directions"]


def appended_words(
    *,
    spectral_lift: float | None,
    lift: float | None,
    stable_over_null: float | None,
    limits: Mapping[str, float],
) -> str:
    """What else is seen: rotation, enrichment, avoidance, isotropy."""
    words = []
    rotates = spectral_lift is not None and spectral_lift < limits["words.spectral_lift"]
    if rotates:
        words.append("rotates the singular frames, keeps the singular values")
    if lift is not None and lift > limits["words.enriched"]:
        times = f"{lift:.2g}" if lift < 99.5 else f"{lift:.0f}"  # no 1.2e+02
        words.append(f"enriched {times}× over isotropic")
    elif rotates or lift is None:
        pass
    elif lift < limits["words.avoids"]:
        words.append("avoids the leading directions")
    elif stable_over_null is not None and _is_as_of_noise(stable_over_null, limits):
        words.append("indistinguishable from isotropic")
    elif stable_over_null is not None:
        words.append("isotropic in direction, but on few directions")
    return "; ".join(words)


_SENTENCES = {
    "NO_UPDATE": "no weight in scope changed",
    "INIT_MISMATCH": "pattern consistent with an initial factor counted twice, as when an adapter "
    "that started from the SVD of the base is added to the original base",
    "UNDETERMINED": "storage rounding is as large as the update; the adapter itself or the fp32 "
    "master weights would settle it",
    "RANK_COLLAPSE": "pattern consistent with an update that works in a single direction",
    "ON_PRINCIPAL": "pattern consistent with an update on the principal directions of the base",
    "SPECTRUM_DISTORTED": "pattern consistent with a distorted spectrum: singular values or "
    "leading subspaces moved beyond their limits, as large updates move them",
    "OFF_PRINCIPAL": "pattern consistent with an update off the principal directions of the base",
    "MIXED": "no single pattern: parts of the update lie on the principal directions, or turn them",
}


def judge_model(
    names: Sequence[str],
    modules: Sequence[str],
    rows: Sequence[Measured],
    judged: Sequence[MatrixVerdict],
    limits: Mapping[str, float] | None = None,
) -> Verdict:
    """The verdict on a model: the code with at least half of Σ‖ΔW‖², else MIXED.

    Where most matrices are far from the base, how far they are together; fewer are set apart, and
    the rest decides.
    """
    limits = limits_in_force(limits)
    energy = [row.weights.get("update", 0.0) for row in rows]
    counts = {code: sum(one.code == code for one in judged) for code in CODES}
    shares = _shares(energy, judged)
    flagged = flagged_names(names, energy, judged, FLAGGED)
    far = distance(names, rows, judged, limits)
    if far is not None and far.code is not None:
        code, sentence = far.code, far.text
        share = math.fsum(shares.get(one, 0.0) for one in FAR)
    else:
        rest = [i for i, one in enumerate(judged) if one.code not in FAR]
        own, own_rows = [judged[i] for i in rest], [rows[i] for i in rest]
        code, share = _model_code(own, _shares([energy[i] for i in rest], own))
        sentence = _sentence(code, own, own_rows, limits)
        sentence = sentence if far is None else f"{far.text}: {sentence}"
    text = sentence + _flag_text(names, modules, judged, flagged)
    if rows and all(row.status.get("nss") is Status.NOT_APPLICABLE for row in rows):
        text += " Judged on leading directions alone: NSS, rank ratio and angles are left out."
    return Verdict(
        code=code,
        share=share,
        shares=shares,
        flagged=flagged,
        counts={code: number for code, number in counts.items() if number},
        text=text,
        thresholds={k: v for k, v in limits.items() if not k.startswith(_OF_OTHERS)},
        explain=explained(judged),
        apart=() if far is None or far.code is not None else far.names,
    )


def _shares(energy: Sequence[float], judged: Sequence[MatrixVerdict]) -> dict[str, float]:
    """Share of each code; none without any energy."""
    return shares_of(energy, judged, CODES) if math.fsum(energy) > 0 else {}


def _model_code(
    judged: Sequence[MatrixVerdict], shares: Mapping[str, float]
) -> tuple[str, float | None]:
    if not shares:
        # Without any energy: nothing changed, or nothing could be computed.
        unchanged = [one for one in judged if one.code == "NO_UPDATE"]
        return ("NO_UPDATE" if unchanged else "UNDETERMINED"), None
    code, share = max(shares.items(), key=lambda item: item[1])
    return (code, share) if share >= 0.5 else ("MIXED", shares.get("MIXED", 0.0))


def _sentence(
    code: str,
    judged: Sequence[MatrixVerdict],
    rows: Sequence[Measured],
    limits: Mapping[str, float],
) -> str:
    sentence, quantised = _SENTENCES[code], quantised_words(rows, limits)
    if code == "UNDETERMINED" and quantised.startswith(COPY):
        return quantised
    if code in ("OFF_PRINCIPAL", "MIXED"):
        words = _model_words(judged, rows, limits)
        sentence = _joined(sentence, words)
    sentence = _joined(sentence, quantised) + _of_base(judged, rows, limits)
    intruders = sum(row.values.get("intruders") or 0 for row in rows)
    if intruders:
        dimensions = "dimension" if intruders == 1 else "dimensions"
        sentence += f"; {intruders} intruder {dimensions} (the count is not causal)"
    return sentence


def _of_base(
    judged: Sequence[MatrixVerdict], rows: Sequence[Measured], limits: Mapping[str, float]
) -> str:
    """What W0 itself, as part of the update, gives to C_LR; said where it is half of it or more."""
    own = captured = energy = 0.0
    for row, one in zip(rows, judged, strict=True):
        base = row.values.get(f"energy_of_base@{one.k}")
        both = row.values.get(f"energy_two_sided@{one.k}")
        if base is not None and both is not None:
            weight = row.weights["update"]
            own, captured, energy = own + base * weight, captured + both * weight, energy + weight
    if own <= limits["off_principal.energy_two_sided"] * energy or own < captured / 2:
        return ""
    return (
        f"; W0 itself is part of the update, as where it is scaled: of C_LR {captured / energy:.2g}"
        f" that alone gives {own / energy:.2g}"
    )


def _model_words(
    judged: Sequence[MatrixVerdict], rows: Sequence[Measured], limits: Mapping[str, float]
) -> str:
    """The appended words from sums over the model: captured energy over expected energy."""
    pairs = [(row, one.k) for row, one in zip(rows, judged, strict=True)]
    captured = expected = 0.0
    for row, k in pairs:
        lift = row.values.get(f"lift@{k}")
        null = row.nulls.get(f"energy_two_sided@{k}")
        if lift is not None and null is not None:
            captured += lift * null * row.weights["update"]
            expected += null * row.weights["update"]
    ratios = [
        value / row.nulls["update.stable_rank"]
        for row, _ in pairs
        if (value := row.values.get("update.stable_rank")) is not None
    ]
    lifts = [v for row, _ in pairs if (v := row.values.get("spectral_lift")) is not None]
    return appended_words(
        spectral_lift=math.fsum(lifts) / len(lifts) if lifts else None,
        lift=captured / expected if expected > 0 else None,
        stable_over_null=math.fsum(ratios) / len(ratios) if ratios else None,
        limits=limits,
    )


def _flag_text(
    names: Sequence[str],
    modules: Sequence[str],
    judged: Sequence[MatrixVerdict],
    flagged: Sequence[str],
) -> str:
    unknown = sum(one.code == "UNDETERMINED" for one in judged)
    rest = f"; {unknown} without a verdict" if unknown else ""
    if not flagged:
        return f". Flagged 0 of {len(names)} matrices{rest}."
    kinds: dict[str, int] = {}
    for name, module in zip(names, modules, strict=True):
        if name in flagged:
            kinds[module] = kinds.get(module, 0) + 1
    listed = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
    return (
        f". Flagged {len(flagged)} of {len(names)} matrices ({listed}), worst: {flagged[0]}{rest}."
    )
