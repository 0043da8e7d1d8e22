"""`METHODS`: every way to predict later weights, by the name that users type and reports hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from geoscope.errors import OptionError
from geoscope.trajectory.extrapolators import EXTRAPOLATORS
from geoscope.trajectory.names import NAMES
from geoscope.trajectory.prediction import Method, MethodInput, Prediction, last_of
from geoscope.trajectory.spatial_rank1 import SPATIAL

__all__ = ["METHODS", "PLAIN", "Damped", "Trained"]


@dataclass(frozen=True)
class Trained:
    """W_T + the step that networks predict; they are trained before, see `next_predictor`."""

    name: str

    def predict(self, seen: MethodInput, target: float) -> Prediction:
        if seen.step is None:
            raise OptionError(f"{self.name}: no networks were trained; forecast first")
        return Prediction(last_of(len(seen.increments)), (seen.step,))


@dataclass(frozen=True)
class Damped:
    """Δ_T + λ*·(ΔŴ − Δ_T), λ* learned in the backtest of the inner method."""

    inner: Method

    @property
    def name(self) -> str:
        return f"damped({self.inner.name})"

    def predict(self, seen: MethodInput, target: float) -> Prediction:
        factor = seen.factors.get(self.inner.name)
        if factor is None:
            raise OptionError(f"{self.name}: no damping factor is known; backtest the method first")
        return self.inner.predict(seen, target).damped(factor)


_NEXT = Trained("next")
_KNOWN: Mapping[str, Method] = {**EXTRAPOLATORS, **SPATIAL, _NEXT.name: _NEXT}
_HOLD, *_OTHERS = (_KNOWN[name] for name in NAMES)
METHODS: Mapping[str, Method] = {
    method.name: method for method in (_HOLD, *_OTHERS, *map(Damped, _OTHERS))
}
# What a trajectory tries, beside each of it damped: no network trains for it.
PLAIN: Mapping[str, Method] = {
    method.name: method for method in _OTHERS if not isinstance(method, Trained)
}
