"""ACDC's curves in bits: a curve made up by hand, and the published ones where they are."""

import json
import math
from pathlib import Path

import pytest
from click.testing import CliRunner

from experiments.acdc_curves.run import differences, headline, main, read_curve

CURVES = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "circuits" / "acdc_curves"


def write_curve(folder: Path, task: str = "docstring") -> Path:
    curve = {
        "n_edges": [float("nan"), 0, 10, 1000, float("nan")],
        "test_kl_div": [float("inf"), 2.0, 0.5, 0.1, float("inf")],
        "score": [float("-inf"), 1.0, 0.1, 0.01, float("inf")],
    }
    path = folder / f"acdc-{task}-kl_div-False-0.json"
    path.write_text(json.dumps({"trained": {"random_ablation": {task: {"kl_div": {"ACDC": curve}}}}}))
    return path


def test_a_curve_by_hand(tmp_path: Path) -> None:
    curve = read_curve(write_curve(tmp_path))
    assert curve is not None
    assert curve.edges.tolist() == [0, 10, 1000]
    graph = 10 * math.log2(1377) - math.log2(math.factorial(10))
    assert curve.total_bits(100)[1] == pytest.approx(graph + 100 * 0.5 / math.log(2))
    assert [curve.best(n) for n in (1, 100, 100_000)] == [0, 1, 2]
    row = headline([curve])[0]
    assert row.predicted_threshold == pytest.approx(math.log(1377 / 10) / 1000)
    assert row.best_threshold == 0.1
    assert differences([row])
    assert read_curve(write_curve(tmp_path, "tracr-reverse")) is None


@pytest.mark.skipif(not CURVES.exists(), reason="shared/data/circuits is not here")
def test_the_published_curves() -> None:
    result = CliRunner().invoke(main, [str(CURVES)])
    assert result.exit_code == 0, result.output
    assert "28 of 32 curves" in result.output
    assert "agrees with expected.json" in result.output


def test_another_folder_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [str(tmp_path)])
    assert result.exit_code == 1
    assert "holds none of ACDC's curves" in result.output
