"""Checkpoints of orbax-checkpoint, where it is installed; seen in 0.12.8."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import jax
import numpy as np

from obmlite.errors import ArgumentError

INSTALL = "pip install orbax-checkpoint"


def installed() -> bool:
    """Whether orbax-checkpoint is there."""
    try:
        return importlib.util.find_spec("orbax.checkpoint") is not None
    except ImportError:
        return False


def _library() -> Any:
    try:
        return importlib.import_module("orbax.checkpoint")
    except ImportError as error:
        raise ImportError(f"Orbax checkpoints need orbax-checkpoint: {INSTALL}") from error


def read(path: str) -> Any:
    """A checkpoint as a pytree of dicts and lists, of numpy arrays; one of a single array as that.

    Args:
      path: the directory that was given to Orbax, or the step's directory of a checkpoint manager.

    Raises:
      ArgumentError: Orbax cannot read it.
      ImportError: orbax-checkpoint is not installed.
    """
    ocp = _library()
    path = os.path.abspath(path)
    if os.path.isdir(os.path.join(path, "default")):  # of a checkpoint manager
        path = os.path.join(path, "default")
    try:
        if os.path.isdir(os.path.join(path, "checkpoint")):  # one array, by itself
            with ocp.Checkpointer(ocp.ArrayCheckpointHandler()) as checkpointer:
                return checkpointer.restore(path, restore_args=ocp.RestoreArgs(restore_type=np.ndarray))
        with ocp.PyTreeCheckpointer() as checkpointer:
            found = checkpointer.metadata(path)
            tree = getattr(getattr(found, "item_metadata", found), "tree", found)
            args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            return checkpointer.restore(path, restore_args=args)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArgumentError(
            "The directory is no Orbax checkpoint that can be read.",
            expected="a pytree of arrays, saved with StandardCheckpointer or PyTreeCheckpointer",
            found=f"{path}: {error}"[:500],
        ) from error


def write(state: Any, path: Any) -> None:
    """Saves a pytree.

    Raises:
      ImportError: orbax-checkpoint is not installed.
    """
    with _library().StandardCheckpointer() as checkpointer:
        checkpointer.save(os.path.abspath(path), state)
        checkpointer.wait_until_finished()
