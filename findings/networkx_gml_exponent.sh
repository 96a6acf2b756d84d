#!/bin/sh
# networkx 3.6.1, reading GML: a number in exponent form without a decimal point, as 1e-05, is read
# as the number before the "e", and the exponent as another attribute.  python-igraph 1.0.0 writes
# small and large weights in just this form, so a graph that igraph saved comes back with the weight
# 1 in the place of 0.00001, without an error or a warning.
#
# Seen:   igraph wrote:  weight 1e-05
#         networkx read: {'weight': 1, 'e': -5}
# Exits with 0 while this is so, and with 1 once the weight is read right or refused.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet networkx==3.6.1 igraph==1.0.0
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import sys

import igraph
import networkx

graph = igraph.Graph(edges=[(0, 1)], vertex_attrs={"label": ["a", "b"]})
graph.es["weight"] = [0.00001]
graph.write_gml("graph.gml")
print("igraph wrote:  ", *(line.strip() for line in open("graph.gml") if "weight" in line))
try:
    (read,) = (facts for *_, facts in networkx.read_gml("graph.gml").edges(data=True))
except networkx.NetworkXError as error:
    sys.exit(f"networkx refuses it: {error}")
print("networkx read: ", read)
sys.exit(read != {"weight": 1, "e": -5})
PY
