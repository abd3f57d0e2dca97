"""How far the process has grown while something ran."""

from __future__ import annotations

from pathlib import Path


class Peak:
    """`with Peak() as peak:` measures how much memory the process has at most, in bytes; 0 where /proc is not.

    Attributes:
      bytes: how far it grows. What was freed before and is used again does not count.
      resident_bytes: all that it has then.
    """

    bytes = 0
    resident_bytes = 0

    def __enter__(self) -> Peak:
        if _RESET.exists():
            _RESET.write_text("5")  # the peak starts anew; getrusage's is inherited from the parent
            self._before = status_bytes("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if _RESET.exists():
            self.resident_bytes = status_bytes("VmHWM")
            self.bytes = self.resident_bytes - self._before


_RESET = Path("/proc/self/clear_refs")


def status_bytes(name: str) -> int:
    """A number of bytes of /proc/self/status, such as VmRSS."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])
