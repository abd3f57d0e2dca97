"""The benchmark's table with tiny sizes. Nothing here looks at a time."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from typer.testing import CliRunner

from jaxpruner_baselines.benchmarks import hlo, masks, peers
from jaxpruner_baselines.benchmarks.command import GROUPS
from jaxpruner_baselines.benchmarks.figures import Figure, Reach, alternate
from jaxpruner_baselines.cli import app
from jaxpruner_baselines.results import COLUMNS, Results

HAS_TORCH = peers.has_torch()
ROWS = {
    "mask update, 100,000 float32": 5 + 2 * HAS_TORCH,
    "RigL's drop and grow, 100,000 float32": 2,
    "global mask, 3 leaves of 30,000": 1 + HAS_TORCH,
    "2:4 mask along axis 1, (128, 128)": 2,
    "2:4 mask along axis 0, (128, 128)": 2,
    "thresholds by sample, 1,024 float32": 1,
    "thresholds by sample, 65,536 float32": 1,
    **{f"peak scratch of a mask update ({name})": 1 for name in ("ours", *peers.JAX_PEERS, *peers.host_peers())},
    "mask memory, packed, worst of 10 algorithms": 1,
    "mask memory, dense, worst of 10 algorithms": 1,
    **{f"mask memory, {name}": 1 for name in peers.host_peers()},
    "mask update, bytes touched by a device, 1 device": 1,
    "mask update, bytes touched by a device, 2 devices": 1,
    "whole update, bytes touched by a device, 1 device": 1,
    "whole update, bytes touched by a device, 2 devices": 1,
    "whole update, scratch of a device, 1 device": 1,
    "whole update, scratch of a device, 2 devices": 1,
    "whole update, all-reduced, 2 devices": 1,
    "whole update, gathers and other moves, 2 devices": 1,
    "training step between updates, dense masks": 2,  # one of them at the size of an accelerator
    "training step between updates, packed masks": 2,
    "training step, all in, update_freq=100": 2,
    "straight-through step, mask made every step": 2,
    "the bare step against itself: the noise of these rows": 2,
    **{
        f"Transformer, bfloat16: {row}": 1
        for row in (
            "training step between updates, dense masks",
            "RigL's step, all in, update_freq=100",
            "the bare step against itself: the noise of these rows",
            "state of AdamW, dense masks",
            "state of AdamW, packed masks",
            "state of AdamW, straight-through, packed masks",
        )
    },
    **{f"trace and compile, 3 kernels, {name}": 1 for name in ("magnitude", "global_magnitude", "rigl")},
    "eager step, dense masks, worst of 2 algorithms": 1,
    "eager step, packed masks, worst of 2 algorithms": 1,
    "compact VisionTransformer, forward pass, 50% removed": 1,
    "compact VisionTransformer, training step, 50% removed": 1,
    "32x32, 90% zeros, times 4: sparse_above": 1,
    "agent plays dqn_cartpole, 50% of units removed": 1,
    **{
        row: count
        for structure in ("unstructured", "2:4")
        for row, count in {
            f"SparseGPT of a layer 32x32, {structure}": HAS_TORCH,
            f"SparseGPT of a layer 32x32, {structure}: peak": 1,
            f"SparseGPT of 7B weights at this rate, {structure}": 1,
        }.items()
        if count
    },
    "mask update, 50,000 float32": 3,
    "mask update, 50,000 bfloat16": 3,
}

OTHER_NETWORKS = {"resnet_steps", "transformer_steps"}  # with --quick their network is that of vit_steps


@pytest.mark.slow
def test_quick_prints_and_writes_all_rows(tmp_path):
    result = CliRunner().invoke(
        app, ["bench", "--quick", "--repeats", "1", "--results", str(tmp_path)], env={"COLUMNS": "250"}
    )
    assert result.exit_code == 0, result.output
    table = Results(tmp_path / "benchmarks.csv").read()
    assert list(table.columns) == COLUMNS
    assert table["method"].value_counts().to_dict() == ROWS
    for row, count in ROWS.items():
        assert result.output.count(f"│ {row} ") == count
    assert set(table["preset"]) == {"quick"}
    assert (table["value"] >= 0).all()
    assert table["value"][table["method"] == "whole update, gathers and other moves, 2 devices"].item() == 0
    assert {json.loads(config)["group"] for config in table["config"]} == set(GROUPS) - OTHER_NETWORKS
    assert (peers.NO_TORCH in result.output) == (not HAS_TORCH)


@pytest.mark.parametrize("name", peers.host_peers())
def test_host_peers_make_the_same_mask(name):
    scores = np.random.default_rng(0).random(1000, dtype=np.float32)
    mask = np.asarray(peers.host_peers()[name].make(scores)())
    mask = mask[0] if mask.ndim > 1 else mask
    np.testing.assert_array_equal(mask.astype(bool), np.asarray(peers.argsort_mask(scores)))
    assert mask.dtype.itemsize == peers.host_peers()[name].mask_bytes


@pytest.mark.slow
def test_module_command_with_selected_rows(tmp_path):
    command = [sys.executable, "-m", "jaxpruner_baselines.benchmarks", "--quick", "--rows", "nm_mask", "--repeats", "1"]
    done = subprocess.run([*command, "--results", str(tmp_path)], capture_output=True, text=True, check=True)
    assert "2:4 mask" in done.stdout
    assert len(Results(tmp_path / "benchmarks.csv").read()) == 4


def test_packed_masks_take_one_bit_a_weight():
    figures = [event for event in masks.mask_bytes(masks.QUICK) if isinstance(event, Figure)]
    assert [figure.ratio for figure in figures[:2]] == [1.0, 8.0]


def test_sides_alternate_and_drop_out():
    called = []
    sides = {name: lambda name=name: called.append(name) for name in "ab"}
    times = {}

    def measure():
        times.update((yield from alternate(sides, {"a": 3, "b": 2})))

    list(measure())
    assert "".join(called) == "ab" + "ab" + "ba" + "a"  # compile, there, back, there
    assert (len(times["a"]), len(times["b"])) == (3, 2)


@pytest.mark.parametrize(
    ("reach", "ratio", "met"),
    [(Reach(at_least=100), 99.0, False), (Reach(at_least=100), 100.0, True), (Reach(at_most=0.5), 0.6, False)],
)
def test_reach(reach, ratio, met):
    assert reach.met(ratio) is met


HLO = """HloModule example, entry_computation_layout={()->()}

%add (x: u32[], y: u32[]) -> u32[] {
  ROOT %sum = u32[] add(%x, %y)
}

%inner (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-reduce.1 = (u32[], /*index=1*/u32[]) all-reduce(%a, %b), channel_id=1, to_apply=%add
  %all-gather.1 = bf16[4,2]{1,0:T(8,128)} all-gather(%c), dimensions={0}
  ROOT %t = (s32[], f32[8]) tuple(%i, %f)
}

%outer (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  ROOT %w = (s32[], f32[8]) while(%p), condition=%cond, body=%inner, backend_config={"known_trip_count":{"n":"5"}}
}

%left (p: f32[8]) -> f32[8] {
  %r = f32[8]{0} all-reduce-start(%p), to_apply=%add
  ROOT %d = f32[8]{0} all-reduce-done(%r)
}

%right (p: f32[8]) -> f32[8] {
  ROOT %q = pred[3] collective-permute(%p), source_target_pairs={{0,1}}
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%x), condition=%cond, body=%outer, backend_config={"known_trip_count":{"n":"3"}}
  %k = f32[8] call(%x), to_apply=%left
  ROOT %c = f32[8]{0} conditional(%p, %x, %x), branch_computations={%left, %right}
}
"""


def test_collectives_of_a_program():
    found = hlo.collectives(HLO)
    assert found == [
        hlo.Collective("all-reduce", 8, 15),
        hlo.Collective("all-gather", 16, 15),
        hlo.Collective("all-reduce", 32, 1),
        hlo.Collective("all-reduce", 32, 1),
        hlo.Collective("collective-permute", 3, 1),
    ]


def test_collectives_that_cannot_be_counted():
    with pytest.raises(ValueError, match="unknown length"):
        hlo.collectives(HLO.replace('"n":"5"', ""))
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.collectives("")
