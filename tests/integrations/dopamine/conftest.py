"""Lets these tests import their shared cases: `importlib` mode puts no folder on the path."""

import pathlib
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))


@pytest.fixture(scope="package", autouse=True)
def compile_once(compiled_in, tmp_path_factory):
    """Agents and trainings that are made again, to continue a checkpoint, compile the same programs."""
    with compiled_in(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture
def flags_of_play(monkeypatch):
    """The command lines' flags, in this process, and an end of what they leave in gin."""
    from absl import flags
    from absl.testing import flagsaver

    from jaxpruner_dopamine import compact, play

    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    if "base_dir" not in flags.FLAGS:
        play.define_flags()
        compact.define_own_flags()
    with flagsaver.flagsaver():
        yield
