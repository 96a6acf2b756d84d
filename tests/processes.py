"""The command line in a process of its own."""

import subprocess
import sys
import time


def command(*words):
    return [sys.executable, "-m", "offbeat.runtime.cli", *words]


def start(*words, **options):
    return subprocess.Popen(
        command(*words), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def wait_for(condition, process, limit_s=60.0):
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("checkpoint/*.safetensors"))
