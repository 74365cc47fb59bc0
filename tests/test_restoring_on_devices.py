"""Restoring onto eight devices, compared with what was saved.

How many devices there are is settled when JAX starts, so the checks on several run in a process of their own: this
file, as a program.
"""

from __future__ import annotations

import collections
import itertools
import pathlib
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import obmlite
from obmlite import Model, RestoreError, Weights, _arrays, dtypes
from obmlite.plan import boxes
from tests import pieces
from tests.on_devices import on_devices
from tests.test_weights import ON_DEVICE, bits, file_of, filled, offset_of, place_of


def test_on_eight_devices(tmp_path: pathlib.Path) -> None:
    assert on_devices(__file__, tmp_path, timeout=300).split() == CHECKS, "each has run and printed its name"


# --- what the checks share


def tree() -> dict[str, Any]:
    """Leaves of every kind, of shapes that meshes of eight devices can split, and a tied one."""
    leaves: dict[str, Any] = {d.name: filled(d, (8, 16, 4), n) for n, d in enumerate(ON_DEVICE)}
    leaves |= {
        "large": filled(dtypes.of(np.float32), (512, 520)),
        "packed": filled(dtypes.parse("int4"), (16, 24)),
        "odd": filled(dtypes.parse("uint4"), (8, 3)),
        "odd rows": filled(dtypes.parse("int4"), (304, 1031)),  # of more than one chunk
        "odd columns": filled(dtypes.parse("uint2"), (304, 2056)),
        "vector": filled(dtypes.of(np.uint8), (40,)),
        "scalar": np.float32(1.5),
        "number": 7,
        "empty": np.zeros((8, 0, 16), np.float32),
        "none": np.zeros((0,), np.int32),
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(1), (8, 8)),
        "rbg": jax.random.split(jax.random.key(1, impl="rbg"), 16),
    }
    leaves["tied"] = leaves["large"]
    return leaves


def host(value: Any) -> np.ndarray[Any, Any]:
    """What numpy holds for a leaf that was saved."""
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(value))
    return np.asarray(value)


def meshes() -> Iterator[Mesh]:
    for sizes in ((8,), (4, 2), (2, 2, 2)):
        names = tuple("abc"[: len(sizes)])
        yield Mesh(np.array(jax.devices()).reshape(sizes), names, axis_types=(AxisType.Auto,) * len(sizes))


def partitions(shape: tuple[int, ...], mesh: Mesh) -> list[P]:
    """All ways to split a shape over a mesh, one or several axes to a dimension, that divide."""
    found = [P()]
    for places in itertools.product([None, *range(len(shape))], repeat=len(mesh.axis_names)):
        axes = [
            tuple(a for a, place in zip(mesh.axis_names, places, strict=True) if place == n) for n in range(len(shape))
        ]
        for order in {tuple(axes), tuple(own[::-1] for own in axes)}:
            if all(n % int(np.prod([mesh.shape[a] for a in own])) == 0 for n, own in zip(shape, order, strict=True)):
                found.append(P(*[own or None for own in order]))
    return found


def same(array: Any, value: Any, dtype: Any = None) -> None:
    """Every shard has the saved value's bits at its index."""
    expected = host(value)
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        assert array.shape == expected.shape[: array.ndim]
        array = jax.random.key_data(array)
    elif not isinstance(value, (np.ndarray, np.generic, jax.Array)):
        expected = expected.astype(array.dtype)  # a Python number
    if dtype is not None:
        with np.errstate(all="ignore"):
            expected = expected.astype(dtype)
    assert array.shape == expected.shape
    for shard in array.addressable_shards:
        assert bits(shard.data) == bits(expected[(*shard.index, ...)]), (array.dtype, array.shape, array.sharding)


def pointers(array: Any) -> list[tuple[Any, int]]:
    """For each device the box that it holds, and where that is in memory."""
    if jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    shards = array.addressable_shards
    return [(boxes.of_index(s.index, array.shape), s.data.unsafe_buffer_pointer()) for s in shards]


class Store:
    """One package of the tree whole and one in pieces, each once mapped and once read."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.value = tree()
        Model({"w": Weights(self.value)}).save(folder / "whole")
        pieces.save(self.value, folder / "pieces")
        self.folder = folder
        self.weights = {
            (name, mmap): obmlite.load(folder / name, mmap=mmap).weights["w"]
            for name in ("whole", "pieces")
            for mmap in (True, False)
        }


# --- the checks


def check_every_mesh_and_partition(store: Store) -> None:
    for mesh in meshes():
        ways = {name: partitions(host(v).shape[: getattr(v, "ndim", 0)], mesh) for name, v in store.value.items()}
        turns = max(map(len, ways.values()))
        for turn in range(turns):
            # Every way of every leaf comes up, in one of the packages: whole or in pieces, mapped or read.
            weights = list(store.weights.values())[turn % 4]
            chosen = {name: NamedSharding(mesh, own[turn % len(own)]) for name, own in ways.items()}
            chosen["tied"] = chosen["large"]
            restored = weights.restore(shardings=chosen, threads=1 + turn % 4)
            for name, value in store.value.items():
                array = restored[name]
                assert array.sharding.is_equivalent_to(chosen[name], array.ndim), name
                same(array, value)
            assert restored["tied"] is restored["large"]
            assert restored["number"].weak_type


def check_all_packages_alike(store: Store) -> None:
    mesh = list(meshes())[1]
    for spec in (P("a"), P(None, "b"), P(("b", "a")), P("b", "a")):
        for weights in store.weights.values():
            big = weights.restore(
                select=["large", "packed", "keys", "complex64", "bool"], shardings=NamedSharding(mesh, spec)
            )
            assert len(big) == 5
            for name, array in big.items():
                same(array, store.value[name])


def check_replicas_share_a_buffer(store: Store) -> None:
    mesh = list(meshes())[1]
    packed = {d.numpy for d in ON_DEVICE if d.is_packed}
    for (_, mmap), weights in store.weights.items():
        for spec in (P(), P("a"), P("b")) if mmap else (P(), P("a"), P(None, "b"), P("b", "a")):
            names = [
                name
                for name, value in store.value.items()
                if (held := host(value)).dtype not in packed
                and held.nbytes
                and held.nbytes % 512 == 0  # so that every shard is aligned in the file, too
                and value.ndim >= len(spec)
            ]
            assert len(names) > 10
            for name, array in weights.restore(select=names, shardings=NamedSharding(mesh, spec)).items():
                places = pointers(array)
                assert len(set(places)) == len({box for box, _ in places}), (name, spec, mmap)
                same(array, store.value[name])


def check_leading_shards_lie_in_the_file(store: Store) -> None:
    mesh = Mesh(np.array(jax.devices()), ("a",))
    weights = store.weights["whole", True]
    path = store.folder / "whole"
    for name, spec in {"large": P("a"), "float32": P("a"), "bool": P(), "keys": P("a")}.items():
        array = weights[name].restore(sharding=NamedSharding(mesh, spec))
        value = host(store.value[name])
        row = value.nbytes // value.shape[0]
        for box, pointer in pointers(array):
            expected = str(file_of(path, weights, name)), offset_of(path, weights, name) + box[0][0] * row
            assert place_of(pointer) == expected, name
    # A shard that lies within a piece is in the piece's file.
    array = store.weights["pieces", True]["large"].restore(
        sharding=NamedSharding(Mesh(mesh.devices.reshape(4, 2), ("a", "b")), P("a", "b"))
    )
    assert all(place_of(pointer)[0].startswith(str(store.folder / "pieces")) for _, pointer in pointers(array))


def check_gathered_shards_are_not_copied_again(store: Store) -> None:
    made: list[tuple[int, int]] = []
    real = _arrays.aligned_empty

    def noted(shape: Any, dtype: Any) -> Any:
        array = real(shape, dtype)
        made.append((array.ctypes.data, array.nbytes))
        return array

    mesh = Mesh(np.array(jax.devices()), ("a",))
    _arrays.aligned_empty = noted
    try:
        for weights in store.weights.values():
            np.asarray(weights["large"][:1, :1])  # opens the files
            for dtype, nbytes in ((None, 512 * 65 * 4), ("bfloat16", 512 * 65 * 2)):
                made.clear()
                array = weights["large"].restore(sharding=NamedSharding(mesh, P(None, "a")), dtype=dtype)
                assert {pointer for _, pointer in pointers(array)} == {pointer for pointer, _ in made}
                assert [size for _, size in made] == [nbytes] * 8
                assert all(pointer % 64 == 0 for pointer, _ in made)
    finally:
        _arrays.aligned_empty = real


def check_casts(store: Store) -> None:
    mesh = list(meshes())[2]
    for weights in store.weights.values():
        for spec in (P("a"), P(None, ("a", "b")), P("c", "a")):
            place = NamedSharding(mesh, spec)
            names = ["large", "int8", "float16", "float8_e4m3fn", "packed", "uint2"]
            names = [n for n in names if n in store.value]
            found = weights.restore(select=names, shardings=place, dtype="bfloat16", memory_budget=1 << 16)
            for name, array in found.items():
                cast = "bfloat16" if "float" in name or name == "large" else None
                same(array, store.value[name], cast and ml_dtypes.bfloat16)
            for name, array in weights.restore(select=["packed", "int8"], shardings=place, dtype="int16").items():
                same(array, store.value[name], np.int16)
            narrow = weights.restore(select="large", shardings=place, dtype="float8_e4m3fn")["large"]
            same(narrow, store.value["large"], ml_dtypes.float8_e4m3fn)


def check_small_chunks(store: Store) -> None:
    # A budget of one byte: chunks are as small as they get, and many.
    mesh = list(meshes())[1]
    for weights in store.weights.values():
        for spec in (P("b", "a"), P(None, "a"), P("a"), P()):
            options = {"memory_budget": 1, "threads": 3, "shardings": NamedSharding(mesh, spec)}
            names = ["large", "packed", "keys", "odd columns", *([] if "a" in spec[1:] else ["odd rows"])]
            for name, array in weights.restore(select=names, **options).items():
                same(array, store.value[name])
    six = next(d for d in dtypes.ALL if d.bits == 6)
    value = filled(six, (304, 517 * 8))
    for save in (pieces.save, lambda value, path: Model({"w": Weights(value)}).save(path)):
        path = pathlib.Path(tempfile.mkdtemp(dir=store.folder)) / "six"
        save({"six": value}, path)
        for spec in (P("a"), P("b", "a"), P(None, ("a", "b"))):
            for mmap in (True, False):
                leaf = obmlite.load(path, mmap=mmap).weights["w"]
                options = {"memory_budget": 1, "threads": 2, "dtype": "float32"}
                array = leaf.restore(shardings=NamedSharding(mesh, spec), **options)["six"]
                same(array, value, np.float32)


def check_weights_in_memory(store: Store) -> None:
    mesh = list(meshes())[1]
    # Without those whose NaNs JAX 0.12 itself changes when it splits them.
    on_device = {n: jnp.asarray(v) for n, v in store.value.items() if "float8" not in n and n != "number"}
    for weights in (Weights(store.value), Weights(on_device)):
        for spec in (P(), P("a"), P("b")):
            place = NamedSharding(mesh, spec)
            names = [n for n, leaf in weights.flat.items() if leaf.ndim >= len(spec)]
            for name, array in weights.restore(select=names, shardings=place).items():
                assert array.sharding.is_equivalent_to(place, array.ndim)
                same(array, store.value[name])
            found = weights.restore(select=["large", "float16"], shardings=place, dtype="bfloat16")
            same(found["large"], store.value["large"], ml_dtypes.bfloat16)


def check_some_of_the_devices_in_any_order(store: Store) -> None:
    mesh = Mesh(np.array(jax.devices())[[6, 1, 3, 2]], ("a",))
    for weights in store.weights.values():
        for name, array in weights.restore(
            select=["large", "keys", "int4", "odd rows"], shardings=NamedSharding(mesh, P("a"))
        ).items():
            assert [shard.device.id for shard in array.addressable_shards if shard.index[0].start in (0, None)] == [6]
            same(array, store.value[name])


def check_donating_changes_nothing_else(store: Store) -> None:
    # Buffers that several devices share, or that are the file, must not be written to.
    mesh = list(meshes())[1]
    for weights in store.weights.values():
        for spec in (P(), P("a"), P(None, "b")):
            restored = weights["large"].restore(sharding=NamedSharding(mesh, spec))
            first, *others = [(shard.data, shard.index) for shard in restored.addressable_shards]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it could not be donated
                jax.block_until_ready(jax.jit(lambda x: 0 * x, donate_argnums=0)(first[0]))
            for other, index in others:
                assert bits(other) == bits(store.value["large"][index])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                jax.block_until_ready(jax.jit(lambda x: 0 * x, donate_argnums=0)(weights["large"].restore()))
            same(weights["large"].restore(), store.value["large"])


def check_several_at_once(store: Store) -> None:
    mesh = list(meshes())[1]
    fresh = obmlite.load(store.folder / "pieces", mmap=False).weights["w"]  # whose files are not open yet
    failed = []

    def restore(weights: Any, spec: P) -> None:
        try:
            found = weights.restore(select=["large", "keys", "float8_e5m2"], shardings=NamedSharding(mesh, spec))
            for name, array in found.items():
                same(array, store.value[name])
        except BaseException as error:  # noqa: BLE001 - shown by the thread that waits
            failed.append(error)

    threads = [
        threading.Thread(target=restore, args=(weights, spec))
        for weights in (fresh, store.weights["pieces", True])
        for spec in (P("a"), P("b"), P())
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed, failed


def check_explicit_meshes_and_memories(store: Store) -> None:
    explicit = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    for spec in (P("a"), P(None, "b"), P()):
        place = NamedSharding(explicit, spec)
        array = store.weights["whole", True]["float32"].restore(sharding=place)
        assert jax.typeof(array).sharding == jax.typeof(jax.device_put(array, place)).sharding
        same(array, store.value["float32"])
    memories = {memory.kind for memory in jax.devices()[0].addressable_memories()}
    for kind in memories:
        place = NamedSharding(next(meshes()), P("a"), memory_kind=kind)
        array = store.weights["whole", False]["large"].restore(sharding=place)
        assert array.sharding.memory_kind == kind
        same(array, store.value["large"])
    device = jax.devices()[5]
    for place in (device, SingleDeviceSharding(device)):
        restored = store.weights["pieces", True].restore(select=["large", "key", "number"], shardings=place)
        for name, array in restored.items():
            assert array.devices() == {device}
            assert array.committed
            same(array, store.value[name])
    with jax.default_device(device):
        array = store.weights["whole", True]["large"].restore()
        assert array.devices() == {device}
        assert not array.committed


def check_like(store: Store) -> None:
    mesh = list(meshes())[1]
    value = {"b": [np.ones((8, 4), np.float32), np.arange(16, dtype=np.int32)], "a": (jax.random.key(0),)}
    path = store.folder / "like"
    Model({"w": Weights(value)}).save(path)
    place = NamedSharding(mesh, P("a", "b"))
    like = collections.OrderedDict(
        b=[
            jax.ShapeDtypeStruct((8, 4), jnp.bfloat16, sharding=place),
            jax.device_put(np.zeros(16, np.int32), NamedSharding(mesh, P("b"))),
        ],
        a=(jax.eval_shape(lambda: jax.random.key(0)),),
    )
    for rest in ({}, {"shardings": jax.devices()[3]}, {"mesh": mesh}):
        found = obmlite.load(path).weights["w"].restore(like=like, **rest)
        assert type(found) is collections.OrderedDict
        assert list(found) == ["b", "a"]
        assert (found["b"][0].dtype, found["b"][0].sharding) == (jnp.bfloat16, place)
        assert found["b"][1].sharding == NamedSharding(mesh, P("b"))
        same(found["b"][0], value["b"][0], jnp.bfloat16)
        same(found["b"][1], value["b"][1])
        same(found["a"][0], value["a"][0])
        devices = {"": 1, "shardings": 1, "mesh": 8}["".join(rest)]
        assert len(found["a"][0].sharding.device_set) == devices
    # What the template does not say is taken from the arguments.
    bare = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), value)
    found = obmlite.load(path).weights["w"].restore(like=bare, shardings=NamedSharding(mesh, P()))
    assert found["b"][0].dtype == np.float32
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(found))


def check_models_run_on_what_is_restored(store: Store) -> None:
    mesh = list(meshes())[1]
    random = np.random.default_rng(0)
    plain = {"w": random.normal(size=(16, 8)).astype("f4"), "sub": {"b": random.normal(size=8).astype("f4")}}
    put = jax.device_put(plain, {"w": NamedSharding(mesh, P("b", "a")), "sub": {"b": NamedSharding(mesh, P("a"))}})

    def apply(params: Any, x: Any) -> Any:
        return jnp.tanh(x @ params["w"] + params["sub"]["b"])

    x = random.normal(size=(4, 16)).astype("f4")
    path = store.folder / "model"
    Model.from_function(apply, put, x).save(path)
    expected = obmlite.load(path)(x)
    np.testing.assert_allclose(expected, apply(plain, x), rtol=1e-4, atol=1e-6)
    model = obmlite.load(path).restore(mesh=mesh)
    [own] = model.weights.values()
    assert own["w"].restore().sharding == NamedSharding(mesh, P("b", "a")), "as it was saved"
    np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-6)
    assert len(model(x).sharding.device_set) == 8
    whole = NamedSharding(mesh, P())
    other = obmlite.load(path).restore(shardings={"params": {"w": NamedSharding(mesh, P("a")), "sub": whole}})
    assert other.weights["params"]["w"].restore().sharding.spec == P("a")
    np.testing.assert_allclose(other(x), expected, rtol=1e-4, atol=1e-6)
    for rules, spec in (({"a": "b", "b": None}, P(None, "b")), ([("a", None), ("b", "a")], P("a"))):
        small = Mesh(mesh.devices, ("b", "c") if spec == P(None, "b") else ("c", "a"))
        rules = {"a": "c", "b": "b"} if spec == P(None, "b") else {"b": "c"}
        array = obmlite.load(path).weights["params"].restore(mesh=small, rules=rules)["w"]
        same(array, plain["w"])
        assert len(array.sharding.device_set) == 8
    below = obmlite.load(path).weights["params"]["sub"].restore(mesh=mesh)
    assert below["b"].sharding.spec == P("a")
    same(below["b"], plain["sub"]["b"])
    try:
        obmlite.load(path).weights["params"].restore(mesh=Mesh(np.array(jax.devices()), ("z",)))
    except RestoreError as error:
        for text in ("sub.b: f32[8] as P(a): the axis 'a'", "w: f32[16,8] as P(b, a): the axis 'a'", "rules="):
            assert text in str(error), error
    else:
        raise AssertionError("the mesh has no such axis")


def check_misfits_are_all_listed(store: Store) -> None:
    mesh = next(meshes())
    try:
        store.weights["whole", True].restore(shardings=NamedSharding(mesh, P(None, "a")))
    except RestoreError as error:
        lines = error.found.splitlines()
        assert any(line.strip().startswith("odd") for line in lines), error
        assert any(line.strip().startswith("scalar") for line in lines), error
    else:
        raise AssertionError("3 columns over 8 devices")


def check_in_a_trace(store: Store) -> None:
    mesh = next(meshes())
    kept = []

    @jax.jit
    def double(x: Any) -> Any:
        weights = store.weights["whole", True]
        place = NamedSharding(mesh, P("a"))
        restored = weights.restore(select=["large", "keys", "float32"], shardings=place, dtype="float32")
        restored |= weights.restore(select=["scalar", "int4", "bfloat16"], dtype="float16")
        kept.append(restored)
        return 2 * x

    assert double(1) == 2
    [restored] = kept
    for name, array in restored.items():
        assert not isinstance(array, jax.core.Tracer)
        same(array, store.value[name], np.float16 if name in ("scalar", "bfloat16") else None)


CHECKS = [name for name in globals() if name.startswith("check_")]


if __name__ == "__main__":
    warnings.simplefilter("error")
    shared = Store(pathlib.Path(sys.argv[1]))
    failed = False
    for check in CHECKS:
        try:
            globals()[check](shared)
        except BaseException:  # noqa: BLE001 - what failed is printed, and the others still run
            failed = True
            traceback.print_exc(file=sys.stderr)
        else:
            print(check)
    sys.exit(failed)
