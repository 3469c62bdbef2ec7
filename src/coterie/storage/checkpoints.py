"""Checkpoints: the newest few versions of everything a run needs to go on."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coterie.core.errors import RunError
from coterie.core.types import Tree
from coterie.storage.files import load_tree, make_folder, remove_temporary, save_tree

_log = logging.getLogger("coterie")


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints in a folder, one file a version; one process writes, any number may read."""

    folder: Path
    keep: int = 2  # more than one, so that a damaged newest file does not end the run

    def save(self, number: int, tree: Tree, meta: Mapping[str, Any]) -> int:
        """Write checkpoint `number` atomically, then keep the newest `keep` up to it; return the oldest kept.

        Higher numbers go too: they are of a future that this run went back from.
        Raises RunError when it cannot be written; the older checkpoints stay.
        """
        make_folder(self.folder)
        save_tree(self.folder / f"round-{number:06d}.safetensors", tree, meta)
        numbers = self._files()
        kept = sorted(n for n in numbers if n <= number)[-self.keep :]
        for n, path in numbers.items():
            if n not in kept:
                path.unlink(missing_ok=True)
        remove_temporary(self.folder)
        return kept[0]

    def latest(self) -> tuple[int, Tree, dict[str, Any]] | None:
        """Load the newest checkpoint that is whole: (number, tree, meta); None when there is none.

        A damaged one is skipped with a warning. Changes nothing, so a reader may call it during the run.
        """
        for number, path in sorted(self._files().items(), reverse=True):
            try:
                return number, *load_tree(path)
            except RunError as error:
                _log.warning("skipping a checkpoint: %s", error.args[0])
        return None

    def _files(self) -> dict[int, Path]:
        found = (
            (re.fullmatch(r"round-(\d{6,})\.safetensors", p.name), p) for p in self.folder.glob("round-*")
        )
        return {int(match[1]): path for match, path in found if match}
