"""How much of a package is compared with its digests, and when."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, TypeAlias

from obmlite._collector import paused
from obmlite._files import WeightsFile, WeightsFiles
from obmlite.errors import ArgumentError
from obmlite.io import checked
from obmlite.io.chunked import Range, Recent, processors
from obmlite.io.store import Store
from obmlite.schema import records as r

LEVELS = ("structure", "lazy", "all")
"""From the least to the most; each promises what the one before it does, and more (``docs/trust.md``)."""

Job: TypeAlias = Callable[[], None]

_AHEAD = 4  # jobs that wait for each thread


def check_level(level: str) -> None:
    """Refuses what is no level.

    Raises:
      ArgumentError: there is none of this name.
    """
    if level not in LEVELS:
        raise ArgumentError(
            "There is no such level of verification.",
            field="verify",
            expected=", ".join(LEVELS),
            found=repr(level),
        )


def recent(level: str) -> Recent | None:
    """What a package's weights files are opened with: None where tensors are not compared."""
    return None if level == "structure" else Recent()


def check_lengths(store: Store, files: Iterable[r.FileRecord]) -> None:
    """Looks whether files are there, as long as they were saved; none is opened.

    Raises:
      MissingFileError: one is not there.
      CorruptPackageError: one has another length.
    """
    for file in files:
        checked.check_size(store.size(file.path), file.path, file.length)


def check_all(store: Store, manifest: r.ManifestRecord, weights: Iterable[WeightsFiles]) -> None:
    """Decodes every object, and compares every byte of every file, on all cores.

    Args:
      store: where the package is.
      manifest: its manifest.
      weights: the files of each of its weights objects.

    Raises:
      CorruptPackageError: something is not what was saved.
      UnsupportedFormatError: an object needs a newer obmlite, so that it cannot be checked.
    """
    with paused():
        for objects in objects_of(manifest):
            for name in objects:
                objects[name]
    others = [file for file in manifest.files.values() if file.kind is not r.FileKind.WEIGHTS]
    whole: Iterator[Job] = (functools.partial(check_file, store, file) for file in others)
    tensors = (job for files in weights for path in files.paths for job in comparing(files(path)))
    with ThreadPoolExecutor(processors(), "obmlite-verify") as pool:
        run(pool, itertools.chain(whole, tensors))


def objects_of(manifest: r.ManifestRecord) -> tuple[Mapping[str, Any], ...]:
    """All objects, kind by kind; one is decoded when it is asked for."""
    return (manifest.functions, manifest.polymorphic, manifest.weights, manifest.pipelines, manifest.supplementals)


def check_file(store: Store, record: r.FileRecord) -> None:
    """Compares all bytes of a file that is no weights file.

    Raises:
      CorruptPackageError: they are not those that were saved.
    """
    source = store.open(record.path)
    try:
        for _ in checked.chunks(source, record.path, record.length, record.digest):
            pass
    finally:
        source.close()


def comparing(file: WeightsFile, progress: Callable[[int], object] = lambda _: None) -> Iterator[Job]:
    """What threads are to do so that all tensors of an open file are compared with their digests.

    Args:
      file: the file, opened to be compared.
      progress: told numbers of bytes that were compared.
    """

    def check(ranges: list[Range]) -> None:
        file.check(ranges)
        progress(sum(nbytes for _, nbytes in ranges))

    return (functools.partial(check, ranges) for ranges in file.pending(file.ranges))


def run(pool: Executor, jobs: Iterable[Job]) -> None:
    """Has jobs done; few wait at a time, since there may be a hundred thousand.

    Raises:
      CorruptPackageError: what a job has found; of several errors that of the first job.
    """
    most = _AHEAD * processors()
    free = threading.Semaphore(most)
    failed: dict[int, BaseException] = {}

    def done(number: int, future: Future[None]) -> None:
        error = future.exception()
        if error is not None:
            failed[number] = error
        free.release()

    for number, job in enumerate(jobs):
        free.acquire()
        if failed:
            free.release()
            break
        pool.submit(job).add_done_callback(functools.partial(done, number))
    for _ in range(most):
        free.acquire()
    if failed:
        raise failed[min(failed)]
