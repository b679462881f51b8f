"""A third party's decoder is charged at the compressed size of its source; what cannot be charged so is refused."""

from __future__ import annotations

import importlib
import lzma
import sys
import textwrap
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mdl.decoder_source import (
    LARGEST_SOURCE,
    check_source,
    compressed,
    is_ours,
    received_source,
    source_bits,
    source_section,
    source_text,
)
from mdl.errors import ExplanationError, MessageError, PluginError
from mdl.message import QuantisedArray, Section, decode_message, encode_message
from mdl.protocols import Decoder, Inputs
from mdl.state import NoState

PLUGIN = '''
"""A mean, times two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mdl.alphabets import NoAlphabet
from mdl.errors import MessageError
from mdl.message import Section
from third_party.arithmetic import FACTOR, twice

if TYPE_CHECKING:
    from mdl.protocols import Inputs


@dataclass(frozen=True)
class TwiceDecoder:
    """Twice what was sent."""

    mean: np.ndarray

    @classmethod
    def from_section(cls, section: Section) -> TwiceDecoder:
        if len(section.header) != 1:
            raise MessageError("one header array")
        return cls(section.header[0].values()[0])

    @property
    def alphabet(self) -> NoAlphabet:
        return NoAlphabet()

    def predict(self, inputs: Inputs, state):
        out = np.zeros((inputs.n_tokens, len(self.mean)), np.float32)
        out[:] = twice(self.mean)
        rows = []
        rows.append(out * FACTOR)
        return rows[0]

    def touched(self, inputs, state):
        return None

    def flops_per_token(self, inputs, state) -> float:
        return float(len(self.mean))
'''
ARITHMETIC = """
FACTOR = 1.0
NAMES = ("a", "b")


def twice(x):
    return 2 * x
"""
Install = Callable[..., type]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Write a package `third_party` with its metadata, and import its decoder."""

    def make(decoder: str = PLUGIN, arithmetic: str = ARITHMETIC, package: str = "", **more: str) -> type:
        folder, information = tmp_path / "third_party", tmp_path / "third_party-1.0.dist-info"
        folder.mkdir(exist_ok=True)
        information.mkdir(exist_ok=True)
        files = {"__init__": package, "decoder": decoder, "arithmetic": arithmetic} | more
        for name, text in files.items():
            (folder / f"{name}.py").write_text(text)
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
        points = "[mdl.decoders]\ntwice-test = third_party.decoder:TwiceDecoder\n"
        (information / "entry_points.txt").write_text(points)
        forget()
        importlib.invalidate_caches()
        kind = importlib.import_module("third_party.decoder").TwiceDecoder
        assert isinstance(kind, type)
        return kind

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield make
    forget()


def forget() -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "third_party"]:
        del sys.modules[name]


def test_the_source_of_every_module_of_the_distribution_travels(install: Install) -> None:
    kind = install()
    text = source_text(kind)
    assert text == (
        f"third_party 0\nthird_party.arithmetic {len(ARITHMETIC)}\n{ARITHMETIC}"
        f"third_party.decoder {len(PLUGIN)}\n{PLUGIN}"
    )
    assert received_source(decode_message(encode_message([source_section(kind)]).data)[0]) == text


def test_the_decoder_still_decodes(install: Install) -> None:
    kind = install()
    section = Section("twice-test", (QuantisedArray.from_integers(np.array([[3, 4]])),))
    decoder = kind.from_section(section)  # type: ignore[attr-defined]
    assert isinstance(decoder, Decoder)
    inputs = Inputs(np.zeros((1, 2), np.int32), np.ones((1, 2), bool))
    assert decoder.predict(inputs, NoState(2)).tolist() == [[6, 8], [6, 8]]


def test_the_charge_is_the_compressed_size(install: Install) -> None:
    kind = install()
    data = source_text(kind).encode()
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    shortest = min(
        len(deflate.compress(data) + deflate.flush()),
        len(lzma.compress(data, lzma.FORMAT_RAW, filters=[{"id": lzma.FILTER_LZMA2, "preset": 9}])),
    )
    assert source_bits(kind) == pytest.approx(8 * (1 + shortest), abs=64)
    with_source, without = encode_message([source_section(kind)]), encode_message([])
    # The container's own share: the section's name and shape, and its adaptive code.
    assert source_bits(kind) < with_source.whole_bits - without.whole_bits < source_bits(kind) + 240


def test_both_compressors_are_used_and_read() -> None:
    rng = np.random.default_rng(0)
    noise = "".join(chr(c) for c in rng.integers(32, 127, 40000))
    texts = ("x = 1\n", noise + "\n" + noise)  # lzma sees further back than zlib's 32 kB
    streams = [compressed(t) for t in texts]
    assert [s[0] for s in streams] == [0, 1]
    for text, stream in zip(texts, streams, strict=True):
        assert received_source(section_of(stream)) == text


def section_of(stream: bytes, offset: int = 256) -> Section:
    symbols = offset + np.frombuffer(stream, np.uint8).astype(np.int64)
    return Section("source", (QuantisedArray.from_integers(symbols),))


def test_comments_docstrings_and_names_are_paid_for(install: Install) -> None:
    plain = source_bits(install())
    secret = "".join(f"{i:02x}" for i in np.random.default_rng(0).integers(0, 256, 200))
    for hidden in (f"# {secret}\n", f'def x():\n    """{secret}"""\n', f"def f_{secret}():\n    pass\n"):
        assert source_bits(install(arithmetic=ARITHMETIC + hidden)) > plain + 8 * 200


def test_ours_and_theirs(install: Install) -> None:
    install()
    assert is_ours("table")
    assert is_ours("dictionary")
    assert not is_ours("twice-test")
    with pytest.raises(PluginError, match="no decoder named 'twise-test'"):
        is_ours("twise-test")


def test_the_receiver_uses_only_what_the_message_carries(install: Install) -> None:
    section = source_section(install())
    check_source(section, install())
    for changed in ({"arithmetic": ARITHMETIC.replace("2 * x", "3 * x")}, {"decoder": PLUGIN + "\n# more\n"}):
        with pytest.raises(MessageError, match=r"the installed third_party.decoder.TwiceDecoder has \d+ others"):
            check_source(section, install(**changed))


def test_source_in_a_message_is_never_executed(install: Install, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    evil = f"third_party.decoder 9\nopen({str(mark)!r}, 'w')\n"
    section = section_of(compressed(evil))
    with pytest.raises(MessageError, match="is not used"):
        check_source(section, install())
    assert not mark.exists()


# One a cheat: what is put into the plug-in, and what the refusal says.
CHEATS = [
    ("arithmetic", "import json\ndef twice(x): return json.dumps(x)", "imports json. That is reading"),
    ("arithmetic", "def twice(x): return x * len(open('weights').read())", "the name 'open'. That is reading"),
    (
        "arithmetic",
        "import numpy as np\ndef twice(x): return np.load('w.npy')",
        r"attribute \.load. That is reading",
    ),
    ("arithmetic", "from numpy import fromfile as twice", "the name 'fromfile' of numpy. That is reading"),
    ("arithmetic", "from pathlib import Path\ndef twice(x): return x", "imports pathlib.Path. That is reading"),
    ("arithmetic", "def twice(x): return len(__file__)", "the name '__file__'. That is reading"),
    ("arithmetic", "from mdl.models import load_model\ndef twice(x): return x", "That is reading the model"),
    ("arithmetic", "from mdl.task import Task\ndef twice(x): return x", "That is reading the model"),
    ("arithmetic", "import transformers\ndef twice(x): return x", "imports transformers. That is reading the model"),
    ("arithmetic", "from tokenizers import Tokenizer\ndef twice(x): return x", "That is installed"),
    ("arithmetic", "import numpy.ctypeslib as c\ndef twice(x): return x", "imports numpy.ctypeslib. That is installed"),
    (
        "arithmetic",
        "import scipy.sparse\ndef twice(x): return scipy.stats",
        r"scipy\.stats. That is installed",
    ),
    ("arithmetic", "from numpy import *\ndef twice(x): return x", r"`import \*`. That is installed"),
    (
        "arithmetic",
        "from functools import lru_cache\n@lru_cache\ndef twice(x): return x",
        "@lru_cache. That is a c",
    ),
    ("arithmetic", "SEEN = {}\ndef twice(x): return x", "state that can be changed: `SEEN = {}`. That is a cache"),
    ("arithmetic", "SEEN: list = []\ndef twice(x): return x", "That is a cache"),
    ("arithmetic", "import numpy as np\nSEEN = np.zeros(9)\ndef twice(x): return x", "That is a cache"),
    ("arithmetic", "def twice(x, seen={}): return x", "a default that can be changed: `{}`. That is a cache"),
    ("arithmetic", "N = 0\ndef twice(x):\n    global N\n    N = 1\n    return x", "`global`. That is a cache"),
    ("arithmetic", "def twice(x):\n    twice.n = 1\n    return x", r"is kept by `twice\.n`. That is a cache"),
    ("arithmetic", "class A:\n    seen = []\ndef twice(x): return x", "class attribute that can be changed"),
    (
        "decoder",
        PLUGIN.replace("rows = []", "rows = []; self.mean[0] = 1"),
        r"kept by `self\.mean\[0\]`. That is a c",
    ),
    (
        "decoder",
        PLUGIN.replace("rows = []", "rows = []; self.m.append(1)"),
        r"kept by `self\.m\.append`. That is a c",
    ),
    ("arithmetic", "def twice(x): return eval('x')", "the name 'eval'. That is running"),
    ("arithmetic", "def twice(x): return __import__('os')", "the name '__import__'. That is running"),
    ("arithmetic", "import importlib\ndef twice(x): return x", "imports importlib. That is running"),
    ("arithmetic", "import ctypes\ndef twice(x): return x", "imports ctypes. That is running"),
    ("arithmetic", "def twice(x): return getattr(x, 'T')", "the name 'getattr'. That is running"),
    (
        "arithmetic",
        "def twice(x): return x.__class__.__mro__",
        r"attribute \.__(class|mro)__. That is running",
    ),
    ("arithmetic", "import typing\ndef twice(x): return typing.sys.modules", r"the attribute \.sys. That is running"),
    ("arithmetic", "from dataclasses import sys\ndef twice(x): return x", "the name 'sys' of dataclasses"),
    ("arithmetic", "import numpy as n\ndef twice(x): return n._core", "n's private _core. That is installed"),
    ("decoder", PLUGIN.replace("@dataclass(frozen=True)", "@cached"), "the decorator @cached"),
    ("decoder", PLUGIN.replace("rows = []", "rows = [0 for self.x in '']"), r"kept by `self\.x`. That is a cache"),
    ("arithmetic", "def twice(x): return x\nprint(1)", "a statement that runs at import"),
    ("arithmetic", "import random\ndef twice(x): return x", "imports random. That is a seed that is not sent"),
    ("arithmetic", "import numpy as np\ndef twice(x): return np.random.default_rng()", r"\(\) without a seed"),
    ("arithmetic", "import numpy as np\ndef twice(x): return np.random.rand()", "a seed that is not sent"),
]


@pytest.mark.parametrize(("file", "text", "reason"), CHEATS, ids=[c[2][:40] for c in CHEATS])
def test_cheats_are_named(file: str, text: str, reason: str, install: Install) -> None:
    whole = text if file == "decoder" else text + "\nFACTOR = 1.0\n"
    kind = install()
    folder = Path(sys.modules["third_party"].__file__ or "").parent
    (folder / f"{file}.py").write_text(whole)
    with pytest.raises(ExplanationError, match=reason) as refused:
        source_text(kind)
    assert f"third_party.{file}, line " in str(refused.value)


def test_compiled_code_is_refused(install: Install) -> None:
    kind = install()
    folder = Path(sys.modules["third_party"].__file__ or "").parent
    (folder / "decoder.py").write_text(PLUGIN + "\nfrom third_party import fast\n")
    (folder / f"fast{importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(b"")
    importlib.invalidate_caches()
    with pytest.raises(ExplanationError, match="which has no Python source"):
        source_text(kind)


def changed_function(kind: Any, module: Any) -> None:
    kind.predict = lambda self, inputs, state: np.zeros(1)


def added_attribute(kind: Any, module: Any) -> None:
    kind.rows = np.zeros(9)


def added_global(kind: Any, module: Any) -> None:
    module.TABLE = {1: 2}


def changed_constant(kind: Any, module: Any) -> None:
    module.FACTOR = 3.0


def changed_helper(kind: Any, module: Any) -> None:
    module.twice = lambda x: x


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (changed_function, "TwiceDecoder.predict was replaced by a function of another file"),
        (added_attribute, "TwiceDecoder.rows is not in the source"),
        (added_global, "arithmetic.TABLE is not in the source"),
        (changed_constant, "arithmetic.FACTOR is not what the source says"),
        (changed_helper, "arithmetic.twice was replaced by a function of another file"),
    ],
)
def test_what_was_changed_while_running_is_refused(change: Any, reason: str, install: Install) -> None:
    kind = install()
    source_text(kind)
    change(kind, sys.modules["third_party.arithmetic"])
    with pytest.raises(ExplanationError, match=reason):
        source_text(kind)


def test_a_class_made_while_running_is_refused(install: Install) -> None:
    install()
    made = type("Made", (), {"__module__": "third_party.decoder"})
    with pytest.raises(ExplanationError, match="does not define the class Made once"):
        source_text(made)


def test_the_package_around_it_counts_too(install: Install) -> None:
    install()
    assert "third_party 12\nSOME = 12345" in source_text(install(package="SOME = 12345"))
    with pytest.raises(ExplanationError, match="third_party, line 1: module state"):
        source_text(install(package="SOME = [12345]"))


def test_relative_imports_are_followed(install: Install) -> None:
    decoder = PLUGIN.replace("from third_party.arithmetic import", "from .arithmetic import")
    assert "third_party.arithmetic " in source_text(install(decoder=decoder))
    decoder = PLUGIN.replace("from third_party.arithmetic import FACTOR, twice", "from . import arithmetic as a")
    decoder = decoder.replace("twice(", "a.twice(").replace("FACTOR", "a.FACTOR")
    assert "third_party.arithmetic " in source_text(install(decoder=decoder))


DAMAGED = [
    (Section("other", ()), "one header array"),
    (Section("source", ()), "one header array"),
    (section_of(b""), "the 0 integers"),
    (section_of(b"x", 0), "are not bytes from 256 to 511"),
    (section_of(b"x", -2000), "are not bytes from 256 to 511"),
    (section_of(b"\t123456"), "under compressor 9"),
    (section_of(b"\0"), "does not end"),
    (section_of(b"\1"), "does not end"),
    (section_of(b"\0\xff\xff\xff\xff"), "cannot be unpacked"),
    (section_of(b"\1\x7f\xff\xff\xff"), "cannot be unpacked|does not end"),
    (section_of(compressed("x = 1")[:-1]), "does not end"),
    (section_of(compressed("x = 1") + b"more"), "does not end"),
]


@pytest.mark.parametrize(("section", "reason"), DAMAGED)
def test_damaged_source_sections_are_refused(section: Section, reason: str) -> None:
    with pytest.raises(MessageError, match=reason):
        received_source(section)


def test_source_that_unpacks_without_end_is_refused() -> None:
    for stream in (compressed("a" * (LARGEST_SOURCE + 100)), b"\0" + zlib.compress(b"a" * 10**7, 9, -15)):
        with pytest.raises(MessageError, match="or is longer than 1048576"):
            received_source(section_of(stream))


def test_our_own_decoders_pass_their_own_rules_where_they_keep_to_the_list() -> None:
    """The rules leave room for real decoders: the text of a dictionary's decoder in numpy and scipy is accepted."""
    from mdl.decoder_rules import check_module

    check_module(
        "sparse",
        textwrap.dedent('''
            """Atoms times codes."""
            from dataclasses import dataclass, field
            import numpy as np
            import scipy.sparse
            from mdl.message import Section
            STEPS = 4
            LEVELS: tuple[int, ...] = (1, 2, 3)
            LOG2 = np.float32
            @dataclass(frozen=True)
            class Sparse:
                atoms: np.ndarray
                names: tuple[str, ...] = ()
                extra: dict[str, int] = field(default_factory=dict)
                kind = "sparse"
                def __post_init__(self) -> None:
                    self.table = {}
                def predict(self, inputs, state, *, scale: float = -1.0):
                    codes = state.matrix().astype(np.float32)
                    total = {}
                    total["a"] = codes @ self.atoms
                    total["a"] += 1
                    return total["a"] * scale
        '''),
    )
