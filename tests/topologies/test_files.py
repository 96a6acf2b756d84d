"""Graphs from files: the right W, by the file's own names, or one sentence."""

import bz2
import gzip
import json
import re

import networkx as nx
import numpy as np
import pandas
import pytest
import scipy.io
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from offbeat import ConfigError
from offbeat.topologies import TOPOLOGIES, from_networkx, saved

parse = TOPOLOGIES.parse
RING = "0 1\n1 2\n2 3\n3 0\n"
PATH = np.array([[0.5, 0.5, 0], [0.5, 0.25, 0.25], [0, 0.25, 0.75]])  # 0-1 by 1/2, 1-2 by 1/4
METROPOLIS = np.array([[2, 1, 0], [1, 1, 1], [0, 1, 2]]) / 3  # of the same path
K = '<key id="d" for="edge" attr.name="weight" attr.type="double"/>'


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(name, text):
    with open(name, "wb") as file:
        file.write(text if isinstance(text, bytes) else text.encode())
    return name


def read(name, text, **options):
    extra = "".join(f", {key}={value!r}" for key, value in options.items())
    return parse(f"file({written(name, text)!r}{extra})")


def graphml(nodes, edges, *, key=K, kind="undirected"):
    inner = "".join(f'<node id="{i}"/>' for i in nodes) + "".join(
        f'<edge source="{i}" target="{j}">'
        + (f'<data key="d">{w}</data>' if w is not None else "")
        + "</edge>"
        for i, j, w in edges
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<graphml '
        f'xmlns="http://graphml.graphdrawing.org/xmlns">{key}<graph edgedefault="{kind}">{inner}'
        "</graph></graphml>"
    )


def gml(*weights, labels="abc"):
    nodes = "".join(f' node [ id {i} label "{name}" ]' for i, name in enumerate(labels))
    edges = "".join(f" edge [ source {i} target {j} {w} ]" for i, j, w in weights)
    return f'Creator "igraph"\nVersion 1\ngraph\n[{nodes}{edges} ]'


def gexf(*edges):
    edges = "".join(f'<edge source="{i}" target="{j}"{w}/>' for i, j, w in edges)
    nodes = "".join(f'<node id="{i}" label="{i}"/>' for i in (10, 1, 2))
    return (
        '<?xml version="1.0"?><gexf xmlns="http://gexf.net/1.3" version="1.3"><graph '
        f'defaultedgetype="undirected"><nodes>{nodes}</nodes><edges>{edges}</edges></graph></gexf>'
    )


AB = [("a", "b", 0.5), ("b", "c", 0.25)]
DEFAULT = K.replace("/>", "><default>0.25</default></key>")
VERTICES = '*Vertices 3\n1 "a"\n2 "b"\n3 "c"\n'
MARKET = "%%MatrixMarket matrix coordinate "
NODES = [{"id": 10}, {"id": 2}, {"id": 1}]
LINKS = [{"source": 10, "target": 2, "weight": 0.25}, {"source": 2, "target": 1, "weight": 0.5}]
ABC, NUMBERS = ("a", "b", "c"), ("1", "2", "10")

RIGHT = [
    ("bom.txt", "\ufeff0 1\n1 2\n", METROPOLIS, None),
    ("bom.csv", "0,1\n1,2\n".encode("utf-16"), METROPOLIS, None),
    ("packed.csv", bz2.compress(b"i,j\n0,1\n1,2\n"), METROPOLIS, None),
    ("comma.csv", "i;j;w\n1;2;0,5\n2;10;0,25\n", PATH, NUMBERS),
    ("comma2.csv", "1;2;0,5\n2;10;0,25\n", PATH, NUMBERS),
    ("spaces.csv", "10, 2, 0.25\n2, 1, 0.5\n", PATH, NUMBERS),
    ("header.csv", "Weight,Source,Target\n0.25,10,2\n0.5,2,1\n", PATH, NUMBERS),
    ("names.csv", '"from","to"\n"ann lee",bob\nbob,cid\n', METROPOLIS, ("ann lee", "bob", "cid")),
    ("savetxt.txt", "1.000e+01 2.000e+00 2.5e-01\n2.000e+00 1.000e+00 5e-01\n", PATH, NUMBERS),
    ("remark.txt", "# source target weight\n10 2 0.25\n2 1 0.5\n", PATH, NUMBERS),
    ("snap.txt", "# Nodes: 3 Edges: 2\n# FromNodeId\tToNodeId\n0\t1\n1\t2\n", METROPOLIS, None),
    ("out.konect", "% sym unweighted\n% 2 3 3\n1 2\n2 10\n", METROPOLIS, NUMBERS),
    ("uv.txt", "u v\nv w\n", METROPOLIS, ("u", "v", "w")),
    ("dicts.edgelist", "10 2 {'weight': 0.25, 'of': 'x#y'}\n2 1 {'weight': 0.5}\n", PATH, NUMBERS),
    ("plain.edgelist", "#x\n10 2 {}\n2 1 {}\n", METROPOLIS, NUMBERS),
    ("padded.txt", "02 01\n02 10\n", METROPOLIS, ("01", "02", "10")),
    ("metis.graph", "% c\n3 2\n2\n1 3\n2\n", METROPOLIS, ("1", "2", "3")),
    ("w.txt", "0.5 0.5 0\n.5 .25 .25\n0 2.5e-1 7.5E-01\n", PATH, None),
    ("w.csv", ",a,b,c\na,0.5,0.5,0\nb,0.5,0.25,0.25\nc,0,0.25,0.75\n", PATH, ABC),
    ("w2.csv", "a,b,c\n0.5,0.5,0\n0.5,0.25,0.25\n0,0.25,0.75\n", PATH, ABC),
    ("a.graphml", graphml([10, 1, 2], [(10, 2, 0.25), (2, 1, 0.5)]), PATH, NUMBERS),
    ("b.xml", graphml([10, 1, 2], [(10, 2, None), (2, 1, None)]), METROPOLIS, NUMBERS),
    (
        "default.graphml",
        graphml([10, 1, 2], [(10, 2, None), (2, 1, 0.5)], key=DEFAULT),
        PATH,
        NUMBERS,
    ),
    ("same.graphml", graphml("abc", [*AB, ("b", "a", 0.5)]), PATH, ABC),
    ("a.gexf", gexf((10, 2, ' weight=".25"'), (1, 2, ' weight="0.5"')), PATH, NUMBERS),
    ("b.gexf", gexf((10, 2, ""), (1, 2, "")), METROPOLIS, NUMBERS),
    ("a.gml", gml((0, 1, "weight 5e-1"), (1, 2, "weight 25E-02")), PATH, ABC),
    (
        "b.gml",
        gml((0, 1, ""), (1, 0, ""), (1, 2, ""), labels=["10", "2", "1"]),
        METROPOLIS,
        NUMBERS,
    ),
    ("a.net", VERTICES + "*Edges\n1 2 0.5\n2 3 25e-2\n", PATH, ABC),
    ("b.net", "%x\n*Network of y\n" + VERTICES + "*edges\n1 2\n2 3 1\n", METROPOLIS, ABC),
    (
        "w.mtx",
        MARKET + "real symmetric\n3 3 5\n1 1 .5\n2 1 .5\n2 2 .25\n3 2 .25\n3 3 .75\n",
        PATH,
        None,
    ),
    (
        "array.mtx",
        MARKET.replace("coordinate", "array") + "real symmetric\n3 3\n.5\n.5\n0\n.25\n.25\n.75\n",
        PATH,
        None,
    ),
    ("edges.mtx", MARKET + "real symmetric\n% x\n3 3 2\n2 1 0.5\n3 2 0.25\n", PATH, None),
    ("integer.mtx", MARKET + "integer symmetric\n3 3 2\n2 1 +.5\n% x\n3 2 0.25\n", PATH, None),
    ("pattern.mtx", MARKET + "pattern symmetric\n3 3 2\n2 1\n3 2\n", METROPOLIS, None),
    ("links.json", json.dumps({"nodes": NODES, "links": LINKS}), PATH, NUMBERS),
    ("edges.json", json.dumps({"nodes": NODES, "edges": LINKS}), PATH, NUMBERS),
]


@pytest.mark.parametrize(("name", "text", "w", "names"), RIGHT, ids=[row[0] for row in RIGHT])
def test_a_graph_is_what_its_file_says(name, text, w, names):
    topology = read(name, text)
    np.testing.assert_allclose(topology.matrix().toarray(), w, atol=1e-15)
    assert topology.names == names


def test_w_may_be_packed():
    np.save("w.npy", PATH)
    with open("w.npy", "rb") as file:
        topology = read("w.npy.gz", gzip.compress(file.read()))
    np.testing.assert_array_equal(topology.matrix().toarray(), PATH)


REFUSED = [
    ("semi.csv", "0;1.5;2,5\n", 'numbers have commas as in "2,5"'),
    ("tabs.txt", "0\t1\t0,5\n", 'numbers have commas as in "0,5"'),
    ("blanks.txt", "0 1 0,5\n1 2 0,5\n", 'line 1: "0,5" may be one number or two'),
    ("both.txt", "0, 1 0.5\n", "has commas and spaces between numbers"),
    ("mixed.txt", "0 1\n1,2\n", 'mixed.txt line 1: "0 1" has no comma, and other lines are cut'),
    ("ragged.txt", "0 1\n1 2 3\n", 'ragged.txt line 2: "1 2 3" has 3 columns, and line 1 has 2'),
    ("words.csv", "Person,Friend\n1,2\n2,3\n", 'unknown column "person"; an edge is a line "i j"'),
    ("person.csv", "person,friend\nann,bob\nbob,cid\n", "may be a header or an edge; write sou"),
    ("counts.txt", "3 2\n0 1\n1 2\n", '"3 2" may be a header (nodes, edges) or an edge; write sou'),
    ("counts1.txt", "3 2\n1 2\n2 3\n", '"3 2" may be a header (nodes, edges) or an edge'),
    ("list.adj", "0 3\n1 {}\n2 {}\n3 {}\n1 1\n2 {}\n", "has {...} that are no facts behind every"),
    ("graph.dot", "graph { a -- b }\n", "has {...} that are no facts behind every edge;"),
    ("a.tgf", "1 a\n2 b\n#\n1 2\n", 'a.tgf line 3: is "#" alone, as between the nodes and the'),
    ("hash.csv", "#ai,bob\nbob,#ml\n", "a remark or a name that begins with #"),
    ("parts.csv", "from,to\nann,bob\ncid,dan\n", "cut off from the largest: cid, dan;"),
    (
        "archive.tar",
        b"out.x\0\0\x000 1\n",
        "archive.tar: cannot be read (it is no text; of an arch",
    ),
    ("cut.csv", "1,2\n2,3\n4,5\n", "cut off from the largest: 4, 5;"),
    ("times.txt", "1 2 0\n2 3 20\n", "whole numbers are no weights of W; where weights are no W"),
    ("who.txt", "ann bob 0\nbob cid 1\n", 'who.txt line 1: "ann bob 0": whole numbers are no weig'),
    (
        "array.mtx",
        MARKET.replace("coordinate", "array") + "real general\n9999999 9999999\n1\n",
        "has 1 entries, and not as many as it says",
    ),
    ("head.csv", "source,target\n", "head.csv: the graph has no nodes"),
    ("when.csv", "i,j,t\n1,2,0\n2,3,1\n", 'has times; take timed("when.csv"), or for all edges'),
    ("konect", "% sym positive\n1 2 1 12345\n", '"1 2 1 12345" has 4 columns and no header'),
    ("asym", "% asym unweighted\n1 2\n", "its edges are directed (asym)"),
    ("bip", "% bip unweighted\n1 2\n", "nodes of two kinds (bip)"),
    ("half.txt", "1 2\n1.5 2\n1 3", 'half.txt line 2: "1.5 2": "1.5" is no node'),
    ("zeros.txt", "1 02\n2 3\n", '"02" and "2" may be one node or two'),
    ("gap.csv", "a,\nb,c\n", 'gap.csv line 1: "a,": "" is no node'),
    ("nan.txt", "a b nan\n", 'its weight "nan" is no number'),
    ("underscore.txt", "a b 1_0\n", 'its weight "1_0" is no number'),
    ("some.edgelist", "0 1 {'weight': 0.5}\n1 2 {}\n", "edge 1, 2 has no weight, and others have"),
    ("swap.txt", "0 1\n1 0\n", "is W as well as an adjacency matrix or a list of edges"),
    ("adjacency.txt", "0 1 1\n1 0 1\n1 1 0\n", "is W as well as an adjacency matrix or a list"),
    ("four.txt", "0 1 0 1\n1 0 1 0\n0 1 0 1\n1 0 1 0\n", "row 0 sums to 2; every row"),
    ("w.csv", ",a,b\na,.5,.5\nb,.5,.4\n", "row b sums to 0.9; every row and every column must su"),
    ("weights.graph", "3 2 1\n2 7\n1 7 3 2\n2 2\n", "cannot be read as METIS without weights"),
    ("picture.txt", b"\x89PNG\r\n\x1a\n\x00", "picture.txt: cannot be read"),
    ("short.txt.gz", gzip.compress(RING.encode())[:-9], "short.txt.gz: cannot be read"),
    ("empty.npy", b"", "empty.npy: cannot be read (No data left in file)"),
    ("plain.graphml", RING, "plain.graphml: cannot be read as GraphML, which it is by its name"),
    ("a.xml", "<a/>", "a.xml: is no format that is known; an edge is a line"),
    ("comma.graphml", graphml("ab", [("a", "b", "0,5")]), "cannot be read as GraphML (could"),
    (
        "text.graphml",
        graphml("ab", [("a", "b", 0.5)], key=K.replace("double", "string")),
        "edge a, b has '0.5' as its \"weight\", which is no number",
    ),
    (
        "nested.graphml",
        graphml("ab", AB[:1]).replace(
            '<node id="a"/>', '<node id="a"><graph><node id="x"/></graph></node>'
        ),
        "nodes that are",
    ),
    ("loose.graphml", graphml("a", [("a", "b", 0.5)]), "listed twice or not at all"),
    ("dynamic.gexf", gexf().replace("<graph ", '<graph mode="dynamic" '), "that changes in time"),
    ("bad.gml", gml((0, 7, "")), "cannot be read as GML (edge #0 has undefined target 7)"),
    ("list.net", VERTICES + "*Edgeslist\n1 2 3\n", "has the sections *vertices, *edgeslist, which"),
    ("two.net", VERTICES + "*Arcs\n1 2\n*Edges\n2 3\n", "sections *vertices, *arcs, *edges, which"),
    ("kinds.net", VERTICES + '*Edges :1 "knows"\n1 2\n2 3\n', "without comments and relations"),
    ("comma.net", VERTICES + "*Edges\n1 2 0,5\n2 3\n", 'has a line "1 2 0,5", which is no edge'),
    ("bare.net", "*Vertices 3\n*Edges\n1 2\n2 3\n", "lists 0 names of 3 vertices; give each its"),
    ("same.net", VERTICES.replace("b", "a") + "*Edges\n1 2\n2 3\n", "lists 2 names of 3 vertices"),
    ("comma.mtx", MARKET + "real symmetric\n2 2 1\n2 1 0,5\n", 'has a line "2 1 0,5", which is no'),
    ("fortran.mtx", MARKET + "real symmetric\n2 2 1\n2 1 5D-1\n", 'has a line "2 1 5D-1", which'),
    ("halves.mtx", MARKET + "real symmetric\n2 2 2\n2 1 .5\n1 2 .5\n", "has an entry twice"),
    ("swap.mtx", MARKET + "real symmetric\n2 2 1\n2 1 1\n", "is W as well as an adjacency matrix"),
    ("one_way.mtx", MARKET + "pattern general\n2 2 1\n2 1\n", "is a graph that is directed or has"),
    (
        "places.json",
        json.dumps({"nodes": [{"id": "a"}, {"id": "b"}], "links": [{"source": 0, "target": 1}]}),
        "has edges to nodes that it does not list by that id",
    ),
    ("other.json", "{}", "is JSON, but no node-link graph (nodes, and edges or links)"),
]


@pytest.mark.parametrize(("name", "text", "said"), REFUSED, ids=[row[0] for row in REFUSED])
def test_what_cannot_be_told_is_refused_in_a_sentence(name, text, said):
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        read(name, text)
    assert str(caught.value).startswith(name)
    assert "\n" not in str(caught.value)


PARALLEL = {
    "a.txt": "a b 0.1\nb a 0.3\n",
    "a.graphml": graphml("ab", [("a", "b", 0.1), ("b", "a", 0.3)]),
    "a.gml": gml((0, 1, "weight 0.1"), (1, 0, "weight 0.3"), labels="ab"),
    "a.net": '*Vertices 2\n1 "a"\n2 "b"\n*Edges\n1 2 0.1\n2 1 0.3\n',
    "a.json": json.dumps(
        {
            "nodes": [{"id": "a"}, {"id": "b"}],
            "links": [
                {"source": "a", "target": "b", "weight": 0.1},
                {"source": "b", "target": "a", "weight": 0.3},
            ],
        }
    ),
}


@pytest.mark.parametrize("name", PARALLEL)
def test_parallel_edges_of_two_weights_are_refused_in_the_same_words(name):
    said = 'weights: edge a, b has 0.1 and 0.3 as its "weight"; give one weight an edge'
    with pytest.raises(ConfigError, match=re.escape(f"{name}: {said}")):
        read(name, PARALLEL[name])
    plain = read(name, PARALLEL[name], weights="metropolis")  # which asks for none
    np.testing.assert_array_equal(plain.matrix().toarray(), np.full((2, 2), 0.5))
    with pytest.raises(ConfigError, match=re.escape(said)):
        from_networkx(
            nx.MultiGraph([("a", "b", {"weight": 0.1}), ("b", "a", {"weight": 0.3})]), "attribute"
        )


def test_a_label_of_the_file_is_kept():
    key = '<key id="d" for="node" attr.name="label" attr.type="string"/>'
    text = graphml([1, 0], [(1, 0, None)], key=key)
    for i, city in ((1, "Oslo"), (0, "Bern")):
        text = text.replace(
            f'<node id="{i}"/>', f'<node id="{i}"><data key="d">{city}</data></node>'
        )
    topology = read("a.graphml", text)
    assert topology.names == ("Bern", "Oslo")  # node 0 is the file's "0"
    assert topology.graph().nodes[0]["label"] == "Bern"


def test_times_of_contacts():
    rows = "20\t1148\t1644\n20\t1\t1148\n40\t1644\t1\n"
    topology = parse("timed:" + written("contacts.tsv", rows))
    assert (topology.n, topology.period, topology.names) == (3, 41, ("1", "1148", "1644"))
    assert [sorted(topology.graph(k).edges) for k in (0, 20, 40)] == [
        [],
        [(0, 1), (1, 2)],
        [(0, 2)],
    ]
    said = "its first column may be a time, for which there is timed"
    with pytest.raises(ConfigError, match=said):
        read("contacts.tsv", rows, weights="metropolis")
    topology = parse("timed:" + written("named.csv", "From;To;Time\nann;bob;1\nbob;cid;0\n"))
    assert topology.names == ("ann", "bob", "cid")
    assert [sorted(topology.graph(k).edges) for k in (0, 1)] == [[(1, 2)], [(0, 1)]]
    written("last.txt", "1 2 0\n0 3 1\n")
    with pytest.raises(ConfigError, match="its last column may be the time; name the columns"):
        parse("timed:last.txt")


def test_names_go_with_the_graph():
    written("cities.csv", "oslo,bern\nbern,rome\n")
    for text in (
        "file:cities.csv",
        "dropout(file('cities.csv'))",
        "b-connected(file('cities.csv'))",
        "cycle(['file:cities.csv', 'ring:3'])",
    ):
        assert parse(text).names == ("oslo", "bern", "rome")
    written("others.csv", "bern,oslo\noslo,rome\n")
    with pytest.raises(ConfigError, match="a cycle needs the same nodes, in the same order"):
        parse("cycle(['file:cities.csv', 'file:others.csv'])")


def test_hosts_are_nodes_by_name():
    topology = read("cities.csv", "oslo,bern\nbern,rome\n")
    assert topology.seated({"bern": 1, "oslo": 2, "rome": 3}) == [2, 1, 3]
    assert topology.seated({"n0": 1, "n1": 2, "n2": 3}) == [1, 2, 3]  # hosts that are counted
    assert parse("ring:3").seated({"bern": 1, "oslo": 2, "rome": 3}) == [1, 2, 3]
    with pytest.raises(ConfigError, match='no host is called "rome", as a node of the graph is;'):
        topology.seated({"bern": 1, "oslo": 2, "paris": 3})
    with pytest.raises(ConfigError, match='no node of the graph is called "paris", as a host is'):
        topology.seated({"bern": 1, "oslo": 2, "rome": 3, "paris": 4})


def node_link(graph, path):
    key = {"edges": "links"} if len(graph) % 2 else {"edges": "edges"}
    with open(path, "w") as file:
        json.dump(nx.node_link_data(graph, **key), file)


def whole_w(graph):
    return from_networkx(graph, "attribute", allow_disconnected=True).matrix()


WRITERS = {
    "x.graphml": nx.write_graphml,
    "x.gml": nx.write_gml,
    "x.gexf": nx.write_gexf,
    "x.net": nx.write_pajek,
    "x.json": node_link,
    "x.edgelist": nx.write_edgelist,
    "x.edgelist.gz": nx.write_edgelist,
    "x.txt": nx.write_weighted_edgelist,
    "x.mtx": lambda g, path: scipy.io.mmwrite(path, nx.to_scipy_sparse_array(g)),
    "w.mtx": lambda g, path: scipy.io.mmwrite(path, sparse.coo_array(whole_w(g))),
    "w.npy": lambda g, path: np.save(path, whole_w(g).toarray()),
    "w.txt": lambda g, path: np.savetxt(path, whole_w(g).toarray()),
    "w.csv": lambda g, path: pandas.DataFrame(whole_w(g).toarray()).to_csv(path),
    "edges.csv": lambda g, path: nx.to_pandas_edgelist(g).to_csv(path),
    "edges2.csv": lambda g, path: nx.to_pandas_edgelist(g).to_csv(
        path, sep=";", decimal=",", index=False
    ),
    "savetxt.txt": lambda g, path: np.savetxt(path, list(g.edges.data("weight"))),
}


@settings(max_examples=15, deadline=None)
@given(n=st.integers(2, 7), seed=st.integers(0, 10**6), small=st.booleans())
def test_every_format_gives_back_the_w_that_was_written(n, seed, small, tmp_path_factory):
    g = np.random.default_rng(seed)
    graph = nx.path_graph(n)
    graph.add_edges_from(nx.gnp_random_graph(n, 0.4, seed=seed).edges)
    for *_, facts in graph.edges.data():
        facts["weight"] = float(g.random() / n) * (1e-5 if small else 1)
    folder = tmp_path_factory.mktemp("formats")
    for name, write in WRITERS.items():
        write(graph, str(folder / name))
        again = parse(f"file('{folder / name}')")
        w = whole_w(graph).toarray()
        np.testing.assert_allclose(again.matrix().toarray(), w, atol=1e-15, err_msg=name)


def test_a_run_keeps_the_names_of_a_graph(here):
    graph = from_networkx(nx.path_graph(["oslo", "bern", "rome"]))
    again = parse("saved:" + written("graph.json", saved.text(graph)))
    assert again.names == graph.names == ("oslo", "bern", "rome")
