"""Lets these tests import their shared cases: `importlib` mode puts no folder on the path."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))


@pytest.fixture(scope="package", autouse=True)
def compile_once(compiled_in, tmp_path_factory):
    """Trainings that are made again, to continue a checkpoint, compile the same programs."""
    with compiled_in(tmp_path_factory.mktemp("compiled")):
        yield
