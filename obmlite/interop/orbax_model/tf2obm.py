"""TensorFlow's side of Orbax Model's names: handles of functions, and the SavedModel that holds them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from obmlite.interop.orbax_model._objects import GlobalSupplemental, UnstructuredData
from obmlite.interop.tensorflow import convert_function, save_functions, tf_specs_to_jax
from obmlite.interop.tensorflow_steps import SAVED_MODEL, SAVED_MODEL_NAME, SAVED_MODEL_VERSION

__all__ = [
    "SAVED_MODEL_MIME_TYPE",
    "SAVED_MODEL_VERSION",
    "TF_SAVED_MODEL_SUPPLEMENTAL_NAME",
    "convert_function",
    "save_tf_functions",
    "tf_saved_model_as_obm_supplemental",
    "tf_specs_to_jax",
]

SAVED_MODEL_MIME_TYPE = SAVED_MODEL
TF_SAVED_MODEL_SUPPLEMENTAL_NAME = SAVED_MODEL_NAME


def save_tf_functions(
    model_dir: str | os.PathLike[str],
    fns: Mapping[str, Any],
    trackable_resources: Any = None,
    *,
    tf_saved_model_sub_dir: str = "tf_saved_model/",
) -> dict[str, GlobalSupplemental]:
    """Writes functions of TensorFlow's as one SavedModel below a model's directory, over one that is there.

    Args:
      model_dir: the directory that the model will be saved to.
      fns: name → concrete function, or a ``tf.function`` with an ``input_signature``.
      trackable_resources: variables, look-up tables and assets that they use: a pytree of them.
      tf_saved_model_sub_dir: where below ``model_dir``.

    Returns:
      The SavedModel, as ``SaveOptions(supplementals=…)`` takes it.

    Raises:
      ExportError: TensorFlow cannot save the functions.
      ImportError: TensorFlow is not installed.
    """
    path = os.path.join(model_dir, tf_saved_model_sub_dir)
    save_functions(path, fns, resources=trackable_resources, overwrite=True)
    return {SAVED_MODEL_NAME: GlobalSupplemental(tf_saved_model_as_obm_supplemental(tf_saved_model_sub_dir))}


def tf_saved_model_as_obm_supplemental(path: str) -> UnstructuredData:
    """A SavedModel's directory as a supplemental.

    Args:
      path: absolute, or below the model's directory.
    """
    return UnstructuredData(path, mime_type=SAVED_MODEL, version=SAVED_MODEL_VERSION)
