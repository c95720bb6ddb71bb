"""The tables of the documents are what the report prints of the result that is kept; and what a result may lack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import report

ROOT = Path(__file__).parents[1]
KEPT = json.loads((ROOT / "benchmarks" / "results" / "steady_state.json").read_text())
ABOUT = {key: KEPT[key] for key in ("command", "date", "machine", "versions", "rounds")}


def test_the_tables_of_the_benchmarks_are_those_of_the_result_that_is_kept() -> None:
    assert "\n".join(report(KEPT)) in (ROOT / "benchmarks" / "README.md").read_text()


def test_the_table_of_speed_is_that_of_the_result_that_is_kept() -> None:
    real = [*report({**ABOUT, "real_d256_p2": KEPT["real_d256_p2"]})]
    assert "\n".join(real[1:]) in (ROOT / "README.md").read_text()


FEW: dict[str, Any] = {
    "ours_over_torch_by_schedule": {"1f1b": 1.0204},
    "contestants": {
        "Lightning DDP": {"ms_per_mini_batch": 200.0, "kept_mini_batches": 0.5, "versions": "1", "delay": "0"},
        "ours": {
            "ms_per_mini_batch": 100.0,
            "steady_wait_share": 0.0123,
            "kept_mini_batches": 2.0,
            "versions": "2 1",
            "delay": "1 0",
        },
    },
}

SAID = """\
| | ms per mini-batch | waits | kept | versions | delay |
|---|---|---|---|---|---|
| ours | 100.0 | 1.2% | 2 | 2 1 | 1 0 |
| Lightning DDP | 200.0 | – | 0.5 | 1 | 0 |

Our time over torch's for the same schedule: 1f1b 1.020."""


@pytest.mark.parametrize("part", [{"real_d256_p2": FEW}, {"runs_40_80_ms_256_kb": {"stages": {"2": FEW}}}])
def test_what_nobody_has_gets_no_column_and_what_somebody_lacks_gets_a_dash(part: dict[str, Any]) -> None:
    assert "\n".join([*report({**ABOUT, **part})][4:]) == SAID
