#!/bin/sh
# networkx 3.6.1, reading Pajek: what follows the first section of lines is read as more of that
# section, whatever its head says.  In a file with *Arcs and then *Edges (the usual form of a mixed
# graph) every edge becomes an arc in one direction only.  In a file of several relations the head
# of the second, "*Edges :2", becomes an edge between two new nodes called "*Edges" and ":2".
#
# Seen:   arcs then edges: [('a', 'b'), ('b', 'c')], without ('c', 'b')
#         two relations:   nodes a, b, c, *Edges, :2
# Exits with 0 while this is so, and with 1 once sections are told apart or refused.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet networkx==3.6.1
"$folder/venv/bin/python" - <<'PY'
import sys

import networkx

vertices = '*Vertices 3\n1 "a"\n2 "b"\n3 "c"\n'
mixed = networkx.parse_pajek(vertices + "*Arcs\n1 2 1\n*Edges\n2 3 1\n")
print("arcs then edges:", sorted(mixed.edges()))
related = networkx.parse_pajek(vertices + "*Edges :1\n1 2 1\n*Edges :2\n2 3 1\n")
print("two relations:  ", "nodes", ", ".join(related))
one_way = sorted(mixed.edges()) == [("a", "b"), ("b", "c")]
sys.exit(not (one_way and list(related) == ["a", "b", "c", "*Edges", ":2"]))
PY
