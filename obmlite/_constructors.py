"""How models are made of functions and of frameworks' modules, each in one call."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from obmlite import _engine, dims
from obmlite._compile_options import CompileOptions
from obmlite.errors import ExportError, context
from obmlite.function import Function, export, function_name
from obmlite.pipeline import Pipeline
from obmlite.polymorphic import Polymorphic
from obmlite.specs import TensorSpec
from obmlite.weights import Weights

if TYPE_CHECKING:
    from typing import Self

    from obmlite.frameworks._calls import ModuleCall

DEFAULT_PIPELINE = "serving_default"

_OPTIONS = frozenset(
    {
        "name",
        "constraints",
        "platforms",
        "vjp_order",
        "allow_custom_calls",
        "metadata",
        "compile_options",
        "symbol_values",
    }
)
"""What the frameworks' own constructors hand on to :meth:`Constructors.from_function`."""


class Constructors:
    """The constructors of :class:`obmlite.Model`, which inherits them."""

    functions: Mapping[str, Function]
    weights: Mapping[str, Weights]

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
        compile_options: CompileOptions | None = None,
        symbol_values: Mapping[str, Sequence[int | None]] | None = None,
    ) -> Self:
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
          compile_options: XLA's options, as for :func:`obmlite.export`.
          symbol_values: the function is exported once for each combination of these values of the symbols in its
            arguments' shapes, as a polymorphic function over the same weights: ``{"b": (1, 16, 128)}``. A value None
            leaves the symbol as it is.

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

        def exported(args: Any, kwargs: Any, constraints: Any) -> Function:
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
                compile_options=compile_options,
            )
            return function.bound_to(chosen)

        function: Function | Polymorphic
        if symbol_values:
            texts = [constraints] if isinstance(constraints, str) else list(constraints)
            cases = _cases(symbol_values, args, dict(kwargs or {}), texts)
            function = Polymorphic({suffix: exported(*case) for suffix, case in cases.items()})
        else:
            function = exported(args, kwargs, constraints)
        make: Any = cls
        made: Self = make(
            {own_name: function, **objects},
            pipelines={DEFAULT_PIPELINE: Pipeline(function=own_name, weights=chosen)},
            metadata=metadata,
        )
        return made

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
    ) -> Self:
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
        make: Any = cls
        made: Self = make(objects, pipelines=pipelines, metadata=metadata)
        return made

    # --- from frameworks

    @classmethod
    def from_linen(
        cls, module: Any, variables: Any, *args: Any, method: Any = None, mutable: Any = False, **keywords: Any
    ) -> Self:
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
          ArgumentError: it is no such module, or has no such method.
          ExportError: the function cannot be exported as it is.
          LeafError: the variables, an argument or a result hold what is neither an array nor a number.
        """
        from obmlite.frameworks import linen

        options, own = _options(keywords)
        return cls._of_call(linen.call(module, variables, args, own, method=method, mutable=mutable), options)

    @classmethod
    def from_nnx(
        cls, module: Any, *args: Any, method: str | None = None, mutable: bool = False, **keywords: Any
    ) -> Self:
        """A model of a Flax NNX module: ``Model.from_nnx(module, x)``.

        The function's weights are the module's ``state``, in which shared variables are there once.

        Args:
          module: the module, as it is to be used: after ``module.eval()``, say.
          *args: the module's arguments, of which shape and dtype matter.
          method: the name of a method other than ``__call__``.
          mutable: whether to return the new state beside the result.
          **keywords: as for :meth:`from_linen`.

        Raises:
          ArgumentError: it is no such module, or has no such method.
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
    ) -> Self:
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
          ArgumentError: it is no such module, or has no such method.
          ExportError: the function cannot be exported as it is, or ``state`` does not fit it.
          LeafError: weights, an argument or a result hold what is neither an array nor a number.
        """
        from obmlite.frameworks import haiku

        options, own = _options(keywords)
        call = haiku.call(transformed, params, args, own, state=state, rng=rng, mutable=mutable)
        return cls._of_call(call, options)

    @classmethod
    def from_objax(cls, module: Any, *args: Any, mutable: bool = False, **keywords: Any) -> Self:
        """A model of an Objax module: ``Model.from_objax(module, x, training=False)``.

        The function's weights are ``variables``, the module's ``vars()``; the module is not changed.

        Args:
          module: the module.
          *args: the module's arguments, of which shape and dtype matter.
          mutable: whether to return the new values of all variables, by name, beside the result.
          **keywords: as for :meth:`from_linen`.

        Raises:
          ArgumentError: it is no such module, or has no such method.
          ExportError: the function cannot be exported as it is.
          LeafError: a variable, an argument or a result hold what is neither an array nor a number.
        """
        from obmlite.frameworks import objax

        options, own = _options(keywords)
        return cls._of_call(objax.call(module, args, own, mutable=mutable), options)

    @classmethod
    def from_equinox(cls, module: Any, *args: Any, state: Any = None, mutable: bool = False, **keywords: Any) -> Self:
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
          ArgumentError: it is no such module, or has no such method.
          ExportError: the function cannot be exported as it is.
          LeafError: an argument or a result hold what is neither an array nor a number.
        """
        from obmlite.frameworks import equinox

        options, own = _options(keywords)
        return cls._of_call(equinox.call(module, args, own, state=state, mutable=mutable), options)

    @classmethod
    def _of_call(cls, call: ModuleCall, options: Mapping[str, Any]) -> Self:
        return cls.from_function(
            call.fn,
            *call.args,
            kwargs=call.kwargs,
            static=call.static,
            weights=call.weights,
            **{"name": call.name, **options},
        )


def _cases(
    values: Mapping[str, Sequence[int | None]], args: Sequence[Any], kwargs: Mapping[str, Any], texts: Sequence[str]
) -> dict[str, tuple[Any, Any, list[str]]]:
    """For each combination of symbols' values what it is called, the arguments, and the constraints that are left.

    Raises:
      ExportError: a symbol is in no shape, has no values, or has one that breaks a constraint.
    """
    found: set[str] = set()

    def replaced(value: Any, known: Mapping[str, int]) -> Any:
        symbolic = isinstance(value, (TensorSpec, jax.ShapeDtypeStruct))
        if not symbolic or all(type(d) is int for d in value.shape):
            return value
        spec = TensorSpec.of(value)
        found.update(spec.symbols)
        shape = tuple(dims.substitute(d, known) for d in spec.shape)
        return dataclasses.replace(spec, shape=shape)

    constraints = [dims.parse_constraint(text) for text in texts]
    cases: dict[str, tuple[Any, Any, list[str]]] = {}
    for combination in itertools.product(*values.values()):
        chosen = dict(zip(values, combination, strict=True))
        known = {symbol: value for symbol, value in chosen.items() if value is not None}
        if any(type(value) is not int or value < 1 for value in known.values()):
            raise ExportError(
                "A symbol's values are sizes.",
                field="symbol_values",
                expected="integers of at least 1, or None",
                found=str(dict(values)),
            )
        for constraint in constraints:
            if constraint.holds(known) is False:
                raise ExportError(
                    "A symbol's value breaks a constraint.",
                    field="symbol_values",
                    expected=str(constraint),
                    found=str(known),
                )
        given = jax.tree.map(lambda leaf, known=known: replaced(leaf, known), (list(args), dict(kwargs)))
        left = [str(c) for c in constraints if not c.symbols <= known.keys()]
        suffix = ",".join(symbol if value is None else f"{symbol}={value}" for symbol, value in chosen.items())
        cases[suffix] = (*given, left)
    if not cases or not values.keys() <= found:
        raise ExportError(
            "Values are given for a symbol that is in no argument's shape, or none for one that is.",
            field="symbol_values",
            expected=f"values for some of {', '.join(sorted(found))}" if found else "symbols in the arguments' shapes",
            found=", ".join(values),
            fix='give the arguments as in obmlite.spec("f32[b,4]")',
        )
    return cases


def _options(keywords: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments apart: options of an export, and a module's own."""
    options = {key: value for key, value in keywords.items() if key in _OPTIONS}
    return options, {key: value for key, value in keywords.items() if key not in _OPTIONS}


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
