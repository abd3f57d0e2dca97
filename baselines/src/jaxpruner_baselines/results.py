"""Results: one CSV per baseline, one schema for all, a row per finished run.

A row is appended with a single write, so a killed process leaves at most one unfinished last line.
Reading ignores such a line and the next append removes it.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import fcntl
import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from jaxpruner_baselines import provenance
from jaxpruner_baselines.baseline import Outcome, Run, hash_of, to_json


@dataclasses.dataclass(frozen=True)
class Row:
    """The schema. `sparsity` is what was asked for, `sparsity_reached` what was measured."""

    baseline: str
    preset: str
    method: str
    sparsity: float
    sparsity_reached: float
    seed: int
    steps: int
    metric: str
    value: float
    source: str
    config_hash: str
    config: str
    details: str
    commit: str
    versions: str
    device: str
    seconds: float
    date: str

    @classmethod
    def of(cls, run: Run, metric: str, outcome: Outcome, seconds: float) -> Row:
        return cls.measured(
            baseline=run.baseline,
            preset=run.preset_name,
            method=run.method,
            sparsity=run.sparsity,
            sparsity_reached=round(outcome.sparsity_reached, 6),
            seed=run.seed,
            steps=outcome.steps,
            metric=metric,
            value=outcome.value,
            config=run.config,
            details=outcome.details,
            seconds=round(seconds, 3),
        )

    @classmethod
    def measured(cls, *, config: Mapping[str, Any], details: Mapping[str, Any], **fields: Any) -> Row:
        """A row of our own, now, with this code on this device."""
        return cls(
            **fields,
            source="ours",
            config_hash=hash_of(config),
            config=to_json(config),
            details=to_json(details),
            commit=provenance.commit(),
            versions=to_json(provenance.versions()),
            device=provenance.device(),
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )


SETTINGS = "settings"  # in the details of a row; see `Baseline.digest`
COLUMNS = [field.name for field in dataclasses.fields(Row)]


def digest_of(details: str) -> str | None:
    """That of the settings of a row; None where it tells none, as one of older code."""
    return json.loads(details).get(SETTINGS)


class ResultsError(ValueError):
    """The results file is not one of ours."""


class Results:
    """The CSV of one baseline."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> pd.DataFrame:
        """All complete rows, oldest first; an empty table where there is no file."""
        text = self._complete_lines().decode()
        if not text:
            return pd.DataFrame(columns=COLUMNS)
        header = next(csv.reader([text.splitlines()[0]]))
        if header != COLUMNS:
            raise ResultsError(
                f"{self.path}: its columns are {', '.join(header)}; expected {', '.join(COLUMNS)}. "
                "Move the file away or choose another --results folder."
            )
        return pd.read_csv(io.StringIO(text), dtype={"config_hash": str, "commit": str, "method": str})

    def finished(self) -> dict[str, str | None]:
        """The config hashes of all finished runs, each with the digest of its settings."""
        rows = self.read()
        return dict(zip(rows["config_hash"], map(digest_of, rows["details"]), strict=True))

    def append(self, row: Row) -> None:
        """Appends a row; other processes may do so at the same time."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            complete = self._complete_lines()
            text = io.StringIO(newline="")
            writer = csv.writer(text, lineterminator="\n")
            if not complete:
                writer.writerow(COLUMNS)
            writer.writerow(dataclasses.astuple(row))
            if os.fstat(file).st_size > len(complete):
                os.ftruncate(file, len(complete))
            os.write(file, text.getvalue().encode())
            os.fsync(file)
        finally:
            os.close(file)

    def _complete_lines(self) -> bytes:
        content = self.path.read_bytes() if self.path.exists() else b""
        return content[: content.rfind(b"\n") + 1]
