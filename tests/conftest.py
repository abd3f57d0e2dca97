"""For all tests: where hosts are found that no registry has, no deadlines, and an end of what piles up."""

import gc
import pathlib
import sys

import hypothesis
import jax
import pytest

# A process may hold 65,530 mappings of memory on Linux; each compiled program takes some, and XLA crashes past that.
MAPPINGS = pathlib.Path("/proc/self/maps")
TOO_MANY = 15_000


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_do_not_pile_up():
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > TOO_MANY:
        jax.clear_caches()
        gc.collect()


# No test asserts a time.
hypothesis.settings.register_profile("workspace", deadline=None)
hypothesis.settings.load_profile("workspace")

# Sources of hosts, each in a folder of its name, such as scenic/scenic. Installed ones come first.
for folder in sorted((pathlib.Path.home() / ".cache" / "jaxpruner" / "frameworks").glob("*")):
    if (folder / folder.name).is_dir():
        sys.path.append(str(folder))
