"""For all tests: where hosts are found that no registry has, no deadlines, and an end of what piles up."""

import contextlib
import gc
import os
import pathlib
import sys

import hypothesis
import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

# Keras reads its backend when it is imported, by whichever test comes first.
os.environ["KERAS_BACKEND"] = "jax"

# A process may hold 65,530 mappings of memory on Linux; each compiled program takes some, and XLA crashes past that.
MAPPINGS = pathlib.Path("/proc/self/maps")
TOO_MANY = 15_000


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_do_not_pile_up():
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > TOO_MANY:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(autouse=True)
def no_gin_configuration_is_left():
    """A configuration that a host's test has parsed locks gin, and the next host cannot even be imported."""
    yield
    if "gin" in sys.modules:
        sys.modules["gin"].clear_config()


@pytest.fixture(scope="session")
def compiled_in():
    """`with compiled_in(folder)`: programs are kept there, for tests whose hosts make the same ones again and again."""

    @contextlib.contextmanager
    def keep(folder):
        settings = {
            "jax_compilation_cache_dir": str(folder),
            "jax_persistent_cache_min_compile_time_secs": 0,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }
        before = {name: getattr(jax.config, name) for name in settings}
        try:
            for name, value in settings.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()  # whether there is one is decided once
            yield
        finally:
            for name, value in before.items():
                jax.config.update(name, value)
            compilation_cache.reset_cache()

    return keep


LEFT_OUT = pytest.StashKey[int]()


def pytest_deselected(items):
    config = items[0].config
    config.stash[LEFT_OUT] = config.stash.get(LEFT_OUT, 0) + len(items)
    if hasattr(config, "workeroutput"):  # each worker of pytest-xdist collects all tests
        config.workeroutput["left_out"] = config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


def pytest_terminal_summary(terminalreporter, config):
    """The number of tests that `make test` leaves out, in a closing line."""
    if config.option.markexpr == "not slow" and (left_out := config.stash.get(LEFT_OUT, 0)):
        terminalreporter.write_line(f"{left_out} slow tests were left out; `make test-all` runs them.")


# No test asserts a time.
hypothesis.settings.register_profile("workspace", deadline=None)
hypothesis.settings.load_profile("workspace")

# Sources of hosts, each in a folder of its name, such as scenic/scenic. Installed ones come first.
for folder in sorted((pathlib.Path.home() / ".cache" / "jaxpruner" / "frameworks").glob("*")):
    if (folder / folder.name).is_dir():
        sys.path.append(str(folder))
