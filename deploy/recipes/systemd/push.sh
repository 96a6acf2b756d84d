#!/usr/bin/env bash
# push.sh [HOST...]: brings this folder, but of the keys only those of HOST's own nodes, to each
# HOST (to all of them, where none is named) and installs it there. It needs ssh and, there, sudo.
set -euo pipefail
cd "$(dirname "$0")"

push() {  # push REMOTE HOST NODE...
    local remote=$1 host=$2 node
    shift 2
    for node in "$@"; do
        if [ ! -e "keys/$node/$node.key_secret" ]; then
            echo "$node: has no keys; make them first: ./keys.sh" >&2
            return 2
        fi
    done
    echo "$host:"
    tar -cf - experiment.toml hosts.toml units {{ "env " if not plan.peers }}{{ "files " if plan.files }}install.sh "${@/#/keys/}" |
        ssh -o BatchMode=yes -o ConnectTimeout=10 "$remote" \
            "bash -c 'there=\$(mktemp -d) && trap \"rm -rf \$there\" EXIT && tar -xf - -C \$there && sudo bash \$there/install.sh $host'"
}

[ $# -gt 0 ] || set -- {{ hosts|map(attribute="name")|join(" ") }}
for host in "$@"; do
    case $host in
{% for host in hosts %}
        {{ host.name }}) push {{ host.remote }} {{ host.name }} {{ nodes_of[host.name]|join(" ") }} ;;
{% endfor %}
        *)
            echo "push.sh: no host is called $host; known: {{ hosts|map(attribute="name")|join(", ") }}" >&2
            exit 2
            ;;
    esac
done
