"""Graphs from files: edges as a table, W, and the formats that networkx reads.

What it is known to read wrong without a word is looked for first.  Nodes keep the file's own
names.  They are numbered by these where all are whole numbers, else in the file's order.
"""

import ast
import io
import json
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from itertools import repeat
from typing import Any, TypeAlias
from xml.etree import ElementTree

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.io import mmread

from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.registry import File
from offbeat.runtime.base.tables import (
    BROKEN,
    NUMBER,
    Table,
    ending,
    read_table,
    read_text,
    unpacked,
    whole,
    wholes,
)
from offbeat.topologies.contract import TOPOLOGIES, Topology
from offbeat.topologies.graphs import from_matrix, from_networkx
from offbeat.topologies.weights import TOLERANCE, Weights

COLUMNS = {
    "source": ("source", "src", "from", "fromnodeid", "i", "u", "node1"),
    "target": ("target", "dst", "to", "tonodeid", "j", "v", "node2"),
    "weight": ("weight", "w"),
    "time": ("time", "t", "round", "timestamp"),
}
TAKEN = (
    'an edge is a line "i j" or "i j weight", below a header source,target,weight or without; a '
    "graph may also be GraphML, GML, GEXF, Pajek, METIS, Matrix Market, node-link JSON, or W as "
    "text or .npy"
)
MOST_NODES = 10_000_000  # of a file that may say any number
PLAIN = 'give weights = "metropolis"'
NO_W = f"where weights are no W, {PLAIN}"
DICT = re.compile(r"(?m)[ \t,;]*(\{.*\})[ \t]*$")

Found: TypeAlias = nx.Graph | tuple[NDArray | sparse.sparray, list[str] | None]  # or W and names


@TOPOLOGIES.register("file")
def file(path: File, weights: Weights | None = None, allow_disconnected: bool = False) -> Topology:
    """A graph from lines "i j" or "i,j,weight", W as text or .npy, or any usual format of graphs.

    Where all edges have weights, W[i, j] = W[j, i] are these, ``"attribute(weight)"``, unless
    ``weights`` names another rule; else the rule is Metropolis-Hastings'.  Formats are told by
    what is in the file: GraphML, GML, GEXF, Pajek, METIS, Matrix Market, node-link JSON.
    """
    advice = ""
    try:
        found = _npy(path) if ending(path) == ".npy" else _read(path, weights)
        if isinstance(found, tuple):
            if weights is not None:
                raise ConfigError("is W itself, n x n numbers; leave weights out")
            advice = "; a square table of numbers is taken as W"
            return from_matrix(*found)
        if weights is None and _weighted(found):
            weights, advice = "attribute", f"; {NO_W}"
        rule = "metropolis" if weights is None else weights
        return from_networkx(found, rule, allow_disconnected=allow_disconnected)
    except ConfigError as error:
        said = str(error).removeprefix(f"{path}: ")
        where = "" if said.startswith(path) else f"{path}: "
        weighed = said.startswith(("weights", "mixing"))
        raise ConfigError(f"{where}{said}{advice * weighed}") from None


def _npy(path: str) -> Found:
    try:
        with unpacked(path) as file:
            return np.load(file), None
    except BROKEN as error:
        raise ConfigError(f"cannot be read ({error})") from None


def _read(path: str, weights: Weights | None) -> Found:
    text = read_text(path)
    name = next((name for name, (sign, *_) in FORMATS.items() if sign.search(text)), None)
    meant = next((name for name, (_, end, _) in FORMATS.items() if end == ending(path)), None)
    if meant is not None and name != meant:
        raise ConfigError(f"cannot be read as {meant}, which it is by its name")
    if name is None:
        if text.lstrip().startswith(("<", "[")):
            raise ConfigError(f"is no format that is known; {TAKEN}")
        if (graph := _metis(text)) is None and ending(path) in (".graph", ".metis"):
            raise ConfigError(f"cannot be read as METIS without weights; {TAKEN}")
        return _table(path, text, weights) if graph is None else graph
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return FORMATS[name][2](text)
        except ConfigError:
            raise
        except Exception as error:  # networkx has no error of its own for broken files
            raise ConfigError(f"cannot be read as {name} ({error})") from None


def _weighted(graph: nx.Graph) -> bool:
    """Whether edges have weights; a ConfigError where only some have."""
    having = [edge for edge in graph.edges(data="weight") if edge[2] is not None]
    if having and len(having) < graph.number_of_edges():
        i, j, _ = next(edge for edge in graph.edges(data="weight") if edge[2] is None)
        raise ConfigError(f'edge {i}, {j} has no weight, and others have; give weights = "..."')
    return bool(having)


def _unweighted_if_ones(graph: nx.Graph) -> nx.Graph:
    """``graph``, without its weights where all are 1, which the format has for none."""
    facts = [facts for *_, facts in graph.edges(data=True)]
    for one in facts:
        one.setdefault("weight", 1.0)
    if all(one["weight"] == 1 for one in facts):
        for one in facts:
            del one["weight"]
    return graph


def _called(graph: nx.Graph) -> nx.Graph:
    """``graph`` by the names of its nodes: their labels, where these tell all apart, or ids."""
    ids = [str(node) for node in graph]
    names = ids
    for key in ("name", "label"):  # the second, where there are both
        told = [facts.get(key) for _, facts in graph.nodes(data=True)]
        if None not in told and len({*map(str, told)}) == len(told):
            names = [str(name) for name in told]
    if len({*names}) < len(names):
        raise ConfigError(f'two nodes are called "{Counter(names).most_common(1)[0][0]}"')
    order: Iterable[int] = range(len(names))
    for keys in (ids, names):  # by names, where both are numbers
        if (numbers := wholes(keys)) is not None:
            order = sorted(range(len(keys)), key=numbers.__getitem__)
    nodes, rename = list(graph.nodes(data=True)), dict(zip(graph, names, strict=True))
    made = graph.__class__()
    made.add_nodes_from((names[at], nodes[at][1]) for at in order)
    made.add_edges_from((rename[u], rename[v], facts) for u, v, facts in graph.edges(data=True))
    return made


def _xml(text: str, read: Callable[[str], nx.Graph]) -> nx.Graph:
    """What networkx reads of GraphML and GEXF, if it is all there is."""
    text = re.sub(r"\A\s*<\?xml[^>]*\?>", "", text)  # its encoding was that of the file
    graph, kinds = read(text), defaultdict[str, list[str]](list)
    for element in ElementTree.fromstring(text).iter():
        kinds[str(element.tag).rpartition("}")[2]].append(str(element.get("id")))
    if sorted(kinds["node"]) != sorted(map(str, graph)):
        raise ConfigError(
            "has nodes that are nested, in a second graph, listed twice or not at all; give one "
            "graph, with each node once"
        )
    if len(kinds["edge"]) != graph.number_of_edges():
        raise ConfigError("has edges that cannot be read; give one plain graph")
    return _called(graph)


def _graphml(text: str) -> nx.Graph:
    def read(text: str) -> nx.Graph:
        graph = nx.parse_graphml(text, force_multigraph=True)
        for *_, facts in graph.edges(data=True):  # which networkx keeps, but gives to no edge
            facts |= graph.graph["edge_default"] | facts
        return graph

    return _xml(text, read)


def _gexf(text: str) -> nx.Graph:
    if re.search(r"<graph\b[^>]*\bmode\s*=\s*[\"']dynamic", text):
        raise ConfigError('is a graph that changes in time; take timed("edges.csv")')
    return _unweighted_if_ones(_xml(text, lambda text: nx.read_gexf(io.BytesIO(text.encode()))))


def _gml(text: str) -> nx.Graph:
    parts = re.sub(r"(?m)^\s*#.*", "", text).split('"')
    # networkx takes 1e-05, which igraph writes, for the number 1 and an attribute "e".
    parts[::2] = [re.sub(r"(?<=\s)([+-]?\d+)(?=[eE][+-]?\d)", r"\1.0", p) for p in parts[::2]]
    text = '"'.join(parts)
    if not re.search(r"(?m)(^|\s)multigraph\s", text):
        text = re.sub(r"(?m)^(\s*)graph\s*\[", r"\1graph [ multigraph 1", text, count=1)
    return _called(nx.parse_gml(text, label="id"))


def _pajek(text: str) -> nx.Graph:
    lines = [line for line in text.splitlines() if line.strip() and line.lstrip()[0] != "%"]
    heads = [line.split() for line in lines if line.lstrip().startswith("*")]
    kinds = [head[0].lower() for head in heads if head[0].lower() != "*network"]
    if kinds not in (["*vertices", "*edges"], ["*vertices", "*arcs"]) or (
        len(heads[-1]) > 1 or any("/*" in line for line in lines)
    ):
        raise ConfigError(
            f"has the sections {', '.join(kinds)}, which are not read right; give *Vertices with "
            "one line each, and *Edges (or *Arcs), without comments and relations"
        )
    at = next(at for at, line in enumerate(lines) if line.split() == heads[-1])
    named = [line for line in lines[:at] if line.lstrip()[0] != "*" and len(line.split()) > 1]
    if len(named) != int(heads[-2][1]):
        raise ConfigError(f"lists {len(named)} names of {heads[-2][1]} vertices; give each its own")
    graph = nx.parse_pajek(lines)
    if len(graph) != int(heads[-2][1]):
        raise ConfigError(f"lists {len(graph)} names of {heads[-2][1]} vertices; give each its own")
    for line in lines[at + 1 :]:  # of which networkx leaves out what it cannot read
        if len(words := line.split()) < 2 or not all(map(NUMBER.fullmatch, words[:3])):
            raise ConfigError(f'has a line "{line[:40]}", which is no edge i j value')
    return _unweighted_if_ones(_called(graph))


def _market(text: str) -> Found:
    head, *lines = text.splitlines()
    kind = head.lower().split()[1:]
    rows = [line.split() for line in lines if line.strip() and not line.startswith("%")]
    if len(kind) != 4 or kind[2] == "complex" or kind[3] not in ("general", "symmetric"):
        raise ConfigError(f'is "{head[:60]}"; give a real, general or symmetric matrix')
    dense, counted, symmetric = kind[1] == "array", kind[2] == "pattern", kind[3] == "symmetric"
    # scipy.io.mmread takes 0,5 and an integer 0.5 for 0, 5D-1 for 5, and no +1.
    for row in rows:
        wide = 3 - dense if row is rows[0] else 1 if dense else 3 - counted
        if len(row) != wide or not all(map(NUMBER.fullmatch, row)):
            raise ConfigError(f'has a line "{" ".join(row)[:40]}", which is no entry of its matrix')
    (n, m, *said), entries = wholes(rows[0]) or (0, 0, 0), rows[1:]
    if n != m or not 0 < n <= MOST_NODES:
        raise ConfigError(f"is a matrix of {n} x {m}, not n x n with at most {MOST_NODES:,} rows")
    if len(entries) != (said or [n * (n + 1) // 2 if symmetric else n * n])[0]:
        raise ConfigError(f"has {len(entries)} entries, and not as many as it says")
    head = f"%%MatrixMarket {' '.join(kind)}".replace("integer", "real")
    text = "\n".join([head, *map(" ".join, rows)]).replace("+", "")
    found = sparse.coo_array(mmread(io.BytesIO(text.encode()), spmatrix=False))
    matrix = found.tocsr()  # which adds what is there twice
    if matrix.nnz < found.nnz:
        raise ConfigError("has an entry twice (of a symmetric matrix, give the lower half)")
    matrix.eliminate_zeros()
    return _of_matrix(matrix, counted=counted)


def _of_matrix(matrix: sparse.csr_array, *, counted: bool) -> Found:
    """W, or the graph of a symmetric matrix without a diagonal."""
    symmetric = abs(matrix - matrix.T).max() <= TOLERANCE
    ones = bool((matrix.data == 1).all())
    plain = symmetric and not matrix.diagonal().any()
    if not counted and _stochastic(matrix):
        if ones and plain:
            raise ConfigError(BOTH)
        return matrix, None
    if not plain and counted:
        raise ConfigError("is a graph that is directed or has loops; give a symmetric one")
    if not plain:
        return matrix, None  # its check says where it is no W
    graph = nx.from_scipy_sparse_array(matrix)
    return _unweighted_if_ones(graph) if ones else graph


BOTH = "is W as well as an adjacency matrix or a list of edges; give the edges below a header"


def _stochastic(matrix: Any) -> bool:
    sums = np.concatenate([np.ravel(matrix.sum(axis=axis)) for axis in (0, 1)])
    return bool((abs(sums - 1) <= TOLERANCE).all()) and matrix.min() >= 0


def _json(text: str) -> nx.Graph:
    data = json.loads(text)
    edges = [key for key in ("edges", "links") if key in data]
    if "nodes" not in data or len(edges) != 1:
        raise ConfigError(f"is JSON, but no node-link graph (nodes, and edges or links); {TAKEN}")
    graph = nx.node_link_graph({**data, "multigraph": True}, edges=edges[0])
    if len(graph) != len(data["nodes"]):
        raise ConfigError("has edges to nodes that it does not list by that id, or one id twice")
    return _called(graph)


def _table(path: str, text: str, weights: Weights | None) -> Found:
    """The graph of a list of edges, or W."""
    text, facts = _dicts(text)
    table = read_table(path, text)
    if not table.rows:
        raise ConfigError(f"has no nodes; {TAKEN}")
    if any(re.match(r"(asym|bip)\b", remark) for remark in table.remarks):  # of KONECT
        raise ConfigError(
            "says that its edges are directed (asym) or between nodes of two kinds (bip), each "
            "with its own numbers; give undirected edges of one kind (sym)"
        )
    if not facts and (found := _w(table)):
        return found
    words, _ = table.titles(COLUMNS)
    table = table.named(COLUMNS, TAKEN, ("source", "target"), ("source", "target", "weight"))
    have = set(table.header)
    if not {"source", "target"} <= have:
        raise ConfigError(f"has no source or no target; {TAKEN}")
    if weights is None and "time" in have:
        raise ConfigError(f'has times; take timed("{path}"), or for all edges at once {PLAIN}')
    if not words and "weight" in have:
        _check_third(table, weights)
    names, src, dst = ends(table)
    if not words and len(src) > 1:
        _check_first(table, names, {*src[1:], *dst[1:]}, {src[0], dst[0]})
    graph = nx.MultiGraph()
    graph.add_nodes_from(names)
    if "weight" in have:
        facts = [{"weight": number} for number in table.numbers("weight")]
    for i, j, said in zip(src, dst, facts or repeat({}), strict=False):
        graph.add_edge(names[i], names[j], **said)
    return graph


def _check_first(table: Table, names: list[str], rest: set[int], pair: set[int]) -> None:
    """Refuse a first line that may be a header: of nodes that no other has, or of counts."""
    first, n = table.rows[0], len(rest)
    found = sorted(wholes(names[node] for node in rest) or ())
    counts = wholes(first) == [n, len(table.rows) - 1] and found in (
        [*range(n)],
        [*range(1, n + 1)],
    )
    if counts or (rest.isdisjoint(pair) and not any(map(NUMBER.fullmatch, first[:2]))):
        raise ConfigError(
            f"{table.at(0)} may be a header{' (nodes, edges)' * counts} or an edge; write "
            "source,target in its place, or above it"
        )


def _check_third(table: Table, weights: Weights | None) -> None:
    """Refuse a third column without a name that has counts or times, or if it is a node."""
    first, second, third = (wholes(row[at] for row in table.rows) for at in range(3))
    if third is None:
        return
    if weights is None:
        raise ConfigError(
            f"{table.at(0)}: whole numbers are no weights of W; {NO_W}; where one is a time, take "
            f'timed("{table.path}")'
        )
    if not first or not second:
        return
    if first == sorted(first) and len({*third} & {*second}) > len({*first} & {*second}):
        raise ConfigError(
            f"{table.at(0)}: its first column may be a time, for which there is "
            f'timed("{table.path}"), or a node; say which in a header, as source,target,weight'
        )


def ends(table: Table) -> tuple[list[str], list[int], list[int]]:
    """The names of a table's nodes, and the places in these of sources ``[m]`` and targets ``[m]``.

    Raises:
        ConfigError: a node without a name, or numbers that are not whole, or written in two ways.
    """
    pairs = list(zip(table.column("source"), table.column("target"), strict=True))
    words = list(dict.fromkeys(word for pair in pairs for word in pair))
    numbers = wholes(words)
    for wrong in words:
        if not wrong or (numbers is None and NUMBER.fullmatch(wrong) and whole(wrong) is None):
            at = next(at for at, pair in enumerate(pairs) if wrong in pair)
            raise ConfigError(f'{table.at(at)}: "{wrong}" is no node; take names or whole numbers')
    names, called = words, dict(zip(words, words, strict=True))
    if numbers is not None:
        spelt: dict[int, str] = {}
        for n, word in zip(numbers, words, strict=True):
            name = word if word.isdecimal() else str(n)
            if spelt.setdefault(n, name) != name:
                raise ConfigError(f'{table.path}: "{spelt[n]}" and "{name}" may be one node or two')
        names = [spelt[n] for n in sorted(spelt)]
        called = {word: spelt[n] for n, word in zip(numbers, words, strict=True)}
    place = {name: at for at, name in enumerate(names)}
    return names, [place[called[i]] for i, _ in pairs], [place[called[j]] for _, j in pairs]


def _dicts(text: str) -> tuple[str, list[dict[str, Any]]]:
    """The text without the facts that networkx.write_edgelist puts behind edges, and these."""
    lines = [line for line in text.splitlines() if line.strip() and line.strip()[0] not in "#%"]
    found = [DICT.search(line) for line in lines]
    if not any(found):
        return text, []
    try:
        facts = [dict(ast.literal_eval(match[1] if match else "")) for match in found]
    except (ValueError, SyntaxError, TypeError):
        raise ConfigError(f"has {{...}} that are no facts behind every edge; {TAKEN}") from None
    return DICT.sub("", text), facts


def _w(table: Table) -> Found | None:
    """W, where the table is one: n x n numbers that are no list of edges; names may be above."""
    rows, names, sure = table.rows, None, False
    words, below = table.titles(COLUMNS)
    known = {name for some in COLUMNS.values() for name in some}
    if rows[0][0] == "" and rows[0][1:] == [row[0] for row in rows[1:]]:
        rows, names, sure = [row[1:] for row in rows[1:]], rows[0][1:], True
    elif words and not {*words} & known:
        rows, names = below.rows, rows[0]
    n = len(rows)
    if any(len(row) != n for row in rows) or not all(NUMBER.fullmatch(w) for r in rows for w in r):
        return None
    w = np.array(rows, float).reshape(n, n)
    if n in (2, 3) and not sure and all(wholes(row[:2]) for row in rows):  # could be edges
        if _stochastic(w) or (n == 3 and (w == w.T).all() and np.isin(w, [0, 1]).all()):
            raise ConfigError(BOTH)
        return None
    return w, names


def _metis(text: str) -> nx.Graph | None:
    """The graph of a METIS file: "n m", then line i has node i's neighbours, from 1 on; or None."""
    lines = [line.split() for line in text.splitlines() if not line.lstrip().startswith("%")]
    while lines and not lines[0]:
        del lines[0]
    if not lines or len(lines[0]) not in (2, 3) or not all(w.isdecimal() for w in lines[0]):
        return None
    (n, m, *form), hears = map(int, lines[0]), lines[1:]
    while len(hears) > n and not hears[-1]:
        del hears[-1]
    edges = Counter((i, int(w)) for i, row in enumerate(hears, 1) for w in row if w.isdecimal())
    both = all(edges[j, i] == count and i != j and 1 <= j <= n for (i, j), count in edges.items())
    if any(form) or len(hears) != n or edges.total() != 2 * m or not both:
        return None
    if sum(map(len, hears)) != 2 * m:
        return None
    graph = nx.Graph()
    graph.add_nodes_from(map(str, range(1, n + 1)))
    graph.add_edges_from((str(i), str(j)) for i, j in edges if i < j)
    return graph


XML = r"\A\s*(<[?!][^<]*)*<"
FORMATS: dict[str, tuple[re.Pattern[str], str, Callable[[str], Found]]] = {
    "GraphML": (re.compile(XML + r"graphml\b"), ".graphml", _graphml),
    "GEXF": (re.compile(XML + r"gexf\b"), ".gexf", _gexf),
    "GML": (re.compile(r"(?m)^\s*graph\s*\["), ".gml", _gml),
    "Pajek": (re.compile(r"(?mi)^\s*\*(network|vertices)\b"), ".net", _pajek),
    "Matrix Market": (re.compile(r"\A%%MatrixMarket\b"), ".mtx", _market),
    "node-link JSON": (re.compile(r"\A\s*\{"), ".json", _json),
}
