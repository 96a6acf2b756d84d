#!/usr/bin/env bash
# keep.sh COMMAND...: runs COMMAND, and again when it dies, after 1, 2, 4, ... 32 seconds.
# Not when it is done (0) or was asked to end (130), nor where that would not help: 2 settings,
# 3 another took its place, 4 refused, 7 diverged, 126 and 127 no such program.
# SIGTERM is handed on, once; what is still there a minute later is killed.
set -uo pipefail

patience_s=60
most_tries=20  # in a row; one that ran for a minute begins a new row
ulimit -Sn "$(ulimit -Hn)"  # open files; a connection takes one
child='' stopping='' pause_s=1 tries=0

stop() {
    [ -z "$stopping" ] || return 0
    stopping=yes
    [ -n "$child" ] || return 0
    kill -TERM "$child" 2>/dev/null
    for ((left = patience_s * 10; left > 0; left--)); do
        kill -0 "$child" 2>/dev/null || return 0
        sleep 0.1
    done
    kill -KILL "$child" 2>/dev/null
}
trap stop TERM INT

while [ -z "$stopping" ]; do
    began_s=$SECONDS
    setsid "$@" &  # in a session of its own, so that signals to ours reach it once, through stop
    child=$!
    [ -z "$stopping" ] || kill -TERM "$child" 2>/dev/null
    wait "$child"
    status=$?
    if [ -n "$stopping" ]; then  # the wait ended with the signal; this is the command's own status
        wait "$child"
        own=$?
        [ "$own" -eq 127 ] || status=$own
        exit "$status"
    fi
    child=''
    case $status in
        0 | 2 | 3 | 4 | 7 | 126 | 127 | 130) exit "$status" ;;
    esac
    if ((SECONDS - began_s >= 60)); then
        tries=0 pause_s=1
    fi
    tries=$((tries + 1))
    if ((tries > most_tries)); then
        echo "keep.sh: gave up after $most_tries tries: $*" >&2
        exit "$status"
    fi
    echo "keep.sh: ended with $status, again in $pause_s s: $*" >&2
    sleep "$pause_s" &
    wait $!
    pause_s=$((pause_s < 32 ? pause_s * 2 : 32))
done
