#!/bin/sh
# networkx 3.6.1, reading Pajek: a section *Edgeslist (or *Arcslist) has in each line a vertex and
# then all its neighbours.  networkx takes it for *Edges, whose third number is the value of the
# line: "1 2 3" becomes one edge of weight 3, and vertex 3 is left alone.  Nothing is said.
#
# Seen:   the file has the edges 1-2 and 1-3; networkx read [('a', 'b', {'weight': 3.0})]
# Exits with 0 while this is so, and with 1 once both edges are read or the section is refused.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet networkx==3.6.1
"$folder/venv/bin/python" - <<'PY'
import sys

import networkx

graph = networkx.parse_pajek('*Vertices 3\n1 "a"\n2 "b"\n3 "c"\n*Edgeslist\n1 2 3\n')
edges = list(graph.edges(data=True))
print("the file has the edges 1-2 and 1-3; networkx read", edges)
sys.exit(edges != [("a", "b", {"weight": 3.0})])
PY
