from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest

from mdl.errors import ExplanationError, PluginError
from mdl.plugins import Option, available, describe, load, make_decomposition

MODULE = '''
from __future__ import annotations
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from mdl.errors import ExplanationError


@dataclass(frozen=True)
class Spectral:
    """A decomposition made up for tests.

    More about it.
    """

    rank: int = 16
    ratio: float = 0.5
    label: str = "plain"
    whiten: bool = False
    widths: tuple[int, ...] = (4, 8)
    limit: int | None = None
    metric: Literal["fisher", "euclid"] = "fisher"
    extra: tuple[str, ...] = field(default_factory=tuple)
    given: Any = None

    def __post_init__(self):
        if self.rank > 1000:
            raise ValueError(f"rank {self.rank} exceeds 1000")
        if self.rank < 0:
            raise ExplanationError("negative rank")


@dataclass(frozen=True)
class Loaded:
    """Needs a path."""

    path: Path
    name: str = ""


class Plain:
    """No options at all."""
'''
POINTS = """
[mdl.decompositions]
spectral-test = {module}:Spectral
loaded-test = {module}:Loaded
plain-test = {module}:Plain
broken-test = {module}:Absent
unimportable-test = {module}_absent:Absent

[mdl.decoders]
spectral-test = {module}:Spectral
"""


def install(folder: Path, distribution: str, points: str) -> None:
    """A distribution as pip would leave it: metadata that importlib finds on the path."""
    information = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(textwrap.dedent(points))


@pytest.fixture
def installed(tmp_path, monkeypatch):
    module = "mdl_plugin_made_for_tests"
    (tmp_path / f"{module}.py").write_text(MODULE)
    install(tmp_path, "made-for-tests", POINTS.format(module=module))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop(module, None)


def test_available_finds_installed_packages_and_imports_none(installed):
    found = available("decomposition")
    assert {"spectral-test", "loaded-test", "broken-test"} <= set(found)
    assert "spectral-test" in available("decoder")
    assert "spectral-test" not in available("estimator")
    assert "mdl_plugin_made_for_tests" not in sys.modules


def test_two_packages_with_one_name_are_both_named(installed):
    install(installed, "other-package", "[mdl.decompositions]\nspectral-test = other:Thing\n")
    with pytest.raises(PluginError, match=r"two packages offer .*'spectral-test': made-for-tests .* and other-package"):
        available("decomposition")


def test_an_unknown_name_lists_what_is_installed(installed):
    with pytest.raises(PluginError, match=r"no decomposition named 'spectal-test'\. Did you mean 'spectral-test'"):
        load("decomposition", "spectal-test")
    with pytest.raises(PluginError, match=r"Installed: .*plain-test"):
        load("decomposition", "zzzz")


@pytest.mark.parametrize("name", ["broken-test", "unimportable-test"])
def test_a_broken_plugin_is_reported_with_its_owner(installed, name):
    with pytest.raises(PluginError, match=rf"'{name}' of made-for-tests cannot be imported from mdl_plugin"):
        load("decomposition", name)


def test_describe_shows_options_as_they_are_typed_and_survives_broken_ones(installed):
    rows = {row.name: row for row in describe("decomposition")}
    spectral = rows["spectral-test"]
    assert (spectral.owner, spectral.summary) == ("made-for-tests", "A decomposition made up for tests.")
    assert spectral.options[:6] == (
        Option("rank", "int", "16"),
        Option("ratio", "float", "0.5"),
        Option("label", "str", "plain"),
        Option("whiten", "bool", "false"),
        Option("widths", "tuple[int, ...]", "4+8"),
        Option("limit", "int | None", "none"),
    )
    assert rows["loaded-test"].options[0] == Option("path", "Path", None)
    assert rows["plain-test"].options == ()
    assert "cannot be imported" in rows["broken-test"].problem
    assert next(row for row in describe("decoder") if row.name == "spectral-test").options == ()


def test_a_name_alone_takes_the_defaults(installed):
    made = make_decomposition("spectral-test")
    assert (made.rank, made.widths, made.limit) == (16, (4, 8), None)
    assert make_decomposition("spectral-test:") == made
    assert type(make_decomposition("plain-test")).__name__ == "Plain"


def test_options_are_read_as_their_annotations_say(installed):
    made = make_decomposition(
        "spectral-test:rank=3,ratio=1e-2, whiten=yes,widths=1+2+3,limit=7,metric=euclid,extra=a+b"
    )
    assert (made.rank, made.ratio, made.whiten, made.limit) == (3, 0.01, True, 7)
    assert (made.widths, made.metric, made.extra) == ((1, 2, 3), "euclid", ("a", "b"))
    assert isinstance(made.rank, int)
    assert make_decomposition("spectral-test:limit=none").limit is None
    assert make_decomposition("spectral-test:rank=1e2").rank == 100


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("label='a,b=c'", "a,b=c"),
        ('label="it\'s",rank=2', "it's"),
        ("label=a=b", "a=b"),
        ("label=it's", "it's"),
        ("label=", ""),
        ("label=x y ", "x y"),
    ],
)
def test_values_may_be_quoted(installed, text, label):
    assert make_decomposition(f"spectral-test:{text}").label == label


def test_paths_may_hold_colons_and_slashes(installed):
    made = make_decomposition("loaded-test:path=C:/some dir/sae:1,name=x")
    assert made.path == Path("C:/some dir/sae:1")
    assert made.name == "x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "spectral-test:rnk=3",
            r"'rnk'\. Did you mean 'rank'\? Its options: rank \(int, default 16\), ratio",
        ),
        ("plain-test:rank=3", r"'plain-test' has no option 'rank'\. It has none\."),
        (
            "spectral-test:rank=three",
            r"'rank' of .* takes a whole number, and 'three' is not: e\.g\. rank=16",
        ),
        ("spectral-test:rank=3.5", "takes a whole number"),
        ("spectral-test:rank=inf", "takes a whole number"),
        ("spectral-test:ratio=nan", "takes a number"),
        ("spectral-test:whiten=maybe", "takes true or false"),
        ("spectral-test:widths=1+x", "takes several joined by"),
        ("spectral-test:widths=1,2,3", r"cannot read '2,3' in .*quote a value that contains a comma"),
        ("spectral-test:metric=l1", "takes one of fisher, euclid"),
        ("spectral-test:rank", "cannot read 'rank'"),
        ("spectral-test:label='open", "cannot read"),
        ("spectral-test:rank=1,rank=2", "gives 'rank' twice"),
        ("spectral-test:given=x", "text cannot say: set it from Python"),
        ("spectral-test:rank=2000", "is refused: rank 2000 exceeds 1000"),
        ("loaded-test", r"cannot do without path: write loaded-test:path=\.\.\."),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_reason(installed, text, message):
    with pytest.raises(PluginError, match=message):
        make_decomposition(text)


def test_a_plugins_own_refusal_passes_unchanged(installed):
    with pytest.raises(ExplanationError, match="negative rank"):
        make_decomposition("spectral-test:rank=-1")
