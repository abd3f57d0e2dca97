"""How far the process has grown while something ran."""

from __future__ import annotations

from pathlib import Path


class Peak:
    """`with Peak() as peak:` measures how far the process grows at most, in bytes: `peak.bytes`, 0 where /proc is not.

    What is freed and used again does not count, so that it is a lower bound in a process that has grown before.
    """

    bytes = 0

    def __enter__(self) -> Peak:
        if _RESET.exists():
            _RESET.write_text("5")  # the peak starts anew; getrusage's is inherited from the parent
            self._before = status_bytes("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if _RESET.exists():
            self.bytes = status_bytes("VmHWM") - self._before


_RESET = Path("/proc/self/clear_refs")


def status_bytes(name: str) -> int:
    """A number of bytes of /proc/self/status, such as VmRSS."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])
