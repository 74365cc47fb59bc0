"""Python's garbage collector, paused while very many objects without cycles are made.

It looks through all that is alive whenever so many containers more are there than were freed: for fifty thousand
tensors that takes longer than making them.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator

_lock = threading.Lock()
_pauses = 0
_resume = False


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Pauses it for the block, in all threads; for work of a second or so, and no waiting. May be nested."""
    global _pauses, _resume
    with _lock:
        if not _pauses:
            _resume = gc.isenabled()
            gc.disable()
        _pauses += 1
    try:
        yield
    finally:
        with _lock:
            _pauses -= 1
            if not _pauses and _resume:
                gc.enable()


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Pauses it while modules are imported, and then counts all that is alive as old, without looking through it.

    Almost nothing that an import makes is garbage, and with JAX it is 100,000 objects: the collections that they would
    set off take a tenth of the time to a first prediction. What garbage there is is found by the next full collection.
    """
    with paused():
        yield
        if not gc.get_freeze_count():  # else somebody has put objects aside, which are not to be taken back
            gc.freeze()
            gc.unfreeze()
