#!/usr/bin/env bash
# keys.sh [DIR]: makes the keys of {{ plan.name }}. DIR/NODE/ has all that NODE needs: its own secret, and
# in authorized/ the public keys of those it talks to. Keys that are there stay: it can be run again.
set -euo pipefail
umask 077

dir=${1:-"$(dirname "$0")/keys"}
nodes=(
{% for node in plan.nodes %}
    {{ node }}
{% endfor %}
)

for node in "${nodes[@]}"; do
    mkdir -p "$dir/$node/authorized"
    if [ ! -e "$dir/$node/$node.key_secret" ]; then
        {{ program }} keys new "$node" --keys "$dir/$node"
    fi
done
for node in "${nodes[@]}"; do
{% if plan.peers %}
    for other in "${nodes[@]}"; do
        if [ "$other" != "$node" ]; then
            cp "$dir/$other/$other.key" "$dir/$node/authorized/"
        fi
    done
{% else %}
    cp "$dir/$node/$node.key" "$dir/server/authorized/"  # the server's own, too: for offbeat status
    if [ "$node" != server ]; then
        cp "$dir/server/server.key" "$dir/$node/authorized/"
    fi
{% endif %}
done
