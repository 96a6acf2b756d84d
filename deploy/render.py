"""Recipes: from a plan to files that are ready to be used.

Scripts and units are templates in ``recipes/``; Compose and Kubernetes documents are built as
values (``manifests``).  No file has a secret in it: ``keys.sh``, which is rendered with the rest,
makes keys where it is run.
"""

import math
import re
import shlex
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from offbeat.deploy import manifests
from offbeat.deploy.hosts import Host, Hosts
from offbeat.deploy.plan import SERVER, Deployment, server_endpoint
from offbeat.runtime.base.errors import ConfigError, StorageError

CPU_BASE = "python:3.11-slim-bookworm"
CUDA_BASE = "nvidia/cuda:12.8.1-base-ubuntu24.04"
FIRST_PORT, PORTS = 20000, 12000  # of Slurm's jobs: below those that systems lend
MOST_PER_MACHINE = 100
SLURM_GRACE_S = 180  # before a job's end, to save and be queued again
HIDDEN = ("/home/", "/root/", "/run/user/", "/tmp/", "/var/tmp/")  # from units
MOST_PODS = 1000  # whose keys fit into one secret of 1 MiB

Files = dict[str, str | Path]  # a text, or where the file is

_environment = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "recipes"),
    undefined=StrictUndefined,
    autoescape=False,  # every value was checked to need no quotes
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
    comment_start_string="<#",  # {# is the length of a variable in shells
    comment_end_string="#>",
)


def _fill(template: str, **values: Any) -> str:
    return _environment.get_template(template).render(values)


def slurm(
    plan: Deployment,
    *,
    per_machine: int = 1,
    cpus: int = 1,
    time: str = "1-00:00:00",
    partition: str | None = None,
) -> Files:
    """A job script, and what each of its tasks runs.

    Args:
        plan: the run; hosts are what Slurm gives.
        per_machine: tasks on one machine.
        cpus: of each task.
        time: limit, as Slurm writes it; then the job is queued again and goes on.
        partition: of the cluster.
    """
    if not 1 <= per_machine <= MOST_PER_MACHINE:
        raise ConfigError(f"--per-machine must be from 1 to {MOST_PER_MACHINE}, not {per_machine}")
    if not re.fullmatch(r"(\d+-)?\d+(:\d+){0,2}", time):
        raise ConfigError(f'--time: "{time}" is no time of Slurm; write 12:00:00 or 2-00:00:00')
    if partition is not None and not re.fullmatch(r"[\w-]+(,[\w-]+)*", partition):
        raise ConfigError(f'--partition: "{partition}" is no name of a partition')
    apart = plan.cuda and not plan.peers  # the server's machine need not have a GPU
    tasks = len(plan.participants if apart else plan.nodes)
    values = {
        "plan": plan,
        "apart": apart,
        "tasks": tasks,
        "machines": math.ceil(tasks / per_machine),
        "per_machine": min(per_machine, tasks),
        "cpus": cpus,
        # Of every step, so that tasks fall on the same machines; srun has no CPUs from sbatch.
        "layout": f"--distribution=block --cpus-per-task={cpus}",
        "time": time,
        "partition": partition,
        "grace_s": SLURM_GRACE_S,
        "first_port": FIRST_PORT,
        "ports": PORTS,
        "device": "cuda:0" if plan.cuda else "cpu",  # Slurm shows each task its own
    }
    return _with_keys(plan, plan.offbeat) | {
        "offbeat.sbatch": _fill("slurm/offbeat.sbatch", **values),
        "task.sh": _fill("slurm/task.sh", **values),
        "keep.sh": _fill("shared/keep.sh"),
    }


def systemd(plan: Deployment, *, user: str = "offbeat") -> Files:
    """Units, and scripts that bring them to the hosts.

    Args:
        plan: the run, with hosts.
        user: as whom nodes run; made where it is absent.
    """
    if not plan.offbeat.startswith("/"):
        raise ConfigError(
            f'--offbeat: units need the whole path of the program, not "{plan.offbeat}"'
        )
    if plan.offbeat.startswith(HIDDEN):
        raise ConfigError(
            f"units see nothing of {', '.join(HIDDEN)}, so not {plan.offbeat}; put it elsewhere, "
            "as in /opt/offbeat"
        )
    if not re.fullmatch(r"[a-z_][a-z0-9_-]{0,30}", user):
        raise ConfigError(f'--user: "{user}" is no name of a user')
    machines, hosts, nodes_of = _by_host(plan)
    etc = f"/etc/offbeat/{plan.name}"
    values: dict[str, Any] = {"plan": plan, "user": user, "hosts": hosts, "nodes_of": nodes_of}
    roles: dict[str, tuple[str, list[str], str | None, bool]]
    # %i is the node that an instance of a template unit stands for.
    if plan.peers:
        command = plan.peer(f"{etc}/hosts.toml", "%i", f"{etc}/keys/%i", "run-%i")
        roles = {"peer@": ("peer %i", command, None, _any_cuda(hosts))}
    else:
        port = machines.serving().port
        join = plan.join(server_endpoint(machines), "%i", f"{etc}/keys/%i", "${OFFBEAT_DEVICE}")
        roles = {
            "server": ("the server", plan.serve(port, f"{etc}/keys/{SERVER}", "run"), None, False),
            "worker@": ("worker %i", join, f"{etc}/%i.env", _any_cuda(hosts)),
        }
    files = _with_keys(plan) | {"hosts.toml": machines.toml()}
    for role, (who, command, environment, cuda) in roles.items():
        files[f"units/offbeat-{plan.name}-{role}.service"] = _fill(
            "systemd/node.service",
            **values,
            description=f"{who} of {plan.name}",
            command=command,
            environment=environment,
            cuda=cuda,
        )
    if not plan.peers:
        files |= {
            f"env/{node.name}": f"OFFBEAT_DEVICE={node.device}\n"
            for host in hosts
            for node in host.nodes()
        }
    return files | {
        "install.sh": _fill("systemd/install.sh", **values),
        "push.sh": _fill("systemd/push.sh", **values),
    }


def compose(plan: Deployment, *, image: str) -> Files:
    """A Compose file, the image's Dockerfile, and what has to be there before."""
    files = {"hosts.toml": plan.counted_hosts(lambda node: node)} if plan.peers else {}
    return (
        _with_keys(plan)
        | files
        | _dockerfile(plan, image)
        | {
            "compose.yaml": manifests.compose(plan, image),
            "prepare.sh": _fill("compose/prepare.sh"),
        }
    )


def kubernetes(
    plan: Deployment, *, image: str, cpus: float = 1, memory: str = "", storage: str = "10Gi"
) -> Files:
    """Stateful sets with all around them, and a script that makes the secrets.

    Args:
        plan: the run.
        image: of all pods.
        cpus, memory: of a pod; "": as much as the plan has.
        storage: of a run folder.
    """
    memory = memory or f"{plan.memory_mb}Mi"
    _check_sizes(plan, cpus, memory, storage)
    stay = _fill("kubernetes/stay.sh", done=manifests.DONE)
    return (
        _with_keys(plan)
        | _dockerfile(plan, image)
        | {
            "offbeat.yaml": manifests.kubernetes(plan, image, cpus, memory, storage, stay),
            "apply.sh": _fill("kubernetes/apply.sh", plan=plan),
        }
    )


def kuberay(
    plan: Deployment, *, image: str, cpus: float = 1, memory: str = "", storage: str = "10Gi"
) -> Files:
    """A RayJob; arguments as of ``kubernetes``. Ray's own network is the cluster's: no keys."""
    memory = memory or f"{plan.memory_mb}Mi"
    _check_sizes(plan, cpus, memory, storage)
    entry = _fill("kuberay/entry.sh", plan=plan, run=f"{manifests.RUN}/{plan.name}")
    return _dockerfile(plan, image) | {
        "rayjob.yaml": manifests.kuberay(plan, image, cpus, memory, storage, entry)
    }


def ssh(plan: Deployment, *, folder: str) -> Files:
    """A launcher.

    Args:
        plan: the run, with hosts.
        folder: of the run on every host; relative to the home folder.
    """
    machines, hosts, nodes_of = _by_host(plan)
    remotes: dict[str, str] = {}
    commands: dict[str, list[str]] = {}
    for host in hosts:
        remotes |= {node: host.remote for node in nodes_of[host.name]}
        for node in host.nodes():
            keys = f"keys/{node.name}"
            if plan.peers:
                commands[node.name] = plan.peer("hosts.toml", node.name, keys, f"run-{node.name}")
            else:
                server = server_endpoint(machines)
                commands[node.name] = plan.join(server, node.name, keys, node.device)
    port = None
    if not plan.peers:
        port = machines.serving().port
        commands[SERVER] = plan.serve(port, f"keys/{SERVER}", "run")
    return _with_keys(plan) | {
        "hosts.toml": machines.toml(),
        "keep.sh": _fill("shared/keep.sh"),
        "launch.sh": _fill(
            "ssh/launch.sh",
            plan=plan,
            dir=folder,
            remotes=remotes,
            commands={node: shlex.join(words) for node, words in commands.items()},
            port=port,
        ),
    }


def _with_keys(plan: Deployment, program: str = "offbeat") -> Files:
    """The experiment, and the script that makes keys with ``program`` of the machine it is on."""
    keys = _fill("shared/keys.sh", plan=plan, program=program)
    return {"experiment.toml": plan.text, "keys.sh": keys}


def _dockerfile(plan: Deployment, image: str) -> Files:
    return {
        "Dockerfile": _fill(
            "shared/Dockerfile",
            plan=plan,
            image=image,
            uid=manifests.UID,
            version=version("offbeat"),
            cpu_base=CPU_BASE,
            cuda_base=CUDA_BASE,
            ray=version("ray") if plan.engine == "ray" else None,
        ),
        ".dockerignore": "*\n!wheels\n!files\n",
        "wheels/README": "Wheels that no index has; see ../Dockerfile.\n",
    }


def _by_host(plan: Deployment) -> tuple[Hosts, list[Host], dict[str, list[str]]]:
    """All hosts, those that have something to do, and the names of what runs on each."""
    if plan.hosts is None:
        raise ConfigError("give the machines, as --nodes hosts.toml")
    server = None if plan.peers else plan.hosts.serving()
    nodes_of = {
        host.name: [SERVER] * (host is server) + [node.name for node in host.nodes()]
        for host in plan.hosts.hosts
    }
    busy = [host for host in plan.hosts.hosts if nodes_of[host.name]]
    return plan.hosts, busy, nodes_of


def _any_cuda(hosts: list[Host]) -> bool:
    return any(host.device != "cpu" and host.slots for host in hosts)


def _check_sizes(plan: Deployment, cpus: float, memory: str, storage: str) -> None:
    if not 0 < cpus <= 1024:
        raise ConfigError(f"--cpus must be above 0 and at most 1024, not {cpus}")
    for option, size in (("--memory", memory), ("--storage", storage)):
        if not re.fullmatch(r"[1-9]\d*(\.\d+)?(Ki|Mi|Gi|Ti)", size):
            raise ConfigError(f'{option}: "{size}" is no size; write 4Gi or 512Mi')
    if len(plan.participants) > MOST_PODS:
        raise ConfigError(f"{len(plan.participants)} pods; at most {MOST_PODS}")


def write(files: Mapping[str, str | Path], folder: Path, *, overwrite: bool = False) -> None:
    """Write or copy files into ``folder``; scripts can be executed.

    Raises:
        ConfigError: one of them is there already, and is not to be replaced.
        StorageError: the folder cannot be written.
    """
    there = [name for name in files if (folder / name).exists()]
    if there and not overwrite:
        raise ConfigError(
            f"{folder}: already has {there[0]}; give another --out, or --overwrite, which leaves "
            "keys and runs alone"
        )
    try:
        for name, source in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(source, str):
                path.write_text(source)
            else:
                shutil.copyfile(source, path)
            path.chmod(0o755 if name.endswith(".sh") else 0o644)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written ({error.strerror})") from None
