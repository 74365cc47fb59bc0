"""What a model is given, put together: names checked, polymorphic functions taken apart, steps looked up."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeAlias

from obmlite.errors import ArgumentError, context
from obmlite.function import Function, adopt
from obmlite.pipeline import HOST_STEPS, BoundPipeline, HostStep, Pipeline
from obmlite.polymorphic import Polymorphic, PolymorphicFunction
from obmlite.schema.records import Visibility
from obmlite.supplemental import Supplemental
from obmlite.weights import Weights

Given: TypeAlias = "Function | Polymorphic | PolymorphicFunction | Weights"


@dataclasses.dataclass(frozen=True)
class Objects:
    """A model's objects.

    Attributes:
      functions: by name, with those that polymorphic functions brought along.
      polymorphic: by name.
      weights: by name, with what functions closed over.
      private: names of those that are only for other objects.
    """

    functions: Mapping[str, Function]
    polymorphic: Mapping[str, PolymorphicFunction]
    weights: Mapping[str, Weights]
    private: frozenset[str]


def assemble(objects: Mapping[str, Given], private: Collection[str]) -> Objects:
    """Takes the objects of a model apart.

    Args:
      objects: what the model is given, by name.
      private: names of those that are only for other objects.

    Raises:
      ArgumentError: a name cannot be kept or is taken, an object is of another kind, or a polymorphic function names
        what is not there.
    """
    for name, value in objects.items():
        check_name(name)
        if not isinstance(value, (Function, Polymorphic, PolymorphicFunction, Weights)):
            raise ArgumentError(
                "An object of a model is neither a function nor weights.",
                object=name,
                expected="obmlite.export(…), obmlite.Polymorphic(…) or obmlite.Weights(…)",
                found=type(value).__qualname__,
            )
    functions = {n: v.named(n) for n, v in objects.items() if isinstance(v, Function)}
    members: dict[str, list[str]] = {}
    inner: list[str] = []
    for name, value in objects.items():
        if isinstance(value, (Polymorphic, PolymorphicFunction)):
            members[name], own = _members(name, value, objects)
            for member, function in own.items():
                if member in objects or member in functions:
                    raise ArgumentError(
                        "A function of a polymorphic function is to have a name that is taken.",
                        object=member,
                        fix="rename that object",
                    )
                functions[member] = function.named(member)
            inner += own
    adopted, captures = adopt(functions)
    weights = {n: v for n, v in objects.items() if isinstance(v, Weights)}
    for name in captures.keys() & {*functions, *members, *weights}:
        raise ArgumentError(
            "A function's captured arrays are to have a name that is taken.", object=name, fix="rename that object"
        )
    weights |= captures
    polymorphic = {}
    for name, names in members.items():
        metadata: Mapping[str, Any] = objects[name].metadata
        polymorphic[name] = PolymorphicFunction(name, [adopted[n] for n in names], metadata)
    for name in private:
        if name not in adopted and name not in polymorphic and name not in weights:
            raise ArgumentError(
                "What is to be private is not there.",
                field="private",
                expected=", ".join([*adopted, *polymorphic, *weights]) or "objects of the model",
                found=str(name),
            )
    return Objects(adopted, polymorphic, weights, frozenset([*private, *inner]))


def _members(
    name: str, value: Polymorphic | PolymorphicFunction, objects: Mapping[str, Given]
) -> tuple[list[str], dict[str, Function]]:
    """The names of a polymorphic function's functions, and those of them that the model does not have yet."""
    given = value.functions
    if isinstance(given, Mapping):
        named = {f"{name}.{suffix}": function for suffix, function in given.items()}
        return list(named), named
    names, own = [], {}
    for number, item in enumerate(given):
        if isinstance(item, Function):
            own[f"{name}.{number}"] = item
            names.append(f"{name}.{number}")
            continue
        if not isinstance(objects.get(item), Function):
            raise _no_function(name, item, objects)
        names.append(item)
    return names, own


def _no_function(name: str, item: Any, objects: Mapping[str, Given]) -> ArgumentError:
    there = ", ".join(n for n, v in objects.items() if isinstance(v, Function)) or "a function"
    path, at = [name], item
    while isinstance(found := objects.get(at), Polymorphic) and at not in path:  # which way it leads
        path.append(at)
        at = next((n for n in found.functions if isinstance(n, str) and isinstance(objects.get(n), Polymorphic)), "")
    if at in path:
        return ArgumentError(
            "Polymorphic functions name one another in a circle.",
            object=name,
            expected=there,
            found=" → ".join([*path[path.index(at) :], at]),
        )
    what = "a polymorphic function" if item in objects and not isinstance(objects[item], Weights) else None
    what = "weights" if isinstance(objects.get(item), Weights) else what
    return ArgumentError(
        "A polymorphic function names what is no function of the model.",
        object=name,
        expected=there,
        found=f"{item}, {what}" if what else str(item),
    )


def finder(
    functions: Mapping[str, Function],
    polymorphic: Mapping[str, PolymorphicFunction],
    supplementals: Mapping[str, Supplemental],
    missing: Callable[[str], Exception],
) -> Callable[[str], Any]:
    """Gives what a pipeline's step names: a function, a polymorphic function, or a step that a supplemental describes.

    Args:
      functions: the model's.
      polymorphic: the model's.
      supplementals: the model's.
      missing: the error for a name of none of these.
    """
    steps: dict[str, HostStep] = {}

    def find(name: str) -> Any:
        if name in functions:
            return functions[name]
        if name in polymorphic:
            return polymorphic[name]
        if name in supplementals and supplementals[name].mime_type in HOST_STEPS:
            if name not in steps:
                steps[name] = HOST_STEPS[supplementals[name].mime_type](name, supplementals)
            return steps[name]
        raise missing(name)

    return find


def bind(
    pipelines: Mapping[str, Pipeline], objects: Objects, supplementals: Mapping[str, Supplemental]
) -> dict[str, BoundPipeline]:
    """The pipelines of a model, bound to its objects.

    Raises:
      ArgumentError: one names what is not there, or does not fit.
    """

    def missing(name: str) -> Exception:
        if name in pipelines:
            problem = "A pipeline's step is a pipeline; steps are functions."
        else:
            problem = "A pipeline names a function that is not there."
        there = [*objects.functions, *objects.polymorphic]
        return ArgumentError(problem, expected=", ".join(there) or "a function", found=str(name))

    find = finder(objects.functions, objects.polymorphic, supplementals, missing)
    bound = {}
    for name, pipeline in pipelines.items():
        check_name(name)
        with context(object=name):
            steps = pipeline.records(find)
            for binding in (b for step in steps for b in step.bindings):
                if binding.weights not in objects.weights:
                    raise ArgumentError(
                        "A pipeline names weights that are not there.",
                        leaf=binding.argument,
                        expected=", ".join(objects.weights) or "weights",
                        found=binding.weights,
                    )
            bound[name] = BoundPipeline(
                name,
                steps,
                find,
                objects.weights,
                pipeline.metadata,
                pass_through=pipeline.pass_through,
                visibility=visibility_of(pipeline.visibility),
            )
    return bound


def visibility_of(value: str | Visibility) -> Visibility:
    """A visibility by its name.

    Raises:
      ArgumentError: there is none of that name.
    """
    if isinstance(value, Visibility):
        return value
    found = {v.name.lower(): v for v in Visibility}.get(value)
    if found is None:
        raise ArgumentError(
            "There is no such visibility.", field="visibility", expected="public or private", found=repr(value)
        )
    return found


def check_name(name: object) -> None:
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


def check_supplementals(supplementals: Mapping[str, Any], objects: Objects) -> None:
    """Refuses what is no supplemental, or one of a function that is not there.

    Raises:
      ArgumentError: there is such.
    """
    for name, value in supplementals.items():
        check_name(name)
        if not isinstance(value, Supplemental):
            raise ArgumentError(
                "A supplemental of a model is of another kind.",
                object=name,
                expected="obmlite.Supplemental.from_bytes(…), .from_file(…) or .from_directory(…)",
                found=type(value).__qualname__,
            )
        if value.function and value.function not in objects.functions and value.function not in objects.polymorphic:
            raise ArgumentError(
                "A supplemental belongs to a function that is not there.",
                object=name,
                expected=", ".join([*objects.functions, *objects.polymorphic]) or "no function",
                found=value.function,
            )
