"""What is to be converted, as one function of flat arrays by name, with its weights closed over.

Other runtimes know neither pytrees nor weights apart from the graph, so this is where both end.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from obmlite import function as functions
from obmlite import tree as trees
from obmlite.errors import ArgumentError, LeafError, context
from obmlite.frameworks._calls import module_call
from obmlite.function import Function
from obmlite.model import Model
from obmlite.pipeline import BoundPipeline
from obmlite.polymorphic import PolymorphicFunction
from obmlite.signature import Signature
from obmlite.specs import TensorSpec
from obmlite.weights import Weights

__all__ = ["Flattened", "flatten"]


@dataclasses.dataclass(frozen=True)
class Flattened:
    """A function of arrays.

    Attributes:
      function: takes and returns leaves, all by position; arrays that it closed over are its captures.
      inputs: the names of what it takes, as in the signature: ``"x"``, ``"batch.image"``.
      outputs: the names of what it returns; ``"output_0"``, … where the signature has positions only.
    """

    function: Function
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def specs(self) -> Sequence[TensorSpec]:
        """What it takes."""
        return self.function.signature.input_specs


def flatten(
    subject: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    weights: Mapping[str, Any] | None = None,
) -> Flattened:
    """Makes one flat function of whatever can be called.

    Args:
      subject: a :class:`obmlite.Model` (its default pipeline), a pipeline or a function of one, a function of JAX's,
        or a Flax Linen module with its variables (``module.bind(variables)``).
      args: arrays, ``jax.ShapeDtypeStruct`` or :func:`obmlite.spec` in place of the arguments. A model, a pipeline and
        a function know their own; given, they fix sizes that are open.
      kwargs: the same by keyword. Of a live function or module, those without arrays (``training=False``) are fixed.
      weights: of an :class:`obmlite.Function`, argument → :class:`obmlite.Weights` or pytree of arrays. Arguments that
        are not named stay inputs.

    Raises:
      ArgumentError: the arguments do not fit, or there is nothing to be called.
      ExportError: JAX does not export the function.
      LeafError: an argument is a PRNG key or a string, for which other runtimes have nothing.
    """
    kwargs, weights = dict(kwargs or {}), dict(weights or {})
    if weights and not isinstance(subject, Function):
        raise ArgumentError(
            "Weights are bound to the arguments of a loaded function.",
            field="weights",
            expected="an obmlite.Function",
            found=type(subject).__qualname__,
            fix="functools.partial(function, params) for a live one; a pipeline has its weights",
        )
    if isinstance(subject, Model):
        subject = subject.pipeline
    if not isinstance(subject, (Function, BoundPipeline, PolymorphicFunction)):
        subject, args, kwargs = _exported(subject, args, kwargs), (), {}
    if isinstance(subject, PolymorphicFunction):
        raise ArgumentError(
            "A polymorphic function is converted one signature at a time.",
            object=subject.name,
            expected="one of its functions",
            found=", ".join(str(signature) for signature in subject.signatures),
        )
    with context(object=subject.name):
        signature, call = _bound(subject, weights) if isinstance(subject, Function) else (subject.signature, subject)
        specs = _specs(signature, args, kwargs)
        names = signature.inputs.names

    def flat(*leaves: Any) -> tuple[Any, ...]:
        positional, keywords = signature.spread(signature.inputs.unflatten(list(leaves)))
        return tuple(trees.flatten(call(*positional, **keywords))[0])

    symbols = frozenset[str]().union(*(spec.symbols for spec in specs))
    function = functions.export(
        flat,
        *specs,
        name=subject.name,
        platforms="cpu",
        constraints=signature.constraints if symbols else (),
        # What was exported was allowed to be, and what another runtime lacks is refused by its converter.
        allow_custom_calls=subject.module.custom_calls if isinstance(subject, Function) else (),
    )
    return Flattened(function, tuple(names), _output_names(names, signature))


def _bound(function: Function, weights: Mapping[str, Any]) -> tuple[Signature, Callable[..., Any]]:
    unknown = [name for name in weights if name not in function.signature.arguments]
    if unknown:
        raise ArgumentError(
            "Weights are given for an argument that the function does not have.",
            field="weights",
            expected=", ".join(function.signature.arguments),
            found=", ".join(unknown),
        )
    values = {name: own.restore() if isinstance(own, Weights) else own for name, own in weights.items()}
    own = function.signature
    rest = own.without(list(values))

    def call(*args: Any, **kwargs: Any) -> Any:
        positional, keywords = own.spread({**values, **rest.bind(args, kwargs)})
        return function(*positional, **keywords)

    return rest, call


def _exported(subject: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Function:
    """A live function or module, for arguments like the given ones."""
    linen = sys.modules.get("flax.linen")
    call, method, name = subject, None, None
    if linen is not None and isinstance(subject, linen.Module):
        if subject.scope is None:
            raise ArgumentError(
                "A Flax Linen module has no variables.",
                object=type(subject).__qualname__,
                fix="give module.bind(variables)",
            )
        module, variables = subject.unbind()
        call, method, name = functools.partial(module.apply, variables), module.__call__, type(module).__name__
    if not callable(call):
        raise ArgumentError(
            "There is nothing to be converted.",
            expected="a model, pipeline or function, of obmlite or live, or a Flax Linen module",
            found=type(subject).__qualname__,
        )
    if not args and not kwargs:
        raise ArgumentError(
            "What a live function takes has to be said.", expected="an example of each argument", found="none"
        )
    called = module_call(call, {}, args, kwargs, method or call, name or functions.function_name(call))
    return functions.export(
        called.fn, *called.args, kwargs=called.kwargs, static=called.static, name=called.name, platforms="cpu"
    )


def _specs(signature: Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[TensorSpec]:
    """What the flat function takes: the signature's own specs, or those of given arguments."""
    found = list(signature.input_specs)
    if args or kwargs:
        given = signature.match(signature.bind(args, kwargs))
        found = [
            dataclasses.replace(own, shape=TensorSpec.of(value).shape) for own, value in zip(found, given, strict=True)
        ]
    for name, spec in zip(signature.inputs.names, found, strict=True):
        if spec.kind.is_key or not spec.kind.storage:
            raise LeafError(
                "Other runtimes have no such argument.",
                leaf=name,
                expected="numbers",
                found=str(spec),
                fix="take jax.random.key_data of a key, and make the key inside" if spec.kind.is_key else None,
            )
    return [TensorSpec(spec.shape, spec.kind) for spec in found]  # neither weak types nor hints of where it lives


def _output_names(inputs: Sequence[str], signature: Signature) -> tuple[str, ...]:
    """Names that are no position and that no input has, since graphs keep both in one space."""
    taken, found = set(inputs), []
    for name in signature.outputs.names:
        own = f"output_{name or 0}" if not name or name[0].isdigit() else name
        while own in taken:
            own += "_out"
        taken.add(own)
        found.append(own)
    return tuple(found)
