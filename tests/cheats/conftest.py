"""What the cheats share: one tiny task whose kernels are compiled once, a plug-in package that is really installed, and
the outcome that every marked test has to leave."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jaxtyping
import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # the plug-in package, and the table

from mdl import plugins, receiver, score  # noqa: E402
from mdl.ledger import Score  # noqa: E402
from mdl.task import Task  # noqa: E402

HORIZON = 1e4
FIDELITY = 0.1
DECODERS = {
    **{"cheat-" + name: f"cheating.{name}:{name.capitalize()}Decoder" for name in ("honest", "hidden", "payload")},
    **{"cheat-" + name: f"cheating.{name}:{name.capitalize()}Decoder" for name in ("reading", "installed", "noisy")},
    **{"cheat-" + name: f"cheating.{name}:{name.capitalize()}Decoder" for name in ("memory", "counting", "heavy")},
    **{"cheat-" + name: f"cheating.{name}:{name.capitalize()}Decoder" for name in ("erasing", "priced", "tokens")},
    **{
        "cheat-" + name: f"cheating.{name}:{name.capitalize()}Decoder"
        for name in ("untouched", "late", "future", "contexts")
    },
}
Judge = Callable[..., dict[str, Score]]


@dataclass
class Outcome:
    """What became of a cheat: refused with an error, or charged."""

    verdict: str = ""
    evidence: str = ""
    figures: list[str] = field(default_factory=list)

    def refused(self, error: BaseException | str, *words: str) -> None:
        """The error's text names the cheat: it has all the words."""
        text = str(error)
        for word in words:
            assert word in text, f"{word!r} is not in: {text}"
        assert words
        self.verdict, self.evidence = "refused", " ".join(text.split()[:14]) + " ..."

    def charged(self, honest: float, cheat: float, margin: float = 0.0, unit: str = "bits") -> None:
        """The cheat is not shorter than the honest version, less a relative margin."""
        assert cheat >= honest * (1 - margin), f"the cheat gains: {cheat:.1f} against {honest:.1f} {unit}"
        self.verdict, self.evidence = "charged", f"honest {honest:,.0f}, cheat {cheat:,.0f} {unit}"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Annotations are checked in the tests of the parts; here they would be most of the time. Fixtures of the session
    are set up behind this as well, and nothing stays switched off for other tests."""
    jaxtyping.config.update("jaxtyping_disable", True)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session", autouse=True)
def cheating(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The third party's distribution, as pip would leave it."""
    folder = tmp_path_factory.mktemp("installed")
    information = folder / "cheating-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: cheating\nVersion: 1.0\n")
    points = "".join(f"{kind} = {place}\n" for kind, place in DECODERS.items())
    (information / "entry_points.txt").write_text("[mdl.decoders]\n" + points)
    sys.path.insert(0, str(folder))
    receiver._decoder_class.cache_clear()
    yield
    sys.path.remove(str(folder))
    receiver._decoder_class.cache_clear()


@pytest.fixture
def outcome(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> Iterator[Outcome]:
    """A marked test has to leave the verdict that its mark claims."""
    found = Outcome()
    yield found
    row, _, _, verdict = request.node.get_closest_marker("cheat").args
    failed = getattr(request.node, "failed_call", False)
    assert failed or found.verdict == verdict, f"row {row} claims {verdict!r}, and the test found {found.verdict!r}"
    print(f"{row}: {found.evidence}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    report = yield
    mark = item.get_closest_marker("cheat")
    if mark is not None and report.when == "call":
        item.failed_call = report.failed  # type: ignore[attr-defined]
        found = item.funcargs.get("outcome")  # type: ignore[attr-defined]
        if found is None or (report.passed and found.verdict != mark.args[3]):
            report.outcome = "failed"
            report.longrepr = f"row {mark.args[0]} claims {mark.args[3]!r}; the test left {found and found.verdict!r}"
        elif report.passed:
            report.user_properties += [("row", mark.args[0]), ("evidence", found.evidence)]
    return report


def judge_of(task: Task) -> Judge:
    """`mdl.score.score` on one task, with an estimator whose compiled kernels are kept from call to call."""
    made: dict[float, Any] = {}
    load = plugins.load

    def kept(kind: Any, name: str) -> Any:
        if kind != "estimator":
            return load(kind, name)
        return lambda task, horizon, seed: made.setdefault(horizon, load(kind, name)(task, horizon, seed))

    def judge(*decompositions: Any, **options: Any) -> dict[str, Score]:
        """The score of each, by name; of several settings the last."""
        options = {"phenomena": ["activations"], "fidelities": [FIDELITY], "horizon": HORIZON} | options
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(score.plugins, "load", kept)
            card, _ = score.score(task, decompositions, **options)
        return {s.explanation: s for s in card.scores}

    return judge


@pytest.fixture(scope="session")
def judge(tiny_task: Task) -> Judge:
    return judge_of(tiny_task)


@pytest.fixture(scope="session")
def judge_on() -> Callable[[Task], Judge]:
    return judge_of


@pytest.fixture(scope="session")
def honest(judge: Judge) -> dict[str, Score]:
    """What the cheats are measured against."""
    from cheating import senders
    from cheating.senders import Rows, clusters, means_by_key

    from decompositions.baselines import Nothing, TokenTable

    def tokens(task: Task) -> Rows:
        fit = task.fit
        return Rows("tokens", "cheat-tokens", *means_by_key(fit.inputs.scored_tokens(), fit.outputs))

    return judge(
        Nothing(), TokenTable(), clusters("ours"), clusters("theirs", kind="cheat-honest"), senders.Fitted(tokens)
    )


@pytest.fixture
def no_conduct(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the checks of how decoders behave: what they are there for."""
    from estimators import conduct

    monkeypatch.setattr(conduct, "check_decoder", lambda *arguments: None)
