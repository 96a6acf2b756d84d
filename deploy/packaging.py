"""Build hook: the five source folders share one import name, ``offbeat``.

A wheel gets ``offbeat/__init__.py`` from ``runtime/root.py``.  An editable install
gets ``build/editable/offbeat``, a folder of symlinks to the same files, so that
Python, editors and type checkers agree.
"""

import os
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT_FILES = {
    "runtime/root.py": "offbeat/__init__.py",
    "runtime/extend.py": "offbeat/extend.py",
    "runtime/py.typed": "offbeat/py.typed",
}


class OneNamespace(BuildHookInterface):
    """Lays out one ``offbeat`` package over the source folders."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before a build of kind ``version``."""
        if self.target_name != "wheel":
            return
        if version != "editable":
            build_data["force_include"].update(ROOT_FILES)
            return
        for source, target in {**self.build_config.target_config["sources"], **ROOT_FILES}.items():
            link = Path(self.root, "build", "editable", target)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(os.path.relpath(Path(self.root, source), link.parent))
