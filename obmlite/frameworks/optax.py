"""Optax: the states of its optimizers, which are namedtuples. The list here decides which come back as their class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from obmlite.tree import Registration

_STATES = (
    "AddNoiseState", "ApplyEvery", "ApplyIfFiniteState", "ConditionallyMaskState", "ConditionallyTransformState",
    "EmaState", "EmptyState", "FactoredState", "InjectHyperparamsState", "InjectStatefulHyperparamsState",
    "LookaheadParams", "LookaheadState", "MaskedNode", "MaskedState", "MonitorState", "MultiStepsState",
    "PartitionState", "ScaleByAdaDeltaState", "ScaleByAdamState", "ScaleByAdanState", "ScaleByAmsgradState",
    "ScaleByBacktrackingLinesearchState", "ScaleByBeliefState", "ScaleByLBFGSState", "ScaleByLionState",
    "ScaleByNovogradState", "ScaleByRStdDevState", "ScaleByRmsState", "ScaleByRpropState", "ScaleByRssState",
    "ScaleBySM3State", "ScaleByScheduleState", "ScaleByZoomLinesearchState", "SnapshotState", "TraceState",
    "ZeroNansState", "ZoomLinesearchInfo",
)  # fmt: skip
_CONTRIBUTED = (
    "COCOBState", "DAdaptAdamWState", "DifferentiallyPrivateAggregateState", "DoGState", "DoWGState",
    "GaLoreState", "HutchinsonState", "MadgradState", "MechanicState", "MomoAdamState", "MomoState",
    "MuonState", "ProdigyState", "ReduceLROnPlateauState", "SAMState", "ScaleByAdemamixState",
    "ScaleBySimplifiedAdEMAMixState", "ScheduleFreeState", "SophiaState", "SplitRealAndImaginaryState",
)  # fmt: skip
_UNNAMED: dict[str, Callable[[Any], Any]] = {
    "ScaleByDistanceOverGradientsState": lambda optax: optax.scale_by_distance_over_gradients().init({}),
    "ScaleByOptimisticGradientState": lambda optax: optax.scale_by_optimistic_gradient().init({}),
    "ScaleByRStdDevWithCountState": lambda optax: optax.scale_by_stddev(bias_correction=True).init({}),
    "ScaleByRmsWithCountState": lambda optax: optax.scale_by_rms(bias_correction=True).init({}),
    "WeightDecaySchedule": lambda optax: optax.add_decayed_weights(lambda _: 0.0).init({}),
    "WrappedScheduleState": lambda optax: (
        optax.inject_hyperparams(optax.sgd)(lambda _: 0.0).init({}).hyperparams_states["learning_rate"]
    ),
}
"""States that Optax has no public name for → how to come by one."""

_NAMES = {f"optax.{name}" for name in (*_STATES, *_UNNAMED)} | {f"optax.contrib.{name}" for name in _CONTRIBUTED}


class _Optax:
    def of_class(self, cls: type) -> Registration | None:
        name = f"optax.contrib.{cls.__name__}" if cls.__name__ in _CONTRIBUTED else f"optax.{cls.__name__}"
        entry = self.of_name(name)
        return entry if entry is not None and entry.cls is cls else None

    def of_name(self, name: str) -> Registration | None:
        if name not in _NAMES:
            return None
        import optax
        import optax.contrib

        module, _, own = name.rpartition(".")
        if own in _UNNAMED:
            return Registration(type(_UNNAMED[own](optax)), name)
        cls = getattr(optax.contrib if module.endswith("contrib") else optax, own, None)
        return None if cls is None else Registration(cls, name)


ADAPTER = _Optax()
