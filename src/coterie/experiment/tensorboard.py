"""TensorBoard event files, as an option: `run.tensorboard = true` and the extra `coterie[tensorboard]`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from coterie.core import ConfigError


def board(folder: Path, version: int) -> Callable[[Mapping[str, Any]], None]:
    """Return a function that writes one metrics row to `folder`/tensorboard.

    version: that the run goes on from; later steps of an earlier stretch are purged.
    Raises ConfigError when TensorBoard is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  an extra
    except ImportError:
        raise ConfigError(
            "run.tensorboard = true: TensorBoard is not installed", "pip install 'coterie[tensorboard]'"
        ) from None
    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=version + 1)

    def write(row: Mapping[str, Any]) -> None:
        flat = {f"clients/{name}": value for name, value in row["clients"].items()}
        flat |= {f"bytes/{name}": value for name, value in row["bytes"].items()}
        flat |= {name: row[name] for name in ("loss", "accuracy", "train_loss") if name in row}
        for name, value in flat.items():
            writer.add_scalar(name, value, row["version"])
        writer.flush()

    return write
