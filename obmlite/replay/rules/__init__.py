"""The rules, in modules by the groups of StableHLO's specification; importing them fills the tables."""

import obmlite.replay.rules.chlo as chlo
import obmlite.replay.rules.control as control
import obmlite.replay.rules.custom_calls as custom_calls
import obmlite.replay.rules.data_movement as data_movement
import obmlite.replay.rules.dynamic as dynamic
import obmlite.replay.rules.elementwise as elementwise
import obmlite.replay.rules.linear_algebra as linear_algebra
import obmlite.replay.rules.linear_algebra_calls as linear_algebra_calls
import obmlite.replay.rules.random as random
import obmlite.replay.rules.reduction as reduction
import obmlite.replay.rules.sharding as sharding

__all__ = [
    "chlo",
    "control",
    "custom_calls",
    "data_movement",
    "dynamic",
    "elementwise",
    "linear_algebra",
    "linear_algebra_calls",
    "random",
    "reduction",
    "sharding",
]
