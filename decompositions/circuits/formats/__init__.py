"""Circuits in the files of those who found them, read onto our graph and written back.

| format | file | read | written |
| --- | --- | --- | --- |
| `eap-ig` | EAP-IG's and MIB's json and pt | edges, scores | yes |
| `mib` | a submission's folder for one task and model | edges or scores, each with its share | |
| `acdc` | ACDC's pth (`save_subgraph`) and pkl (`save_edges`) | edges, effects | pth |
| `interpbench` | InterpBench's edges.pkl | edges | |
| `auto-circuit`, `auto-circuit-masks` | AutoCircuit's PruneScores; patch masks, 1 for ablated | edges, scores | both |
| `edge-pruning` | Edge Pruning's edges.json | edges | yes |
| `feature-circuits` | sparse feature circuits, pt | features and error terms, by `load_features` | |
| `circuit-tracer` | attribution graphs, pt | a graph of features, by `load_features` | |

Pickles are read by a reader that imports nothing: what a file may hold is listed, and stands for a class of ours.
"""

from decompositions.circuits.formats.loaded import LoadedCircuit
from decompositions.circuits.formats.recognise import FORMATS, load_circuit, load_features

__all__ = ["FORMATS", "LoadedCircuit", "load_circuit", "load_features"]
