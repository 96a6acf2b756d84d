"""What tests of deployment share: experiments, host files, and a stand-in for the program."""

import sys
from pathlib import Path

from typer.testing import CliRunner

from offbeat.runtime.commands.cli import app

SERVER = """
pace = 0.05
[task]
name = "quadratic"
dim = 4
[fleet]
workers = 3
[stop]
steps = 60
[algorithm]
name = "pure"
"""
QUADRATIC = 'name = "quadratic"\ndim = 4\n'
TORCH = 'name = "lm"\nlength = 8\nbatch = 1\nevaluated = 1\n'  # a task for GPUs
PEERS = 'topology = "ring"' + SERVER.replace('"pure"', '"dsgd"\nlr = 0.1')
SHAPES = {"server": SERVER, "peers": PEERS}
HOSTS = """
server = "head"
[[hosts]]
name = "head"
address = "10.0.0.1"
slots = 0
[[hosts]]
name = "gpu1"
address = "10.0.0.2"
slots = 2
device = "cuda"
ssh = "ops@gpu1"
[[hosts]]
name = "cpu1"
address = "fd00::3"
"""
BY_HOSTS = ("systemd", "ssh")
BY_COUNT = ("slurm", "compose", "kubernetes")

# Stands in for `offbeat`: makes keys that are none, writes down what else it is told, and waits.
STUB = f"""#!{sys.executable}
import os, signal, sys, time
from pathlib import Path

words = sys.argv[1:]
if words[:2] == ["keys", "new"]:
    name, folder = words[2], Path(words[words.index("--keys") + 1])
    if (folder / (name + ".key_secret")).exists():
        sys.exit(2)
    os.umask(0o022)
    (folder / (name + ".key")).write_text("public of " + name)
    with open(os.open(folder / (name + ".key_secret"), os.O_CREAT | os.O_WRONLY, 0o600), "w") as f:
        f.write("secret of " + name)
    sys.exit(0)
keys = Path(words[words.index("--keys") + 1])
secret = next(keys.glob("*.key_secret"))
assert secret.stat().st_mode & 0o077 == 0, "others can read it"
log = open(os.environ["STUB_LOG"], "a", buffering=1)
node = secret.name.removesuffix(".key_secret")

if words[0] == "status":
    log.write(node + " asked: " + " ".join(words) + "\\n")
    sys.exit(0)

def end(*_):
    log.write(node + " stopped\\n")
    sys.exit(int(os.environ.get("STUB_END", "0")))

signal.signal(signal.SIGTERM, end)
log.write(node + " started: " + " ".join(words) + "\\n")
if code := os.environ.get("STUB_CODE_" + node.replace("-", "_")):
    sys.exit(int(code))
time.sleep(float(os.environ.get("STUB_S", "60")))
log.write(node + " done\\n")
"""


def deploy(folder: Path, recipe: str, shape: str, *options: str, text: str | None = None) -> Path:
    """The folder that ``offbeat deploy RECIPE`` writes, in ``folder``."""
    file, hosts, out = folder / "run.toml", folder / "hosts.toml", folder / recipe
    if not hosts.exists():
        hosts.write_text(HOSTS)
    cuda = recipe in BY_HOSTS and "cuda" in hosts.read_text()
    task = TORCH if cuda or "cuda" in options else QUADRATIC
    file.write_text((text or SHAPES[shape]).replace(QUADRATIC, task))
    nodes = ["--nodes", str(hosts)] if recipe in BY_HOSTS else []
    words = ["deploy", recipe, str(file), *nodes, "--out", str(out), *options]
    done = CliRunner().invoke(app, words, catch_exceptions=False, standalone_mode=False)
    print(done.output, end="")
    return out


def program(folder: Path, name: str, text: str) -> Path:
    """An executable ``name`` in ``folder``."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path
