#!/bin/sh
# What the Ray job runs. A second try goes on from the run's folder, which outlives the cluster.
set -eu

run={{ run }}
if [ -e "$run/experiment.toml" ]; then
    exec offbeat resume "$run"
fi
exec offbeat run {{ plan.experiment }} --out "$run"
