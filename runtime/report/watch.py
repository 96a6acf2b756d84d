"""Following a job that is running: from its files, so that it need not know."""

import json
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from offbeat.runtime.base.errors import ConfigError, OffbeatError
from offbeat.runtime.experiment.experiment import read_toml
from offbeat.runtime.experiment.metrics import METRICS, said
from offbeat.runtime.report import recorded, report
from offbeat.runtime.studies import study as studies
from offbeat.runtime.studies.lines import read_cells
from offbeat.runtime.studies.table import REACHED

BARS = "▁▂▃▄▅▆▇█"
SPARKS = 40  # evaluations in a sparkline
HOST = "127.0.0.1"  # who is on this machine, and nobody else
SHOWN = ("time_s", "step", "loss", "accuracy", "consensus", "bytes", "staleness_mean", "busy")


def follow(folder: Path, every_s: float, console: Console) -> None:
    """Show a run, a comparison or a study in the terminal until it has ended, or Ctrl-C."""
    try:
        with Live(console=console, refresh_per_second=4) as live:
            while True:
                shown, ended = look(folder)
                live.update(shown)
                if ended:
                    return
                time.sleep(every_s)
    except KeyboardInterrupt:
        return


def look(folder: Path) -> tuple[Group, bool]:
    """What there is to see, and whether it has ended.

    Raises:
        ConfigError: the folder holds no job.
    """
    if not folder.is_file() and (folder / studies.FILE).exists():
        return _study(folder)
    parts = recorded.parts(folder)
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("run", no_wrap=True)
    table.add_column("done", justify="right")
    rows = []
    for part in parts:
        path = part / "metrics.jsonl"
        rows.append(recorded.rows(path) if path.exists() else [])
    keys = [key for key in SHOWN if any(row and key in row[-1] for row in rows)]
    for key in keys:
        table.add_column(METRICS[key].column, justify="right", no_wrap=True)
    table.add_column("loss so far", no_wrap=True)
    ended = True
    for part, metrics in zip(parts, rows, strict=True):
        whole = (part / "summary.json").exists()
        ended = ended and whole
        last = metrics[-1] if metrics else {}
        cells = [said(key, last[key]) if key in last else "" for key in keys]
        fraction = 1.0 if whole else _fraction(part, last)
        line = sparkline([row["loss"] for row in metrics if "loss" in row])
        table.add_row(part.name, f"{fraction:.0%}", *cells, line)
    return Group(table), ended


def _fraction(folder: Path, last: dict[str, Any]) -> float:
    """How much of a run is done, by whichever of its ends is nearest."""
    stop = read_toml(folder / "experiment.toml")["stop"]
    ends = {of: stop.get(key) for key, of in REACHED.items()}
    return min(1.0, max((last.get(key, 0) / end for key, end in ends.items() if end), default=0.0))


def _study(folder: Path) -> tuple[Group, bool]:
    study = studies.Study.read(folder / studies.FILE, build=False)
    done = read_cells(folder)
    missing, wanted = study.plan(done)
    failed = [line for line in done.values() if "error" in line]
    text = Text(f"{study.name}: {len(done):,} runs done, {len(missing):,} to go")
    if len(wanted) < len(study.settings()) * len(study.seeds):
        text.append(", and those of the settings that are being tuned")
    if failed:
        text.append(f"; {len(failed)} failed, the last: {failed[-1]['error']}", style="red")
    return Group(text), not missing


def sparkline(values: list[float]) -> str:
    """The last values as a row of bars.

    >>> sparkline([4.0, 3.0, 1.0, 1.0])
    '█▆▁▁'
    """
    values = values[-SPARKS:]
    low, high = min(values, default=0.0), max(values, default=0.0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in values)


def serve(folder: Path, port: int, every_s: float, say: Callable[[str], None]) -> None:
    """Serve the report of ``folder`` on this machine, made anew at each look, until Ctrl-C."""
    server = make_server(folder, port, every_s)
    say(f"http://{HOST}:{server.server_port}/  (Ctrl-C ends it)")
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


def make_server(folder: Path, port: int, every_s: float) -> ThreadingHTTPServer:
    """A server on the loopback address that knows two pages: ``/`` and ``/data.json``.

    Raises:
        ConfigError: the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        """Answers with the report as it is now."""

        def do_GET(self) -> None:
            """The page, or what it asks for."""
            # A name that leads here from a page elsewhere (DNS rebinding) is not ours.
            name = self.headers.get("Host", "").rsplit(":", 1)[0]
            if name not in (HOST, "localhost"):
                return self._answer(HTTPStatus.FORBIDDEN, "text/plain", "only for this machine")
            if self.path not in ("/", "/data.json"):
                return self._answer(HTTPStatus.NOT_FOUND, "text/plain", "there is / and /data.json")
            try:
                found = report.data([folder], every_s)
            except OffbeatError as error:  # nothing is recorded yet, or a file is being replaced
                return self._answer(
                    HTTPStatus.SERVICE_UNAVAILABLE, "text/plain; charset=utf-8", str(error)
                )
            if self.path == "/":
                return self._answer(HTTPStatus.OK, "text/html; charset=utf-8", report.page(found))
            return self._answer(
                HTTPStatus.OK, "application/json", json.dumps(found, allow_nan=False)
            )

        def _answer(self, code: int, kind: str, text: str) -> None:
            body = text.encode()
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            if code == HTTPStatus.SERVICE_UNAVAILABLE:
                self.send_header("Refresh", f"{every_s:g}")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Nothing: requests are of no interest."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise ConfigError(f"port {port} cannot be used ({error.strerror}); take --port 0") from None
