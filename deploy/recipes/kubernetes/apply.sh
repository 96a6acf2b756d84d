#!/usr/bin/env bash
# apply.sh [KUBECTL OPTION...]: makes keys, brings them into the cluster as secrets, and applies
# offbeat.yaml. It can be run again. As ./apply.sh --namespace training
set -euo pipefail
cd "$(dirname "$0")"
umask 077

secret() {  # secret NAME FILE...
    local name=$1 file from=()
    shift
    for file in "$@"; do
        from+=("--from-file=$file")
    done
    kubectl create secret generic "$name" "${from[@]}" --dry-run=client --output=yaml |
        kubectl apply --server-side "${options[@]}" --filename=-
}

options=("$@")
./keys.sh
{% if plan.peers %}
secret {{ plan.name }}-peer-keys keys/*/*.key_secret keys/*/{{ plan.name }}-peer-*.key
{% else %}
secret {{ plan.name }}-server-keys keys/server/server.key_secret keys/server/authorized/*.key
secret {{ plan.name }}-worker-keys keys/{{ plan.name }}-worker-*/*.key_secret keys/server/server.key
{% endif %}
kubectl apply "${options[@]}" --filename=offbeat.yaml
