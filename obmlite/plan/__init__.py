"""Planning which bytes a process reads: pure functions of shapes, which know nothing of files, devices or JAX."""

from obmlite.plan.boxes import Box
from obmlite.plan.layouts import Layout
from obmlite.plan.planner import CHUNK, GAP, Buffer, Plan, Read, Request, TensorPlan, plan
from obmlite.plan.runs import Runs, runs_of

__all__ = [
    "CHUNK",
    "GAP",
    "Box",
    "Buffer",
    "Layout",
    "Plan",
    "Read",
    "Request",
    "Runs",
    "TensorPlan",
    "plan",
    "runs_of",
]
