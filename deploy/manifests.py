"""Compose and Kubernetes documents, as the values that are written down as YAML."""

import shlex
from importlib.metadata import version
from typing import Any

import yaml

from offbeat.deploy.plan import SERVER, SHIPPED, Deployment

GRACE_S = 90  # from SIGTERM to SIGKILL: to finish a job and save
UID = 10001  # of the image's user
CONFIG, KEYS, RUN, FILES = "/config", "/keys", "/run-folder", f"/{SHIPPED}"
EXPERIMENT = f"{CONFIG}/experiment.toml"
DONE = "/tmp/done"  # there when a pod's command has ended well


def _python(code: str) -> list[str]:
    return ["python3", "-c", code]


def listening(port: int) -> list[str]:
    """A command that fails where nobody listens on ``port`` of this machine."""
    return _python(
        f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=3).close()"
    )


def connected(port: int) -> list[str]:
    """A command that fails where nobody here is connected to a ``port``."""
    return _python(
        "import psutil, sys; "
        "sys.exit(not any(c.status == 'ESTABLISHED' and c.raddr and c.raddr.port == "
        f"{port} for c in psutil.net_connections('tcp')))"
    )


# -- Compose ---------------------------------------------------------------------------------------


def _secrets(node: str, *others: str) -> list[dict[str, str]]:
    own = f"{node}.key_secret"
    authorized = [f"{other}.key" for other in others]
    return [
        {"source": own, "target": own},
        *({"source": key, "target": f"authorized/{key}"} for key in authorized),
    ]


def _gpu(plan: Deployment, number: int) -> dict[str, Any]:
    """One of its own: of a mere count, Docker gives every container the first."""
    own = {"driver": "nvidia", "device_ids": [str(number)], "capabilities": ["gpu"]}
    return {"deploy": {"resources": {"reservations": {"devices": [own]}}}} if plan.cuda else {}


def _container(plan: Deployment, image: str) -> dict[str, Any]:
    return {
        "image": image,
        "pull_policy": "never",
        # Keys are readable by their owner alone, so nodes run as whoever made them.
        "user": "${OFFBEAT_UID:?run ./prepare.sh first}:${OFFBEAT_GID:?run ./prepare.sh first}",
        "init": True,
        "mem_limit": f"{plan.memory_mb}m",
        "restart": "on-failure:20",
        "stop_grace_period": f"{GRACE_S}s",
        "read_only": True,
        "tmpfs": ["/tmp"],
        "environment": {"HOME": "/tmp", "USER": "offbeat"},  # its number has no name there
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "logging": {"driver": "json-file", "options": {"max-size": "10m", "max-file": "3"}},
    }


def compose(plan: Deployment, image: str) -> str:
    """compose.yaml: every node a container of one machine."""
    port, common = plan.port, _container(plan, image)
    config = [{"source": "experiment", "target": EXPERIMENT}]

    mount = {"type": "bind", "source": f"./{SHIPPED}", "target": FILES, "read_only": True}
    data = [mount] if plan.files else []
    services: dict[str, Any] = {}
    if plan.peers:
        config.append({"source": "hosts", "target": f"{CONFIG}/hosts.toml"})
        for number, node in enumerate(plan.nodes):
            services[node] = {
                **common,
                **_gpu(plan, number),
                "command": plan.peer(f"{CONFIG}/hosts.toml", node, "/run/secrets", f"{RUN}/{node}"),
                "configs": config,
                "secrets": _secrets(node, *(n for n in plan.nodes if n != node)),
                "volumes": [f"./run:{RUN}", *data],
                "healthcheck": _healthcheck(listening(port)),
            }
    else:
        services[SERVER] = {
            **common,
            "command": plan.serve(port, "/run/secrets", f"{RUN}/server"),
            "configs": config,
            "secrets": _secrets(SERVER, SERVER, *plan.participants),
            "volumes": [f"./run:{RUN}", *data],
            "healthcheck": _healthcheck(listening(port)),
        }
        for number, node in enumerate(plan.participants):
            services[node] = {
                **common,
                **_gpu(plan, number),
                "command": plan.join(f"tcp://server:{port}", node, "/run/secrets"),
                "secrets": _secrets(node, SERVER),
                **({"volumes": data} if data else {}),
                "depends_on": {"server": {"condition": "service_healthy"}},
                "healthcheck": _healthcheck(connected(port)),
            }
    # Only one of them: several that build the same image at once fail as they tag it.
    first = services[plan.nodes[0]]
    del first["pull_policy"]
    first["build"] = {"context": ".", "target": f"offbeat-{plan.device}"}
    document = {
        "name": plan.name,
        "services": services,
        "configs": {
            "experiment": {"file": "./experiment.toml"},
            **({"hosts": {"file": "./hosts.toml"}} if plan.peers else {}),
        },
        "secrets": {
            f"{node}.{kind}": {"file": f"./keys/{node}/{node}.{kind}"}
            for node in plan.nodes
            for kind in ("key", "key_secret")
        },
    }
    return _text([document], f"{plan.about}, all on one machine; ./prepare.sh first")


def _healthcheck(test: list[str]) -> dict[str, Any]:
    return {
        "test": ["CMD", *test],
        "interval": "10s",
        "timeout": "5s",
        "retries": 3,
        "start_period": "60s",
    }


# -- Kubernetes ------------------------------------------------------------------------------------


def kubernetes(
    plan: Deployment, image: str, cpus: float, memory: str, storage: str, stay: str
) -> str:
    """Headless service, stateful sets, disruption budgets: server and workers, or peers.

    Args:
        plan, image, cpus, memory, storage: see ``render.kubernetes``.
        stay: the script that a pod runs its command with.
    """
    port = plan.port
    files = {"stay.sh": stay}
    if plan.peers:
        files["hosts.toml"] = plan.counted_hosts(lambda node: f"{node}.{plan.name}")
    documents = [_config_map(plan, files), _headless(plan)]
    if plan.peers:
        role = "peer"
        command = plan.peer(f"{CONFIG}/hosts.toml", "$(NODE)", f"{KEYS}/own", f"{RUN}/$(NODE)")
        pod = _pod(plan, role, image, cpus, memory, command, listening(port), serves=True)
        documents += [
            _stateful_set(plan, role, len(plan.participants), pod, storage),
            # One at a time may be moved: its neighbours mix around it, and bring it up to date.
            _budget(plan, role, {"maxUnavailable": 1}),
        ]
    else:
        command = plan.serve(port, f"{KEYS}/own", f"{RUN}/server")
        pod = _pod(plan, "server", image, cpus, memory, command, listening(port), serves=True)
        documents += [
            _stateful_set(plan, "server", 1, pod, storage),
            # To move it costs the work since its last checkpoint: not by the way, but by hand.
            _budget(plan, "server", {"minAvailable": 1}),
        ]
        server = f"tcp://{plan.name}-server-0.{plan.name}:{port}"
        command = plan.join(server, "$(NODE)", f"{KEYS}/own")
        pod = _pod(plan, "worker", image, cpus, memory, command, connected(port), serves=False)
        documents += [
            _stateful_set(plan, "worker", len(plan.participants), pod, None),
            _budget(plan, "worker", {"maxUnavailable": "25%"}),
        ]
    return _text(documents, f"{plan.about}; ./apply.sh makes the keys' secrets, and this")


def _labels(plan: Deployment, role: str | None = None) -> dict[str, str]:
    labels = {"app.kubernetes.io/name": "offbeat", "app.kubernetes.io/instance": plan.name}
    return labels | ({"app.kubernetes.io/component": role} if role else {})


def _metadata(plan: Deployment, role: str | None = None) -> dict[str, Any]:
    name = f"{plan.name}-{role}" if role else plan.name
    return {"name": name, "labels": _labels(plan, role)}


def _config_map(plan: Deployment, files: dict[str, str]) -> dict[str, Any]:
    data = {"experiment.toml": plan.text, **files}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": _metadata(plan), "data": data}


def _headless(plan: Deployment) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(plan),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,  # nodes look each other up before they are ready
            "selector": _labels(plan),
            "ports": [{"name": "offbeat", "port": plan.port}],
        },
    }


def _budget(plan: Deployment, role: str, allowed: dict[str, int | str]) -> dict[str, Any]:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(plan, role),
        "spec": {**allowed, "selector": {"matchLabels": _labels(plan, role)}},
    }


def _stateful_set(
    plan: Deployment, role: str, replicas: int, pod: dict[str, Any], storage: str | None
) -> dict[str, Any]:
    claim = {
        "metadata": {"name": "run"},
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": storage}}},
    }
    return {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "metadata": _metadata(plan, role),
        "spec": {
            "serviceName": plan.name,
            "replicas": replicas,
            "podManagementPolicy": "Parallel",
            "selector": {"matchLabels": _labels(plan, role)},
            "template": {"metadata": {"labels": _labels(plan, role)}, "spec": pod},
            **({"volumeClaimTemplates": [claim]} if storage else {}),
        },
    }


LOCKED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
USER = {
    "runAsNonRoot": True,
    "runAsUser": UID,
    "runAsGroup": UID,
    "fsGroup": UID,
    "seccompProfile": {"type": "RuntimeDefault"},
}


def _spread(plan: Deployment, role: str) -> dict[str, Any]:
    return {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": _labels(plan, role)},
    }


def _key_copier(image: str, node: dict[str, Any]) -> dict[str, Any]:
    # Files of secrets can be read by the pod's group; a copy of its own can not, and has of all
    # the secrets in the role's only this pod's. It may be made again, over one that is read-only.
    copy = (
        f"umask 077 && rm -rf {KEYS}/own && mkdir -p {KEYS}/own/authorized "
        f"&& cp /secret/$NODE.key_secret {KEYS}/own/ && cp /secret/*.key {KEYS}/own/authorized/"
    )
    return {
        "name": "keys",
        "image": image,
        "command": ["sh", "-c", copy],
        "env": [node],
        "securityContext": LOCKED,
        "volumeMounts": [
            {"name": "secret", "mountPath": "/secret", "readOnly": True},
            {"name": "keys", "mountPath": KEYS},
        ],
    }


def _pod(
    plan: Deployment,
    role: str,
    image: str,
    cpus: float,
    memory: str,
    command: list[str],
    ready: list[str],
    *,
    serves: bool,
) -> dict[str, Any]:
    pod_name = {"valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}
    node = {"name": "NODE", **({"value": "server"} if role == "server" else pod_name)}
    well = {"exec": {"command": ["sh", "-c", f"[ -e {DONE} ] || {shlex.join(ready)}"]}}
    probe = {**well, "periodSeconds": 10, "timeoutSeconds": 5}
    gpu = {"nvidia.com/gpu": 1} if plan.cuda and role != "server" else {}
    main: dict[str, Any] = {
        "name": "offbeat",
        "image": image,
        "command": ["sh", f"{CONFIG}/stay.sh", "offbeat"],
        "args": command,
        "env": [node, {"name": "HOME", "value": "/tmp"}],
        "securityContext": LOCKED,
        "resources": {
            "requests": {"cpu": f"{cpus:g}", "memory": memory},
            "limits": {"memory": memory, **gpu},
        },
        "volumeMounts": [
            {"name": "config", "mountPath": CONFIG, "readOnly": True},
            {"name": "keys", "mountPath": KEYS, "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},
            *([{"name": "run", "mountPath": RUN}] if serves else []),
        ],
        "readinessProbe": probe,
    }
    if serves:  # a worker that has lost its server comes back by itself; to kill it helps nobody
        main["ports"] = [{"name": "offbeat", "containerPort": plan.port}]
        main["startupProbe"] = {**probe, "failureThreshold": 60}
        main["livenessProbe"] = {**probe, "failureThreshold": 6}
    return {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": GRACE_S,
        "securityContext": USER,
        "initContainers": [_key_copier(image, node)],
        "containers": [main],
        "topologySpreadConstraints": [_spread(plan, role)],
        "volumes": [
            {"name": "config", "configMap": {"name": plan.name}},
            {
                "name": "secret",
                "secret": {"secretName": f"{plan.name}-{role}-keys", "defaultMode": 0o440},
            },
            {"name": "keys", "emptyDir": {"medium": "Memory", "sizeLimit": "16Mi"}},
            {"name": "tmp", "emptyDir": {}},
        ],
    }


def _ray_pod(
    plan: Deployment, image: str, cpus: float, memory: str, role: str, **extra: Any
) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [
        {"name": "config", "configMap": {"name": plan.name}},
        {"name": "tmp", "emptyDir": {}},
    ]
    mounts: list[dict[str, Any]] = [
        {"name": "config", "mountPath": CONFIG, "readOnly": True},
        {"name": "tmp", "mountPath": "/tmp"},
    ]
    if role == "head":
        volumes.append({"name": "run", "persistentVolumeClaim": {"claimName": plan.name}})
        mounts.append({"name": "run", "mountPath": RUN})
    limits = {"cpu": f"{cpus:g}", "memory": memory}
    container = {
        "name": f"ray-{role}",
        "image": image,
        "env": [{"name": "HOME", "value": "/tmp"}],
        "securityContext": {k: v for k, v in LOCKED.items() if k != "readOnlyRootFilesystem"},
        "resources": {
            "requests": limits,
            "limits": limits | ({"nvidia.com/gpu": 1} if plan.cuda and role == "worker" else {}),
        },
        "volumeMounts": mounts,
        **extra,
    }
    return {
        "metadata": {"labels": _labels(plan, role)},
        "spec": {
            "automountServiceAccountToken": False,
            "securityContext": USER,
            "containers": [container],
            "volumes": volumes,
        },
    }


def kuberay(
    plan: Deployment, image: str, cpus: float, memory: str, storage: str, entry: str
) -> str:
    """A RayJob: a Ray cluster for this run, from the first job to the last.

    Args:
        plan, image, cpus, memory, storage: see ``render.kuberay``.
        entry: the script that the job is.
    """
    claim = {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": _metadata(plan),
        "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": storage}}},
    }

    each = plan, image, cpus, memory
    ports = [
        {"name": "gcs-server", "containerPort": 6379},
        {"name": "dashboard", "containerPort": 8265},
        {"name": "client", "containerPort": 10001},
    ]
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": _metadata(plan),
        "spec": {
            "entrypoint": f"sh {CONFIG}/entry.sh",
            "submissionMode": "K8sJobMode",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "backoffLimit": 3,
            "rayClusterSpec": {
                "rayVersion": version("ray"),
                "headGroupSpec": {
                    # It serves; jobs are computed by the workers.
                    "rayStartParams": {"dashboard-host": "0.0.0.0", "num-cpus": "0"},
                    "template": _ray_pod(*each, "head", ports=ports),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "workers",
                        "replicas": len(plan.participants),
                        "minReplicas": 1,
                        "maxReplicas": len(plan.participants),
                        "rayStartParams": {},
                        "template": _ray_pod(*each, "worker"),
                    }
                ],
            },
        },
    }
    about = f"on Ray, {len(plan.participants)} pods for workers; kubectl apply -f rayjob.yaml"
    return _text([_config_map(plan, {"entry.sh": entry}), claim, job], about)


# -- YAML ------------------------------------------------------------------------------------------


class _Dumper(yaml.SafeDumper):
    """Writes long text as blocks, and the same thing twice as often as it is there."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _block(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style)


_Dumper.add_representer(str, _block)


def _text(documents: list[dict[str, Any]], about: str) -> str:
    return f"# {about}\n" + yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, width=1000)
