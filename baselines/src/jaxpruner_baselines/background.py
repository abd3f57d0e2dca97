"""Follows a trainer that returns only when it is done, through what it reports on its way."""

from __future__ import annotations

import gc
import queue
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax

from jaxpruner_baselines.baseline import Progress

T = TypeVar("T")
Report = Callable[[Progress], None]


def follow(work: Callable[[Report], T]) -> Generator[Progress, None, T]:
    """Carries out `work` in a thread of its own and yields what it reports.

        result = yield from follow(lambda report: host.train(..., when_logging=report))

    If the generator is closed, as when the user interrupts, the next report ends the work; closing waits for it.

    Returns:
      What `work` returns; what it raises is raised here.
    """
    reports: queue.SimpleQueue[Progress | None] = queue.SimpleQueue()
    stopped = threading.Event()

    def report(progress: Progress) -> None:
        if stopped.is_set():
            raise _StoppedError
        reports.put(progress)

    with ThreadPoolExecutor(max_workers=1) as pool:
        result = pool.submit(work, report)
        result.add_done_callback(lambda _: reports.put(None))
        try:
            yield from iter(reports.get, None)
        finally:
            stopped.set()
        return result.result()


def release_programs() -> None:
    """Frees what was compiled, for hosts that compile anew for each training.

    Programs take mappings of memory, of which Linux allows a process 65,530.
    """
    jax.clear_caches()
    gc.collect()


class _StoppedError(Exception):
    """Nobody follows any more."""
