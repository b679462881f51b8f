"""Codes: every one has an exact length in bits, and a stream of that length that decodes to the same symbols.

| symbols | code | what the reader must know |
| --- | --- | --- |
| positive integers | `elias_gamma_bits`, `elias_delta_bits`, `elias_omega_bits` (ideal: `rissanen_bits`) | how many |
| counts, signed counts | `count_bits`, `signed_count_bits` | nothing |
| decisions in contexts | `kt_bits`, K-ary `dirichlet_bits`; `write_adaptive_bits` | the contexts |
| integers by class, no table | `AdaptiveInteger` | the classes |
| features on at each token | `IntroductionCode` | the number of tokens |
| one set of k out of n | `enumerative_bits` (k known), `kt_support_bits` | n, k; n |
| one index a token | `IndexCode` | the number of tokens |
| the same three, given token ids | the modules `conditional_*` | them |
| edges of a graph | `edges.edge_bits`, `edges.write_edges` | which are possible, which are alike |
| tables, mostly zero, of few values | the module `sparse_tables` | their shapes, where numbers can be |
| tokens under a model's predictions | `tokens.TokenCode` | the predictions |
| quantised reals, table sent | `TableCode` | how many |
| quantised reals, one scale sent | `DiscretisedLaplace`, `DiscretisedGaussian` | how many |
| rows of quantised reals, columns predicted | `lattice.Lattice` | how many, and their steps |

`BitWriter` and `BitReader` are the stream under them all. A code never sees a model.
"""

from mdl.codes.adaptive_integer import AdaptiveInteger
from mdl.codes.bitstream import BitReader, BitWriter
from mdl.codes.counts import (
    bernoulli_complexity,
    dirichlet_bits,
    kt_bits,
    kt_sequence_probabilities,
    plug_in_bits,
    read_adaptive_bits,
    write_adaptive_bits,
)
from mdl.codes.indices import IndexCode
from mdl.codes.integers import (
    count_bits,
    elias_delta_bits,
    elias_gamma_bits,
    elias_omega_bits,
    read_count,
    read_signed_count,
    rissanen_bits,
    signed_count_bits,
    unzigzag,
    write_count,
    write_signed_count,
    zigzag,
)
from mdl.codes.reals import (
    centroid_shifts,
    dead_zone_dequantise,
    dead_zone_quantise,
    dequantise,
    optimal_step,
    reverse_water_filling,
    two_part_bits,
    uniform_quantise,
)
from mdl.codes.supports import (
    IntroductionCode,
    SupportBits,
    enumerative_bits,
    kt_support_bits,
    read_enumerative,
    write_enumerative,
)
from mdl.codes.tables import DiscretisedGaussian, DiscretisedLaplace, TableCode

__all__ = [
    "AdaptiveInteger",
    "BitReader",
    "BitWriter",
    "DiscretisedGaussian",
    "DiscretisedLaplace",
    "IndexCode",
    "IntroductionCode",
    "SupportBits",
    "TableCode",
    "bernoulli_complexity",
    "centroid_shifts",
    "count_bits",
    "dead_zone_dequantise",
    "dead_zone_quantise",
    "dequantise",
    "dirichlet_bits",
    "elias_delta_bits",
    "elias_gamma_bits",
    "elias_omega_bits",
    "enumerative_bits",
    "kt_bits",
    "kt_sequence_probabilities",
    "kt_support_bits",
    "optimal_step",
    "plug_in_bits",
    "read_adaptive_bits",
    "read_count",
    "read_enumerative",
    "read_signed_count",
    "reverse_water_filling",
    "rissanen_bits",
    "signed_count_bits",
    "two_part_bits",
    "uniform_quantise",
    "unzigzag",
    "write_adaptive_bits",
    "write_count",
    "write_enumerative",
    "write_signed_count",
    "zigzag",
]
