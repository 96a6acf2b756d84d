#!/bin/sh
# stay.sh COMMAND...: runs COMMAND; when it is done it stays, for a stateful set would begin it
# again. {{ done }} says so to the probes.
set -u

child='' stopping='' told=''
stop() {
    stopping=yes
    if [ -n "$child" ] && [ -z "$told" ]; then
        told=yes
        kill -TERM "$child" 2>/dev/null
    fi
}
trap stop TERM

"$@" &
child=$!
[ -z "$stopping" ] || stop  # the signal came before the child had a number
wait "$child"
status=$?
if [ -n "$stopping" ]; then  # the signal ended the wait; this is the command's own status
    wait "$child"
    own=$?
    [ "$own" -eq 127 ] || status=$own
elif [ "$status" -eq 0 ]; then
    echo "stay.sh: done; delete the stateful sets when you have what you want"
    touch {{ done }}
    sleep infinity &
    child=$! told=''
    [ -z "$stopping" ] || stop
    wait "$child"
    exit 0
fi
exit "$status"
