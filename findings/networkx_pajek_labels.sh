#!/bin/sh
# networkx 3.6.1, reading Pajek: vertices are numbered, and their labels need not differ (people of
# one name, towns of one name).  networkx makes the label the node, so vertices of one label become
# one node that has the edges of all; the edge between two of them becomes a loop.  Nothing is said.
#
# Seen:   three vertices in a line, two of them "Springfield": nodes ['Springfield', 'Shelbyville'],
#         edges [('Springfield', 'Springfield'), ('Springfield', 'Shelbyville')]
# Exits with 0 while this is so, and with 1 once there are three nodes or it is refused.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet networkx==3.6.1
"$folder/venv/bin/python" - <<'PY'
import sys

import networkx

graph = networkx.parse_pajek(
    '*Vertices 3\n1 "Springfield"\n2 "Springfield"\n3 "Shelbyville"\n*Edges\n1 2 1\n2 3 1\n'
)
print("nodes", list(graph), "edges", list(graph.edges()))
sys.exit(list(graph) != ["Springfield", "Shelbyville"])
PY
