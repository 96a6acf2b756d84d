"""Graphs that were made in Python, as a run leaves them in its folder: W, edges, names, places."""

import hashlib
import json
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
from scipy import sparse

from offbeat.runtime.base.errors import ConfigError
from offbeat.topologies.contract import TOPOLOGIES, Topology, graph_of

SAVED = "saved"


def own(topology: Topology) -> bool:
    """Whether it is fixed, and made in Python: a run leaves it in its folder."""
    spec = topology.spec
    return topology.period == 1 and (spec is None or spec.name == SAVED)


def digest(topology: Topology) -> str:
    """What tells a fixed topology from others: of its W."""
    w = topology.matrix().sorted_indices()
    found = hashlib.blake2b(digest_size=16)
    for part in (w.indptr, w.indices, w.data):
        found.update(part.astype("<f8").data)
    return found.hexdigest()


def text(topology: Topology) -> str:
    """A fixed topology as JSON, from which ``saved`` makes one with the same W to the last bit."""
    graph, w = topology.graph(), topology.matrix().tocoo()
    made: dict[str, Any] = {
        "n": topology.n,
        "directed": bool(topology.directed),
        "names": topology.names,
        "w": list(zip(w.row.tolist(), w.col.tolist(), w.data.tolist(), strict=True)),
        "edges": [[int(i), int(j)] for i, j in graph.edges],
    }
    nodes = [graph.nodes[i] for i in range(topology.n)]
    if any("label" in node for node in nodes):
        made["label"] = [str(node.get("label", i)) for i, node in enumerate(nodes)]
    if all(np.shape(node.get("pos")) == (2,) for node in nodes):
        made["pos"] = [np.asarray(node["pos"], float).tolist() for node in nodes]
    return json.dumps(made) + "\n"


@TOPOLOGIES.register(SAVED)
def saved(path: str) -> Topology:
    """A networkx graph or W that a run from Python left in its folder; made by no hand."""
    try:
        made = json.loads(Path(path).read_text())
        i, j, w = zip(*made["w"], strict=True)
        n, directed = int(made["n"]), bool(made["directed"])
        matrix = sparse.csr_array((w, (i, j)), shape=(n, n))
        graph = graph_of(sparse.csr_array((n, n)), directed)
        graph.add_edges_from(made["edges"])
        for key in ("label", "pos"):
            nx.set_node_attributes(graph, dict(enumerate(made.get(key, []))), key)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: is no graph that a run has left ({error})") from None
    names = made.get("names")
    return Topology(n, lambda k: matrix, graph=lambda k: graph, directed=directed, names=names)
