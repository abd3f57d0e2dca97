"""What devices tell each other in a compiled program, read from its text."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

REDUCES = "all-reduce"
MOVES = (
    "all-gather",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
    "reduce-scatter",
)

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (.+?) ([a-z][a-z-]*)\(")
_CALLED = re.compile(r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"([a-z]+)(\d*)\w*\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction: what it is, the bytes of its result, how often it runs in one call of the program."""

    kind: str
    bytes: int
    times: int


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program, `compiled.as_text()`.

    The body of a loop counts as often as it runs, and both branches of a conditional count, so that
    sums over the list are the most that a call can take.

    Raises:
      ValueError: if a loop with collectives in it does not say how often it runs.
    """
    bodies: dict[str, list[str]] = {}
    entry = None
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            entry, lines = found[2] if found[1] else entry, bodies.setdefault(found[2], [])
        elif line.startswith(" ") and bodies:
            lines.append(line)
    if entry is None:
        raise ValueError("text: has no ENTRY computation; give compiled.as_text().")
    return list(_of(entry, 1, bodies))


def _of(name: str, times: int, bodies: dict[str, list[str]]) -> Iterator[Collective]:
    for line in bodies[name]:
        if not (found := _INSTRUCTION.match(line)):
            continue
        shape, opcode = found[1], found[2]
        kind = opcode.removesuffix("-start")
        if kind == REDUCES or kind in MOVES:
            yield Collective(kind, _bytes(shape), times)
            continue
        called = _CALLED.findall(line)
        for branches in _BRANCHES.findall(line):
            called += [branch.strip().lstrip("%") for branch in branches.split(",")]
        trips = _TRIPS.search(line) if opcode == "while" else None
        inner = [one for callee in called for one in _of(callee, times * int(trips[1] if trips else 1), bodies)]
        if inner and opcode == "while" and not trips:
            raise ValueError(f"{name}: holds a loop with collectives of unknown length, which cannot be added up.")
        yield from inner


def _bytes(shape: str) -> int:
    """The bytes of an array or of a tuple of arrays, as HLO writes them: `(f32[2,3]{1,0}, pred[])`."""
    return sum(
        math.prod(int(d) for d in dims.split(",") if d) * max(1, int(bits or 8) // 8)
        for _, bits, dims in _ARRAY.findall(shape)
    )
