"""The checks behind the digest: manifests whose trailer matches and whose content lies."""

from __future__ import annotations

import ast
import collections
import contextlib
import inspect
import random
import resource
import struct
import time
import traceback

import pytest

from obmlite.errors import CorruptPackageError, RestoreError, UnsupportedFormatError
from obmlite.schema import _columns, _flat, _shared, decode, trailer
from obmlite.schema.encode import encode
from obmlite.tree import names as tree_names
from obmlite.tree import static as tree_static
from obmlite.tree import structure as tree_structure
from tests.schema import flat, samples

GOOD = encode(samples.sample())
EXPECTED = samples.undigested(decode.decode(GOOD))

# --- every number of a manifest, changed


def places():
    """Of each field: its slot, its number or offset, its length, and of its items those at the ends."""
    data = GOOD[: -trailer.SIZE]
    ends = {}
    for place in flat.walk(data):
        vector = place.path.rpartition("[")[0] if place.what in ("item", "byte") else place.path
        ends.setdefault((place.label, place.what), {}).setdefault(vector, []).append(place)
    for vectors in ends.values():
        for found in list(vectors.values())[:: max(1, len(vectors) - 1)]:  # the first and the last such table
            yield found[0]
            if len(found) > 1:
                yield found[-1]


def values(place, data, targets, rng):
    """What to put there: limits, neighbours, a random number; and for an offset places where something else is."""
    bits = 8 * struct.calcsize(place.form)
    signed = place.form[1].islower()
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    now = struct.unpack_from(place.form, data, place.position)[0]
    found = [0, 1, now - 1, now + 1, high, (high >> 1) + 1, -1, rng.randint(low, high)]
    if place.what == "offset":
        found += [target - place.position for target in rng.sample(targets, 2)]
    if place.what in ("slot", "size", "slots", "soffset"):
        found += [now + 4, now - 4, rng.randint(0, 64)]
    return [v for v in dict.fromkeys(found) if low <= v <= high and v != now]


def outcome(manifest):
    """What a reader makes of a manifest: ``same``, ``other`` or ``refused``; anything else fails the test."""
    problem = None
    found = "refused"
    start = time.process_time()
    try:
        read = decode.decode(manifest)
        found = "same" if samples.undigested(read) == EXPECTED else "other"
        samples.touch(read)
    except (CorruptPackageError, UnsupportedFormatError, RestoreError) as error:
        problem = error
        found = "refused"
    assert time.process_time() - start < 2
    if problem is not None:
        assert isinstance(problem.field, str)
        assert problem.field
        assert len(str(problem)) < 3000
    return found


PLACES = list(places())


@pytest.mark.parametrize("table", flat.TABLES)
def test_any_number_may_be_wrong(table):
    rng = random.Random(table)
    data = GOOD[: -trailer.SIZE]
    targets = [p.position for p in flat.walk(data) if p.what in ("soffset", "count")]
    outcomes = collections.Counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for place in PLACES:
        if place.label.split(".")[0] != table:
            continue
        for value in values(place, data, targets, rng):
            changed = bytearray(data)
            struct.pack_into(place.form, changed, place.position, value)
            try:
                outcomes[outcome(trailer.seal(bytes(changed)))] += 1
            except Exception as error:
                error.add_note(f"{place} = {value}")
                raise
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB
    assert outcomes["refused"] > 0
    assert outcomes["same"] + outcomes["other"] > 0


def test_the_walk_reaches_every_field():
    reached = collections.defaultdict(set)
    for place in PLACES:
        reached[place.label].add(place.what)
    for table, fields in flat.TABLES.items():
        assert reached[table] >= {"soffset", "slots", "size"}
        for field in fields:
            if field.name in ("required", "format_minor"):
                continue
            wanted = {"slot", "scalar"} if field.type in flat.FORMS else {"slot", "offset"}
            if field.type not in flat.FORMS and field.type not in flat.TABLES:
                wanted.add("count")
            if field.type.strip("[]") in flat.FORMS and field.type[0] == "[":
                wanted.add("item")
            assert reached[f"{table}.{field.name}"] >= wanted, field


def test_anything_may_be_wrong():
    """Random bytes in random places, several at once."""
    rng = random.Random(0)
    data = GOOD[: -trailer.SIZE]
    for _ in range(500):
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 5, 50))):
            at = rng.randrange(8, len(changed))
            size = rng.choice((1, 1, 2, 4))
            changed[at : at + size] = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size)))
        outcome(trailer.seal(bytes(changed)))


# --- one lie each


CASES = {}


def case(error, field, name=None):
    """Adds a function of the sample's dict to the cases, or one that makes the manifest from nothing."""

    def add(function):
        CASES[name or function.__name__] = (error, field, function)
        return function

    return add


def lie(name, field, change, error=CorruptPackageError):
    CASES[name] = (error, field, change)


def put(*path, value):
    """A change that puts a value at a path of the sample's dict; the last step may be new."""

    def change(d):
        for step in path[:-1]:
            d = d[step]
        d[path[-1]] = value

    return change


def drop(*path):
    def change(d):
        for step in path[:-1]:
            d = d[step]
        del d[path[-1]]

    return change


def both(*changes):
    def change(d):
        for one in changes:
            one(d)

    return change


def string(d, text):
    """The number of a new string in the pool."""
    pool = d["strings"]
    pool["bytes"].extend(text if isinstance(text, bytes) else text.encode())
    pool["starts"].append(len(pool["bytes"]))
    return len(pool["starts"]) - 2


def blob(d, data):
    pool = d["blobs"]
    pool["bytes"].extend(data)
    pool["starts"].append(len(pool["bytes"]))
    return len(pool["starts"]) - 2


F, W = ("functions", 0), ("weights", 0)
PRIMAL, SPECS, TREE = (*F, "primal"), (*W, "specs"), (*W, "tree")

# The root.
FUTURE = "obmlite 9 from the year 2099"
lie(
    "a later format",
    "format_major",
    both(put("format_major", value=2), put("reader", value=FUTURE.encode())),
    UnsupportedFormatError,
)
lie("format 0", "format_major", put("format_major", value=0), UnsupportedFormatError)
lie("no format", "format_major", drop("format_major"), UnsupportedFormatError)
lie(
    "a later format of which nothing else is known",
    "format_major",
    lambda d: (d.clear(), d.update(format_major=9)),
    UnsupportedFormatError,
)
lie("an unknown feature", "required", put("required", value=[b"warp"]), UnsupportedFormatError)
lie("another digest", "Manifest.digest_algorithm", put("digest_algorithm", value=2))
lie("no digest", "Manifest.digest_algorithm", drop("digest_algorithm"))
lie("another chunk size", "Manifest.chunk_size", put("chunk_size", value=1 << 20))
lie("a device's core without coordinates", "Device.coords", drop("device_assignment", 0, "coords"))
lie("a device's coordinates alone", "Device.coords", drop("device_assignment", 0, "core_on_chip_plus1"))
for part in ("strings", "blobs", "files", "meshes", "partitions"):
    lie(f"no {part}", f"Manifest.{part}", drop(part))
lie("metadata that is no map", "metadata", lambda d: d.update(metadata_plus1=blob(d, b"\x90") + 1))
lie("metadata past the end", "Manifest.blobs", put("metadata_plus1", value=1000))
lie("metadata that is no msgpack", "static", lambda d: d.update(metadata_plus1=blob(d, b"\xc1") + 1))
lie("metadata with bytes left over", "static", lambda d: d.update(metadata_plus1=blob(d, b"\x80\x80") + 1))
lie("metadata with a time", "static", lambda d: d.update(metadata_plus1=blob(d, b"\x81\x01\xd6\xff\0\0\0\0") + 1))
lie("metadata that is too large", "static", lambda d: d.update(metadata_plus1=blob(d, bytes((1 << 20) + 1)) + 1))
lie("a reader that is no text", "Manifest.reader", put("reader", value=b"\xff"))
lie("a producer that is no text", "Manifest.producer", put("producer", value=b"a\x80"))
lie("a producer that is too long", "Manifest.producer", put("producer", value=b"a" * ((1 << 20) + 1)))

# Pools and offsets.
lie("offsets that fall", "Manifest.strings.starts", lambda d: d["strings"]["starts"].__setitem__(1, 1 << 20))
lie("offsets that begin late", "Manifest.strings.starts", put("strings", "starts", 0, value=1))
lie("offsets that end early", "Manifest.strings.starts", lambda d: d["strings"]["starts"].__setitem__(-1, 0))
lie("no offsets", "Manifest.strings.starts", drop("strings", "starts"))
lie("no blob bytes", "Manifest.blobs.starts", drop("blobs", "bytes"))
lie("a pool that is no text", "Manifest.strings", lambda d: d["files"]["path"].__setitem__(0, string(d, b"\xc3")))

# Files.
lie("a path past the end", "Manifest.strings", put("files", "path", 0, value=10**6))
lie("a path twice", "Files.path", lambda d: d["files"]["path"].__setitem__(0, d["files"]["path"][1]))
lie("paths in disorder", "Files.path", lambda d: d["files"]["path"].reverse())
lie("too few lengths", "Files.length", lambda d: d["files"]["length"].pop())
lie("too many kinds", "Files.kind", lambda d: d["files"]["kind"].append(1))
lie("no kinds", "Files.kind", drop("files", "kind"))
lie("too few digests", "Files.digest", lambda d: d["files"]["digest"].pop())
lie("too many digests", "Files.digest", lambda d: d["files"]["digest"].extend(bytes(32)))
lie("an impossible length", "Files.length", put("files", "length", 0, value=1 << 62))
lie("the longest length", "Files.length", put("files", "length", 0, value=(1 << 64) - 1))
lie("a function of 2 GiB", "Files.length", put("files", "length", 1, value=1 << 31))

# Meshes and partitions.
for size in (0, 1 << 31, (1 << 64) - 1):
    lie(f"a mesh axis of {size}", "Meshes.axis_size", put("meshes", "axis_size", 1, value=size))
lie("too few axis sizes", "Meshes.axis_size", lambda d: d["meshes"]["axis_size"].pop())
lie("too few axis types", "Meshes.axis_type", lambda d: d["meshes"]["axis_type"].pop())
lie("axes of no mesh", "Meshes.axis_start", drop("meshes", "axis_start"))
lie("an axis name past the end", "Manifest.strings", put("meshes", "axis_name", 0, value=10**6))
lie("a mesh past the end", "Partitions.mesh_plus1", put("partitions", "mesh_plus1", 0, value=2))
for name in ("entry_start", "axis_start", "unreduced_start", "reduced_start"):
    lie(f"too few {name}", f"Partitions.{name}", lambda d, name=name: d["partitions"][name].pop())
    lie(f"no {name}", f"Partitions.{name}", drop("partitions", name))
for name in ("axis", "unreduced", "reduced"):
    lie(f"{name} past the end", "Manifest.strings", put("partitions", name, 0, value=10**6))
lie("an entry with axes that is not split", "Partitions.entry_kind", put("partitions", "entry_kind", 0, value=1))
lie("a split entry without axes", "Partitions.entry_kind", put("partitions", "entry_kind", 1, value=2))

# Symbolic dimensions.
for text in ("", "b +", "7", "-1", "2*b+1", "b*2", "floordiv(b, 0)", "b" * 20_000):
    lie(
        f"the dimension {text[:20]!r}",
        "Manifest.symbolic_dims",
        lambda d, text=text: d["symbolic_dims"].__setitem__(0, string(d, text)),
    )
lie("a dimension twice", "Manifest.symbolic_dims", lambda d: d["symbolic_dims"].append(d["symbolic_dims"][0]))
lie("a dimension past the end", "Manifest.strings", put("symbolic_dims", 0, value=10**6))

# Names of objects.
for kind, table in [
    ("functions", "Function"),
    ("polymorphic", "PolymorphicFunction"),
    ("weights", "Weights"),
    ("pipelines", "Pipeline"),
    ("supplementals", "Supplemental"),
]:
    lie(f"{kind}: no name", f"{table}.name", drop(kind, 0, "name"))
    lie(f"{kind}: an empty name", f"{table}.name", put(kind, 0, "name", value=b""))
    lie(f"{kind}: one name twice", f"{table}.name", lambda d, kind=kind: d[kind].append(d[kind][0]))
    lie(f"{kind}: a name that is no text", f"{table}.name", put(kind, 0, "name", value=b"\xed\xa0\x80"))
    lie(f"{kind}: an unknown feature", "required", put(kind, 0, "required", value=[b"x"]), UnsupportedFormatError)
    lie(f"{kind}: a feature that is no text", f"{table}.required", put(kind, 0, "required", value=[b"\xff"]))
    lie(f"{kind}: metadata past the end", "Manifest.blobs", put(kind, 0, "metadata_plus1", value=10**6))
    lie(
        f"{kind}: metadata that is no map",
        "metadata",
        lambda d, k=kind: d[k][0].update(metadata_plus1=blob(d, b"\1") + 1),
    )
lie("one name for a function and weights", "Function.name", put("weights", 0, "name", value=b"apply"))
lie("one name for two kinds of function", "Function.name", put("polymorphic", 0, "name", value=b"apply"))

# Trees.
lie("no tree", "Weights.tree", drop(*W, "tree"))
lie("an empty tree", "tree.kind", put(*W, "tree", value={}))
for name, field in [("arity", "Tree.arity"), ("key_kind", "Tree.key_kind"), ("key", "Tree.key")]:
    lie(f"a tree without {name}", field, drop(*TREE, name))
lie("a tree with too few classes", "Tree.class_plus1", put(*TREE, "class_plus1", value=[0]))
lie("a tree without static data", "Tree.static_plus1", drop(*TREE, "static_plus1"))
lie("static data past the end", "Tree.static_plus1", put(*TREE, "static_plus1", 0, value=10**6))
lie("a class past the end", "Manifest.strings", put(*TREE, "class_plus1", 0, value=10**6))
lie("a key past the end", "Manifest.strings", put(*TREE, "key", 1, value=10**6))
lie(
    "a key that is no text",
    "Manifest.strings",
    lambda d: d["weights"][0]["tree"]["key"].__setitem__(1, string(d, b"\xff")),
)
lie(
    "a key that is too long",
    "tree.key",
    lambda d: d["weights"][0]["tree"]["key"].__setitem__(1, string(d, "a" * ((1 << 14) + 1))),
)
for n, arity in [(0, 5), (0, 7), (0, 0), (1, 1), (6, 1), (0, (1 << 32) - 1)]:
    lie(f"a tree with arity {arity} at {n}", "tree.arity", put(*TREE, "arity", n, value=arity))
lie("a root with a key", "tree.key_kind", put(*TREE, "key_kind", 0, value=2))
lie(
    "a dict with positions",
    "tree.key_kind",
    lambda d: both(put("key_kind", 1, value=5), put("key", 1, value=string(d, "0")))(d["weights"][0]["tree"]),
)
lie("a list with keys", "tree.key_kind", put(*TREE, "kind", 0, value=6))
lie("a namedtuple with keys", "tree.key_kind", put(*TREE, "kind", 0, value=8))
lie("arguments with keys", "tree.key_kind", put(*TREE, "kind", 0, value=10))


def tree_of(*nodes):
    """Puts a tree of nodes (kind, arity, key kind, key, [static]) in place of that of the weights."""

    def change(d):
        columns = {name: [] for name in ("kind", "arity", "key_kind", "key", "class_plus1", "static_plus1")}
        for kind, arity, key_kind, key, *static in nodes:
            row = (kind, arity, key_kind, string(d, key), 0, blob(d, static[0]) + 1 if static else 0)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(value)
        d["weights"][0]["tree"] = columns

    return change


ROOT = (3, 1, 1, "")
KEYS = {
    "a root that has one": (1, "x"),
    "an int with a zero in front": (3, "01"),
    "an int with a plus": (3, "+1"),
    "an int with a space": (3, " 1"),
    "an int with an underscore": (3, "1_0"),
    "an int of other digits": (3, "١"),
    "minus zero": (3, "-0"),
    "an int that is none": (3, "one"),
    "an empty int": (3, ""),
    "an int of 64 bits": (3, str(2**63)),
    "a negative int of 64 bits": (3, str(-(2**63))),
    "an int of many digits": (3, "1" * 4000),
    "an int of too many digits": (3, "1" * 5000),
    "a tuple that is no JSON": (4, "(1,)"),
    "a tuple that is a map": (4, '{"a":1}'),
    "a tuple with spaces": (4, "[1, 2]"),
    "a tuple with a float": (4, "[1.0]"),
    "a tuple with a constant": (4, "[NaN]"),
    "a tuple with a truth value": (4, "[true]"),
    "a tuple with nothing": (4, "[null]"),
    "a tuple with escapes": (4, '["\\u00e9"]'),
    "a tuple with a surrogate": (4, '["\\ud800"]'),
    "a tuple with a large int": (4, f"[{2**63}]"),
    "a tuple that is too deep": (4, "[" * 9 + "]" * 9),
    "a tuple that is far too deep": (4, "[" * 100_000 + "]" * 100_000),
    "a tuple that does not end": (4, "[" * 100_000),
}
for name, (kind, text) in KEYS.items():
    lie(f"a key: {name}", "tree.key", tree_of(ROOT, (1, 0, kind, text)))
for name, index in [("1 of 1", "1"), ("-1", "-1"), ("one that is none", "x"), ("00", "00")]:
    field = "tree.key" if index in ("x", "00") else "tree.key_kind"
    lie(f"a position: {name}", field, tree_of((6, 1, 1, ""), (1, 0, 5, index)))
lie("positions in disorder", "tree.key_kind", tree_of((7, 2, 1, ""), (1, 0, 5, "1"), (1, 0, 5, "0")))
lie("a class with positions and keys", "tree.key_kind", tree_of((9, 2, 1, ""), (1, 0, 5, "0"), (1, 0, 2, "a")))
lie("a class with keys and positions", "tree.key_kind", tree_of((9, 2, 1, ""), (1, 0, 2, "a"), (1, 0, 5, "0")))
lie("a child that is a root", "tree.key_kind", tree_of(ROOT, (1, 0, 1, "")))
lie("a class with attributes", "tree.key_kind", tree_of((9, 1, 1, ""), (1, 0, 6, "a")))
lie("a list in arguments below the root", "tree.kind", tree_of((6, 1, 1, ""), (10, 0, 5, "0")))
lie("two leaves of one name", "tree.key", tree_of((4, 2, 1, ""), (1, 0, 2, "1"), (1, 0, 3, "1")))
lie("two leaves of one key", "tree.key", tree_of((3, 2, 1, ""), (1, 0, 2, "a"), (1, 0, 2, "a")))
lie("two empty children of one key", "tree.key", tree_of((3, 2, 1, ""), (2, 0, 2, "a"), (6, 0, 2, "a")))
lie(
    "two children of one key",
    "tree.key",
    tree_of(*[(3, 2, 1, ""), (3, 1, 2, "a"), (1, 0, 2, "x"), (3, 1, 2, "a"), (1, 0, 2, "y")]),
)
lie("a dict in disorder", "tree.key", tree_of((3, 2, 1, ""), (1, 0, 3, "10"), (1, 0, 3, "9")))
lie("a defaultdict in disorder", "tree.key", tree_of((5, 2, 1, ""), (1, 0, 2, "b"), (1, 0, 2, "a")))
lie("a dict with keys of two types", "tree.key", tree_of((3, 2, 1, ""), (1, 0, 3, "1"), (1, 0, 2, "2")))
lie("a dict of a class", "tree.class", put(*TREE, "class_plus1", 0, value=1))
lie("a dict with static data", "tree.static", put(*TREE, "static_plus1", 0, value=1))
lie("a leaf with a child", "tree.arity", tree_of((1, 1, 1, ""), (1, 0, 2, "a")))
lie("a None with a child", "tree.arity", tree_of((2, 1, 1, ""), (1, 0, 2, "a")))
lie("two roots", "tree.arity", tree_of((1, 0, 1, ""), (1, 0, 1, "")))
lie("a root after the end", "tree.arity", tree_of((6, 0, 1, ""), (1, 0, 1, ""), (1, 0, 1, "")))
lie("a tree that is too deep", "tree.arity", tree_of(ROOT, *[(6, 1, 2, "a"), *[(6, 1, 5, "0")] * 1000, (1, 0, 5, "0")]))
lie("a name that is too long", "tree.key", tree_of(ROOT, *[(3, 1, 2, "a" * 100)] * 200, (1, 0, 2, "a")))
lie(
    "names that are too long",
    "tree.key",
    tree_of((3, 1, 1, ""), (3, 99, 2, "a" * 16_000), *[(1, 0, 2, str(n)) for n in range(99)]),
)
for text, static in [("an unknown factory", b"\xa4eval"), ("a list as factory", b"\x90"), ("a nil factory", b"\xc0")]:
    lie(text, "tree.static", tree_of((5, 0, 1, "", static)))
lie("static data that is no msgpack", "static", tree_of((9, 0, 1, "", b"\xc1")))
for depth in (65, 2000):
    lie(f"static data of depth {depth}", "static", tree_of((9, 0, 1, "", b"\x91" * depth + b"\xc0")))
lie("static data with a tuple of text", "static", tree_of((9, 0, 1, "", b"\xc7\x02\x01\xa1a")))
lie("static data of another type", "static", tree_of((9, 0, 1, "", b"\xd4\x05\0")))

# Specs.
for field, name in [("Module.arguments", PRIMAL), ("Module.results", PRIMAL), ("Weights.specs", W)]:
    part = field.partition(".")[2]
    rows = (*name, part)
    lie(f"{field}: none", field, drop(*rows))
    for column in ("rank", "key_impl_plus1", "weak_type", "partition_plus1", "memory_kind_plus1", "logical_axes_plus1"):
        lie(f"{field}: too few of {column}", f"{field}.{column}", lambda d, c=column, r=rows: at(d, *r)[c].pop())
        lie(f"{field}: no {column}", f"{field}.{column}", drop(*rows, column))
    lie(f"{field}: rank 65", f"{field}.rank", put(*rows, "rank", 0, value=65))
    lie(f"{field}: another rank", f"{field}.dim", lambda d, r=rows: at(d, *r)["rank"].__setitem__(-1, 3))
    lie(f"{field}: too many dims", f"{field}.dim", lambda d, r=rows: at(d, *r)["dim"].append(1))
    lie(f"{field}: an unknown dim", f"{field}.dim", lambda d, r=rows: at(d, *r)["dim"].__setitem__(-1, -3))
    lie(f"{field}: the lowest dim", f"{field}.dim", lambda d, r=rows: at(d, *r)["dim"].__setitem__(-1, -(2**63)))
    lie(f"{field}: a huge dim", f"{field}.dim", lambda d, r=rows: at(d, *r)["dim"].__setitem__(-1, 2**63 - 1))
    lie(f"{field}: weak 2", f"{field}.weak_type", put(*rows, "weak_type", 0, value=2))
    lie(f"{field}: dtype 0", "dtype", put(*rows, "dtype", 0, value=0))
    lie(f"{field}: dtype 200", "dtype", put(*rows, "dtype", 0, value=200))
    lie(f"{field}: an implementation without a key", "dtype", put(*rows, "key_impl_plus1", 0, value=2))
    lie(f"{field}: a key without an implementation", "dtype", put(*rows, "dtype", 0, value=30))
    for column in ("partition_plus1", "logical_axes_plus1"):
        lie(f"{field}: {column} past the end", f"{field}.{column}", put(*rows, column, 0, value=100))
    for column in ("key_impl_plus1", "memory_kind_plus1"):
        lie(f"{field}: {column} past the end", "Manifest.strings", put(*rows, column, 0, value=10**6))
lie("weights of a symbolic shape", "Weights.specs.dim", lambda d: at(d, *SPECS)["dim"].__setitem__(0, -1))
lie(
    "a huge dim beside a 0",
    "Weights.specs.dim",
    both(lambda d: at(d, *SPECS)["dim"].__setitem__(slice(0, 1), [0, 2**62, 4]), put(*SPECS, "rank", 0, value=3)),
)


def at(d, *path):
    for step in path:
        d = d[step]
    return d


lie("more entries than dimensions", "Weights.specs.partition_plus1", put(*SPECS, "partition_plus1", 0, value=1))
lie(
    "axes of a mesh as logical ones",
    "Module.arguments.logical_axes_plus1",
    put(*PRIMAL, "arguments", "logical_axes_plus1", 0, value=1),
)


@case(UnsupportedFormatError, "Weights.specs")
def keys_of_an_unknown_implementation(d):
    at(d, *SPECS)["key_impl_plus1"][1] = string(d, "a-prng.of-its-own") + 1


# Modules.
lie("no module", "Function.primal", drop(*PRIMAL))
lie("a function's file past the end", "Module.file", put(*PRIMAL, "file", value=4))
lie("a function in a weights file", "Module.file", put(*PRIMAL, "file", value=2))
for name, offset, length in [
    ("nothing", 0, 0),
    ("past the end", 1000, 4001),
    ("all past the end", 5001, 1),
    ("around the end of all numbers", (1 << 64) - 1, 2),
]:
    lie(
        f"StableHLO {name}",
        "Module.stablehlo_length",
        both(put(*PRIMAL, "stablehlo_offset", value=offset), put(*PRIMAL, "stablehlo_length", value=length)),
    )
lie(
    "a bare artifact that is not its whole file",
    "Module.stablehlo_length",
    put(*F, "vjps", 0, "stablehlo_length", value=4999),
)
lie("a bare artifact that begins later", "Module.stablehlo_length", put(*PRIMAL, "format", value=2))
lie("a VJP without its cotangents", "Function.vjps", lambda d: at(d, *F)["vjps"][0].update(results={}))
lie("a VJP that is the function again", "Function.vjps", lambda d: at(d, *F).update(vjps=[at(d, *F)["primal"]]))
lie("a VJP of order 2 that is none", "Function.vjps", lambda d: at(d, *F)["vjps"].extend(at(d, *F)["vjps"]))
lie("no StableHLO", "Module.stablehlo_length", drop(*PRIMAL, "stablehlo_length"))
for name in ("kept", "donated"):
    lie(
        f"{name} past the end",
        f"Module.{name}",
        lambda d, n=name: at(d, *PRIMAL)[n].append(len(at(d, *PRIMAL, "arguments", "dtype"))),
    )
    lie(f"{name} twice", f"Module.{name}", put(*PRIMAL, name, value=[1, 1]))
    lie(f"{name} falling", f"Module.{name}", put(*PRIMAL, name, value=[2, 1]))
lie("no device", "Module.num_devices", drop(*PRIMAL, "num_devices"))
lie("too few captured leaves", "Captures.leaf", drop(*PRIMAL, "captures", "leaf"))
lie("too few flags", "Captures.differentiable", put(*PRIMAL, "captures", "differentiable", value=[]))
lie("a flag of 2", "Captures.differentiable", put(*PRIMAL, "captures", "differentiable", value=[2]))
lie("captures of no name", "Manifest.strings", put(*PRIMAL, "captures", "weights", 0, value=10**6))
lie("captures without arguments", "Captures.argument", drop(*PRIMAL, "captures", "argument"))
lie("captures that fall", "Captures.argument", lambda d: at(d, *PRIMAL, "captures", "argument").reverse())
lie("captures past the end", "Captures.argument", put(*PRIMAL, "captures", "argument", 1, value=100))
lie("captures of leaves", "Module.arguments", put(*PRIMAL, "captures", "argument", 0, value=0))
lie("no captures", "Module.traced", drop(*PRIMAL, "captures"))
lie(
    "neither captures nor hoisted ones",
    "Module.arguments",
    both(drop(*PRIMAL, "captures"), lambda d: at(d, *PRIMAL).update(traced=len(at(d, *PRIMAL, "arguments", "dtype")))),
)
lie("traced with too many", "Module.traced", put(*PRIMAL, "traced", value=100))
lie("traced with too few", "Module.traced", put(*PRIMAL, "traced", value=1))
lie("traced with none", "Module.traced", drop(*PRIMAL, "traced"))
lie("hoisted without being captured", "Module.traced", lambda d: at(d, *PRIMAL, "captures").update(argument=[0, 1]))
lie("a mesh of a module past the end", "Module.mesh_plus1", put(*PRIMAL, "mesh_plus1", value=100))
lie("a VJP of other captures", "Captures.argument", put(*F, "vjps", 0, "captures", "argument", 0, value=0))
lie("no results", "Module.results", put(*PRIMAL, "results", value={}))
for name in ("platforms", "ordered_effects", "unordered_effects", "disabled_checks", "custom_calls", "dialects"):
    lie(f"{name}: no text", f"Module.{name}", put(*PRIMAL, name, value=[b"", b"\xff"]))
for name in ("stablehlo_version", "jax_version", "jaxlib_version", "name"):
    lie(f"{name}: no text", f"Module.{name}", put(*PRIMAL, name, value=b"\xff"))

# Functions.
for name in ("inputs", "outputs"):
    lie(f"no {name}", f"Function.{name}", drop(*F, name))
lie("inputs that are no arguments", "Function.inputs", lambda d: at(d, *F).update(inputs=at(d, *F)["outputs"]))
lie("outputs that are arguments", "Function.outputs", lambda d: at(d, *F).update(outputs=at(d, *F)["inputs"]))
lie("too few kinds of arguments", "Function.inputs", lambda d: at(d, *F)["argument_kinds"].pop())
lie("no kinds of arguments", "Function.inputs", drop(*F, "argument_kinds"))
lie("a constraint without a relation", "Function.constraints", put(*F, "constraints", value=[b"b"]))
lie("a constraint that is no text", "Function.constraints", put(*F, "constraints", value=[b"\xff"]))
lie("fixed past the end", "Manifest.blobs", put(*F, "fixed", 0, "value_plus1", value=10**6))
lie("fixed that is no msgpack", "static", lambda d: at(d, *F, "fixed", 0).update(value_plus1=blob(d, b"") + 1))
lie("fixed whose text is none", "FixedArgument.text", put(*F, "fixed", 0, "text", value=b"\xff"))
lie("options past the end", "Manifest.blobs", put(*F, "compile_options", 0, "options", value=10**6))
lie(
    "options that are no map",
    "CompileOptions.options",
    lambda d: at(d, *F, "compile_options", 0).update(options=blob(d, b"\xc0")),
)
lie("options twice", "CompileOptions.options", lambda d: at(d, *F, "compile_options", 1).update(platform=b"tpu"))
for name in ("argument", "weights", "subtree"):
    lie(f"a binding whose {name} is no text", f"Binding.{name}", put(*F, "bindings", 0, name, value=b"\xff"))
lie(
    "a function's name that is no text",
    "PolymorphicFunction.functions",
    put("polymorphic", 0, "functions", value=[b"\xff"]),
)

# Weights. Tensors: w (of leaves 5 and 3), v (4), k (1), empty (0); leaf 2 has none.
lie("a tensor past the end", "Weights.leaf_tensor_plus1", put(*W, "leaf_tensor_plus1", 0, value=5))
lie("a leaf past the end", "Weights.tensor_leaf", put(*W, "tensor_leaf", 0, value=6))
lie("too few leaves", "Weights.leaf_tensor_plus1", lambda d: at(d, *W)["leaf_tensor_plus1"].pop())
lie("no leaves", "Weights.leaf_tensor_plus1", drop(*W, "leaf_tensor_plus1"))
lie("specs of another tree", "Weights.specs", tree_of((1, 0, 1, "")))
lie("a tensor named after another's leaf", "Weights.tensor_leaf", put(*W, "tensor_leaf", 0, value=4))
lie("a tensor named after no tensor's leaf", "Weights.tensor_leaf", put(*W, "tensor_leaf", 0, value=2))
lie("a leaf without its tensor", "Weights.leaf_tensor_plus1", put(*W, "leaf_tensor_plus1", 3, value=0))
lie("a float0 with a tensor", "Weights.leaf_tensor_plus1", put(*W, "leaf_tensor_plus1", 2, value=1))
lie("ties of different shapes", "Weights.leaf_tensor_plus1", put(*W, "leaf_tensor_plus1", 3, value=2))
lie("ties of different dtypes", "Weights.leaf_tensor_plus1", put(*SPECS, "dtype", 3, value=6))
lie("too few piece names", "Weights.piece_name_plus1", lambda d: at(d, *W)["piece_name_plus1"].pop())
lie("too few piece starts", "Weights.piece_start", lambda d: at(d, *W)["piece_start"].pop())
lie("no piece starts", "Weights.piece_start", drop(*W, "piece_start"))
lie("a tensor without pieces", "Weights.piece_start", put(*W, "piece_start", value=[0, 1, 3, 3, 5]))
lie("a piece in no file", "Weights.piece_file", put(*W, "piece_file", 0, value=4))
lie("a piece in a function", "Weights.piece_file", put(*W, "piece_file", 0, value=1))
lie("a piece's name past the end", "Manifest.strings", put(*W, "piece_name_plus1", 1, value=10**6))
lie(
    "two pieces of one name",
    "Weights.piece_name_plus1",
    lambda d: both(put("piece_name_plus1", 2, value=at(d, *W)["piece_name_plus1"][1]), put("piece_file", 2, value=2))(
        at(d, *W)
    ),
)
lie("a piece that begins too late", "Weights.piece_begin", put(*W, "piece_begin", 2, value=2))
lie("a piece that begins far away", "Weights.piece_begin", put(*W, "piece_begin", 2, value=(1 << 64) - 1))
lie("a piece that is too long", "Weights.piece_begin", put(*W, "piece_shape", 1, value=7))
lie("too few begins", "Weights.piece_begin", put(*W, "piece_begin", value=[0, 0, 1]))
lie("too few extents", "Weights.piece_begin", put(*W, "piece_shape", value=[1, 6]))
lie("no extents", "Weights.piece_begin", drop(*W, "piece_shape"))
lie("a hole between pieces", "Weights.piece_shape", put(*W, "piece_shape", value=[1, 6, 1, 6]))
lie("pieces that overlap", "Weights.piece_shape", put(*W, "piece_begin", value=[0, 0, 0, 0]))
lie(
    "pieces that overlap and leave a hole",
    "Weights.piece_shape",
    both(put(*W, "piece_begin", value=[0, 0, 0, 1]), put(*W, "piece_shape", value=[3, 3, 3, 3])),
)
lie("pieces of too much", "Weights.piece_shape", put(*W, "piece_shape", value=[2, 6, 2, 6]))
lie("begins left over", "Weights.chunk_digest", lambda d: at(d, *W)["piece_begin"].append(0))
lie("extents left over", "Weights.chunk_digest", lambda d: at(d, *W)["piece_shape"].append(0))
lie("digests left over", "Weights.chunk_digest", lambda d: at(d, *W)["chunk_digest"].extend(bytes(32)))
lie("a byte left over", "Weights.chunk_digest", lambda d: at(d, *W)["chunk_digest"].append(0))
lie(
    "too few chunk digests",
    "Weights.chunk_digest",
    lambda d: at(d, *W).update(chunk_digest=at(d, *W)["chunk_digest"][:-32]),
)
lie("a cut digest", "Weights.chunk_digest", lambda d: at(d, *W)["chunk_digest"].pop())
lie("no chunk digests", "Weights.chunk_digest", drop(*W, "chunk_digest"))
lie(
    "a tensor of more chunks",
    "Weights.chunk_digest",
    both(*[lambda d, n=n: at(d, *SPECS)["dim"].__setitem__(n, 10**6) for n in (3, 7)]),
)

# Pipelines and supplementals.
P, S = ("pipelines", 0), ("supplementals", 0)
lie("no steps", "Step.role", drop(*P, "steps"))
lie("steps in disorder", "Step.role", lambda d: at(d, *P)["steps"].reverse())
lie("two models", "Step.role", put(*P, "steps", 0, "role", value=2))
lie("a step's function that is no text", "Step.function", put(*P, "steps", 0, "function", value=b"\xff"))
lie("too few files", "Supplemental.entry_file_plus1", put(*S, "entry_file_plus1", value=[0]))
lie("a file past the end", "Supplemental.entry_file_plus1", put(*S, "entry_file_plus1", 1, value=5))
lie("a file of another kind", "Supplemental.entry_file_plus1", put(*S, "entry_file_plus1", 1, value=2))
lie("a file without one", "Supplemental.entry_path", put(*S, "entry_file_plus1", 1, value=0))
lie("a folder with a file", "Supplemental.entry_path", put(*S, "entry_file_plus1", 0, value=1))
lie(
    "a path of an attachment twice",
    "Supplemental.entry_path",
    lambda d: at(d, *S).update(entry_path=at(d, *S)["entry_path"][1:] * 2, entry_file_plus1=[1, 1]),
)
lie("an attachment's path past the end", "Manifest.strings", put(*S, "entry_path", 1, value=10**6))
lie("inline with files", "Supplemental.form", put(*S, "form", value=1))
lie("one file that are two", "Supplemental.form", put(*S, "form", value=2))
lie(
    "one file that is none",
    "Supplemental.form",
    both(drop("supplementals", 2, "entry_path"), drop("supplementals", 2, "entry_file_plus1")),
)
lie(
    "one file that is a folder",
    "Supplemental.form",
    lambda d: d["supplementals"][2].update(entry_path=d["supplementals"][0]["entry_path"][:1], entry_file_plus1=[0]),
)
lie("inline past the end", "Manifest.blobs", put("supplementals", 1, "inline", value=10**6))

# Enumerations: 0, which is never valid, and the first number that is none.
ENUMS = {
    "Function.visibility": (*F, "visibility"),
    "PolymorphicFunction.visibility": ("polymorphic", 0, "visibility"),
    "Weights.visibility": (*W, "visibility"),
    "Pipeline.visibility": (*P, "visibility"),
    "Module.format": (*PRIMAL, "format"),
    "FixedArgument.kind": (*F, "fixed", 0, "kind"),
    "Step.role": (*P, "steps", 0, "role"),
    "Supplemental.form": (*S, "form"),
    "Manifest.digest_algorithm": ("digest_algorithm",),
    "Files.kind": ("files", "kind", 0),
    "Meshes.axis_type": ("meshes", "axis_type", 0),
    "Partitions.entry_kind": ("partitions", "entry_kind", 0),
    "Tree.kind": (*TREE, "kind", 1),
    "Tree.key_kind": (*TREE, "key_kind", 1),
    "Specs.dtype": (*SPECS, "dtype", 0),
    "Function.argument_kinds": (*F, "argument_kinds", 0),
}
SCALAR_ENUMS = {f"{table}.{f.name}": f.enum for table, fields in flat.TABLES.items() for f in fields if f.enum}
for field, path in ENUMS.items():
    kind = (SCALAR_ENUMS | flat.COLUMN_ENUMS)[field]
    says = {"Tree.kind": "tree.kind", "Specs.dtype": "dtype"}.get(field, field)
    for value in (0, max(flat.ENUMS[kind].values()) + 1, 255):
        lie(f"{field} = {value}", says, put(*path, value=value))


def read(manifest):
    found = decode.decode(manifest)
    samples.touch(found)
    return found


REACHED = set()  # (file, line) of every refusal that a case met


def reach(error):
    while error is not None:
        for frame, line in traceback.walk_tb(error.__traceback__):
            REACHED.add((frame.f_code.co_filename, line))
        error = error.__cause__


def refusal(manifest):
    with pytest.raises((CorruptPackageError, UnsupportedFormatError)) as caught:
        read(manifest)
    reach(caught.value)
    return caught.value


def check(name):
    error, field, change = CASES[name]
    start = time.process_time()
    found = refusal(flat.changed(GOOD, change))
    assert (type(found), found.field) == (error, field), found
    assert time.process_time() - start < 2
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_lie_is_refused(name):
    check(name)


def test_every_enumeration_is_tried():
    assert set(ENUMS) == set(SCALAR_ENUMS) | set(flat.COLUMN_ENUMS)
    assert {flat.ENUMS[kind]["UNSPECIFIED"] for kind in (SCALAR_ENUMS | flat.COLUMN_ENUMS).values()} == {0}
    assert set((SCALAR_ENUMS | flat.COLUMN_ENUMS).values()) == set(flat.ENUMS)


def test_a_later_format_says_who_reads_it():
    error = check("a later format")
    assert FUTURE in str(error)
    assert error.found == "format 2.1"
    newer = flat.changed(GOOD, put("format_minor", value=9))
    assert read(newer).format == (1, 9)


def test_an_error_names_its_object():
    assert check("weights: an unknown feature").object == "params"
    assert check("a tensor without pieces").object == "params"
    assert check("no module").object == "apply"
    assert check("no kinds").object is None


def test_fields_that_are_not_known_are_ignored():
    """A vtable with more slots than this schema has, as a later minor version would write it."""
    data = GOOD[: -trailer.SIZE]
    root = struct.unpack_from("<I", data)[0]
    (soffset,) = struct.unpack_from("<i", data, root)
    slots = data[root - soffset : root - soffset + struct.unpack_from("<H", data, root - soffset)[0]]
    more = bytearray(slots + struct.pack("<HH", 4, 0))
    struct.pack_into("<H", more, 0, len(more))
    moved = bytearray(data + bytes(-len(data) % 4)) + more
    struct.pack_into("<i", moved, root, root - (len(moved) - len(more)))
    assert samples.undigested(read(trailer.seal(bytes(moved)))) == EXPECTED


# What the dict cannot say: the flatbuffer's own structure.


def structure():
    yield "a root outside", "", "root", len(GOOD), "Manifest"
    yield "a vtable before the start", "", "soffset", 1 << 30, "Manifest"
    yield "a vtable after the end", "", "soffset", -(1 << 30), "Manifest"
    yield "a vtable of 3 bytes", "", "slots", 3, "Manifest"
    yield "a vtable of an odd size", "", "slots", 45, "Manifest"
    yield "a vtable that is too long", "weights[0]", "slots", 65534, "Weights"
    yield "a table that is too long", "", "size", 65535, "Manifest"
    yield "a field in the vtable's offset", "producer", "slot", 2, "Manifest.producer"
    yield "a field outside its table", "producer", "slot", 4000, "Manifest.producer"
    yield "a field half outside its table", "chunk_size", "slot", 1, "Manifest.chunk_size"
    yield "a string outside", "producer", "offset", 1 << 31, "Manifest.producer"
    yield "a string that is too long", "producer", "count", len(GOOD), "Manifest.producer"
    yield "a vector outside", "files.path", "offset", (1 << 32) - 1, "Files.path"
    yield "a vector that is too long", "files.path", "count", len(GOOD) // 4, "Files.path"
    yield "a vector that is far too long", "files.length", "count", (1 << 32) - 1, "Files.length"
    yield "a table outside", "files", "offset", (1 << 32) - 1, "Files"
    yield "a table outside, in a vector", "functions[0]", "offset", (1 << 32) - 1, "Function"
    yield (
        "a string outside, in a vector",
        "functions[0].constraints[0]",
        "offset",
        (1 << 32) - 1,
        "Function.constraints",
    )
    yield "a truth value of 2", "pipelines[0].pass_through", "scalar", 2, "Pipeline.pass_through"
    yield "a truth value of 255", "functions[0].vjps[0].all_kept", "scalar", 255, "Module.all_kept"


STRUCTURE = {name: rest for name, *rest in structure()}


def check_structure(name):
    path, what, value, field = STRUCTURE[name]
    error = refusal(flat.patch(GOOD, path, what, value))
    assert (type(error), error.field) == (CorruptPackageError, field)


@pytest.mark.parametrize("name", STRUCTURE)
def test_an_offset_that_lies_is_refused(name):
    check_structure(name)


def shared_children():
    """Many offsets to one large child, which would make a small manifest expensive."""
    d = flat.to_dict(GOOD)
    d["required"] = [b"x" * 100_000, *[b""] * 50_000]
    data = bytearray(flat.from_dict(d)[: -trailer.SIZE])
    offsets = [p for p in flat.walk(bytes(data)) if p.what == "offset" and p.path.startswith("required[")]
    first = offsets[0].position + struct.unpack_from("<I", data, offsets[0].position)[0]
    for place in offsets:
        if place.position < first:
            struct.pack_into("<I", data, place.position, first - place.position)
    return trailer.seal(bytes(data))


def test_one_child_of_many_offsets_is_refused():
    start = time.process_time()
    error = refusal(shared_children())
    assert (type(error), error.field) == (CorruptPackageError, "Manifest.required")
    assert time.process_time() - start < 2


@pytest.mark.parametrize("what", ["static", "key", "dimension", "name", "metadata"])
def test_one_entry_of_a_pool_may_be_named_often(what):
    """What many rows name is read once, or refused: the time is bounded by the manifest's size."""
    many = 20_000
    d = flat.to_dict(GOOD)
    if what == "static":
        large = blob(d, b"\xdc\xff\xff" + bytes(65535))
        tree_of((6, many, 1, ""), *[(9, 0, 5, str(n)) for n in range(many)])(d)
        at(d, *TREE)["static_plus1"][1:] = [large + 1] * many
    elif what == "key":
        large = string(d, "[" + ",".join(["1"] * 50_000) + "]")
        tree_of((3, many, 1, ""), *[(1, 0, 2, "")] * many)(d)
        at(d, *TREE).update(key_kind=[1] + [4] * many, key=[at(d, *TREE)["key"][0]] + [large] * many)
    elif what == "dimension":
        d["symbolic_dims"] = [string(d, "+".join(f"b{n}" for n in range(2000)))] * many
    elif what == "name":
        large = string(d, "a" * 16_000)
        tree_of((3, 1, 1, ""), (3, many, 2, "a"), *[(1, 0, 2, str(n)) for n in range(many)])(d)
        at(d, *TREE)["key"][1] = large
    else:
        large = blob(d, b"\x81\x01\xdc\xff\xff" + bytes(65535))
        pipeline = d["pipelines"][0]
        d["pipelines"] = [{**pipeline, "name": str(n).encode(), "metadata_plus1": large + 1} for n in range(2000)]
    manifest = flat.from_dict(d)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with contextlib.suppress(CorruptPackageError):
        found = decode.decode(manifest)
        list(found.weights.values())
        list(found.pipelines.values())
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


# --- that none was forgotten


def raises(module, *functions):
    """(file, line) of the `raise` statements of a module, or of some functions of it; those of helpers that raise."""
    source = inspect.getsourcefile(module)
    tree = ast.parse(inspect.getsource(module))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and (not functions or node.name in functions):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Raise) and inner.exc is not None:
                    found.add((source, inner.lineno))
                if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute) and inner.func.attr == "fail":
                    found.add((source, inner.lineno))
    return found


def test_every_refusal_is_met():
    """Each `raise` behind the digest is met by one of the cases above."""
    REACHED.clear()
    for name in CASES:
        check(name)
    for name in STRUCTURE:
        check_structure(name)
    refusal(shared_children())
    again = decode.decode(flat.changed(GOOD, CASES["functions: an unknown feature"][2]))
    for _ in range(2):  # the second time it is the error of the first
        with pytest.raises(UnsupportedFormatError) as caught:
            again.functions["apply"]
        reach(caught.value)
    wanted = raises(decode) | raises(_flat) | raises(_columns) | raises(_shared)
    wanted |= raises(tree_structure, "check", "_check_keys") | raises(tree_names)
    wanted |= raises(tree_static, "unpack_static", "_unpack", "_check_static")
    missed = sorted(f"{file.rpartition('/')[2]}:{line}" for file, line in wanted - REACHED)
    assert missed == []
