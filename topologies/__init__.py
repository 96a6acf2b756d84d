"""Who talks to whom: graphs, mixing matrices, time-varying sequences, spectral facts."""

from offbeat.topologies import files, graphs, saved, sequences
from offbeat.topologies.contract import TOPOLOGIES, Topology
from offbeat.topologies.graphs import from_matrix, from_networkx
from offbeat.topologies.spectral import consensus_length, effective_gap, facts, slem, spectral_gap
from offbeat.topologies.weights import WEIGHTS, check, weigh

__all__ = [
    "TOPOLOGIES",
    "WEIGHTS",
    "Topology",
    "check",
    "consensus_length",
    "effective_gap",
    "facts",
    "files",
    "from_matrix",
    "from_networkx",
    "graphs",
    "saved",
    "sequences",
    "slem",
    "spectral_gap",
    "weigh",
]
