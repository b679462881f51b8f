"""The receiver: what a message and the streams behind it say, rebuilt from bytes, and nothing else.

Three things travel for a score: the message (static bits), the state symbols and the residual coder's symbols of every
token. Each is a file, of which every bit is counted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import scipy.sparse

from mdl.alphabets import check_alphabet
from mdl.codes.bitstream import BitReader, BitWriter
from mdl.decoder_source import KIND as SOURCE
from mdl.decoder_source import check_source, is_ours, source_section
from mdl.errors import CodeError, MessageError
from mdl.message import QuantisedArray, Section, decode_message
from mdl.plugins import load
from mdl.protocols import AdditiveDecoder, Decoder, Inputs
from mdl.state import DenseState, State
from mdl.streams import Coded, CodedDense
from mdl.transform_coding import KIND, ComponentsDecoder

SPECIAL = "special"
PACKAGES = ("mdl", "decompositions")  # where our own decoders are
STREAM_MAGIC = b"MDLS\x01"


@cache
def _decoder_class(kind: str) -> tuple[Any, bool]:
    """A decoder's class, and whether it is one of ours: part of the machine, not of the message."""
    decoder = load("decoder", kind)
    return decoder, is_ours(kind) and decoder.__module__.partition(".")[0] in PACKAGES


def decoder_of(section: Section) -> Decoder:
    """The receiver's decoder for a section, by the kind that it names.

    **Raises:** `PluginError` for a kind that nothing installed provides, `MessageError` if the arrays do not fit it.
    """
    return _decoder_class(section.kind)[0].from_section(section)


def trusted(kind: str) -> bool:
    """Whether decoders of a kind are ours. A third party's are charged at their source, and their conduct checked."""
    return _decoder_class(kind)[1]


def source_sections(kind: str) -> list[Section]:
    """The source of a third party's decoder, which travels with what it decodes; nothing for one of ours.

    **Raises:** `ExplanationError` where that source breaks the rules for decoders.
    """
    decoder, ours = _decoder_class(kind)
    return [] if ours else [source_section(decoder)]


def predicted(decoder: Decoder, inputs: Inputs, state: State) -> np.ndarray:
    """A decoder's prediction, float32 [n, d], as a plain array of our own; the decoder gets copies of what it reads.

    **Raises:** `MessageError` unless there is one row of finite numbers a token.
    """
    prediction = np.array(decoder.predict(*_told(decoder, inputs, state)), np.float32)
    if prediction.ndim != 2 or len(prediction) != state.n_tokens:
        raise MessageError(f"a prediction of shape {prediction.shape} for {state.n_tokens} tokens: one row a token")
    if not np.isfinite(prediction).all():
        raise MessageError(f"{(~np.isfinite(prediction)).sum()} of {prediction.size} predicted values are not finite")
    return prediction


def _told(decoder: Decoder, inputs: Inputs, state: State) -> tuple[Inputs, State]:
    """What a decoder reads; of its own, where it is not ours, so that it can change neither what others read nor what
    is priced."""
    made = type(decoder)  # a class may say that it is of any module; ours are where they say
    home = sys.modules.get(made.__module__) if made.__module__.partition(".")[0] in PACKAGES else None
    if getattr(home, made.__qualname__, None) is made:
        return inputs, state
    values = None if inputs.values is None else np.array(inputs.values)
    copied = Inputs(np.array(inputs.tokens), np.array(inputs.scored), values, inputs.network)
    return copied, check_alphabet(decoder.alphabet).accept(state, inputs.n_tokens)


def special_section(constants: np.ndarray, steps: np.ndarray | float) -> Section:
    """The constants [ids, d] that stand at the positions of special tokens."""
    return Section(SPECIAL, (QuantisedArray.from_values(constants, steps),))


@dataclass(frozen=True)
class Reconstruction:
    """What the receiver makes of a sample.

    `prediction` [n, d]: the explanation's own part; `values` [n, d]: with the residual coder's correction; `touched`:
    the parts that each token needs, one entry a section of the message (None: every token needs all); `flops`: a token,
    of the explanation's part.
    """

    prediction: np.ndarray
    values: np.ndarray
    touched: tuple[scipy.sparse.csr_array | None, ...]
    flops: float


@dataclass(frozen=True)
class Receiver:
    """Rebuilt from a message: constants of special positions [ids, d], the explanation's decoder, the residual coder's
    (None under behaviour, where nothing corrects the prediction); `sources`: sections of decoder source, 0 or 1."""

    special: np.ndarray
    decoder: Decoder
    corrector: ComponentsDecoder | None
    sources: int = 0

    @classmethod
    def of(cls, data: bytes) -> Receiver:
        """**Raises:** `MessageError` for bytes that are not a message of these sections, or where a third party's
        decoder is installed whose source is not what the message carries."""
        return cls.of_sections(decode_message(data))

    @classmethod
    def of_sections(cls, sections: Sequence[Section]) -> Receiver:
        """From what a message decodes to. **Raises:** as `of`."""
        kinds = [s.kind for s in sections]
        source = [] if len(kinds) < 2 or trusted(kinds[1]) else [SOURCE]
        if len(sections) < 2 or kinds[0] != SPECIAL or kinds[2:] not in (source, [KIND, *source]):
            raise MessageError(
                f"a message of the sections {kinds[:5]}: expected 'special', an explanation, {KIND!r} where a residual "
                f"coder stands behind it, and {SOURCE!r} where the decoder is a third party's; nothing else"
            )
        if len(sections[0].header) != 1 or sections[0].parts:
            raise MessageError("a 'special' section has one header array, the constants, and no parts")
        if source:
            check_source(sections[-1], _decoder_class(kinds[1])[0])
        corrector = ComponentsDecoder.from_section(sections[2]) if kinds[2:3] == [KIND] else None
        return cls(sections[0].header[0].values(), decoder_of(sections[1]), corrector, len(source))

    def read(self, streams: Streams, inputs: Inputs) -> tuple[Coded, CodedDense | None]:
        """The symbols of both streams. **Raises:** `MessageError` if they are damaged, or another message's."""
        context, alphabet = inputs.context(), check_alphabet(self.decoder.alphabet)
        state = _read(streams.state, "state", lambda reader: alphabet.read(reader, context))
        if self.corrector is None:
            return state, None
        corrections = self.corrector.alphabet
        return state, _read(streams.residual, "residual", lambda reader: corrections.read(reader, context))

    def reconstruct(self, inputs: Inputs, state: State, codes: DenseState | None) -> Reconstruction:
        """The region's outputs at the scored positions. **Raises:** `MessageError` for a prediction not finite."""
        prediction = predicted(self.decoder, inputs, state)
        values, touched = prediction, [None, self.decoder.touched(*_told(self.decoder, inputs, state))]
        if self.corrector is not None:
            assert codes is not None
            values = prediction + self.corrector.predict(inputs, codes)
            touched.append(codes.touched())
        touched += [None] * self.sources
        flops = self.decoder.flops_per_token(*_told(self.decoder, inputs, state))
        return Reconstruction(prediction, values, tuple(touched), flops)

    def terms(self, state: State) -> tuple[scipy.sparse.csr_array, np.ndarray] | None:
        """Coefficients [n, parts] and rows [parts, d] of an additive decoder of ours; None of any other."""
        if self.sources or not isinstance(self.decoder, AdditiveDecoder):
            return None
        return self.decoder.terms(state)


@dataclass(frozen=True)
class Streams:
    """The symbols of all tokens as bytes: an explanation's state, and the residual coder's (empty where there is none).

    A stream is magic, then the entropy-coded symbols; a stream without a symbol is empty, and costs nothing.
    """

    state: bytes
    residual: bytes

    @classmethod
    def write(cls, state: Coded, codes: Coded | None) -> Streams:
        return cls(_write(state), b"" if codes is None else _write(codes))


def _write(state: Coded) -> bytes:
    writer = BitWriter()
    state.write(writer)
    return STREAM_MAGIC + writer.to_bytes() if writer.information_bits else b""


def _read(data: bytes, name: str, read: Any) -> Any:
    if data and data[: len(STREAM_MAGIC)] != STREAM_MAGIC:
        raise MessageError(f"the {name} stream begins with {data[:5]!r}, expected {STREAM_MAGIC!r}: another version?")
    try:
        reader = BitReader(data[len(STREAM_MAGIC) :] if data else BitWriter().to_bytes())
        symbols = read(reader)
        reader.finish()
    except CodeError as error:
        raise MessageError(f"damaged {name} stream of {len(data)} bytes: {error}") from error
    return symbols
