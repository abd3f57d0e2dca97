"""Lets these tests import their shared cases: `importlib` mode puts no folder on the path."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))


import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="package", autouse=True)
def compiled_once(tmp_path_factory):
    """Agents that are made again, to continue a checkpoint, compile the same programs."""
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0, -1), strict=True):
        jax.config.update(name, value)
    compilation_cache.reset_cache()  # whether there is one is decided once
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
