"""What the top of a baseline says to expect is what the committed results say."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from jaxpruner_baselines import registry, report, runner
from jaxpruner_baselines.measures import measure
from jaxpruner_baselines.methods import is_dense
from jaxpruner_baselines.results import Results

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "baselines" / "results"
EXPECTED = re.compile(r"jaxpruner-baselines run (\w+) --preset (\w+).*dense: (\S+)$", re.MULTILINE)
MODULES = sorted({place.partition(":")[0] for place in registry.MODULES.values()})


def test_speeds_in_the_readme_are_those_of_the_benchmarks():
    # A row that was measured again stands below.
    rows = (
        Results(RESULTS / "benchmarks.csv").read().drop_duplicates("method", keep="last").set_index("method")["value"]
    )
    found = re.findall(r"([0-9.]+)x<!-- (.+?) -->", (ROOT / "README.md").read_text())
    assert found
    assert found == [(f"{rows[row]:.2f}", row) for _, row in found]


@pytest.mark.parametrize("name", MODULES)
def test_the_top_of_a_baseline(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"its host is missing: {error}")
    found = EXPECTED.findall(module.__doc__)
    assert found
    for baseline_name, preset, expected in found:
        baseline = registry.get(baseline_name)
        lines, _ = report.summarize(baseline, preset, runner.results_of(baseline, RESULTS))
        dense = next(line for line in lines if is_dense(line.method))
        assert measure(baseline.metric).shown(dense.mean) == expected, (baseline_name, preset)
