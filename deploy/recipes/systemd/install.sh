#!/usr/bin/env bash
# install.sh HOST: on HOST, as root: puts the files, keys and units of its nodes in place and starts
# them. It can be run again, with new keys or another experiment.
set -euo pipefail
umask 077
cd "$(dirname "$0")"

case ${1:-} in
{% for host in hosts %}
    {{ host.name }}) nodes=({{ nodes_of[host.name]|join(" ") }}) ;;
{% endfor %}
    *)
        echo "install.sh: which host is this? known: {{ hosts|map(attribute="name")|join(", ") }}" >&2
        exit 2
        ;;
esac

if [ ! -x {{ plan.offbeat }} ]; then
    echo "install.sh: $1 has no {{ plan.offbeat }}; install offbeat there, or deploy with --offbeat PATH" >&2
    exit 2
fi
etc=/etc/offbeat/{{ plan.name }}
id -u {{ user }} >/dev/null 2>&1 || useradd --system --shell /usr/sbin/nologin {{ user }}
install -d -m 0755 /etc/offbeat "$etc"
install -d -m 0700 -o {{ user }} "$etc/keys"
install -m 0644 experiment.toml hosts.toml "$etc/"
{% if plan.files %}
cp -R files "$etc/"
chmod -R a+rX "$etc/files"
{% endif %}
units=()
for node in "${nodes[@]}"; do
    install -d -m 0700 -o {{ user }} "$etc/keys/$node" "$etc/keys/$node/authorized"
    install -m 0600 -o {{ user }} "keys/$node/$node.key_secret" "$etc/keys/$node/"
    install -m 0600 -o {{ user }} "keys/$node/authorized/"*.key "$etc/keys/$node/authorized/"
    for known in "$etc/keys/$node/authorized/"*.key; do  # whom it shall not know any more
        [ -e "keys/$node/authorized/${known##*/}" ] || rm -f "$known"
    done
{% if plan.peers %}
    unit=offbeat-{{ plan.name }}-peer@$node.service
{% else %}
    unit=offbeat-{{ plan.name }}-worker@$node.service
    if [ "$node" = server ]; then
        unit=offbeat-{{ plan.name }}-server.service
    else
        install -m 0644 "env/$node" "$etc/$node.env"
    fi
{% endif %}
    units+=("$unit")
done
install -m 0644 units/*.service /etc/systemd/system/
systemctl daemon-reload
systemctl enable "${units[@]}"
systemctl restart "${units[@]}"
