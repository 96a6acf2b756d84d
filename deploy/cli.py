"""`offbeat deploy` and `offbeat doctor`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from offbeat.deploy import render
from offbeat.deploy.hosts import PORT, read_hosts
from offbeat.deploy.manifests import EXPERIMENT, FILES
from offbeat.deploy.plan import SHIPPED, Deployment, image, plan, word
from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.base.logs import at_terminal

deploy = typer.Typer(help="Write files that bring a run to other machines.", no_args_is_help=True)
WIDE = 140  # characters a line, where no terminal says
console = Console(width=None if at_terminal() else WIDE, highlight=False, markup=False)

File = Annotated[Path, typer.Argument(metavar="EXPERIMENT.toml", help="An experiment of one run.")]
Out = Annotated[Path | None, typer.Option(help="The folder to write (else NAME-RECIPE).")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")]
Run = Annotated[str | None, typer.Option("--name", help="Of the run (else the file's).")]
Count = Annotated[
    int | None, typer.Option("--nodes", help="Workers, or peers (else as many as it has).")
]
Machines = Annotated[Path, typer.Option("--nodes", metavar="HOSTS.toml", help="A host file.")]
Device = Annotated[str, typer.Option(help="cpu, or cuda: one GPU a node.")]
Port = Annotated[int, typer.Option(min=1, max=65535, help="Of the server, or of each peer.")]
Program = Annotated[str, typer.Option(help="The offbeat program there, a name or a path.")]
Image = Annotated[
    str, typer.Option("--image", help="Of the containers; there is a Dockerfile for it.")
]
Cpus = Annotated[float, typer.Option(help="Of each pod; else as the run may need.")]
Memory = Annotated[str, typer.Option(help="Of each pod; else as the run may need.")]
Storage = Annotated[str, typer.Option(help="For the run's folder.")]
IMAGE = "offbeat:latest"
COLOURS = {"good": "green", "note": "yellow", "wrong": "bold red"}


@deploy.command()
def slurm(
    file: File,
    nodes: Count = None,
    per_machine: Annotated[int, typer.Option(help="Tasks on one machine.")] = 1,
    cpus: Annotated[int, typer.Option(min=1, help="Of each task.")] = 1,
    time: Annotated[str, typer.Option(help="Limit of the job; it is queued again.")] = "1-00:00:00",
    partition: Annotated[str | None, typer.Option(help="Of the cluster.")] = None,
    device: Device = "cpu",
    offbeat: Program = "offbeat",
    name: Run = None,
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """A job script: the server on the first machine, keys made anew, queued again at its limit."""
    made = plan(file, nodes=nodes, run=name, device=device, offbeat=offbeat)
    files = render.slurm(made, per_machine=per_machine, cpus=cpus, time=time, partition=partition)
    _write(made, "slurm", files, out, overwrite, "sbatch offbeat.sbatch")


@deploy.command()
def systemd(
    file: File,
    nodes: Machines,
    user: Annotated[str, typer.Option(help="As whom nodes run.")] = "offbeat",
    offbeat: Program = "/opt/offbeat/bin/offbeat",
    name: Run = None,
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """Units: a server, and workers or peers as instances; restarted, and locked in."""
    made = plan(
        file,
        nodes=read_hosts(nodes),
        run=name,
        offbeat=offbeat,
        place=f"/etc/offbeat/{{run}}/{SHIPPED}",
    )
    files = render.systemd(made, user=user)
    _write(made, "systemd", files, out, overwrite, "./keys.sh && ./push.sh")


@deploy.command()
def compose(
    file: File,
    nodes: Count = None,
    image_: Image = IMAGE,
    device: Device = "cpu",
    port: Port = PORT,
    name: Run = None,
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """Containers of one machine: Compose file, Dockerfile, keys as secrets."""
    made = plan(
        file, nodes=nodes, run=name, device=device, port=port, experiment=EXPERIMENT, place=FILES
    )
    files = render.compose(made, image=image(image_))
    _write(
        made,
        "compose",
        files,
        out,
        overwrite,
        "./prepare.sh && docker compose build && docker compose up",
    )


@deploy.command()
def kubernetes(
    file: File,
    nodes: Count = None,
    image_: Image = IMAGE,
    cpus: Cpus = 1,
    memory: Memory = "",
    storage: Storage = "10Gi",
    device: Device = "cpu",
    port: Port = PORT,
    name: Run = None,
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """Stateful sets, headless service, disruption budgets, probes; keys as secrets."""
    made = plan(
        file,
        nodes=nodes,
        run=name,
        prefix=("{run}-worker-", "{run}-peer-"),
        device=device,
        port=port,
        experiment=EXPERIMENT,
        place=FILES,
    )
    files = render.kubernetes(made, image=image(image_), cpus=cpus, memory=memory, storage=storage)
    _write(made, "kubernetes", files, out, overwrite, f"{_built(device, image_)} && ./apply.sh")


@deploy.command()
def kuberay(
    file: File,
    nodes: Count = None,
    image_: Image = IMAGE,
    cpus: Cpus = 1,
    memory: Memory = "",
    storage: Storage = "10Gi",
    device: Device = "cpu",
    name: Run = None,
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """A RayJob, for engine = "ray"."""
    made = plan(
        file, nodes=nodes, run=name, engine="ray", device=device, experiment=EXPERIMENT, place=FILES
    )
    files = render.kuberay(made, image=image(image_), cpus=cpus, memory=memory, storage=storage)
    then = f"{_built(device, image_)} && kubectl apply -f rayjob.yaml"
    _write(made, "kuberay", files, out, overwrite, then)


@deploy.command()
def ssh(
    file: File,
    nodes: Machines,
    folder: Annotated[
        str | None, typer.Option("--dir", help="There (else offbeat-NAME in the home folder).")
    ] = None,
    offbeat: Program = "offbeat",
    name: Run = None,
    out: Out = None,
    overwrite: Overwrite = False,
) -> None:
    """A launcher over a host file: keys, push, start, stop, status, logs."""
    there = "offbeat-{run}" if folder is None else word(folder, "--dir")
    place = f"{there if there[0] in '/~' else '~/' + there}/{SHIPPED}"
    made = plan(file, nodes=read_hosts(nodes), run=name, offbeat=offbeat, place=place)
    files = render.ssh(made, folder=there.format(run=made.name))
    _write(
        made,
        "ssh",
        files,
        out,
        overwrite,
        "./launch.sh keys && ./launch.sh push && ./launch.sh start",
    )


def _built(device: str, image: str) -> str:
    return f"docker build --target offbeat-{device} --tag {image} . && docker push {image}"


def doctor(
    file: Annotated[Path, typer.Argument(metavar="HOSTS.toml", help="A host file.")],
    experiment: Annotated[
        Path | None, typer.Option(help="Of the run; with --from-all, in --dir on every host, too.")
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(help="A folder of keys, or of such, one a node; with --from-all, in --dir."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Which of the hosts this machine is.")] = None,
    from_all: Annotated[
        bool, typer.Option("--from-all", help="Look from every host, over ssh; the run must rest.")
    ] = False,
    folder: Annotated[str, typer.Option("--dir", help="Of the run, on every host.")] = ".",
    offbeat: Program = "offbeat",
    json_: Annotated[bool, typer.Option("--json", help="One line of JSON, for programs.")] = False,
    listen: Annotated[
        bool, typer.Option("--listen", help="Listen for the doctors of other hosts.", hidden=True)
    ] = False,
) -> None:
    """Say what stands in the way of a run on these machines, and what to mend; 2 if something."""
    from offbeat.deploy import doctor as office
    from offbeat.deploy import everywhere

    hosts = read_hosts(file)
    if experiment is not None and office.is_gossip(experiment):
        hosts = hosts._replace(server=None)
    if from_all:
        found = everywhere.everywhere(
            hosts,
            offbeat=word(offbeat, "--offbeat"),
            folder=word(folder, "--dir"),
            keys=None if keys is None else word(str(keys), "--keys"),
            experiment=None if experiment is None else word(str(experiment), "--experiment"),
        )
    else:
        here = office.this_host(hosts, host)
        if json_ or listen:
            if here is None:
                raise ConfigError("this machine is none of the hosts, or several; give --host NAME")
            if listen:
                return everywhere.listen(hosts, here)
            return print(everywhere.report(hosts, here, keys, experiment))
        found = office.look(hosts, here, keys=keys, experiment=experiment)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in ("from", "check", "", "found", "mend"):
        table.add_column(title, overflow="fold")
    for one in found:
        table.add_row(one.host, one.check, Text(one.state, COLOURS[one.state]), one.said, one.mend)
    console.print(table)
    wrong = sum(one.state == "wrong" for one in found)
    console.print(f"{wrong} of {len(found)} checks found something wrong")
    if wrong:
        raise typer.Exit(ConfigError.exit_code)


def _write(
    made: Deployment, recipe: str, files: render.Files, out: Path | None, overwrite: bool, then: str
) -> None:
    folder = out or Path(f"{made.name}-{recipe}")
    files = {**files, **made.files}
    render.write(files, folder, overwrite=overwrite)
    for note in made.notes:
        console.print(f"note: {note}", soft_wrap=True)
    if any(Path(path).parts[0] == "wheels" for path in files):
        console.print(
            "note: unless an index of yours has it, give the image its offbeat: pip wheel "
            f"--no-deps --wheel-dir {shlex.quote(str(folder / 'wheels'))} PATH-OF-OFFBEAT",
            soft_wrap=True,
        )
    if "docker push" in then and "/" not in then.rpartition("docker push ")[2].split()[0]:
        console.print("note: to push the image, say where: --image REGISTRY/offbeat:0.1.0")
    console.print(f"{made.about}: {len(files)} files in {folder}", soft_wrap=True)
    console.print(f"next: cd {shlex.quote(str(folder))} && {then}", soft_wrap=True)
