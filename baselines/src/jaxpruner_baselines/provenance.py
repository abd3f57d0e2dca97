"""Where a number comes from: commit, versions, device."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import jax

_PACKAGES = ("jaxpruner", "jax", "flax", "optax", "numpy")
# Module -> package, recorded where they are used.
_HOSTS = {"dopamine": "dopamine-rl", "fedjax": "fedjax", "scenic": "scenic", "t5x": "t5x"}


@functools.cache
def commit() -> str:
    """The git revision of this source, with `-dirty` where code differs from it, or `unknown`."""
    here = Path(__file__).resolve()

    def git(*args: str) -> str:
        command = ["git", "-C", str(here.parent), *args]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an installed copy inside another repository
        changed = git("status", "--porcelain", "--", ":/*.py", ":/*.toml", ":/*.gin")
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def versions() -> dict[str, str]:
    return _versions(tuple(package for module, package in _HOSTS.items() if module in sys.modules))


@functools.cache
def _versions(hosts: tuple[str, ...]) -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in (*_PACKAGES, *hosts):
        try:
            installed = importlib.metadata.distribution(package)
            origin = json.loads(installed.read_text("direct_url.json") or "{}").get("vcs_info", {})
            # What is installed from a repository seldom changes its version.
            found[package] = "+".join(
                [installed.version, *([origin["commit_id"][:7]] if "commit_id" in origin else [])]
            )
        except importlib.metadata.PackageNotFoundError:  # run from the source tree
            found[package] = "source"
    return found


@functools.cache
def device() -> str:
    first = jax.devices()[0]
    if first.platform == "cpu":
        return f"cpu, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"
    return f"{first.platform}, {jax.device_count()} x {first.device_kind}"
