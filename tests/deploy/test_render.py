"""What is rendered: read by the parsers of those it is for, and by our own command line."""

import json
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tomllib
from pathlib import Path

import deploying
import networkx as nx
import pytest
import typer
import yaml

import offbeat
from offbeat.deploy import cli, render
from offbeat.deploy import plan as plans
from offbeat.deploy.hosts import read_hosts
from offbeat.runtime.base.errors import ConfigError
from offbeat.runtime.commands.cli import app
from offbeat.runtime.experiment.experiment import from_table, read

BIN = Path(sys.executable).parent
COMMANDS = typer.main.get_command(app).commands
OURS = ("serve", "join", "peer", "status", "keys", "run", "resume", "doctor")
RECIPES = [
    (recipe, shape)
    for recipe in (*deploying.BY_COUNT, *deploying.BY_HOSTS)
    for shape in deploying.SHAPES
]
each_recipe = pytest.mark.parametrize(("recipe", "shape"), RECIPES)
each_shape = pytest.mark.parametrize("shape", deploying.SHAPES)


def tool(name):
    found = shutil.which(name) or shutil.which(name, path=str(BIN))
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def passes(*words, **options):
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


RAY = 'engine = {name = "ray", address = "auto", num_cpus = 1}\n' + deploying.SERVER


def rayjob(folder, *options):
    return deploying.deploy(folder, "kuberay", "server", *options, text=RAY)


# -- Parsers and validators ------------------------------------------------------------------------


def scripts(out):
    found = [p for p in out.rglob("*") if p.suffix in (".sh", ".sbatch")]
    assert found or out.name == "kuberay"
    return found


@each_recipe
def test_scripts_are_bash_and_can_be_executed(recipe, shape, tmp_path):
    for path in scripts(deploying.deploy(tmp_path, recipe, shape)):
        passes("bash", "-n", str(path))
        if path.suffix == ".sh":
            assert stat.S_IMODE(path.stat().st_mode) == 0o755


@each_recipe
def test_shellcheck_finds_nothing(recipe, shape, tmp_path):
    paths = scripts(deploying.deploy(tmp_path, recipe, shape))
    passes(tool("shellcheck"), *map(str, paths))


@each_shape
@pytest.mark.parametrize("devices", ["cpu", "cuda"])
def test_units_pass_systemd(shape, devices, tmp_path):
    analyze = tool("systemd-analyze")
    (tmp_path / "hosts.toml").write_text(deploying.HOSTS.replace('"cuda"', f'"{devices}"'))
    out = deploying.deploy(tmp_path, "systemd", shape, "--offbeat", "/usr/bin/env")
    units = list(map(str, (out / "units").glob("*.service")))
    assert len(units) == (2 if shape == "server" else 1)
    assert passes(analyze, "verify", *units) == ""
    for unit in units:  # 0: nothing can be reached from it; 100: everything
        passes(analyze, "security", "--offline=true", "--threshold=25", unit)


@each_shape
def test_slurm_directives(shape, tmp_path):
    out = deploying.deploy(
        tmp_path, "slurm", shape, "--per-machine", "2", "--device", "cuda", "--time", "12:00:00",
        "--partition", "gpu",
    )  # fmt: skip
    head = (out / "offbeat.sbatch").read_text().split("set -euo")[0]
    parts = [
        dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", part, re.MULTILINE))
        for part in head.split("#SBATCH hetjob")
    ]
    assert sum(map(len, parts)) == head.count("#SBATCH --")
    *server, workers = (int(part.pop("mem").removesuffix("M")) for part in parts)
    assert workers >= 2 * plans.LEAST_MB  # of two tasks
    assert server == ([workers // 2] if shape == "server" else [])
    job = {
        "job-name": "run", "time": "12:00:00", "requeue": "", "signal": "B:USR1@180",
        "open-mode": "append", "output": "%x-%j.log",
    }  # fmt: skip
    computing = {
        "nodes": "2", "ntasks": "3", "ntasks-per-node": "2", "cpus-per-task": "1",
        "gpus-per-task": "1", "partition": "gpu",
    }  # fmt: skip
    serving = {"nodes": "1", "ntasks": "1", "cpus-per-task": "1", "partition": "gpu"}
    assert parts == ([job | serving, computing] if shape == "server" else [job | computing])


@pytest.mark.parametrize(("recipe", "options"), [("slurm", ["--device", "cuda"]), ("ssh", [])])
def test_no_gpu_is_asked_for_by_who_cannot_use_it(recipe, options, tmp_path):
    text = deploying.SERVER.replace("dim = 4", "dim = 5")
    with pytest.raises(ConfigError, match=r"run.toml: quadratic is computed by numpy, on the CPU"):
        deploying.deploy(tmp_path, recipe, "server", *options, text=text)
    own = text.replace("[fleet]", '[work]\nname = "own-loop"\n[fleet]')
    deploying.deploy(tmp_path, recipe, "server", *options, text=own)  # which has its own device


@each_shape
def test_slurm_steps_have_the_cpus_of_the_job(shape, tmp_path):
    """Since 22.05 srun takes them from its own command line only; the layout has to be one."""
    out = deploying.deploy(tmp_path, "slurm", shape, "--cpus", "4")
    steps = re.findall(r"^srun (.*)", (out / "offbeat.sbatch").read_text(), re.MULTILINE)
    assert len(steps) == (1 if shape == "server" else 2)
    assert all(step.startswith("--distribution=block --cpus-per-task=4 ") for step in steps)


@each_shape
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_kubernetes_documents_fit_their_schemas(shape, device, tmp_path):
    validator = pytest.importorskip("kubernetes_validate", reason="not installed")
    out = deploying.deploy(tmp_path, "kubernetes", shape, "--device", device)
    documents = list(yaml.safe_load_all((out / "offbeat.yaml").read_text()))
    assert len(documents) == (6 if shape == "server" else 4)
    for document in documents:
        validator.validate(document, "1.30", strict=True)
        if document["kind"] == "StatefulSet":
            (main,) = document["spec"]["template"]["spec"]["containers"]
            computes = document["metadata"]["name"] != "run-server"
            assert ("nvidia.com/gpu" in main["resources"]["limits"]) == (
                computes and device == "cuda"
            )


@each_shape
def test_a_pods_keys_can_be_copied_again(shape, tmp_path):
    """A new sandbox of the same pod begins anew, with the volume that was there."""
    out = deploying.deploy(tmp_path, "kubernetes", shape)
    made = list(yaml.safe_load_all((out / "offbeat.yaml").read_text()))[2]
    (container,) = made["spec"]["template"]["spec"]["initContainers"]
    command = [word.replace("/secret", str(tmp_path / "secret")) for word in container["command"]]
    command = [word.replace("/keys", str(tmp_path / "mine")) for word in command]
    (tmp_path / "secret").mkdir()
    for name in ("me.key_secret", "me.key", "other.key"):
        (tmp_path / "secret" / name).write_text(name)
        (tmp_path / "secret" / name).chmod(0o440)
    (tmp_path / "mine").mkdir()
    bound = [tool("setpriv"), "--bounding-set=-all"] if os.getuid() == 0 else []  # by modes
    for _ in range(2):
        passes(*bound, *command, env={"NODE": "me", "PATH": "/usr/bin:/bin"})
    own = tmp_path / "mine" / "own"
    assert stat.S_IMODE((own / "me.key_secret").stat().st_mode) & 0o377 == 0
    assert sorted(path.name for path in own.rglob("*.key")) == ["me.key", "other.key"]


@each_shape
def test_kubernetes_objects_fit_together(shape, tmp_path):
    out = deploying.deploy(tmp_path, "kubernetes", shape, "--port", "6000")
    objects = {}
    for document in yaml.safe_load_all((out / "offbeat.yaml").read_text()):
        objects.setdefault(document["kind"], []).append(document)
    (service,), (config,) = objects["Service"], objects["ConfigMap"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["ports"][0]["port"] == 6000
    labels = [made["spec"]["template"]["metadata"]["labels"] for made in objects["StatefulSet"]]
    for made in objects["StatefulSet"]:
        spec = made["spec"]
        pod = spec["template"]["spec"]
        assert spec["serviceName"] == service["metadata"]["name"]
        assert service["spec"]["selector"].items() <= spec["template"]["metadata"]["labels"].items()
        names = {volume["name"] for volume in pod["volumes"]}
        names |= {claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", [])}
        for container in pod["initContainers"] + pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= names
            assert container["securityContext"]["readOnlyRootFilesystem"]
        assert pod["volumes"][0]["configMap"]["name"] == config["metadata"]["name"]
        assert [spec["selector"]["matchLabels"] == label for label in labels].count(True) == 1
    for budget, made in zip(objects["PodDisruptionBudget"], objects["StatefulSet"], strict=True):
        assert budget["spec"]["selector"] == made["spec"]["selector"]
    files = config["data"]
    assert files["experiment.toml"] == deploying.SHAPES[shape]
    secrets = {
        volume["secret"]["secretName"]
        for made in objects["StatefulSet"]
        for volume in made["spec"]["template"]["spec"]["volumes"]
        if "secret" in volume
    }
    assert secrets == set(re.findall(r"^secret (\S+)", (out / "apply.sh").read_text(), re.M))
    if shape == "peers":
        (tmp_path / "made.toml").write_text(files["hosts.toml"])
        nodes = read_hosts(tmp_path / "made.toml").nodes()
        assert [node.endpoint for node in nodes] == [
            f"tcp://run-peer-{i}.run:6000" for i in range(3)
        ]


def test_rayjob(tmp_path):
    text = RAY.replace("num_cpus = 1", 'num_cpus = 1, num_gpus = 1, device = "cuda"')
    image = ["--image", "registry:5000/us/offbeat:1"]
    out = deploying.deploy(tmp_path, "kuberay", "server", "--device", "cuda", *image, text=text)
    _, claim, job = yaml.safe_load_all((out / "rayjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["replicas"] == 3
    head, worker = (
        group["template"]["spec"]["containers"][0] for group in (cluster["headGroupSpec"], workers)
    )
    assert "nvidia.com/gpu" in worker["resources"]["limits"]
    assert "nvidia.com/gpu" not in head["resources"]["limits"]
    volumes = cluster["headGroupSpec"]["template"]["spec"]["volumes"]
    assert {"claimName": claim["metadata"]["name"]} in [
        volume.get("persistentVolumeClaim") for volume in volumes
    ]
    validator = pytest.importorskip("kubernetes_validate", reason="not installed")
    for group in (cluster["headGroupSpec"], workers):  # RayJob itself is no type of Kubernetes
        pod = {
            "apiVersion": "v1",
            "kind": "PodTemplate",
            "metadata": {"name": "a"},
            "template": group["template"],
        }
        validator.validate(pod, "1.30", strict=True)


@pytest.mark.parametrize("there", [False, True])
def test_a_rayjob_goes_on_where_it_was(there, tmp_path):
    config, _, job = yaml.safe_load_all((rayjob(tmp_path) / "rayjob.yaml").read_text())
    folder = tmp_path / "run-folder"
    entry = config["data"]["entry.sh"].replace("/run-folder", str(folder))
    (tmp_path / "entry.sh").write_text(entry)
    entrypoint = job["spec"]["entrypoint"].replace("/config", str(tmp_path))
    if there:
        (folder / "run").mkdir(parents=True)
        (folder / "run" / "experiment.toml").touch()
    deploying.program(tmp_path, "offbeat", '#!/bin/sh\necho "$1"\n')
    path = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    said = passes(*shlex.split(entrypoint), env=path)
    assert said == ("resume\n" if there else "run\n")


@each_shape
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_compose_fits_together(shape, device, tmp_path):
    out = deploying.deploy(tmp_path, "compose", shape, "--device", device)
    document = yaml.safe_load((out / "compose.yaml").read_text())
    dockerfile = (out / "Dockerfile").read_text()
    for service in document["services"].values():
        assert {s["source"] for s in service["secrets"]} <= document["secrets"].keys()
        assert {c["source"] for c in service.get("configs", [])} <= document["configs"].keys()
        assert ("build" in service) == (service.get("pull_policy") != "never")
        own = [s["source"] for s in service["secrets"] if s["source"].endswith("_secret")]
        assert len(own) == 1
        assert service["healthcheck"]["test"][0] == "CMD"
        compile(service["healthcheck"]["test"][-1], "healthcheck", "exec")
    names = {"server", "w0", "w1", "w2"} if shape == "server" else {"n0", "n1", "n2"}
    assert document["services"].keys() == names
    gpus = {
        name: service["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
        for name, service in document["services"].items()
        if "deploy" in service
    }
    assert gpus == (
        {f"{'w' if shape == 'server' else 'n'}{i}": [str(i)] for i in range(3)}
        if device == "cuda"
        else {}
    )
    for config in document["configs"].values():
        assert (out / config["file"]).is_file()
    (build,) = [s["build"] for s in document["services"].values() if "build" in s]
    assert f"AS {build['target']}\n" in dockerfile


@each_shape
def test_all_files_that_an_experiment_reads_are_brought(shape, tmp_path, monkeypatch):
    """Relative paths, one of them in a part of a part, one a glob; each node finds its copy."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a $x.svm").write_text("".join(f"{i % 2} 1:{i} 2:1\n" for i in range(12)))
    (tmp_path / "edges.txt").write_text("0 1\n1 2\n2 0\n")
    (tmp_path / "times.csv").write_text("0,1\n1,1\n2,2\n")
    text = deploying.SHAPES[shape].replace("workers = 3", 'workers = 3\nspeeds = "trace:times.csv"')
    text = text.replace(deploying.QUADRATIC, 'name = "logistic"\ndata = "a $x.svm"\n')
    text = text.replace('"ring"', '''"dropout(of='file(edges.txt)', p=0.1)"''')
    (tmp_path / "hosts.toml").write_text(deploying.HOSTS.replace('"cuda"', '"cpu"'))
    places = {
        "slurm": "files", "systemd": "/etc/offbeat/run/files", "compose": "/files",
        "kubernetes": "/files", "ssh": "~/offbeat-run/files",
    }  # fmt: skip
    for recipe, place in places.items():
        out = deploying.deploy(tmp_path, recipe, shape, text=text)
        made = tomllib.loads((out / "experiment.toml").read_text())
        named = [made["task"]["data"], made["fleet"]["speeds"]]
        named += [made["topology"]] if "topology" in made else []
        found = [re.search(rf"{place}/(\w{{12}}/[\w. $]+)", one)[1] for one in named]
        originals = ["a $x.svm", "times.csv", "edges.txt"][: len(found)]
        assert [Path(one).name for one in found] == originals
        for name, one in zip(originals, found, strict=True):
            assert (out / "files" / one).read_bytes() == (tmp_path / name).read_bytes()
    services = yaml.safe_load((tmp_path / "compose/compose.yaml").read_text())["services"]
    mount = {"type": "bind", "source": "./files", "target": "/files", "read_only": True}
    assert all(mount in service["volumes"] for service in services.values())
    assert "\nCOPY files/ /files/\n" in (tmp_path / "kubernetes/Dockerfile").read_text()
    monkeypatch.chdir(tmp_path / "slurm")
    read_there = read(Path("experiment.toml"))[0].files()
    assert {tmp_path / "slurm" / "files" / one for one in found} == set(read_there)


def test_the_graph_that_a_run_left_is_brought(tmp_path, monkeypatch):
    """Its path is from the run's folder, not from where one is; below a home, from there."""
    offbeat.run("quadratic", "dsgd", "3", nx.path_graph(3), stop={"steps": 1}, folder=tmp_path)
    (tmp_path / "hosts.toml").write_text(deploying.HOSTS.replace('"cuda"', '"cpu"'))
    text = (tmp_path / "experiment.toml").read_text()
    made = [deploying.deploy(tmp_path, recipe, "peers", text=text) for recipe in ("slurm", "ssh")]
    monkeypatch.setenv("HOME", str(tmp_path))
    made[1].rename(tmp_path / "offbeat-run")
    (tmp_path / "graph.json").unlink()
    for out in (made[0], tmp_path / "offbeat-run"):
        graph = read(out / "experiment.toml")[0].topology.graph()
        assert sorted(graph.edges) == [(0, 1), (1, 2)]


def test_a_globs_files_are_brought_and_none_that_were_there_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "books").mkdir()
    text = deploying.SERVER.replace(
        deploying.QUADRATIC, deploying.TORCH + 'data = "text:books/*.txt"\n'
    )
    for name in ("a.txt", "b.txt"):
        (tmp_path / "books" / name).write_text("words and words " * 9)
    deploying.deploy(tmp_path, "slurm", "server", text=text)
    (tmp_path / "books" / "a.txt").unlink()
    out = deploying.deploy(tmp_path, "slurm", "server", "--overwrite", text=text)
    monkeypatch.chdir(out)
    assert [path.name for path in read(Path("experiment.toml"))[0].files()] == ["b.txt"]


@each_shape
def test_compose_passes_docker(shape, tmp_path):
    docker = tool("docker")
    if subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("this docker has no compose")
    out = deploying.deploy(tmp_path, "compose", shape)
    (out / ".env").write_text("OFFBEAT_UID=1000\nOFFBEAT_GID=1000\n")
    said = passes(docker, "compose", "config", "--format", "json", cwd=out)
    assert len(json.loads(said)["services"]) == (4 if shape == "server" else 3)


def test_dockerfile_stages(tmp_path):
    text = (deploying.deploy(tmp_path, "compose", "server") / "Dockerfile").read_text()
    known = {"FROM", "ENV", "RUN", "COPY", "USER", "WORKDIR", "STOPSIGNAL", "ENTRYPOINT"}
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line and line[0] != "#"]
    assert {line.split()[0] for line in lines} == known
    stages = [line.split()[1::2] for line in lines if line.startswith("FROM")]
    assert [made for _, made in stages] == ["cpu", "cuda", "offbeat-cpu", "offbeat-cuda"]
    assert [base for base, _ in stages][2:] == ["cpu", "cuda"]


@each_recipe
def test_experiments_and_host_files_are_read_back(recipe, shape, tmp_path):
    out = deploying.deploy(tmp_path, recipe, shape)
    (experiment,) = read(out / "experiment.toml")
    assert experiment.fleet.workers == 3
    if (made := out / "hosts.toml").exists():
        assert len(read_hosts(made).nodes()) == 3
        if recipe in deploying.BY_HOSTS:
            assert read_hosts(made) == read_hosts(tmp_path / "hosts.toml")


# -- Our own command line --------------------------------------------------------------------------


def in_yaml(value):
    """Every list of words that begins with a command of ours."""
    if isinstance(value, dict):
        for one in value.values():
            yield from in_yaml(one)
    elif isinstance(value, list):
        if value and value[0] in OURS:
            yield value
        for one in value:
            yield from in_yaml(one)


def in_text(text):
    """Every command line of ours in a script or unit."""
    for line in text.splitlines():
        if line.lstrip().startswith("#"):
            continue
        for found in re.findall(rf"\S*offbeat ((?:{'|'.join(OURS)}) [^|;&)]*)", line):
            told = found.split(" || ")[0].strip()
            if told[-1] in "'\"" and told.count(told[-1]) % 2:  # closes what began before it
                told = told[:-1]
            yield shlex.split(told)


def command_lines(out):
    found = []
    for path in out.rglob("*"):
        if path.suffix == ".yaml":
            for document in yaml.safe_load_all(path.read_text()):
                found += in_yaml(document)
        elif path.suffix in (".sh", ".sbatch", ".service"):
            found += in_text(path.read_text())
    return found


def parses(words):
    name, *rest = words
    command = COMMANDS[name]
    if hasattr(command, "commands"):
        name, *rest = rest
        command = command.commands[name]
    with command.make_context(name, list(rest)) as context:
        return context.params


@each_recipe
def test_command_lines_are_ours(recipe, shape, tmp_path):
    names = {"server": {"keys", "serve", "join"}, "peers": {"keys", "peer"}}[shape]
    if (recipe, shape) == ("ssh", "server"):
        names |= {"status"}
    found = command_lines(deploying.deploy(tmp_path, recipe, shape))
    assert {words[0] for words in found} == names
    missing = sorted(names - COMMANDS.keys())
    for words in found:
        if words[0] not in missing:
            assert parses(words)
    if missing:
        pytest.skip(f"this build has no offbeat {', '.join(missing)}")


def test_the_rayjobs_command_lines_are_ours(tmp_path):
    config, *_ = yaml.safe_load_all((rayjob(tmp_path) / "rayjob.yaml").read_text())
    found = list(in_text(config["data"]["entry.sh"]))
    assert [words[0] for words in found] == ["resume", "run"]
    assert parses(found[1])["file"] == Path("/config/experiment.toml")


# -- Secrets ---------------------------------------------------------------------------------------


@each_recipe
def test_keys_are_made_where_the_script_runs(recipe, shape, tmp_path):
    out = deploying.deploy(tmp_path, recipe, shape)
    before = {path: path.read_text() for path in out.rglob("*") if path.is_file()}
    assert not any("secret-key" in text for text in before.values())
    deploying.program(tmp_path, "offbeat", deploying.STUB)
    for _ in range(2):  # the second time changes nothing
        passes(str(out / "keys.sh"), env={"PATH": f"{tmp_path}:/usr/bin:/bin"})
    keys = out / "keys"
    nodes = sorted(path.name for path in keys.iterdir())
    assert len(nodes) == (4 if shape == "server" else 3)
    for path in keys.rglob("*"):
        if path.suffix != ".key" or "authorized" in path.parts:
            assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path
    for node in nodes:
        secrets = [path.name for path in (keys / node).rglob("*.key_secret")]
        assert secrets == [f"{node}.key_secret"]
        known = {path.stem for path in (keys / node / "authorized").iterdir()}
        if shape == "peers":
            assert known == set(nodes) - {node}
        else:  # the server knows its own, so that `offbeat status` may ask with it
            assert known == (set(nodes) if node == "server" else {"server"})
    assert all(path.read_text() == text for path, text in before.items())


# -- Mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "options", "said"),
    [
        ("slurm", ["--nodes", "4"], "fleet has 3 workers, so of 4 nodes 1 would have nothing"),
        ("slurm", ["--nodes", "0"], "--nodes must be from 1 to 4096, not 0"),
        ("slurm", ["--per-machine", "0"], "--per-machine must be from 1 to 100, not 0"),
        ("slurm", ["--time", "soon"], '"soon" is no time of Slurm; write 12:00:00'),
        ("slurm", ["--partition", "a b"], '"a b" is no name of a partition'),
        ("slurm", ["--name", "My run"], '"My run" is no name; take lower-case'),
        ("kubernetes", ["--name", "a" * 40], 'a-worker-2" is no name; take lower-case'),
        ("systemd", ["--offbeat", "/home/me/offbeat"], "so not /home/me/offbeat; put it"),
        ("slurm", ["--offbeat", "a; rm b"], "characters that scripts would have to quote"),
        ("slurm", ["--device", "tpu"], '--device must be cpu or cuda, not "tpu"'),
        ("systemd", ["--offbeat", "offbeat"], "units need the whole path of the program"),
        ("systemd", ["--user", "a b"], '"a b" is no name of a user'),
        ("ssh", ["--dir", "my runs"], '--dir: "my runs" has characters'),
        ("kubernetes", ["--image", "UP"], '"UP" names no image; write registry/name:tag'),
        ("kubernetes", ["--memory", "4 GB"], '"4 GB" is no size; write 4Gi'),
        ("kubernetes", ["--cpus", "0"], "--cpus must be above 0"),
        ("kuberay", [], 'kuberay runs what has engine = "ray"; this has "virtual"'),
    ],
)
def test_mistakes_are_one_sentence(recipe, options, said, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(said)):
        deploying.deploy(tmp_path, recipe, "server", *options)


@pytest.mark.parametrize("recipe", [*deploying.BY_COUNT, *deploying.BY_HOSTS])
def test_speeds_of_the_machines_themselves_need_no_engine_in_the_file(recipe, tmp_path):
    """As offbeat serve, which takes such a file."""
    text = deploying.SERVER.replace("workers = 3", 'workers = 3\nspeeds = "real"')
    out = deploying.deploy(tmp_path, recipe, "server", text=text)
    assert 'speeds = "real"' in (out / "experiment.toml").read_text()


def test_what_an_image_needs_is_told(tmp_path, capsys):
    deploying.deploy(tmp_path, "kubernetes", "server")
    said = capsys.readouterr().out
    assert re.search(r"pip wheel --no-deps --wheel-dir \S+/wheels PATH-OF-OFFBEAT", said)
    assert "say where: --image REGISTRY/offbeat:0.1.0" in said
    deploying.deploy(tmp_path, "kuberay", "server", "--image", "here/offbeat:1", text=RAY)
    assert "say where" not in capsys.readouterr().out


def test_names_that_files_suggest(tmp_path, capsys):
    for stem, made in (("My Run $x", "my-run-x"), ("a" * 39 + "-b", "a" * 39)):
        file = tmp_path / f"{stem}.toml"
        file.write_text(deploying.SERVER)
        cli.slurm(file, out=tmp_path / made)
        assert f"--job-name={made}\n" in (tmp_path / made / "offbeat.sbatch").read_text()
    (tmp_path / "2024.toml").write_text(deploying.SERVER)
    with pytest.raises(ConfigError, match=r'"2024" is no name; .*; give another, with --name'):
        cli.slurm(tmp_path / "2024.toml")
    capsys.readouterr()
    cli.slurm(file, out=tmp_path / "my runs")
    assert f"next: cd '{tmp_path}/my runs' && sbatch" in capsys.readouterr().out


def test_gossip_on_ray_has_pods_for_its_actors(tmp_path):
    text = RAY.splitlines()[0].replace("}", ", workers_per_actor = 3}\n") + deploying.PEERS
    out = deploying.deploy(tmp_path, "kuberay", "peers", text=text)
    config, _, job = yaml.safe_load_all((out / "rayjob.yaml").read_text())
    assert config["data"].keys() == {"experiment.toml", "entry.sh"}
    assert job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 1


def test_a_rayjob_with_gpus_has_actors_that_use_them(tmp_path):
    with pytest.raises(ConfigError, match=r'give \[engine\] num_gpus = 1 and device = "cuda"'):
        deploying.deploy(tmp_path, "kuberay", "server", "--device", "cuda", text=RAY)


def test_a_rayjob_joins_its_cluster(tmp_path, capsys):
    with pytest.raises(ConfigError, match="begins a Ray of its own; to join the cluster, give"):
        deploying.deploy(tmp_path, "kuberay", "server", text='engine = "ray"\n' + deploying.SERVER)
    text = RAY.replace(", num_cpus = 1", ", workers_per_actor = 2")
    deploying.deploy(tmp_path, "kuberay", "server", text=text)
    assert "engine.num_cpus is 0, so actors may be put on the head too" in capsys.readouterr().out
    job = list(yaml.safe_load_all((tmp_path / "kuberay" / "rayjob.yaml").read_text()))[-1]
    assert job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["replicas"] == 2
    with pytest.raises(ConfigError, match='deploy it with kuberay, or take "zmq"'):
        deploying.deploy(tmp_path, "slurm", "server", text=text)


def test_gossip_needs_all_its_nodes(tmp_path):
    with pytest.raises(ConfigError, match="graph has 3 nodes, but 2 are to take part"):
        deploying.deploy(tmp_path, "slurm", "peers", "--nodes", "2")


def test_one_run_a_deployment(tmp_path):
    text = deploying.SERVER.replace("[algorithm]", "[[algorithm]]")
    with pytest.raises(ConfigError, match="describes 2 runs; give a file of one"):
        deploying.deploy(
            tmp_path, "slurm", "server", text=text + '[[algorithm]]\nname = "random"\n'
        )


def test_a_method_with_a_server_needs_a_host_for_it(tmp_path):
    (tmp_path / "hosts.toml").write_text(deploying.HOSTS.replace('server = "head"', ""))
    with pytest.raises(ConfigError, match='say on which host it runs, as server = "head"'):
        deploying.deploy(tmp_path, "ssh", "server")


def test_fewer_workers_than_the_fleet_has_is_said(tmp_path, capsys):
    deploying.deploy(tmp_path, "slurm", "server", "--nodes", "2")
    assert "1 of them are away until they join" in capsys.readouterr().out


def test_files_are_not_replaced_unasked(tmp_path):
    out = deploying.deploy(tmp_path, "ssh", "server")
    (out / "keys").mkdir()
    (out / "keys" / "mine").write_text("kept")
    (out / "launch.sh").write_text("changed")
    with pytest.raises(ConfigError, match=r"already has experiment\.toml"):
        deploying.deploy(tmp_path, "ssh", "server")
    assert (out / "launch.sh").read_text() == "changed"
    deploying.deploy(tmp_path, "ssh", "server", "--overwrite")
    assert (out / "launch.sh").read_text().startswith("#!")
    assert (out / "keys" / "mine").read_text() == "kept"


def test_scripts_need_no_quotes(tmp_path):
    """What is filled in was checked: an option cannot become a command."""
    assert render._environment.autoescape is False
    for bad in ("$(reboot)", "`reboot`", "a b", "a;b", "a\nb", "'", '"', "-rf"):
        with pytest.raises(ConfigError):
            deploying.deploy(tmp_path, "ssh", "server", f"--dir={bad}")


@pytest.mark.parametrize("recipe", ["slurm", "systemd", "compose", "kubernetes"])
def test_every_node_has_a_limit_on_memory(recipe, tmp_path):
    """Of one number, for all of a machine's nodes in Slurm."""
    options = ["--per-machine", "2"] if recipe == "slurm" else []
    out = deploying.deploy(tmp_path, recipe, "server", *options)
    text = "\n".join(path.read_text() for path in out.rglob("*") if path.is_file())
    said = {
        "slurm": r"#SBATCH --mem=(\d+)M",
        "systemd": r"MemoryMax=(\d+)M",
        "compose": r"mem_limit: (\d+)m",
        "kubernetes": r"memory: (\d+)Mi",
    }
    (mb,) = set(re.findall(said[recipe], text))
    assert int(mb) >= plans.LEAST_MB * (2 if recipe == "slurm" else 1)


def test_limits_grow_with_the_model_and_its_workers():
    (small,) = from_table({"task": "quadratic(10)", "algorithm": "pure", "fleet": "8"})
    (large,) = from_table({"task": "quadratic(1000000)", "algorithm": "pure", "fleet": "8"})
    assert plans._memory_mb(small, []) == plans.LEAST_MB
    assert plans._memory_mb(large, []) == plans.LEAST_MB + 8 * 64
