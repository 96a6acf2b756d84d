#!/bin/bash
{% if plan.peers %}
# What each task of the job runs: its node.
{% elif apart %}
# What each task of the job runs: with the argument server it serves, the others join it.
{% else %}
# What each task of the job runs: the first one, on the first machine, serves, the others join it.
{% endif %}
set -euo pipefail
umask 077

{% if plan.peers %}
name=n$SLURM_PROCID
{% elif apart %}
name=${1:-w$SLURM_PROCID}
{% else %}
name=w$((SLURM_PROCID - 1))
if [ "$SLURM_PROCID" -eq 0 ]; then
    name=server
fi
{% endif %}
mkdir -p "$OFFBEAT_LOCAL/own"
if [ ! -O "$OFFBEAT_LOCAL" ]; then
    echo "task.sh: $OFFBEAT_LOCAL is somebody else's; remove it" >&2
    exit 2
fi
tar -xf "$OFFBEAT_LOCAL.tar" -C "$OFFBEAT_LOCAL/own" "./$name"
keys=$OFFBEAT_LOCAL/own/$name

{% if plan.peers %}
exec ./keep.sh {{ plan.offbeat }} peer experiment.toml --hosts hosts.toml --node "$name" --keys "$keys" --out "run/$name"
{% else %}
if [ "$name" != server ]; then
    exec ./keep.sh {{ plan.offbeat }} join "tcp://$OFFBEAT_SERVER:$OFFBEAT_PORT" --keys "$keys" --name "$name" --device {{ device }}
fi
./keep.sh {{ plan.offbeat }} serve experiment.toml --bind "tcp://*:$OFFBEAT_PORT" --keys "$keys" --out run &
server=$!
stopping=''
trap 'stopping=yes; kill -TERM "$server"' TERM
status=0
wait "$server" || status=$?
if [ -n "$stopping" ]; then  # the signal ended the wait; all others were told to end, too
    wait "$server" || true
{% if not apart %}
elif [ "$status" -ne 0 ]; then  # without a server nobody else has anything to do
    scancel "$SLURM_JOB_ID.$SLURM_STEP_ID"
{% endif %}
fi
exit "$status"
{% endif %}
