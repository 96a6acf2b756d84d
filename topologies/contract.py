"""What a topology is: for every round, who listens to whom and with what weight."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import networkx as nx
import numpy as np
from scipy import sparse

from offbeat.runtime.base.errors import ConfigError, nearest
from offbeat.runtime.base.registry import Registry, Spec
from offbeat.runtime.base.tables import wholes

TOPOLOGIES = Registry("topology")
T = TypeVar("T")
KEPT_ROUNDS = 64  # matrices of a cyclic sequence that are kept; of a random one, the last


class Topology:
    """A graph with mixing weights, fixed or changing from round to round.

    Round k is a pure function of k (and of the seed in ``spec``, where there is one): rounds can
    be asked for in any order, by anyone.

    Args:
        n: nodes; they are 0..n-1.
        matrix: round -> W ``[n, n]``; a node averages x_i <- sum_j W[i, j] x_j, rows sum to 1.
        graph: round -> its graph; None reads it off the matrix.
        period: rounds after which everything repeats, 1 for a fixed graph, None for never.
        directed: whether W may be asymmetric (its columns sum to 1 all the same).
        names: what the nodes are called where they come from; None where these are 0..n-1.
    """

    spec: Spec | None = None

    def __init__(
        self,
        n: int,
        matrix: Callable[[int], sparse.csr_array],
        *,
        graph: Callable[[int], nx.Graph] | None = None,
        period: int | None = 1,
        directed: bool = False,
        names: Sequence[str] | None = None,
    ) -> None:
        self.n, self.period, self.directed = n, period, directed
        self.names = None if names is None else tuple(names)
        self._graph, self._made = graph, matrix
        kept = min(period or 1, KEPT_ROUNDS)
        self._matrix = lru_cache(maxsize=kept)(lambda k: finished(matrix(k)))

    def __getstate__(self) -> dict[str, Any]:
        """All but the matrices that are kept."""
        return {key: value for key, value in vars(self).items() if key != "_matrix"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        n, period, directed = state["n"], state["period"], state["directed"]
        self.__init__(n, state["_made"], period=period, directed=directed)  # type: ignore[misc]
        vars(self).update(state)

    def matrix(self, k: int = 0) -> sparse.csr_array:
        """W of round ``k``, ``[n, n]``, without stored zeros; its numbers are read-only."""
        return self._matrix(self._place(k))

    def graph(self, k: int = 0) -> nx.Graph:
        """The graph of round ``k`` on 0..n-1, without loops; an edge j -> i where i hears j.

        Where positions are known they are the node attribute ``pos``; where nodes have names and
        no attribute ``label``, it is these.
        """
        if self._graph is not None:
            return self._graph(self._place(k))
        return graph_of(self.matrix(k), self.directed)

    def seated(self, hosts: Mapping[str, T]) -> list[T]:
        """What each node has in ``hosts``: by name, whatever their order.

        Where the nodes' names are numbers, or the hosts are counted (n0, n1, ...), it is by order.

        Raises:
            ConfigError: the names of nodes and hosts are not the same.

        >>> Topology(2, lambda k: None, names=["Oslo", "Bern"]).seated({"bern": 0, "oslo": 1})
        [1, 0]
        """
        stem = next(iter(hosts), "").removesuffix("0")
        counted = [*hosts] == [f"{stem}{i}" for i in range(len(hosts))]
        if self.names is None or counted or wholes(self.names) is not None:
            return list(hosts.values())
        of = {host.casefold(): value for host, value in hosts.items()}
        nodes = [name.casefold() for name in self.names]
        for ours, theirs, said in (
            (nodes, of, 'no host is called "{}", as a node of the graph is'),
            (of, nodes, 'no node of the graph is called "{}", as a host is'),
        ):
            for name in ours:
                if name not in theirs:
                    raise ConfigError(
                        f"{said.format(name)}{nearest(name, theirs)}; hosts are nodes by name"
                    )
        return [of[node] for node in nodes]

    def _place(self, k: int) -> int:
        return k % self.period if self.period else k


def finished(matrix: sparse.csr_array) -> sparse.csr_array:
    """A read-only copy in canonical form, without stored zeros; ``matrix`` itself if it is one."""
    if not matrix.data.flags.writeable and matrix.has_canonical_format and matrix.data.all():
        return matrix
    matrix = sparse.csr_array(matrix, dtype=np.float64, copy=True)
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    matrix.data.flags.writeable = False  # it is shared by all who ask
    return matrix


def graph_of(matrix: sparse.csr_array, directed: bool) -> nx.Graph:
    """The networkx graph with an edge j -> i, j not i, where ``matrix [n, n]`` is not zero."""
    graph = nx.empty_graph(matrix.shape[0], create_using=nx.DiGraph if directed else nx.Graph)
    hears, heard = matrix.nonzero()
    other = hears != heard
    graph.add_edges_from(zip(heard[other].tolist(), hears[other].tolist(), strict=True))
    return graph
