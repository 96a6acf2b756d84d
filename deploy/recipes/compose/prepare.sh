#!/usr/bin/env bash
# prepare.sh: makes keys, the run's folder, and .env, which says as whom containers run: keys are
# readable by their owner alone.
set -euo pipefail
cd "$(dirname "$0")"
./keys.sh
mkdir -p run wheels
printf 'OFFBEAT_UID=%s\nOFFBEAT_GID=%s\n' "$(id -u)" "$(id -g)" >.env
