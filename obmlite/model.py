"""Models: functions, weights and pipelines under names; the same thing in memory and when loaded."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from obmlite import _coordination, _engine
from obmlite import tree as trees
from obmlite._names import Names
from obmlite.errors import (
    ArgumentError,
    ExportError,
    ObmliteError,
    context,
)
from obmlite.function import Function, adopt, export, function_name
from obmlite.pipeline import BoundPipeline, Pipeline
from obmlite.signature import Signature
from obmlite.weights import Weights, count_leaves, size

if TYPE_CHECKING:
    from obmlite.frameworks._calls import ModuleCall

__all__ = ["Model"]

DEFAULT_PIPELINE = "serving_default"

_OPTIONS = frozenset({"name", "constraints", "platforms", "vjp_order", "allow_custom_calls", "metadata"})
"""What the frameworks' own constructors hand on to :meth:`Model.from_function`."""


class Model:
    """Named functions and weights, and the pipelines that put them together.

    Args:
      objects: functions (:func:`obmlite.export`) and :class:`obmlite.Weights` by name.
      pipelines: :class:`obmlite.Pipeline` by name.
      default_pipeline: the one that calling the model runs; left out, the only one, or ``"serving_default"``.
      metadata: what else to keep: None, bool, int, float, str, bytes, and lists and dicts of these.

    Raises:
      ArgumentError: a pipeline names what is not there, or weights that do not fit.
    """

    def __init__(
        self,
        objects: Mapping[str, Function | Weights],
        *,
        pipelines: Mapping[str, Pipeline] | None = None,
        default_pipeline: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        pipelines = dict(pipelines or {})
        for name in [*objects, *pipelines]:
            _check_name(name)
        for name, value in objects.items():
            if not isinstance(value, (Function, Weights)):
                raise ArgumentError(
                    "An object of a model is neither a function nor weights.",
                    object=name,
                    expected="obmlite.export(…) or obmlite.Weights(…)",
                    found=type(value).__qualname__,
                )
        trees.pack_static(dict(metadata or {}))
        functions, captures = adopt({n: v.named(n) for n, v in objects.items() if isinstance(v, Function)})
        for name in captures.keys() & objects.keys():
            raise ArgumentError(
                "A function's captured arrays are to have a name that is taken.", object=name, fix="rename that object"
            )
        weights = {**{n: v for n, v in objects.items() if isinstance(v, Weights)}, **captures}
        default = default_pipeline or (DEFAULT_PIPELINE if DEFAULT_PIPELINE in pipelines else "")
        if default and default not in pipelines:
            raise ArgumentError("The default pipeline is not there.", object=default, expected=", ".join(pipelines))
        bound = {name: _bind(name, pipeline, functions, weights) for name, pipeline in pipelines.items()}
        self._set(functions, weights, bound, default, dict(metadata or {}), None)

    def _set(
        self,
        functions: Mapping[str, Function],
        weights: Mapping[str, Weights],
        pipelines: Mapping[str, BoundPipeline],
        default: str,
        metadata: Mapping[str, Any],
        path: str | None,
    ) -> None:
        self.functions = Names.over(functions)
        self.weights = Names.over(weights)
        self.pipelines = Names.over(pipelines)
        self.supplementals: Mapping[str, Any] = Names.over({})
        self.default_pipeline = default
        self.metadata = metadata
        self.path = path

    @classmethod
    def of_parts(
        cls,
        functions: Mapping[str, Function],
        weights: Mapping[str, Weights],
        pipelines: Mapping[str, BoundPipeline],
        default: str,
        metadata: Mapping[str, Any],
        path: str | None,
    ) -> Model:
        """A model of parts that fit together already, as those of a package do."""
        self = cls.__new__(cls)
        self._set(functions, weights, pipelines, default, metadata, path)
        return self

    @property
    def objects(self) -> Mapping[str, Function | Weights]:
        """Functions and weights, by name."""
        names = [*self.functions, *self.weights]
        return Names(names, lambda n: self.functions[n] if n in self.functions else self.weights[n])

    @classmethod
    def from_function(
        cls,
        fn: Callable[..., Any],
        *args: Any,
        kwargs: Mapping[str, Any] | None = None,
        static: str | Sequence[str] = (),
        name: str | None = None,
        weights: int | str | Sequence[int | str] | Mapping[str, str] | None = 0,
        constraints: str | Sequence[str] = (),
        platforms: str | Sequence[str] = _engine.PLATFORMS,
        vjp_order: int = 0,
        allow_custom_calls: Collection[str] = (),
        metadata: Mapping[str, Any] | None = None,
    ) -> Model:
        """A model of one function and its weights.

        ``Model.from_function(apply, params, jax.ShapeDtypeStruct((8, 28, 28, 1), "float32"))``: the first argument
        is the weights, of the others only shape and dtype matter. Calling the model calls the function with the
        weights in their place.

        Args:
          fn: the function; jitted or not.
          *args: its arguments, as for :func:`obmlite.export`; those that are weights are saved.
          kwargs: arguments to be given by keyword.
          static: names of arguments whose values are fixed now.
          name: the function's name in the package; its own if not given.
          weights: which arguments are weights: a position, an argument's name, several of these, or a mapping from
            argument to the name that its weights get. None for a function without. They are named like the arguments.
          constraints: what symbols in the shapes must satisfy, such as ``"b <= 16"``.
          platforms: of ``"cpu"``, ``"cuda"``, ``"rocm"`` and ``"tpu"``, those that it is to run on.
          vjp_order: up to which order ``jax.grad`` can go through the loaded function; 0 for not at all.
          allow_custom_calls: targets of custom calls beyond those that JAX promises to keep.
          metadata: what else to keep with the package.

        Raises:
          ExportError: the function cannot be exported as it is.
          LeafError: the weights, an argument or a result hold something that is neither an array nor a number.
        """
        names = _argument_names(fn, len(args), list(kwargs or {}))
        chosen = _chosen(weights, names)
        values = {**dict(zip(names, args, strict=False)), **(kwargs or {})}
        objects: dict[str, Function | Weights] = {}
        for argument, own in chosen.items():
            if argument not in values:
                raise ExportError(
                    "An argument that is to be weights was not given.",
                    field="weights",
                    expected=f"some of {', '.join(values)}",
                    found=argument,
                )
            if own in objects:
                raise ExportError("Two arguments' weights are to have one name.", field="weights", found=own)
            hint = "the first argument is the weights; weights= names another one, and weights=None none"
            with context(object=own, fix=hint):
                objects[own] = Weights(values[argument])
        own_name = name or function_name(fn)
        if own_name in objects:
            raise ExportError("The function and its weights have one name.", object=own_name, fix="give name=")
        function = export(
            fn,
            *args,
            kwargs=kwargs,
            static=static,
            name=own_name,
            constraints=constraints,
            platforms=platforms,
            vjp_order=vjp_order,
            allow_custom_calls=allow_custom_calls,
        )
        function = function.bound_to(chosen)
        return cls(
            {own_name: function, **objects},
            pipelines={DEFAULT_PIPELINE: Pipeline(function=own_name, weights=chosen)},
            metadata=metadata,
        )

    @classmethod
    def from_functions(
        cls,
        functions: Mapping[str, Sequence[Any]],
        *,
        weights: int | str | Sequence[int | str] | Mapping[str, str] | None = 0,
        static: str | Sequence[str] = (),
        constraints: str | Sequence[str] = (),
        platforms: str | Sequence[str] = _engine.PLATFORMS,
        vjp_order: int = 0,
        metadata: Mapping[str, Any] | None = None,
    ) -> Model:
        """A model of several functions, which may share weights.

        ``Model.from_functions({"encode": (enc, params, x), "decode": (dec, params, z)})``. Each function gets a
        pipeline of its name, with its weights bound. Weights that are the same arrays under one name are saved once.

        Args:
          functions: name → the function and its arguments, as for :meth:`from_function`.
          weights: which arguments are weights, as for :meth:`from_function`; for each function alike.
          static: names of arguments whose values are fixed; each function has those that it takes.
          constraints: what symbols must satisfy; each function has those whose symbols it uses.
          platforms: as for :func:`obmlite.export`.
          vjp_order: as for :func:`obmlite.export`.
          metadata: what else to keep with the package.

        Raises:
          ExportError: a function cannot be exported, or different weights have one name.
          LeafError: weights, an argument or a result hold something that is neither an array nor a number.
        """
        from obmlite import _exporting

        objects: dict[str, Function | Weights] = {}
        pipelines: dict[str, Pipeline] = {}
        statics = [static] if isinstance(static, str) else list(static)
        texts = [constraints] if isinstance(constraints, str) else list(constraints)
        for name, (fn, *args) in functions.items():
            names = _argument_names(fn, len(args), [])
            model = cls.from_function(
                fn,
                *args,
                static=[s for s in statics if s in names],
                name=name,
                weights=weights,
                constraints=[text for text in texts if _exporting.uses(text, args)],
                platforms=platforms,
                vjp_order=vjp_order,
            )
            objects[name] = model.functions[name]
            bound = {b.argument: b.weights for b in model.functions[name].bindings}
            pipelines[name] = Pipeline(function=name, weights=bound)
            for own in bound.values():
                if own in objects and not _same(objects[own], model.weights[own]):
                    raise ExportError(
                        "Different weights have one name.",
                        object=own,
                        found=f"those of {name} and those of another function",
                        fix="give the functions' parameters different names, or put Model(…) together by hand",
                    )
                objects.setdefault(own, model.weights[own])
        return cls(objects, pipelines=pipelines, metadata=metadata)

    # --- from frameworks

    @classmethod
    def from_linen(
        cls, module: Any, variables: Any, *args: Any, method: Any = None, mutable: Any = False, **keywords: Any
    ) -> Model:
        """A model of a Flax Linen module: ``Model.from_linen(module, variables, x, train=False)``.

        The function is ``module.apply``, its weights are ``variables``, all collections of them.

        Args:
          module: the module.
          variables: what ``module.init`` returned, trained: a dict or ``FrozenDict``, boxed leaves or not.
          *args: the module's arguments, of which shape and dtype matter.
          method: the module's method, as for ``apply``; its name is then the function's.
          mutable: collections that are returned beside the result, as for ``apply``.
          **keywords: options of :meth:`from_function` (name, constraints, platforms, vjp_order, allow_custom_calls,
            metadata); all others are the module's, or those of ``apply``. Without arrays in them they are fixed.

        Raises:
          ExportError: the function cannot be exported as it is.
          LeafError: the variables, an argument or a result hold what is neither an array nor a number.
        """
        from obmlite.frameworks import linen

        options, own = _options(keywords)
        return cls._of_call(linen.call(module, variables, args, own, method=method, mutable=mutable), options)

    @classmethod
    def from_nnx(
        cls, module: Any, *args: Any, method: str | None = None, mutable: bool = False, **keywords: Any
    ) -> Model:
        """A model of a Flax NNX module: ``Model.from_nnx(module, x)``.

        The function's weights are the module's ``state``, in which shared variables are there once.

        Args:
          module: the module, as it is to be used: after ``module.eval()``, say.
          *args: the module's arguments, of which shape and dtype matter.
          method: the name of a method other than ``__call__``.
          mutable: whether to return the new state beside the result.
          **keywords: as for :meth:`from_linen`.

        Raises:
          ExportError: the function cannot be exported as it is.
          LeafError: the state, an argument or a result hold what is neither an array nor a number.
        """
        from obmlite.frameworks import nnx

        options, own = _options(keywords)
        return cls._of_call(nnx.call(module, args, own, method=method, mutable=mutable), options)

    @classmethod
    def from_haiku(
        cls,
        transformed: Any,
        params: Any,
        *args: Any,
        state: Any = None,
        rng: Any = None,
        mutable: bool = False,
        **keywords: Any,
    ) -> Model:
        """A model of a function that Haiku transformed: ``Model.from_haiku(transformed, params, x, state=state)``.

        Args:
          transformed: what ``hk.transform`` or ``hk.transform_with_state`` returned.
          params: the parameters.
          *args: the function's arguments, of which shape and dtype matter.
          state: the state, for a function that has one. It is saved beside the parameters.
          rng: a key like the one that calls will give as ``rng=``; None for a function that draws nothing.
          mutable: whether to return the new state beside the result.
          **keywords: as for :meth:`from_linen`.

        Raises:
          ExportError: the function cannot be exported as it is, or ``state`` does not fit it.
          LeafError: weights, an argument or a result hold what is neither an array nor a number.
        """
        from obmlite.frameworks import haiku

        options, own = _options(keywords)
        call = haiku.call(transformed, params, args, own, state=state, rng=rng, mutable=mutable)
        return cls._of_call(call, options)

    @classmethod
    def from_objax(cls, module: Any, *args: Any, mutable: bool = False, **keywords: Any) -> Model:
        """A model of an Objax module: ``Model.from_objax(module, x, training=False)``.

        The function's weights are ``variables``, the module's ``vars()``; the module is not changed.

        Args:
          module: the module.
          *args: the module's arguments, of which shape and dtype matter.
          mutable: whether to return the new values of all variables, by name, beside the result.
          **keywords: as for :meth:`from_linen`.

        Raises:
          ExportError: the function cannot be exported as it is.
          LeafError: a variable, an argument or a result hold what is neither an array nor a number.
        """
        from obmlite.frameworks import objax

        options, own = _options(keywords)
        return cls._of_call(objax.call(module, args, own, mutable=mutable), options)

    @classmethod
    def from_equinox(cls, module: Any, *args: Any, state: Any = None, mutable: bool = False, **keywords: Any) -> Model:
        """A model of an Equinox module: ``Model.from_equinox(module, x)``.

        The arrays of the module are saved; what else it holds is as it is now, as after ``eqx.nn.inference_mode``.
        For a batch, give :meth:`from_function` the call: ``lambda module, x: jax.vmap(module)(x)``.

        Args:
          module: the module.
          *args: its arguments, of which shape and dtype matter.
          state: an ``eqx.nn.State``, given to the module after these. It is saved beside the module.
          mutable: whether to return the new state beside the result.
          **keywords: as for :meth:`from_linen`.

        Raises:
          ExportError: the function cannot be exported as it is.
          LeafError: an argument or a result hold what is neither an array nor a number.
        """
        from obmlite.frameworks import equinox

        options, own = _options(keywords)
        return cls._of_call(equinox.call(module, args, own, state=state, mutable=mutable), options)

    @classmethod
    def _of_call(cls, call: ModuleCall, options: Mapping[str, Any]) -> Model:
        return cls.from_function(
            call.fn,
            *call.args,
            kwargs=call.kwargs,
            static=call.static,
            weights=call.weights,
            **{"name": call.name, **options},
        )

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
        if len(self.pipelines) == 1:
            return next(iter(self.pipelines.values()))
        raise ArgumentError(
            "The model has no default pipeline.",
            package=self.path,
            expected="default_pipeline=, or exactly one pipeline",
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

        def pipeline(name: str) -> BoundPipeline:
            old = self.pipelines[name]
            return BoundPipeline(name, old.function, old.bindings, weights, old.metadata)

        pipelines = Names(list(self.pipelines), pipeline)
        return Model.of_parts(self.functions, weights, pipelines, self.default_pipeline, self.metadata, self.path)

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
          UserWarning: StableHLO's promise of compatibility does not cover a function, such as one that fixes its mesh.

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
        for heading, mapping in (
            ("functions", self.functions),
            ("weights", self.weights),
            ("pipelines", self.pipelines),
        ):
            if mapping:
                lines.append(f"  {heading}")
            lines.extend(f"    {_line(mapping, name)}" for name in mapping)
        if self.metadata:
            lines.append(f"  metadata: {', '.join(map(str, self.metadata))}")
        return "\n".join(lines)


def _options(keywords: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments apart: options of an export, and a module's own."""
    options = {key: value for key, value in keywords.items() if key in _OPTIONS}
    return options, {key: value for key, value in keywords.items() if key not in _OPTIONS}


def _check_name(name: object) -> None:
    """Refuses what is no name.

    Raises:
      ArgumentError: it is no text, is empty, or is not valid Unicode.
    """
    if not isinstance(name, str) or not name or name.encode(errors="ignore").decode() != name:
        raise ArgumentError(
            "An object or pipeline has a name that cannot be kept.",
            expected="text that is not empty and valid Unicode",
            found=ascii(name),
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
    where = f" where {', '.join(value.signature.constraints)}" if value.signature.constraints else ""
    return f"{name}{value.signature}{where}"


def _bind(
    name: str, pipeline: Pipeline, functions: Mapping[str, Function], weights: Mapping[str, Weights]
) -> BoundPipeline:
    if pipeline.function not in functions:
        raise ArgumentError(
            "A pipeline names a function that is not there.",
            object=name,
            expected=", ".join(functions) or "a function",
            found=pipeline.function,
        )
    function = functions[pipeline.function]
    bindings = pipeline.bindings(function)
    for binding in bindings:
        if binding.weights not in weights:
            raise ArgumentError(
                "A pipeline names weights that are not there.",
                object=name,
                leaf=binding.argument,
                expected=", ".join(weights) or "weights",
                found=binding.weights,
            )
    return BoundPipeline(name, function, bindings, weights, pipeline.metadata)


def _same(one: Function | Weights, other: Weights) -> bool:
    """Whether two weights objects are the same arrays under the same names."""
    if not isinstance(one, Weights) or one.names != other.names:
        return False
    return all(one.leaf(n).same_array(other.leaf(n)) for n in range(len(one.specs)))


def _argument_names(fn: Callable[..., Any], count: int, keywords: Sequence[str]) -> list[str]:
    """The names that positional arguments have in a signature."""
    from obmlite import _exporting

    given, _ = _exporting.name_arguments(fn, [None] * count, dict.fromkeys(keywords), ())
    return [a.name for a in given if isinstance(a.place, int)]


def _chosen(
    weights: int | str | Sequence[int | str] | Mapping[str, str] | None, names: Sequence[str]
) -> dict[str, str]:
    """Argument → name of its weights."""
    if weights is None:
        return {}
    if isinstance(weights, Mapping):
        return dict(weights)
    chosen: dict[str, str] = {}
    for choice in [weights] if isinstance(weights, (int, str)) else weights:
        if isinstance(choice, int) and not -len(names) <= choice < len(names):
            raise ExportError(
                "The argument that is to be weights was not given.",
                field="weights",
                expected=f"one of {len(names)} positional arguments",
                found=str(choice),
                fix="weights=None for a function without weights",
            )
        argument = names[choice] if isinstance(choice, int) else choice
        chosen[argument] = argument
    return chosen
