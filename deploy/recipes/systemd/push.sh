#!/usr/bin/env bash
# push.sh [HOST...]: brings this folder, but of the keys only those of HOST's own nodes, to each
# HOST (to all of them, where none is named) and installs it there. It needs ssh and, there, sudo.
set -euo pipefail
cd "$(dirname "$0")"

push() {  # push REMOTE HOST NODE...
    local remote=$1 host=$2 there=offbeat-{{ plan.name }}
    shift 2
    echo "$host:"
    tar -cf - experiment.toml hosts.toml units {{ "env " if not plan.peers }}install.sh "${@/#/keys/}" |
        ssh -o BatchMode=yes -o ConnectTimeout=10 "$remote" \
            "umask 077 && rm -rf $there && mkdir $there && tar -xf - -C $there && sudo ./$there/install.sh $host && rm -rf $there"
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
