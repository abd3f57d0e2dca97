"""Runs the quick tests of the core on the oldest supported JAX, and on the newest with the interpreters at hand.

Every lane has an environment of its own under .lanes/. An interpreter that is absent is named in the
closing table, it is not a failure. `--record` writes the table into WORKSPACE.md; other arguments go to pytest.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UV = Path(sys.executable).with_name("uv")
RECORD = "--record"


@dataclasses.dataclass(frozen=True)
class Lane:
    name: str
    python: str
    pins: tuple[str, ...] = ()


LANES = (
    # The floor of core/pyproject.toml, with the flax and optax of its day. The newest that 3.11 can have is in .venv.
    Lane("oldest", "3.11", ("jax==0.4.35", "jaxlib==0.4.35", "flax==0.10.1", "optax==0.2.4")),
    Lane("newest", "3.12"),
    Lane("newest", "3.13"),
)


def run(lane: Lane, pytest_args: list[str]) -> str:
    """Installs and tests one lane; returns its line of the closing table."""
    interpreter = find_interpreter(lane.python)
    if interpreter is None:
        return f"absent: no Python {lane.python} on this machine"
    environment = ROOT / ".lanes" / f"{lane.name}-{lane.python}"
    python = environment / "bin" / "python"
    if not python.exists() and _uv("venv", "--python", interpreter, str(environment)):
        return "failed: no environment"
    upgrade = () if lane.pins else ("--upgrade",)
    requirements = ("-e", "core", "flax", "-r", "tests/requirements.txt", *lane.pins)
    if _uv("pip", "install", "--python", str(python), *upgrade, *requirements):
        return "failed: installation"
    versions = subprocess.run(
        [python, "-c", "import jax, flax, optax; print(jax.__version__, flax.__version__, optax.__version__)"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    code = subprocess.run([python, "-m", "pytest", "-n", "2", *pytest_args], cwd=ROOT, check=False).returncode
    return f"{'passed' if code == 0 else 'FAILED'}: jax {versions[0]}, flax {versions[1]}, optax {versions[2]}"


def find_interpreter(version: str) -> str | None:
    """A python of this version that really starts: on the path, or installed by pyenv."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    for candidate in (f"python{version}", *sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}"))):
        try:
            if subprocess.run([candidate, "--version"], capture_output=True, check=False).returncode == 0:
                return str(candidate)
        except FileNotFoundError:
            continue
    return None


def _uv(*command: str) -> int:
    return subprocess.run([UV, *command], cwd=ROOT, check=False).returncode


def record(lines: dict[str, str]) -> None:
    """Puts the table between its markers in WORKSPACE.md."""
    path = ROOT / "WORKSPACE.md"
    rows = "\n".join(f"| {title} | {line} |" for title, line in lines.items())
    today = datetime.datetime.now(datetime.UTC).date()
    table = f"| lane | result of {today} |\n|---|---|\n{rows}"
    marked = r"(<!-- lanes -->\n).*?(<!-- /lanes -->)"
    path.write_text(re.sub(marked, lambda found: found[1] + table + "\n" + found[2], path.read_text(), flags=re.DOTALL))


def main() -> int:
    given = [argument for argument in sys.argv[1:] if argument != RECORD]
    pytest_args = given or ["-m", "not slow", "tests/core", "tests/contract"]
    lines = {}
    for lane in LANES:
        title = f"{lane.name}, Python {lane.python}"
        print(f"\n== lane {title} ==", flush=True)
        lines[title] = run(lane, pytest_args)
    print("\nlanes")
    for title, line in lines.items():
        print(f"  {title:22} {line}")
    if RECORD in sys.argv:
        record(lines)
    return any(line.startswith(("failed", "FAILED")) for line in lines.values())


if __name__ == "__main__":
    sys.exit(main())
