"""The doctor on every host of a host file at once, over ssh.

All hosts listen where their nodes would, while one after the other looks at itself and at the way
to the others; then what they told is compared.
"""

import json
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from offbeat.deploy.doctor import (
    CONNECT_S,
    DOCTOR,
    Finding,
    Found,
    digest,
    ears,
    fingerprint,
    listening,
    look,
    public_keys,
    versions,
)
from offbeat.deploy.hosts import Host, Hosts

LISTEN_S = 600.0  # that a host listens for the others, at most
SSH_S = 90.0  # for a host's own checks
SKEW_S = 1.0  # between clocks that is worth a word: it makes logs hard to read, nothing else
SENT = "doctor.hosts.toml"  # the host file, as it is sent along


def listen(hosts: Hosts, here: Host) -> None:
    """Listen where the nodes of ``here`` would, until standard input ends.

    What was found is printed as a line of JSON first, so that who waits knows that it listens.
    """
    found = Found(here.name)
    with ExitStack() as stack:
        for ear in ears(hosts, here):
            server = stack.enter_context(listening(found, ear))
            if server is not None:
                threading.Thread(target=_answer, args=(server,), daemon=True).start()
        print(json.dumps([finding._asdict() for finding in found.all]), flush=True)
        select.select([sys.stdin], [], [], LISTEN_S)


def _answer(server: socket.socket) -> None:
    """Greets who connects, until the socket is closed."""
    while True:
        try:
            one, _ = server.accept()
        except OSError:  # closed: that is the end
            return
        with one:
            one.settimeout(CONNECT_S)
            try:
                one.sendall(DOCTOR)
                while one.recv(2**20):
                    pass
            except OSError:  # it went, or is too slow: its matter
                continue


def report(hosts: Hosts, here: Host, keys: Path | None, experiment: Path | None) -> str:
    """What a host tells who asked: findings, versions, public keys and settings, as JSON."""
    findings = look(hosts, here, keys=keys, experiment=experiment, bind=False)
    broken = any(one.check == "experiment" and one.state == "wrong" for one in findings)
    said = {
        "findings": [finding._asdict() for finding in findings],
        "versions": versions(),
        "keys": public_keys(hosts, here, keys) if keys is not None else {},
        "settings": fingerprint(experiment) if experiment is not None and not broken else {},
    }
    return json.dumps(said, default=str)


def everywhere(
    hosts: Hosts, *, offbeat: str, folder: str, keys: str | None, experiment: str | None
) -> list[Finding]:
    """What every host finds of itself and of the way to every other, and what tells them apart.

    Args:
        hosts: of the run.
        offbeat: the program there.
        folder: of the run there.
        keys, experiment: where they are in it, if they are to be looked at.
    """
    text = hosts.toml()
    begin = f"cd {folder} && {offbeat} doctor {SENT}"
    receive = f"mkdir -p {folder} && head -c {len(text.encode())} >{folder}/{SENT}"
    options = {"keys": keys, "experiment": experiment}
    more = "".join(f" --{name} {path}" for name, path in options.items() if path is not None)
    found: list[Finding] = []
    told: dict[str, dict[str, Any]] = {}
    with ExitStack() as stack:
        listeners = {
            host.name: _listener(host, text, f"{receive} && {begin} --host {host.name} --listen")
            for host in hosts.hosts
        }
        for process in listeners.values():
            stack.callback(_ended, process)
        ready = [host for host in hosts.hosts if _heard(found, host, listeners[host.name])]
        for host in ready:
            said = _asked(found, host, f"{begin} --host {host.name} --json{more}")
            if said is not None:
                told[host.name] = said
                found += [Finding(**finding) for finding in said["findings"]]
            _clock(found, host)
    compare(found, told)
    return found


def _ssh(host: Host, command: str) -> list[str]:
    return ["ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", host.remote, command]


def _listener(host: Host, text: str, command: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        _ssh(host, command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    with suppress(BrokenPipeError):  # why it ended is told when its answer is awaited
        process.stdin.write(text.encode())
        process.stdin.flush()
    return process


def _heard(found: list[Finding], host: Host, process: subprocess.Popen[bytes]) -> bool:
    """Whether a host listens; else why not is a finding."""
    assert process.stdout is not None
    assert process.stderr is not None
    ready, _, _ = select.select([process.stdout], [], [], SSH_S)
    line = process.stdout.readline() if ready else b""
    try:
        found += [Finding(**finding) for finding in json.loads(line)]
    except (ValueError, TypeError):
        process.kill()
        _failed(found, host, process.stderr.read().decode(errors="replace"))
        return False
    return True


def _ended(process: subprocess.Popen[bytes]) -> None:
    with suppress(BrokenPipeError, subprocess.TimeoutExpired):
        process.communicate(timeout=CONNECT_S)
    process.kill()
    process.communicate()


def _asked(found: list[Finding], host: Host, command: str) -> dict[str, Any] | None:
    try:
        done = subprocess.run(
            _ssh(host, command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SSH_S,
        )
        said: dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired:
        _failed(found, host, f"no answer in {SSH_S:g} s")
    except ValueError:
        _failed(found, host, done.stderr)
    else:
        return said
    return None


def _failed(found: list[Finding], host: Host, why: str) -> None:
    last = (why.strip() or "it said nothing").splitlines()[-1]
    said = f"{host.remote}: the doctor cannot look there ({last})"
    mend = f"let ssh {host.remote} in without a password, and have offbeat there (--offbeat PATH)"
    found.append(Finding(host.name, "ssh", "wrong", said, mend))


def _clock(found: list[Finding], host: Host) -> None:
    """Compare its clock with this one's, to within the time that asking takes."""
    before = time.time()
    done = subprocess.run(
        _ssh(host, "date +%s.%N"),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SSH_S,
    )
    after = time.time()
    try:
        there = float(done.stdout)
    except ValueError:
        return _failed(found, host, done.stderr)
    skew_s = max(before - there, there - after, 0.0)
    if skew_s > SKEW_S:
        said = f"its clock is {skew_s:,.1f} s away from the one here"
        mend = "let chrony or ntpd run; only the times in logs depend on it"
        found.append(Finding(host.name, "clock", "note", said, mend))
    return None


def compare(found: list[Finding], told: Mapping[str, Mapping[str, Any]]) -> None:
    """What hosts have to have in common; most of them are right."""
    if not told:
        return
    for package in next(iter(told.values()))["versions"]:
        have = {name: said["versions"][package] for name, said in told.items()}
        usual = max(have.values(), key=list(have.values()).count)
        state = "wrong" if package == "offbeat" else "note"
        found += [
            Finding(
                name,
                "versions",
                state,
                f"{package} {number}; others have {usual}",
                f"pip install {package}=={usual}",
            )
            for name, number in have.items()
            if number != usual
        ]
    own = {node: ring[node] for said in told.values() for node, ring in said["keys"].items()}
    found += [
        Finding(
            name,
            "keys",
            "wrong",
            f"{node} lists another public key of {other} than it has",
            f"bring {node} its keys again, or: offbeat keys authorize {other} {own[other]!r}",
        )
        for name, said in told.items()
        for node, ring in said["keys"].items()
        for other, key in ring.items()
        if own.get(other, key) != key
    ]
    marks = {name: digest(said["settings"]) for name, said in told.items() if said["settings"]}
    usual = max(marks.values(), key=list(marks.values()).count, default="")
    model: dict[str, Any] = next(
        (told[name]["settings"] for name, mark in marks.items() if mark == usual), {}
    )
    for name, mark in marks.items():
        if mark != usual:
            mine = told[name]["settings"]
            keys = sorted(k for k in {*model, *mine} if model.get(k) != mine.get(k))
            first = f"{keys[0]} is {mine.get(keys[0])}, elsewhere {model.get(keys[0])}"
            said = f"experiment.toml is {mark}, others have {usual}: {first}"
            found.append(Finding(name, "experiment", "wrong", said, "bring the same file to all"))
