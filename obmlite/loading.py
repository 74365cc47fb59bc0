"""A package → a model: the manifest is read, everything else when it is first used."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Any

import jax

from obmlite import _compile_options, _engine, _verifying
from obmlite._assembling import finder
from obmlite._collector import paused
from obmlite._files import WeightsFiles
from obmlite._names import Names
from obmlite._tensors import StoredSource
from obmlite.errors import (
    ArgumentError,
    CorruptPackageError,
    MissingFileError,
    ObmliteError,
    PackageNotFoundError,
    UnknownNameError,
    UnsupportedFormatError,
    context,
)
from obmlite.function import Function
from obmlite.io import checked, versions
from obmlite.io.commit import MANIFEST
from obmlite.io.store import LocalDirectory, Store
from obmlite.model import Model
from obmlite.pipeline import BoundPipeline
from obmlite.polymorphic import PolymorphicFunction
from obmlite.schema import records, trailer
from obmlite.schema.decode import decode
from obmlite.signature import Signature
from obmlite.supplemental import Supplemental
from obmlite.weights import Weights

if TYPE_CHECKING:
    from obmlite._signatures import PublicKeys

__all__ = ["load"]


def load(
    path: str | os.PathLike[str],
    *,
    version: int | None = None,
    mmap: bool | None = None,
    verify: str = "structure",
    engine: str = "auto",
    allow_custom_calls: Collection[str] = (),
    mesh: jax.sharding.Mesh | None = None,
    compile_options: bool = True,
    pad_batch: bool = False,
    public_key: PublicKeys | None = None,
    untrusted: bool = False,
) -> Model:
    """Opens a package. Only its manifest is read, unless ``verify`` says so; everything else when it is first used.

    Args:
      path: the package's directory; or a directory of numbered versions of it, such as ``mnist`` with ``mnist/1`` and
        ``mnist/2``, of which the highest that is complete is opened: its manifest opens, and the files that it names
        are there in their lengths.
      version: the number of the version to open instead.
      mmap: whether weights are mapped, so that nothing of them is read before it is used, or read piece by piece. Left
        out, they are mapped unless they lie on a network or FUSE file system, where a fault in a mapped page is slow,
        and one that fails kills the process.
      verify: what is compared with the digests in the manifest, whose own digest always is. ``"structure"``: the length
        of every file now, the header of a weights file when it is opened, functions and supplementals when they are
        used; tensors are not. ``"lazy"``: tensors too, each 8 MiB of one before a byte of that is used.
        ``"all"``: everything now, on all cores.
      engine: how functions are read: ``"export"`` by ``jax.export``, ``"rebuild"`` from what the manifest says,
        ``"replay"`` operation by operation, as ordinary JAX, ``"auto"`` by the first of these that this JAX accepts.
      allow_custom_calls: targets of custom calls that functions may make beyond those that JAX promises to keep.
      mesh: the mesh that functions are called on, as by :meth:`obmlite.Function.on`; those that fix theirs need it.
      compile_options: whether functions are compiled with the options for XLA that they were saved with. Options that
        name files, or flags of another compiler, are never kept; a function that has some is not used with them.
      pad_batch: whether pipelines run an odd batch on the next larger size that they have, as their ``padded()`` does.
      public_key: only a package that is signed with this key, or with one of these, is opened (``obmlite sign``): a PEM
        file by its path, the bytes of one, or a key of the ``cryptography`` package. ``verify`` is then ``"lazy"`` at
        least, and weights are read into memory unless ``mmap=True``, so that what was compared is what is used.
      untrusted: the package is a stranger's. Its functions are read in a child process first, with limits on memory and
        time, and then only replayed; their options for XLA are dropped, and pipelines have no steps that JAX does not
        run. ``docs/trust.md`` says what this promises.

    Raises:
      PackageNotFoundError: there is no package at the path, or no complete version, or not the one asked for.
      MissingFileError: a file that the manifest names is not there.
      CorruptPackageError: the manifest is not what was saved, a file has another length, or what ``verify`` has
        compared now is not what was saved.
      UnsupportedFormatError: the package needs a newer obmlite.
      SignatureError: ``public_key`` is given, and the package is not signed with it.
      ArgumentError: ``version`` is given for a package, there is no such engine or level of verification,
        ``public_key`` is no such key, or ``untrusted`` excludes what else is given.
      ImportError: ``public_key`` is given, and ``cryptography`` is not installed.
    """
    if engine not in ("auto", *_engine.ENGINES):
        raise ArgumentError(
            "There is no such engine.", field="engine", expected=", ".join(("auto", *_engine.ENGINES)), found=engine
        )
    _verifying.check_level(verify)
    if untrusted and (engine not in ("auto", "replay") or allow_custom_calls):
        raise ArgumentError(
            "A stranger's functions are replayed only, and make no custom calls.",
            field="untrusted",
            expected='engine="auto" or "replay", without allow_custom_calls',
            found=f"engine={engine!r}, allow_custom_calls={allow_custom_calls!r}",
        )
    check = None
    if public_key is not None:
        from obmlite import _signatures  # few programs need it, and all pay for what is imported

        check = functools.partial(_signatures.check, keys=_signatures.public_keys(public_key))
        verify = "lazy" if verify == "structure" else verify
        mmap = bool(mmap)  # what is mapped can change after it was compared
    if "://" in os.fspath(path):
        raise PackageNotFoundError("Only local directories can be loaded.", package=path)
    store, manifest = _open(path, version, mmap, check)
    with context(package=store.name):
        model = open_model(
            store, manifest, engine, allow_custom_calls, mesh, compile_options, pad_batch, verify, untrusted
        )
        if verify == "all":
            _verifying.check_all(store, manifest, [files_of(model.weights[name]) for name in model.weights])
    return model


def _open(
    path: str | os.PathLike[str], version: int | None, mmap: bool | None, check: Callable[[Store, bytes], object] | None
) -> tuple[Store, records.ManifestRecord]:
    """The package at a path, or one of the versions in the directory there."""

    def trusted_manifest(store: Store) -> records.ManifestRecord:
        data = open_manifest(store)
        while True:
            if check is not None:
                check(store, data)
            manifest = decode(data)
            try:
                _verifying.check_lengths(store, manifest.files.values())
            except MissingFileError:
                # Two saves may have replaced the package since its manifest was read, and removed its files.
                before, data = data, open_manifest(store)
                if data == before:
                    raise
            else:
                return manifest

    def complete(place: str) -> tuple[Store, records.ManifestRecord]:
        store = LocalDirectory(place, mmap=mmap)
        with context(package=store.name):
            manifest = trusted_manifest(store)
        return store, manifest

    store = LocalDirectory(path, mmap=mmap)
    with context(package=store.name):
        try:
            manifest = trusted_manifest(store)
        except PackageNotFoundError:
            if version is None and not versions.numbered(path):
                raise
        else:
            if version is not None:
                raise ArgumentError(
                    "A version is given for what is a package itself.",
                    expected="a directory of numbered versions",
                    found=f"version={version} of a package",
                    fix="leave version= out",
                )
            return store, manifest
        return versions.open_version(path, version, complete)


def open_manifest(store: Store) -> bytes:
    """The manifest's bytes.

    Raises:
      PackageNotFoundError: there is none, so this is no package.
      CorruptPackageError: it is too short or too long to be one.
    """
    try:
        source = store.open(MANIFEST)
    except MissingFileError as error:
        raise PackageNotFoundError(
            "The directory is no package: it has no manifest.", package=store.name, expected=MANIFEST
        ) from error
    try:
        trailer.check_size(source.size)
        return source.read(0, source.size)
    finally:
        source.close()


def function_signature(record: records.FunctionRecord) -> Signature:
    """The signature that a manifest holds in parts: trees, and the specs of the module's arguments and results."""
    return Signature(
        record.inputs,
        record.primal.arguments[: record.inputs.num_leaves],
        record.outputs,
        record.primal.results,
        record.argument_kinds,
        record.constraints,
        record.fixed,
    )


def open_model(
    store: Store,
    manifest: records.ManifestRecord,
    engine: str = "auto",
    allow_custom_calls: Collection[str] = (),
    mesh: jax.sharding.Mesh | None = None,
    compile_options: bool = True,
    pad_batch: bool = False,
    verify: str = "structure",
    untrusted: bool = False,
) -> Model:
    """The model that a manifest describes, whose files are in a store."""
    if untrusted:  # XLA may be slow or fail by its options
        engine, compile_options = "replay", False
    recent = _verifying.recent(verify)

    def function(name: str) -> Function:
        record = manifest.functions[name]
        if compile_options:
            with context(object=name):
                _compile_options.check_saved(record.compile_options)
        modules = (record.primal, *record.vjps)
        program = _engine.Program(
            modules=modules,
            constraints=record.constraints,
            blobs=functools.lru_cache(lambda module: read_file(store, manifest.files[module.file])),
            allow_custom_calls=allow_custom_calls,
            apart=apart,
        )
        made = Function(
            name,
            function_signature(record),
            program,
            lambda: [_capture(*key) for key in _engine.captured(modules)],
            metadata=record.metadata,
            bindings=record.bindings,
            package=store.name,
            engine=engine,
            compile_options=record.compile_options if compile_options else None,
        )
        return made if mesh is None else made.on(mesh)

    def artifacts() -> Iterator[bytes]:
        """The modules of all functions, but those that cannot be read: their errors are raised when they are used."""
        for name in manifest.functions:
            with contextlib.suppress(ObmliteError, OSError):
                program = functions[name].program
                yield from map(program.artifact, program.modules)

    def _capture(own: str, leaf: int) -> Any:
        if own not in manifest.weights or leaf >= manifest.weights[own].tree.num_leaves:
            raise CorruptPackageError(
                "A function captures what is not there.", field="Captures.leaf", found=f"leaf {leaf} of {own!r}"
            )
        return all_weights[own].leaf(leaf).restore()

    def weights(name: str) -> Weights:
        with paused():
            record = manifest.weights[name]
        source = StoredSource(WeightsFiles(store, manifest.files, record, recent))
        return Weights.from_source(record.tree, record.specs, source, record.metadata)

    def concrete(name: str) -> PolymorphicFunction:
        record = manifest.polymorphic[name]
        with context(object=name):
            for member in record.functions:
                if member not in manifest.functions:
                    raise CorruptPackageError(
                        "A polymorphic function names what is no function of the package.",
                        field="PolymorphicFunction.functions",
                        found=member,
                    )
        with _put_together(name, "PolymorphicFunction.functions"):
            return PolymorphicFunction(name, [functions[member] for member in record.functions], record.metadata)

    def missing(name: str) -> Exception:
        if untrusted and name in supplementals:
            return UnsupportedFormatError(
                "A step of the pipeline is none that JAX runs: a stranger's is not run.",
                field="Step.function",
                expected="a function",
                found=f"{name}, {supplementals[name].mime_type}",
                fix="load it without untrusted=True, if you trust the package",
            )
        return CorruptPackageError("A pipeline names a function that is not there.", field="Step.function", found=name)

    def pipeline(name: str) -> BoundPipeline:
        record = manifest.pipelines[name]
        with context(object=name):
            for step in record.steps:
                for binding in step.bindings:
                    if binding.weights not in manifest.weights:
                        raise CorruptPackageError(
                            "A pipeline names weights that are not there.",
                            field="Binding.weights",
                            found=binding.weights,
                        )
            for step in record.steps:  # what is wrong with a step itself is not that it does not fit
                find(step.function)
            with _put_together(name, "Pipeline.steps"):
                return BoundPipeline(
                    name,
                    record.steps,
                    find,
                    all_weights,
                    record.metadata,
                    pass_through=record.pass_through,
                    visibility=record.visibility,
                    pad_batch=pad_batch,
                )

    def visibility(name: str) -> records.Visibility:
        groups: tuple[Any, ...] = (manifest.functions, manifest.polymorphic, manifest.weights)
        found: records.Visibility = next(group[name] for group in groups if name in group).visibility
        return found

    def supplemental(name: str) -> Supplemental:
        return Supplemental.from_record(store, manifest.files, manifest.supplementals[name])

    apart = None
    if untrusted:
        from obmlite import _isolation

        apart = _isolation.Apart(artifacts)
    functions = Names(list(manifest.functions), function)
    polymorphic = Names(list(manifest.polymorphic), concrete)
    all_weights = Names(list(manifest.weights), weights)
    supplementals = Names(list(manifest.supplementals), supplemental)
    find = finder(functions, polymorphic, {} if untrusted else supplementals, missing)
    pipelines = Names(list(manifest.pipelines), pipeline)
    return Model.of_parts(
        functions,
        all_weights,
        pipelines,
        manifest.default_pipeline,
        manifest.metadata,
        store.name,
        polymorphic=polymorphic,
        supplementals=supplementals,
        visibility=Names([*functions, *polymorphic, *all_weights], visibility),
        device_assignment=manifest.device_assignment,
    )


@contextlib.contextmanager
def _put_together(name: str, field: str) -> Iterator[None]:
    """Parts of a package that do not fit one another are the package's fault, and no caller's."""
    try:
        yield
    except (ArgumentError, UnknownNameError) as error:
        raise CorruptPackageError(
            error.problem, object=name, leaf=error.leaf, field=field, expected=error.expected, found=error.found
        ) from error


def read_file(store: Store, record: records.FileRecord) -> bytes:
    """All bytes of a file that is no weights file.

    Raises:
      CorruptPackageError: they are not those that were saved.
    """
    source = store.open(record.path)
    try:
        return checked.read(source, record.path, record.length, record.digest)
    finally:
        source.close()


def files_of(weights: Weights) -> WeightsFiles:
    """The files of weights that lie in a package."""
    source = weights.source
    assert isinstance(source, StoredSource)
    return source.files
