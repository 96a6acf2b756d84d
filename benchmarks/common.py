"""What every benchmark shares: ``--quick``, where and when it ran, the JSON line at the end."""

import argparse
import datetime
import json
import os
import platform
from typing import Any

import numpy as np

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def arguments(about: str, **options: dict[str, Any]) -> argparse.Namespace:
    """The command line of a benchmark; ``options`` are further arguments of argparse."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="under a minute")
    for name, how in options.items():
        parser.add_argument(name if how.pop("positional", False) else f"--{name}", **how)
    return parser.parse_args()


def where() -> str:
    """Machine, versions and day, for the head of a report."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            cpu = next(line.split(":")[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        pass
    threads = os.environ.get(THREADS[1], "all")
    return (
        f"{datetime.date.today()}, {os.cpu_count()} x {cpu}, Python {platform.python_version()}, "
        f"numpy {np.__version__}, {threads} BLAS thread(s)"
    )


def finish(figures: dict[str, Any], targets: dict[str, bool]) -> None:
    """Print the JSON line and exit: 0 if every target is met."""
    ok = all(targets.values())
    print(json.dumps({"figures": figures, "targets": targets, "ok": ok}))
    raise SystemExit(0 if ok else 1)
