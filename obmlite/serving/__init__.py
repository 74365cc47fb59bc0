"""Serving packages: versions of models that come and go, called with named arrays, over protocols or without.

The core has no protocols: a :class:`Repository` of models, each in some versions (:class:`Servable`), whose pipelines
are functions of named arrays (:class:`Interface`). ``docs/serving.md`` describes all of it.
"""

from obmlite.serving.config import All, BatchingConfig, Latest, ModelConfig, Specific, read_config
from obmlite.serving.interface import Interface, TensorInfo
from obmlite.serving.observer import Observer
from obmlite.serving.repository import Repository, VersionStatus
from obmlite.serving.servable import Servable, State
from obmlite.serving.status import Code, ServingError

__all__ = [
    "All",
    "BatchingConfig",
    "Code",
    "Interface",
    "Latest",
    "ModelConfig",
    "Observer",
    "Repository",
    "Servable",
    "ServingError",
    "Specific",
    "State",
    "TensorInfo",
    "VersionStatus",
    "read_config",
]
