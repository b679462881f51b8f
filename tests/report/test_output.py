from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mdl.errors import MDLError
from mdl.report.output import LOCK_NAME, claim, claimed, release


def test_claim_creates_and_release_leaves_what_was_written(tmp_path):
    out = tmp_path / "deep" / "run"
    claim(out)
    assert (out / LOCK_NAME).exists()
    (out / "scorecard.json").write_text("{}")
    release(out)
    assert [p.name for p in out.iterdir()] == ["scorecard.json"]


def test_a_second_claim_is_refused_while_the_first_lasts(tmp_path):
    claim(tmp_path / "run")
    with pytest.raises(MDLError, match=r"run is in use by process \d+ \(since .*--out"):
        claim(tmp_path / "run")
    release(tmp_path / "run")
    claim(tmp_path / "run")


def test_a_killed_run_is_recognised(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    lock = {"process": dead.pid, "started": "2026-01-01 00:00:00", "created": True}
    (tmp_path / LOCK_NAME).write_text(json.dumps(lock))
    with pytest.raises(MDLError, match="left over from a run that was killed"):
        claim(tmp_path)
    (tmp_path / LOCK_NAME).write_text("")
    with pytest.raises(MDLError, match="in use by another run"):
        claim(tmp_path)


def test_a_folder_with_anything_in_it_is_refused_and_left_alone(tmp_path):
    for name in "abcdef":
        (tmp_path / name).touch()
    with pytest.raises(MDLError, match=r"is not empty \(a, b, c, d and 2 more\).*delete it"):
        claim(tmp_path)
    assert len(list(tmp_path.iterdir())) == 6
    (tmp_path / "scorecard.json").touch()
    with pytest.raises(MDLError, match="holds an earlier run"):
        claim(tmp_path)


def test_a_file_and_an_unwritable_place_are_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(MDLError, match="is a file"):
        claim(tmp_path / "file")
    with pytest.raises(MDLError, match="cannot write"):
        claim(tmp_path / "file" / "below")


def test_a_failure_before_any_output_leaves_no_folder_that_was_not_there(tmp_path):
    (tmp_path / "mine").mkdir()
    for name, remains in (("new", False), ("mine", True)):
        with pytest.raises(RuntimeError), claimed(tmp_path / name):
            raise RuntimeError
        assert (tmp_path / name).exists() == remains
    assert not list((tmp_path / "mine").iterdir())
