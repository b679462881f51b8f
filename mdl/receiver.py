"""The receiver: what a message and the streams behind it say, rebuilt from bytes, and nothing else.

Three things travel for a score: the message (static bits), the state symbols and the residual coder's symbols of every
token. Each is a file, of which every bit is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import scipy.sparse

from mdl.codes.bitstream import BitReader, BitWriter
from mdl.errors import CodeError, MessageError
from mdl.message import QuantisedArray, Section, decode_message
from mdl.plugins import load
from mdl.protocols import Decoder, Inputs
from mdl.state import DenseState, State
from mdl.streams import Coded, CodedDense
from mdl.transform_coding import KIND, ComponentsDecoder

SPECIAL = "special"
STREAM_MAGIC = b"MDLS\x01"


@cache
def _decoder_class(kind: str) -> Any:
    return load("decoder", kind)


def decoder_of(section: Section) -> Decoder:
    """The receiver's decoder for a section, by the kind that it names.

    **Raises:** `PluginError` for a kind that nothing installed provides, `MessageError` if the arrays do not fit it.
    """
    return _decoder_class(section.kind).from_section(section)


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
    (None under behaviour, where nothing corrects the prediction)."""

    special: np.ndarray
    decoder: Decoder
    corrector: ComponentsDecoder | None

    @classmethod
    def of(cls, data: bytes) -> Receiver:
        """**Raises:** `MessageError` for bytes that are not a message of these two or three sections."""
        sections = decode_message(data)
        kinds = [s.kind for s in sections]
        if kinds[:1] != [SPECIAL] or len(sections[0].header) != 1 or len(kinds) < 2 or kinds[2:] not in ([], [KIND]):
            raise MessageError(
                f"a message of the sections {kinds}: expected 'special' with one array, an explanation, and "
                f"{KIND!r} where a residual coder stands behind it"
            )
        corrector = ComponentsDecoder.from_section(sections[2]) if len(sections) == 3 else None
        return cls(sections[0].header[0].values(), decoder_of(sections[1]), corrector)

    def read(self, streams: Streams, inputs: Inputs) -> tuple[Coded, CodedDense | None]:
        """The symbols of both streams. **Raises:** `MessageError` if they are damaged, or another message's."""
        context = inputs.context()
        state = _read(streams.state, "state", lambda reader: self.decoder.alphabet.read(reader, context))
        if self.corrector is None:
            return state, None
        alphabet = self.corrector.alphabet
        return state, _read(streams.residual, "residual", lambda reader: alphabet.read(reader, context))

    def reconstruct(self, inputs: Inputs, state: State, codes: DenseState | None) -> Reconstruction:
        """The region's outputs at the scored positions. **Raises:** `MessageError` for a prediction not finite."""
        prediction = self.decoder.predict(inputs, state)
        if not np.isfinite(prediction).all():
            raise MessageError(
                f"{(~np.isfinite(prediction)).sum()} of {prediction.size} predicted values are not finite"
            )
        values, touched = prediction, [None, self.decoder.touched(inputs, state)]
        if self.corrector is not None:
            assert codes is not None
            values = prediction + self.corrector.predict(inputs, codes)
            touched.append(codes.touched())
        return Reconstruction(prediction, values, tuple(touched), self.decoder.flops_per_token(inputs, state))


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
