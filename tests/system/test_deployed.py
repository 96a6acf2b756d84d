"""Rendered scripts at work, on this machine; the cluster's programs are stand-ins on PATH."""

import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import deploying
import psutil
import pytest

from offbeat.deploy import render
from offbeat.deploy.hosts import read_hosts

WAIT_S = 40.0


def until(what, most_s=WAIT_S):
    end_s = time.monotonic() + most_s
    while not (found := what()):
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.02)
    return found


class Machine:
    """Programs, a home folder, and the log in which the stand-in for offbeat writes."""

    def __init__(self, folder):
        self.bin, self.home, self.log = folder / "bin", folder / "home", folder / "log"
        self.home.mkdir()
        self.log.touch()
        deploying.program(self.bin, "offbeat", deploying.STUB)
        self.env = os.environ | {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "STUB_LOG": str(self.log),
        }

    def program(self, name, text):
        deploying.program(self.bin, name, text)

    def call(self, *words, **more):
        done = subprocess.run(
            list(map(str, words)), capture_output=True, text=True, timeout=90,
            env=self.env | more,
        )  # fmt: skip
        return done.returncode, done.stdout, done.stderr

    def lines(self, pattern):
        return re.findall(pattern, self.log.read_text(), re.MULTILINE)


@pytest.fixture
def machine(tmp_path):
    made = Machine(tmp_path)
    yield made
    for process in psutil.process_iter(["cwd"]):  # only what a test left running
        if (process.info["cwd"] or "").startswith(f"{made.home}/"):
            process.terminate()


# -- keep.sh ---------------------------------------------------------------------------------------


@pytest.fixture
def keep(tmp_path):
    return deploying.deploy(tmp_path, "ssh", "server") / "keep.sh"


@pytest.mark.parametrize("status", [0, 2, 3, 4, 7, 126, 127, 130])
def test_what_would_not_get_better_is_not_tried_again(status, keep, machine):
    code, _, said = machine.call(keep, "bash", "-c", f"exit {status}")
    assert (code, said) == (status, "")


def test_what_dies_is_started_again(keep, machine, tmp_path):
    script = f"echo x >>{tmp_path}/tries; [ $(wc -l <{tmp_path}/tries) -ge 3 ] || kill -KILL $$"
    code, _, said = machine.call(keep, "bash", "-c", script)
    assert code == 0
    assert (tmp_path / "tries").read_text() == "x\n" * 3
    assert re.findall(r"ended with (\d+), again in (\d) s", said) == [("137", "1"), ("137", "2")]


def test_sigterm_is_handed_on_once_and_the_status_handed_back(keep, machine, tmp_path):
    script = (
        f"trap 'echo t >>{tmp_path}/terms; exit 5' TERM; echo up >{tmp_path}/up; sleep 60 & wait"
    )
    with subprocess.Popen([keep, "bash", "-c", script], env=machine.env) as process:
        until((tmp_path / "up").exists)
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 5
    assert (tmp_path / "terms").read_text() == "t\n"


def test_what_does_not_leave_is_killed(keep, machine, tmp_path):
    keep.write_text(keep.read_text().replace("patience_s=60", "patience_s=1"))
    script = f"trap '' TERM; echo $$ >{tmp_path}/pid; while :; do sleep 0.1; done"
    with subprocess.Popen([keep, "bash", "-c", script], env=machine.env) as process:
        pid = until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip())
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 137
    assert not Path(f"/proc/{pid}").exists()


# -- ssh -------------------------------------------------------------------------------------------

# Runs the command here, in a home folder of the target's own, and notes whom it was for.
SSH = """#!/usr/bin/env bash
while [[ $1 == -o ]]; do shift 2; done
target=$1
shift
echo "$target" >>"$HOME/../targets"
[[ $target != *unreachable* ]] || exit 255
mkdir -p "$HOME/$target"
cd "$HOME/$target"
HOME="$HOME/$target" exec bash -c "$*"
"""


@pytest.fixture
def launch(machine, tmp_path):
    machine.program("ssh", SSH)

    def made(shape="server", *options, text=None, **stub):
        out = deploying.deploy(tmp_path, "ssh", shape, *options, text=text)
        return lambda *words: machine.call(out / "launch.sh", *words, **stub)

    return made


NODES = ("server", "gpu1-0", "gpu1-1", "cpu1")
TARGETS = {"server": "10.0.0.1", "gpu1-0": "ops@gpu1", "gpu1-1": "ops@gpu1", "cpu1": "fd00::3"}


def test_a_launch_from_keys_to_stop(launch, machine):
    call = launch()
    assert call("status")[0] == 1
    code, _, said = call("start")
    assert code == 1
    assert "server: nothing is there; first: ./launch.sh push server" in said
    code, _, said = call("push")
    assert code == 1
    assert "cpu1: has no keys; make them first: ./launch.sh keys" in said

    for _ in range(2):
        assert call("keys")[0] == 0
        code, said, _ = call("push")
        assert code == 0
        assert sorted(said.splitlines()) == sorted(
            f"{node}: pushed to {TARGETS[node]}" for node in NODES
        )
    secrets = {
        path.name.removesuffix(".key_secret"): path for path in machine.home.rglob("*.key_secret")
    }
    assert {node: path.parts[-5] for node, path in secrets.items()} == TARGETS
    for path in secrets.values():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700

    code, said, _ = call("start")
    assert code == 0
    assert len(re.findall("started, as", said)) == 4
    until(lambda: len(machine.lines("started: ")) == 4)
    assert machine.lines("^server started: (.*)") == [
        "serve experiment.toml --bind tcp://*:5555 --keys keys/server --out run"
    ]
    assert machine.lines("^gpu1-1 started: (.*)") == [
        "join tcp://10.0.0.1:5555 --keys keys/gpu1-1 --name gpu1-1 --device cuda:1"
    ]
    code, said, _ = call("start")  # again: nothing happens
    assert code == 0
    assert len(re.findall("runs already, as", said)) == 4
    code, said, _ = call("status")
    assert code == 0
    assert len(re.findall("runs on", said)) == 4
    assert call("live")[0] == 0
    assert machine.lines("asked: (.*)") == ["status tcp://127.0.0.1:5555 --keys keys/server"]

    assert call("stop", "gpu1-0")[0] == 0
    code, said, _ = call("status")
    assert code == 1
    assert "gpu1-0: does not run on ops@gpu1" in said
    assert call("start", "gpu1-0")[0] == 0
    until(lambda: len(machine.lines("^gpu1-0 started")) == 2)
    code, said, _ = call("stop")
    assert code == 0
    assert len(re.findall(": stopped", said)) == 4
    assert machine.lines("^(.*) stopped")[-1] == "server"  # last: jobs are handed back to it
    assert len(machine.lines("stopped")) == 5
    code, said, _ = call("stop")
    assert code == 0
    assert len(re.findall("is not running", said)) == 4
    assert len(machine.lines("started: ")) == 5


def test_what_is_pushed_again_replaces_what_was(launch, machine, tmp_path):
    call = launch()
    assert call("keys")[0] == 0
    assert call("push")[::2] == (0, "")
    (tmp_path / "ssh" / "keys" / "server" / "authorized" / "cpu1.key").unlink()
    (tmp_path / "ssh" / "experiment.toml").write_text("new")
    run = machine.home / "10.0.0.1" / "offbeat-run"
    (run / "run").mkdir()
    assert call("push", "server")[0] == 0
    known = {path.name for path in (run / "keys" / "server" / "authorized").iterdir()}
    assert known == {"server.key", "gpu1-0.key", "gpu1-1.key"}
    assert (run / "experiment.toml").read_text() == "new"
    assert {path.name for path in run.iterdir()} == {"experiment.toml", "keep.sh", "keys", "run"}


def test_a_program_that_is_not_there_is_said(launch, machine, tmp_path):
    call = launch("server", "--offbeat", "~/offbeat/bin/offbeat", "--dir", "~/runs")
    machine.program("offbeat", deploying.STUB)
    assert [call(word)[0] for word in ("keys", "push")] == [0, 0]
    code, _, said = call("start", "cpu1")
    assert code == 1
    assert "cpu1: fd00::3 has no ~/offbeat/bin/offbeat; install offbeat there" in said
    assert (machine.home / "fd00::3" / "runs" / "keys").is_dir()  # ~ is the home folder there
    code, said, _ = call("logs", "cpu1")
    assert (code, said) == (0, "cpu1: no log yet\n")


def test_peers_are_launched_with_the_host_file(launch, machine):
    call = launch("peers")
    assert [call(word)[0] for word in ("keys", "push", "start")] == [0, 0, 0]
    until(lambda: len(machine.lines("started: ")) == 3)
    assert machine.lines("^cpu1 started: (.*)") == [
        "peer experiment.toml --hosts hosts.toml --node cpu1 --keys keys/cpu1 --out run-cpu1"
    ]
    assert (machine.home / "fd00::3" / "offbeat-run" / "hosts.toml").is_file()
    assert call("stop")[0] == 0


def test_a_worker_that_dies_comes_back(launch, machine):
    call = launch()
    assert [call(word)[0] for word in ("keys", "push", "start")] == [0, 0, 0]
    until(lambda: len(machine.lines("started: ")) == 4)
    (pid,) = [
        int(path.name)
        for path in Path("/proc").iterdir()
        if path.name.isdigit() and _words(path)[1:2] == [str(machine.bin / "offbeat")]
        and "keys/cpu1" in _words(path)
    ]  # fmt: skip
    os.kill(pid, signal.SIGKILL)
    until(lambda: len(machine.lines("^cpu1 started")) == 2)
    assert call("status")[0] == 0
    said = call("logs", "cpu1")[1]
    assert "cpu1: keep.sh: ended with 137, again in 1 s" in said
    assert call("stop")[0] == 0


def _words(process):
    try:
        return (process / "cmdline").read_text().split("\0")
    except OSError:
        return []


def test_what_a_killed_keeper_left_is_found_and_stopped(launch, machine):
    call = launch()
    assert [call(word)[0] for word in ("keys", "push", "start")] == [0, 0, 0]
    until(lambda: len(machine.lines("started: ")) == 4)
    (keeper,) = re.findall(r"runs on fd00::3, as (\d+)", call("status", "cpu1")[1])
    os.kill(int(keeper), signal.SIGKILL)
    until(lambda: f"as {keeper}" not in call("status", "cpu1")[1])
    assert "cpu1: runs already, as" in call("start", "cpu1")[1]
    assert "cpu1: stopped" in call("stop", "cpu1")[1]
    assert machine.lines("^cpu1 stopped") == ["cpu1 stopped"]
    assert call("stop")[0] == 0


def test_a_process_that_is_somebody_elses_is_left_alone(launch, machine):
    call = launch()
    assert [call(word)[0] for word in ("keys", "push")] == [0, 0]
    there = machine.home / "fd00::3" / "offbeat-run"
    other = subprocess.Popen(["sleep", "60"], cwd=there)
    try:
        assert "cpu1: is not running" in call("stop", "cpu1")[1]
        assert "started" in call("start", "cpu1")[1]
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
    assert call("stop", "cpu1")[0] == 0


def test_one_machine_that_cannot_be_reached(launch, machine, tmp_path):
    (tmp_path / "hosts.toml").write_text(deploying.HOSTS.replace("ops@gpu1", "ops@unreachable"))
    call = launch()
    assert call("keys")[0] == 0
    code, said, _ = call("push")
    assert code == 1
    assert sorted(re.findall(r"^(\S+): pushed", said, re.MULTILINE)) == ["cpu1", "server"]


def test_unknown_nodes_and_commands(launch):
    call = launch()
    assert call("start", "w9")[::2] == (
        2, "launch.sh: no node is called w9; known: server gpu1-0 gpu1-1 cpu1\n"
    )  # fmt: skip
    code, said, _ = call("restart")
    assert code == 2
    assert "start    start what is not running" in said


# The program itself, over the loopback device.
REAL = {"server": ("serve", "join", "keys"), "peers": ("peer", "keys")}


@pytest.mark.parametrize("shape", REAL)
def test_a_real_run_from_keys_to_its_end(shape, launch, machine, tmp_path):
    import typer

    from offbeat.runtime.commands.cli import app

    commands = typer.main.get_command(app).commands
    if missing := [name for name in REAL[shape] if name not in commands]:
        pytest.skip(f"this build has no offbeat {', '.join(missing)}")
    run = f'#!/bin/sh\nexec {sys.executable} -m offbeat.runtime.commands.cli "$@"\n'
    machine.program("offbeat", run)
    port = 20000 + os.getpid() % 10000
    (tmp_path / "hosts.toml").write_text(
        f'server = "a"\nport = {port}\n[[hosts]]\nname = "a"\naddress = "127.0.0.1"\n'
        f'[[hosts]]\nname = "b"\naddress = "127.0.0.2"\nport = {port + 8}\nslots = 2\n'
    )
    read = {
        "edges.txt": "0 1\n1 2\n",
        "times.csv": "0,1\n1,1\n2,1\n",
        "a.svm": "0 1:1\n1 1:2\n" * 3,
    }
    for name, lines in read.items():
        (tmp_path / name).write_text(lines)
    text = deploying.SHAPES[shape].replace(
        "workers = 3",
        f"""workers = 3
speeds = "trace('{tmp_path}/times.csv')\"""",
    )
    part = f"b-connected(of=\"file('{tmp_path}/edges.txt')\", parts=1)"
    text = text.replace('"ring"', f"'''{part}'''")
    data = f'name = "logistic"\ndata = "{tmp_path}/a.svm"\n'
    call = launch(shape, text=text.replace(deploying.QUADRATIC, data))
    for name in read:
        (tmp_path / name).unlink()  # they are brought
    assert [call(word)[0] for word in ("keys", "push", "start")] == [0, 0, 0]
    runs = {"server": 4, "peers": 3}[shape]
    try:
        until(lambda: len(re.findall("does not run", call("status")[1])) == runs, 3 * WAIT_S)
    finally:
        call("stop")
    said = call("logs")[1]
    assert "keep.sh" not in said  # nothing died
    folders = [path.parent for path in machine.home.rglob("metrics.jsonl")]
    assert len(folders) == {"server": 1, "peers": 3}[shape], said


# -- Slurm -----------------------------------------------------------------------------------------

# One machine with as many tasks as are asked for; signals reach all of them.
SRUN = """#!/usr/bin/env bash
tasks=$SLURM_NTASKS
while [[ $1 == --* ]]; do
    [[ $1 != --ntasks=* && $1 != --het-group=0 ]] || tasks=1
    shift
done
pids=()
for ((task = 0; task < tasks; task++)); do
    SLURM_PROCID=$task SLURM_LOCALID=$task SLURM_STEP_ID=$$ SLURMD_NODENAME=node1 "$@" &
    pids+=($!)
done
trap 'kill -TERM "${pids[@]}" 2>/dev/null' TERM
failed=0
for pid in "${pids[@]}"; do
    wait "$pid"; status=$?
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; status=$?; done
    ((status <= failed)) || failed=$status
done
exit $failed
"""


@pytest.fixture
def sbatch(machine, tmp_path):
    machine.program("srun", SRUN)
    machine.program("scontrol", f'#!/bin/sh\necho "$*" >>{tmp_path}/scontrol\necho node1\n')
    machine.program(
        "scancel", f'#!/bin/sh\necho "$*" >>{tmp_path}/scancel\nkill -TERM "${{1#*.}}"\n'
    )
    machine.program("sbcast", '#!/bin/sh\n[ ! -e "$2" ] && cp -p "$1" "$2"\n')

    begun = []

    def made(shape, *options, **stub):
        out = deploying.deploy(tmp_path, "slurm", shape, "--per-machine", "4", *options)
        computing = shape == "peers" or "cuda" in options
        job = str(10_000_000 + os.getpid())
        env = machine.env | {
            "SLURM_JOB_ID": job, "SLURM_SUBMIT_DIR": str(out), "SLURMD_NODENAME": "node1",
            "SLURM_NTASKS": "3" if computing else "4",
        } | stub  # fmt: skip
        process = subprocess.Popen(
            ["bash", str(out / "offbeat.sbatch")], env=env, cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        )  # fmt: skip
        begun.append(process)
        return process, Path(f"/tmp/offbeat-{job}-0"), out

    yield made
    for process in begun:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def port_of(local, each):
    """The first port of a job with ``each`` of them on a machine."""
    return render.FIRST_PORT + int(local.name.split("-")[1]) % (render.PORTS // each) * each


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("shape", deploying.SHAPES)
def test_a_slurm_job_runs_to_its_end_and_leaves_no_keys(shape, device, sbatch, machine):
    process, local, out = sbatch(shape, "--device", device, STUB_S="0.5")
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    port = port_of(local, 4 if (shape, device) == ("server", "cpu") else 3)
    started = dict(machine.lines("^(.*) started: (.*)"))
    if shape == "server":
        assert started.keys() == {"server", "w0", "w1", "w2"}
        assert f"--bind tcp://*:{port} " in started["server"]
        assert started["w2"].startswith(f"join tcp://node1:{port} --keys {local}/own/w2 ")
    else:
        assert started.keys() == {"n0", "n1", "n2"}
        nodes = read_hosts(out / "hosts.toml").nodes()
        assert [(n.name, n.address, n.port) for n in nodes] == [
            (f"n{i}", "node1", port + i) for i in range(3)
        ]
    assert len(machine.lines("done$")) == len(started)
    assert not local.exists()
    assert not local.with_suffix(".tar").exists()
    assert not list(out.rglob("*.key*"))  # never on the shared file system


@pytest.mark.parametrize("shape", deploying.SHAPES)
def test_a_slurm_job_passes_over_ports_that_are_taken(shape, sbatch, machine):
    first = port_of(Path(f"/tmp/offbeat-{10_000_000 + os.getpid()}-0"), 3)
    with ExitStack() as taken:
        for port in (first, first + 1):
            taken.enter_context(socket.create_server(("", port)))
        process, _, out = sbatch(shape, "--device", "cuda", STUB_S="0.5")
        said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    if shape == "server":
        assert machine.lines(rf"^server started: .* --bind tcp://\*:{first + 2} ")
    else:
        ports = [node.port - first for node in read_hosts(out / "hosts.toml").nodes()]
        assert ports == [3, 4, 2]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_slurm_job_at_its_limit_is_queued_again(device, sbatch, machine, tmp_path):
    process, local, _ = sbatch("server", "--device", device)
    until(lambda: len(machine.lines("started: ")) == 4)
    process.send_signal(signal.SIGUSR1)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert len(machine.lines("stopped$")) == 4
    assert f"requeue {local.name.split('-')[1]}" in (tmp_path / "scontrol").read_text()
    assert not local.exists()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_server_that_cannot_serve_ends_the_slurm_job(device, sbatch, machine, tmp_path):
    process, local, _ = sbatch("server", "--device", device, STUB_CODE_server="2")
    said = process.communicate(timeout=60)[0]
    assert process.returncode != 0, said
    assert not (tmp_path / "scontrol").exists()  # it is not queued again
    if device == "cpu":
        assert (tmp_path / "scancel").read_text().startswith(local.name.split("-")[1] + ".")
    assert not local.exists()


# -- systemd, Kubernetes, Compose ------------------------------------------------------------------


def test_units_are_installed_on_the_hosts_they_are_for(machine, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    machine.env["TMPDIR"] = str(temporary)
    machine.program("ssh", SSH)
    machine.program("sudo", '#!/bin/sh\nexec "$@"\n')
    for name in ("install", "systemctl", "useradd"):
        machine.program(name, f'#!/bin/sh\necho {name} "$@" >>{tmp_path}/done\n')
    program = str(machine.bin / "offbeat")
    monkeypatch.setattr(render, "HIDDEN", ("/home/",))  # of which this is none
    out = deploying.deploy(tmp_path, "systemd", "server", "--offbeat", program)
    code, _, told = machine.call(out / "push.sh")
    assert (code, told) == (2, "server: has no keys; make them first: ./keys.sh\n")
    assert machine.call(out / "keys.sh")[0] == 0
    mine = machine.home / "10.0.0.1" / "offbeat-run"  # where the ssh launcher has its runs
    mine.mkdir(parents=True)
    code, said, told = machine.call(out / "push.sh")
    assert code == 0, told
    assert said == "head:\ngpu1:\ncpu1:\n"
    done = (tmp_path / "done").read_text()
    assert re.findall("systemctl restart (.*)", done) == [
        "offbeat-run-server.service",
        "offbeat-run-worker@gpu1-0.service offbeat-run-worker@gpu1-1.service",
        "offbeat-run-worker@cpu1.service",
    ]
    private = re.findall(
        r"install -m 0600 -o offbeat (\S+secret) /etc/offbeat/run/keys/(\S+)/", done
    )
    assert private == [(f"keys/{node}/{node}.key_secret", node) for node in NODES]
    assert mine.is_dir()
    assert not list(temporary.iterdir())  # what was brought was removed
    machine.program("sudo", "#!/bin/sh\nexit 1\n")
    assert machine.call(out / "push.sh")[0] == 1
    assert not list(temporary.iterdir())
    code, _, told = machine.call(out / "install.sh", "nowhere")
    assert (code, told) == (2, "install.sh: which host is this? known: head, gpu1, cpu1\n")


@pytest.mark.parametrize("shape", deploying.SHAPES)
def test_secrets_are_applied_before_what_needs_them(shape, machine, tmp_path):
    real = shutil.which("kubectl")
    if real is None:
        pytest.skip("kubectl is not installed")
    machine.program(
        "kubectl",
        f'#!/bin/sh\n[ "$1" = apply ] || exec {real} "$@"\necho "$*" >>{tmp_path}/applied\n'
        f'case "$*" in *=-*) cat >>{tmp_path}/secrets; echo --- >>{tmp_path}/secrets ;; esac\n',
    )
    out = deploying.deploy(tmp_path, "kubernetes", shape)
    code, _, told = machine.call(out / "apply.sh", "--namespace", "training")
    assert code == 0, told
    applied = (tmp_path / "applied").read_text().splitlines()
    assert all("--namespace training" in line for line in applied)
    assert applied[-1].endswith("--filename=offbeat.yaml")
    import yaml

    secrets = {
        secret["metadata"]["name"]: set(secret["data"])
        for secret in yaml.safe_load_all((tmp_path / "secrets").read_text())
        if secret
    }
    workers = [f"run-worker-{i}" for i in range(3)]
    peers = [f"run-peer-{i}" for i in range(3)]
    if shape == "server":
        assert secrets == {
            "run-server-keys": {"server.key", "server.key_secret", *(f"{w}.key" for w in workers)},
            "run-worker-keys": {"server.key", *(f"{w}.key_secret" for w in workers)},
        }
    else:
        both = {f"{peer}.{kind}" for peer in peers for kind in ("key", "key_secret")}
        assert secrets == {"run-peer-keys": both}


@pytest.fixture
def stay(tmp_path):
    import yaml

    out = deploying.deploy(tmp_path, "kubernetes", "server")
    config = next(yaml.safe_load_all((out / "offbeat.yaml").read_text()))
    done = tmp_path / "done"
    return deploying.program(
        tmp_path / "bin", "stay.sh", config["data"]["stay.sh"].replace("/tmp/done", str(done))
    ), done  # fmt: skip


def test_a_pod_that_is_done_stays_until_it_is_stopped(stay, machine):
    script, done = stay
    with subprocess.Popen([script, "true"], env=machine.env, stdout=subprocess.DEVNULL) as process:
        until(done.exists)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0


def test_a_pod_that_fails_or_is_stopped_says_so(stay, machine):
    script, done = stay
    assert machine.call(script, "sh", "-c", "exit 6")[0] == 6
    command = "trap 'kill $! 2>&1; exit 130' TERM; kill -TERM $PPID; sleep 60 >&- 2>&- & wait"
    assert {machine.call(script, "sh", "-c", command)[0] for _ in range(10)} == {130}
    assert not done.exists()


def test_compose_is_prepared(machine, tmp_path):
    out = deploying.deploy(tmp_path, "compose", "server")
    assert machine.call(out / "prepare.sh")[0] == 0
    assert (out / ".env").read_text() == f"OFFBEAT_UID={os.getuid()}\nOFFBEAT_GID={os.getgid()}\n"
    import yaml

    for secret in yaml.safe_load((out / "compose.yaml").read_text())["secrets"].values():
        assert (out / secret["file"]).is_file()
