"""Saving from all processes of a program: each writes pieces, process 0 makes a package of them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgpack

from obmlite import _dealing, _packaging
from obmlite._coordination import Session
from obmlite._packaging import Blobs
from obmlite._writing import Part, Progress, Tensors, Writer, Written, at_once, groups, numbered, record, slug
from obmlite.errors import CoordinationError, context
from obmlite.io import digest
from obmlite.io.participant import Participant
from obmlite.schema import records as r

if TYPE_CHECKING:
    from obmlite.model import Model

_COMPARED = 64 << 10  # bytes up to which values that each process has for itself are compared
_PATIENCE = 10.0  # seconds for which a process looks for the directory that process 0 has made


@dataclasses.dataclass(frozen=True, slots=True)
class _Box:
    """A box of a tensor, for dealing out."""

    name: str
    nbytes: int
    holders: tuple[int, ...]
    weights: str
    part: Part


@dataclasses.dataclass(frozen=True, slots=True)
class _File:
    """A weights file that one process is to write."""

    process: int
    weights: str
    stem: str
    parts: Sequence[Part]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


def save(
    model: Model,
    path: str | os.PathLike[str],
    overwrite: bool,
    file_bytes: int,
    progress: bool | None,
    session: Session,
) -> None:
    """Every process writes its pieces; process 0 locks, merges what they say, and commits.

    Until a process has sent what it wrote, it removes that if anything fails anywhere. From then on process 0 decides,
    and the others leave their files where they are unless it tells them that it failed.
    """
    blobs = _packaging.opened(model)
    session.agree("model", _described(model, overwrite, file_bytes))
    files = _dealt(model, file_bytes, session)
    mine = [file for file in files if file.process == session.index]
    total = sum(file.nbytes for file in mine)
    with _packaging.bar(path, total, progress if session.index == 0 else False) as update:

        def advance(nbytes: int) -> None:
            update(nbytes)
            session.poll()

        if session.index == 0:
            _lead(model, path, overwrite, blobs, files, mine, session, advance)
        else:
            _follow(model, path, mine, session, advance)


def _lead(
    model: Model,
    path: str | os.PathLike[str],
    overwrite: bool,
    blobs: Blobs,
    files: Sequence[_File],
    mine: Sequence[_File],
    session: Session,
    advance: Progress,
) -> None:
    """Process 0's part."""
    with _packaging.begin(path, overwrite) as (transaction, previous):
        try:
            with transaction.invitation("weights") as invitation:
                session.broadcast(invitation.encode())
                session.gather()  # all have found it
            records: dict[str, r.FileRecord] = {}
            functions = _packaging.functions(transaction, model, blobs, records)
            supplementals = _packaging.supplementals(transaction, model, records, advance)
            with Writer(transaction, advance) as writer:
                tables = [_table(_write(writer, model, mine))]
            tables += session.gather()[1:]
            made: list[Written] = []
            for process, table in enumerate(tables):
                made += _read_table(table, [file for file in files if file.process == process])
            for file, written in zip(files, made, strict=True):  # `files` are in the order of processes
                records[written.record.path] = written.record
                if file.process:
                    transaction.adopt(written.record.path, written.record.length)
            weights_records = {}
            for name, weights in model.weights.items():
                own = [(f.parts, w) for f, w in zip(files, made, strict=True) if f.weights == name]
                weights_records[name] = record(name, weights, Tensors.of(weights), own)
            transaction.commit(_packaging.manifest(model, records, functions, weights_records, supplementals))
        except BaseException as error:
            if transaction.committed:  # whatever failed behind it, their files are named now
                with contextlib.suppress(CoordinationError):
                    session.broadcast(f"{type(error).__name__}: {error}".encode(), decided=True)
            else:
                session.abandon(error)
            raise
        session.broadcast(b"", decided=True)
        _packaging.publish(transaction, weights_records, previous)


def _follow(
    model: Model, path: str | os.PathLike[str], mine: Sequence[_File], session: Session, advance: Progress
) -> None:
    """The part of any other process."""
    invitation = session.broadcast().decode()
    with Participant(path, invitation, patience=min(_PATIENCE, session.timeout)) as participant:
        session.gather()
        with Writer(participant, advance) as writer:
            table = _table(_write(writer, model, mine))
        participant.seal()
        participant.keep()
        try:
            session.gather(table)
            problem = session.broadcast(decided=True)
        except CoordinationError:
            if session.leader_failed:
                participant.drop()
            raise
    if problem:
        raise CoordinationError(
            "Process 0 has saved the package, but then failed.",
            found=problem.decode(errors="replace"),
            fix="the package is whole now, but may not survive a power failure",
        )


def _write(writer: Writer, model: Model, files: Sequence[_File]) -> list[Written]:
    made = []
    for file in files:
        weights = model.weights[file.weights]
        with context(object=file.weights):
            made.append(writer.write(file.stem, weights.tree.names, file.parts, at_once(weights)))
    return made


def _described(model: Model, overwrite: bool, file_bytes: int) -> Iterator[tuple[str, str]]:
    """What the processes have to have in common, but for values."""
    yield "", f"overwrite={overwrite}, max_file_bytes={file_bytes}, metadata {model.metadata!r}"
    for name, function in model.functions.items():
        yield name, f"function {function.signature}"
    for name, pipeline in model.pipelines.items():
        yield name, f"pipeline of {pipeline.steps!r}, pass_through={pipeline.pass_through}"
    for name, supplemental in model.supplementals.items():
        yield name, f"supplemental {supplemental.mime_type!r} with {list(supplemental.entries)!r}"
    for name, weights in model.weights.items():
        tree = weights.tree
        numbers = Tensors.of(weights).leaf_tensor.tolist()
        for leaf, (own, spec) in enumerate(zip(tree.names, weights.specs, strict=True)):
            sharding = weights.source.tensor(leaf).sharding
            place = "on one process"
            if sharding is not None:
                place = _dealing.fingerprint(sharding, spec.shape)
            yield f"{name}: {own}", f"{spec}, tensor {numbers[leaf]}, {place}, weak {spec.weak_type}, {spec.partition}"
        yield name, f"weights with metadata {weights.metadata!r}, containers {list(map(int, tree.kinds))}"


def _dealt(model: Model, file_bytes: int, session: Session) -> list[_File]:
    """The files of all processes, in the order of processes; small values that each has for itself are compared."""
    found: list[_Box] = []
    elsewhere: dict[str, int] = {}  # arrays on one other process, which to that process look like its own
    everyone = tuple(range(session.count))
    alike: list[int] = []
    for name, weights in model.weights.items():
        taken = set(weights.tree.names)
        for part in Tensors.of(weights).parts(weights):
            sharding = weights.source.tensor(part.leaf).sharding
            own = f"{name}: {part.name}"
            processes = everyone if sharding is None else _dealing.processes_of(sharding)
            if sharding is None or len(processes) == 1:
                if sharding is not None and processes[0] != session.index:
                    elsewhere[own] = processes[0]
                alike.append(len(found))
                found.append(_Box(own, part.nbytes, everyone, name, part))
                continue
            held = _dealing.held_by(sharding, part.shape)
            for place, holders in held.items():
                piece = part
                if len(held) > 1:
                    piece = dataclasses.replace(part, name=_dealing.piece_name(part.name, place, taken), box=place)
                found.append(_Box(f"{name}: {piece.name}", piece.nbytes, holders, name, piece))
    places: dict[str, int] = {}
    for answer in session.exchange(msgpack.packb(elsewhere)):
        places.update(msgpack.unpackb(answer))
    same = []
    for n in alike:
        box = found[n]
        if box.name in places:
            found[n] = dataclasses.replace(box, holders=(places[box.name],))
        elif box.nbytes <= _COMPARED:
            with context(object=box.weights, leaf=box.part.name):
                held_array = model.weights[box.weights].source.tensor(box.part.leaf).read(box.part.box)
            same.append((box.name, digest.sha256(box.part.spec.kind.to_storage(held_array)).hex()))
    session.agree("values", same)
    shares: dict[tuple[int, str], list[Part]] = {}
    for box, owner in zip(found, _dealing.deal(found, session.count), strict=True):
        shares.setdefault((owner, box.weights), []).append(box.part)
    files = []
    for process in range(session.count):
        for name in model.weights:
            cut = list(groups(shares.get((process, name), ()), file_bytes))
            stem = f"{slug(name)}-p{process:05d}-of-{session.count:05d}"
            files += [_File(process, name, stem + numbered(n, len(cut)), group) for n, group in enumerate(cut)]
    return files


def _table(made: Sequence[Written]) -> bytes:
    """What process 0 has to know of files."""
    packed: bytes = msgpack.packb([[w.record.path, w.record.length, w.record.digest, list(w.digests)] for w in made])
    return packed


def _read_table(table: bytes, files: Sequence[_File]) -> list[Written]:
    """The other way round, compared with the files that the process was to write.

    Raises:
      CoordinationError: they are others.
    """
    made = []
    rows = msgpack.unpackb(table)
    wrong = len(rows) != len(files)
    for file, (path, length, own, digests) in zip(files, rows, strict=False):
        chunks = [-(-part.nbytes // digest.CHUNK) for part in file.parts]
        wrong |= not path.startswith(f"weights/{file.stem}-") or len(own) != digest.DIGEST_SIZE
        wrong |= [len(d) for d in digests] != [count * digest.DIGEST_SIZE for count in chunks]
        made.append(Written(r.FileRecord(path, length, r.FileKind.WEIGHTS, own), tuple(digests)))
    if wrong:
        raise CoordinationError(
            "A process has written other files than it was to write.",
            expected=", ".join(file.stem for file in files) or "none",
            found=", ".join(str(row[0]) for row in rows) or "none",
            fix="run the same obmlite on all processes",
        )
    return made
