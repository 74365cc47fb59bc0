"""Models: functions, weights and pipelines under names; the same thing in memory and when loaded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from obmlite import _assembling, _coordination, examples
from obmlite import tree as trees
from obmlite._constructors import DEFAULT_PIPELINE, Constructors
from obmlite._names import Names
from obmlite._processes import OfOneProcess
from obmlite.errors import ArgumentError, ObmliteError, context
from obmlite.function import Function
from obmlite.pipeline import BoundPipeline, Pipeline
from obmlite.polymorphic import Polymorphic, PolymorphicFunction
from obmlite.schema.records import DeviceRecord, Visibility
from obmlite.signature import Signature
from obmlite.supplemental import Supplemental
from obmlite.weights import Weights, count_leaves, size

if TYPE_CHECKING:
    from obmlite.validation import Validation

__all__ = ["Model"]


class Model(OfOneProcess, Constructors):
    """Named functions and weights, and the pipelines that put them together.

    Args:
      objects: functions (:func:`obmlite.export`), :class:`obmlite.Polymorphic` and :class:`obmlite.Weights` by name.
      pipelines: :class:`obmlite.Pipeline` by name.
      default_pipeline: the one that calling the model runs; left out, the only public one, or ``"serving_default"``.
      supplementals: :class:`obmlite.Supplemental` by name.
      private: names of objects that are meant for the others only; everything else is public.
      device_assignment: the devices that the model was made for, as :func:`obmlite.devices_of` lists a mesh's. They are
        kept and shown, and change nothing.
      metadata: what else to keep: None, bool, int, float, str, bytes, and lists and dicts of these.

    Raises:
      ArgumentError: a pipeline names what is not there, weights or a step that do not fit, or a supplemental names a
        function that is not there.
    """

    def __init__(
        self,
        objects: Mapping[str, Function | Polymorphic | PolymorphicFunction | Weights],
        *,
        pipelines: Mapping[str, Pipeline] | None = None,
        default_pipeline: str | None = None,
        supplementals: Mapping[str, Supplemental] | None = None,
        private: Collection[str] = (),
        device_assignment: Sequence[DeviceRecord] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        trees.pack_static(dict(metadata or {}))
        pipelines, supplementals = dict(pipelines or {}), dict(supplementals or {})
        parts = _assembling.assemble(objects, [private] if isinstance(private, str) else private)
        _assembling.check_supplementals(supplementals, parts)
        default = default_pipeline or ""
        if not default and DEFAULT_PIPELINE in pipelines:
            public = _assembling.visibility_of(pipelines[DEFAULT_PIPELINE].visibility) is Visibility.PUBLIC
            default = DEFAULT_PIPELINE if public else ""
        if default and default not in pipelines:
            raise ArgumentError("The default pipeline is not there.", object=default, expected=", ".join(pipelines))
        bound = _assembling.bind(pipelines, parts, supplementals)
        if default and bound[default].visibility is Visibility.PRIVATE:
            raise ArgumentError("The default pipeline is private.", object=default, expected="a public pipeline")
        kept = dict.fromkeys(parts.private, Visibility.PRIVATE)
        names = [*parts.functions, *parts.polymorphic, *parts.weights]
        self._set(
            parts.functions,
            parts.weights,
            bound,
            default,
            dict(metadata or {}),
            None,
            polymorphic=parts.polymorphic,
            supplementals=supplementals,
            visibility=Names(names, lambda name: kept.get(name, Visibility.PUBLIC)),
            device_assignment=device_assignment,
        )

    def _set(
        self,
        functions: Mapping[str, Function],
        weights: Mapping[str, Weights],
        pipelines: Mapping[str, BoundPipeline],
        default: str,
        metadata: Mapping[str, Any],
        path: str | None,
        *,
        polymorphic: Mapping[str, PolymorphicFunction] | None = None,
        supplementals: Mapping[str, Supplemental] | None = None,
        visibility: Mapping[str, Visibility] | None = None,
        device_assignment: Sequence[DeviceRecord] = (),
    ) -> None:
        self.functions = Names.over(functions)
        self.polymorphic = Names.over(polymorphic or {})
        self.weights = Names.over(weights)
        self.pipelines = Names.over(pipelines)
        self.supplementals = Names.over(supplementals or {})
        self.default_pipeline = default
        self.device_assignment = tuple(device_assignment)
        self.metadata = metadata
        self.path = path
        if visibility is None:
            visibility = Names(list(self.objects), lambda _: Visibility.PUBLIC)
        self.visibility: Mapping[str, Visibility] = visibility

    @classmethod
    def of_parts(
        cls,
        functions: Mapping[str, Function],
        weights: Mapping[str, Weights],
        pipelines: Mapping[str, BoundPipeline],
        default: str,
        metadata: Mapping[str, Any],
        path: str | None,
        **others: Any,
    ) -> Model:
        """A model of parts that fit together already, as those of a package do.

        Args:
          functions: by name, as all mappings here.
          weights: the weights.
          pipelines: the pipelines.
          default: the default pipeline; empty for none.
          metadata: what the user attached.
          path: the package that they are of.
          **others: polymorphic, supplementals, visibility and device_assignment, where there are any.
        """
        self = cls.__new__(cls)
        self._set(functions, weights, pipelines, default, metadata, path, **others)
        return self

    @property
    def objects(self) -> Mapping[str, Function | PolymorphicFunction | Weights]:
        """Functions, polymorphic functions and weights, by name."""
        groups: list[Mapping[str, Any]] = [self.functions, self.polymorphic, self.weights]
        return Names([n for group in groups for n in group], lambda n: next(g[n] for g in groups if n in g))

    # --- using

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the default pipeline.

        Raises:
          ArgumentError: the arguments do not match its signature, or there is no default pipeline.
          PlatformError: its function was not exported for the platform that it would run on.
        """
        return self.pipeline(*args, **kwargs)

    @property
    def pipeline(self) -> BoundPipeline:
        """The default pipeline.

        Raises:
          ArgumentError: there are several and none is the default, or there is none.
        """
        if self.default_pipeline:
            return self.pipelines[self.default_pipeline]
        public = list(self.pipelines)
        if len(public) > 1:  # one may be the only one that is not private; others need not even be readable
            public = [n for n in self.pipelines if self.pipelines[n].visibility is Visibility.PUBLIC]
        if len(public) == 1 and (found := self.pipelines[public[0]]).visibility is Visibility.PUBLIC:
            return found
        raise ArgumentError(
            "The model has no default pipeline.",
            package=self.path,
            expected="default_pipeline=, or exactly one public pipeline",
            found=", ".join(self.pipelines) or "no pipelines",
            fix="call one of model.pipelines or model.functions",
        )

    @property
    def signature(self) -> Signature:
        """The default pipeline's signature."""
        return self.pipeline.signature

    def restore(self, *, shardings: Any = None, **options: Any) -> Model:
        """A new model whose weights are in memory, as :meth:`obmlite.Weights.restore` puts them there.

        Its pipelines run on them: ``model.restore(mesh=mesh)(x)``. Functions run where their arguments are; one that
        fixes its mesh needs ``load(path, mesh=mesh)``.

        Args:
          shardings: a sharding or device for all weights; a function from a leaf's name and spec to one; or a mapping
            from names of weights objects to either, or to a pytree prefix of shardings. Objects that it does not
            name go to the default device, or where ``mesh`` says.
          **options: mesh, rules, dtype, memory_budget, threads and progress, as there. With ``dtype`` the functions
            must have been exported for it.

        Raises:
          RestoreError: weights do not fit where they are to go; all of them are listed.
          ArgumentError: an argument is of a wrong kind, or ``shardings`` names what is not there.
        """
        given = shardings if isinstance(shardings, Mapping) else dict.fromkeys(self.weights, shardings)
        for name in given:
            if name not in self.weights:
                raise ArgumentError(
                    "Shardings are given for weights that are not there.",
                    field="shardings",
                    expected=", ".join(self.weights) or "no weights",
                    found=repr(name),
                    fix="give a mapping from names of weights objects",
                )
        weights = {}
        for name, own in self.weights.items():
            with context(object=name, package=self.path):
                weights[name] = own.restored(shardings=given.get(name), **options)

        pipelines = Names(list(self.pipelines), lambda name: self.pipelines[name].over(weights))
        return self._with(weights=weights, pipelines=pipelines)

    @property
    def examples(self) -> dict[str, list[dict[str, Any]]]:
        """Example inputs: pipeline → for each example its arguments by name, as numpy arrays; empty without any.

        Raises:
          CorruptPackageError: they are not those that were saved.
        """
        return examples.examples_of(self.supplementals)

    def with_examples(self, *inputs: Any, pipeline: str | None = None) -> Model:
        """The model with example inputs, which are saved with it, for trying it and for warming it up.

        Args:
          *inputs: for each example its arguments: a tuple of positional ones, a dict of them by name, or one argument.
          pipeline: that they are for; the default one if left out.

        Raises:
          ArgumentError: an example does not match the pipeline's signature.
        """
        own = examples.with_examples(self, inputs, pipeline)
        return self._with(supplementals={**self.supplementals, examples.NAME: own})

    def _with(self, **changes: Any) -> Model:
        parts: dict[str, Any] = {
            "functions": self.functions,
            "weights": self.weights,
            "pipelines": self.pipelines,
            "default": self.default_pipeline,
            "metadata": self.metadata,
            "path": self.path,
            "polymorphic": self.polymorphic,
            "supplementals": self.supplementals,
            "visibility": self.visibility,
            "device_assignment": self.device_assignment,
        }
        return Model.of_parts(**{**parts, **changes})

    def validate(self, inputs: Sequence[Any], reference: Callable[..., Any], **options: Any) -> Validation:
        """Compares the default pipeline with another function on the same inputs, and times both.

        Args:
          inputs: for each call its arguments: a tuple of positional ones, a dict of them by name, or one argument.
          reference: gives the expected results for the same arguments.
          **options: rtol, atol, equal_nan and repeats, as for :func:`obmlite.validation.validate`.

        Returns:
          A report, which prints as a table; ``report.passed`` says whether all leaves are within the tolerances.

        Raises:
          ArgumentError: there are no inputs, or they do not match the signature.
        """
        from obmlite.validation import validate

        return validate(self.pipeline, inputs, reference, **options)

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        max_file_bytes: int | None = None,
        progress: bool | None = None,
        timeout: float = _coordination.TIMEOUT,
        local: bool = False,
    ) -> None:
        """Writes the model as a package. Until all of it is there, the path holds what it held before.

        Under ``jax.distributed`` every process calls this, with the same tree, order and path, which has to be on a
        file system that all of them see; each writes the pieces of arrays that it has, and what several have is dealt
        out. Values that each process has for itself (of numpy, or on its own devices) have to be equal; small ones are
        compared. A process that fails makes all others raise; who learns nothing more from process 0 does so after
        ``timeout``, and the package is then the old one or, if process 0 was done, the new one.

        Args:
          path: a directory that is not there yet, or a package that is to be replaced.
          overwrite: whether a package that is there may be replaced. Those who have it open go on reading it.
          max_file_bytes: bytes of tensors in one weights file before the next is begun; 5 GB if not given.
          progress: whether to show a progress bar; left out, only on a terminal, and of process 0.
          timeout: seconds for which a process waits, at each step, for the slowest of the others.
          local: whether this process saves alone, to a path of its own, what is all on its own devices.

        Warns:
          UserWarning: StableHLO's promise of compatibility does not cover a function, such as one that fixes its mesh;
            or it holds operations that the ``replay`` engine does not have, which the text lists.

        Raises:
          PackageExistsError: there is a package, or something that is no package.
          LeafError: weights cannot be saved: they were deleted, say, or ``local`` was given and they are elsewhere too.
          CoordinationError: processes disagree about what is to be saved, or another one failed or did not answer.
          OSError: the disk is full, the directory is read-only, ….
        """
        from obmlite import _saving, _writing

        for name, function in self.functions.items():
            if not function.durable and (local or _coordination.process_index() == 0):
                warnings.warn(
                    f"The function {name!r} is not durable: its code holds operations beside StableHLO's "
                    f"({', '.join(function.other_dialects)}), as that of one that fixes its mesh does, which no later "
                    "JAX promises to read. Keep what it was made from.",
                    UserWarning,
                    stacklevel=2,
                )
            elif local or _coordination.process_index() == 0:
                _warn_of_what_is_not_replayed(function)
        _saving.save(
            self,
            path,
            overwrite=overwrite,
            file_bytes=max_file_bytes or _writing.FILE_BYTES,
            progress=progress,
            timeout=timeout,
            local=local,
        )

    def __repr__(self) -> str:
        lines = [f"Model{f' at {self.path}' if self.path else ''}"]
        headings: dict[str, Mapping[str, Any]] = {
            "functions": self.functions,
            "polymorphic functions": self.polymorphic,
            "weights": self.weights,
            "pipelines": self.pipelines,
            "supplementals": self.supplementals,
        }
        for heading, mapping in headings.items():
            if mapping:
                lines.append(f"  {heading}")
            lines.extend(f"    {_line(mapping, name)}" for name in mapping)
        if self.metadata:
            lines.append(f"  metadata: {', '.join(map(str, self.metadata))}")
        return "\n".join(lines)


def _warn_of_what_is_not_replayed(function: Function) -> None:
    replayable = function.replayable
    if not replayable:
        where = "" if replayable.platforms == function.platforms else f" on {', '.join(replayable.platforms)}"
        shown = "; ".join(map(str, replayable.reasons[:5]))
        more = f"; … ({len(replayable.reasons)} in all)" if len(replayable.reasons) > 5 else ""
        warnings.warn(
            f"The function {function.name!r} is not replayable{where}: {shown}{more}. There, it will have no jax.vmap, "
            "no jax.jvp and no derivatives but those saved with it.",
            UserWarning,
            stacklevel=3,
        )


def _line(mapping: Mapping[str, Any], name: str) -> str:
    try:
        value = mapping[name]
    except ObmliteError as error:
        return f"{name}: {error.problem} {error.found or ''}".rstrip()
    if isinstance(value, Weights):
        return (
            f"{name}: {count_leaves(value.tree.num_leaves)}, {value.num_parameters:,} parameters, {size(value.nbytes)}"
        )
    if isinstance(value, Supplemental):
        return f"{name}: {repr(value).removeprefix('Supplemental: ')}"
    if isinstance(value, PolymorphicFunction):
        return f"{name}: {', '.join(f.name for f in value.functions)}"
    where = f" where {', '.join(value.signature.constraints)}" if value.signature.constraints else ""
    return f"{name}{value.signature}{where}"
