#!/usr/bin/env bash
# launch.sh COMMAND [NODE...]: {{ plan.name }}, {{ plan.about }}, over ssh.
#   keys     make the keys, here, in keys/
#   push     bring each node's files and its own keys to its machine, into {{ dir }}/
#   start    start what is not running
#   stop     stop what is running, the server last; jobs are handed back, the run is saved
#   status   say what is running; fails if something is not
#   logs     the last lines of each log
{% if not plan.peers %}
#   live     who works for the server, and how it goes
{% endif %}
# Without NODE it is for all of them. Every command can be given again.
set -euo pipefail
cd "$(dirname "$0")"

# shellcheck disable=SC2088  # a ~ is expanded there
dir='{{ dir }}'  # there, from the home folder
at_a_time=16
lines=20
stop_s=70  # keep.sh kills after 60

nodes=({{ plan.nodes|join(" ") }})
declare -A remote=(
{% for node in plan.nodes %}
    [{{ node }}]={{ remotes[node] }}
{% endfor %}
)

# What a node runs there, in $dir.
command_of() {
    case $1 in
{% for node in plan.nodes %}
        {{ node }}) echo "{{ plan.offbeat }} {{ commands[node] }}" ;;
{% endfor %}
    esac
}

there() {  # there NODE: runs the script on standard input on its machine
    ssh -o BatchMode=yes -o ConnectTimeout=10 "${remote[$1]}" bash -s
}

keys() {
    ./keys.sh
}

push() {
    local node=$1
    if [ ! -e "keys/$node/$node.key_secret" ]; then
        echo "$node: has no keys; make them first: ./launch.sh keys" >&2
        return 2
    fi
    tar -cf - experiment.toml {{ "hosts.toml " if plan.peers }}{{ "files " if plan.files }}keep.sh "keys/$node" |
        ssh -o BatchMode=yes -o ConnectTimeout=10 "${remote[$node]}" \
            "bash -c '
                set -eu
                umask 077
                mkdir -p $dir
                cd $dir
                rm -rf .new-$node
                mkdir -p .new-$node keys/$node/authorized
                tar -xpf - -C .new-$node
                for known in keys/$node/authorized/*.key; do  # whom it shall not know any more
                    [ -e \".new-$node/\$known\" ] || rm -f \"\$known\"
                done
                mv -f .new-$node/keys/$node/authorized/* keys/$node/authorized/
                mv -f .new-$node/keys/$node/*.* keys/$node/
                mv -f .new-$node/*.* .
{% if plan.files %}
                mkdir -p files
                # Of a folder called by what is in it there is all or nothing; another node may be first.
                mv -n .new-$node/files/* files/ 2>/dev/null || true
{% endif %}
                rm -rf .new-$node
            '"
    echo "$node: pushed to ${remote[$node]}"
}

# What the machine knows of a node: $pid of its keep.sh, or of what a keep.sh that was killed left.
# shellcheck disable=SC2016  # expanded there
find_it='
    pid=
    for process in /proc/[0-9]*; do
        [ "$process/cwd" -ef . ] || continue
        { words=$(tr "\\0" " " <"$process/cmdline"); } 2>/dev/null || continue
        case $words in
            *" status tcp://"*) ;;  # who only asks
            *"keep.sh "*"--keys keys/$node "*) pid=${process#/proc/}; break ;;
            *"--keys keys/$node "*) pid=${process#/proc/} ;;
        esac
    done
'

start() {
    there "$1" <<END
set -euo pipefail
umask 077
node=$1
cd $dir 2>/dev/null && [ -x keep.sh ] || { echo "$1: nothing is there; first: ./launch.sh push $1" >&2; exit 2; }
$find_it
if [ -n "\$pid" ]; then
    echo "$1: runs already, as \$pid"
    exit 0
fi
command -v {{ plan.offbeat }} >/dev/null || { echo "$1: ${remote[$1]} has no {{ plan.offbeat }}; install offbeat there, or deploy with --offbeat PATH" >&2; exit 2; }
nohup ./keep.sh $(command_of "$1") </dev/null >>"$1.log" 2>&1 &
echo "$1: started, as \$!"
END
}

stop() {
    there "$1" <<END
set -euo pipefail
node=$1
cd $dir 2>/dev/null || { echo "$1: is not running"; exit 0; }
$find_it
if [ -z "\$pid" ]; then
    echo "$1: is not running"
    exit 0
fi
kill -TERM "\$pid"
for ((left = $stop_s * 10; left > 0; left--)); do
    if ! kill -0 "\$pid" 2>/dev/null; then
        echo "$1: stopped"
        exit 0
    fi
    sleep 0.1
done
echo "$1: does not stop" >&2
exit 1
END
}

status() {
    there "$1" <<END
set -euo pipefail
node=$1
pid=
cd $dir 2>/dev/null && {
$find_it
}
if [ -n "\$pid" ]; then
    echo "$1: runs on ${remote[$1]}, as \$pid"
else
    echo "$1: does not run on ${remote[$1]}"
    exit 1
fi
END
}

logs() {
    there "$1" <<END
if [ -e $dir/$1.log ]; then
    tail -n $lines $dir/$1.log | sed 's/^/$1: /'
else
    echo "$1: no log yet"
fi
END
}

{% if not plan.peers %}
live() {
    there server <<END
cd $dir && {{ plan.offbeat }} status tcp://127.0.0.1:{{ port }} --keys keys/server
END
}

{% endif %}
each() {  # each FUNCTION NODE...: at once, so many at a time; fails if one of them did
    local act=$1 failed=0 node pid pids
    shift
    while [ $# -gt 0 ]; do
        pids=()
        for node in "${@:1:at_a_time}"; do
            "$act" "$node" &
            pids+=($!)
        done
        for pid in "${pids[@]}"; do
            wait "$pid" || failed=1
        done
        shift $(($# < at_a_time ? $# : at_a_time))
    done
    return "$failed"
}

command=${1:-help}
[ $# -eq 0 ] || shift
for node in "$@"; do
    if [ -z "${remote[$node]:-}" ]; then
        echo "launch.sh: no node is called $node; known: ${nodes[*]}" >&2
        exit 2
    fi
done
[ $# -gt 0 ] || set -- "${nodes[@]}"
case $command in
    {{ "keys" if plan.peers else "keys | live" }}) "$command" ;;
    push | start | status | logs) each "$command" "$@" ;;
    stop)
        last=()
        others=()
        for node in "$@"; do
            if [ "$node" = server ]; then last+=(server); else others+=("$node"); fi
        done
        failed=0
        each stop "${others[@]}" || failed=1
        each stop "${last[@]}" || failed=1
        exit "$failed"
        ;;
    *)
        sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' "$0"
        [ "$command" = help ] || exit 2
        ;;
esac
