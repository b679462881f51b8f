from __future__ import annotations

import runpy
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def scorecard():
    return runpy.run_path(str(Path(__file__).with_name("synthetic.py")))["synthetic_scorecard"]()
