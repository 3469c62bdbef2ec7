"""The model of a run that brings its code, as its server sees it: in a process of its own.

The server holds keys and everybody's runs, so what travelled is not loaded there. A child assembles the run
and answers three questions: what the model begins as, how good a model is, and what a baseline comes to.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import connection
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from coterie.core.errors import ConfigError, CoterieError, RunError
from coterie.core.types import Tree
from coterie.experiment.assemble import assemble, load_dataset
from coterie.experiment.baselines import BASELINES
from coterie.experiment.child import Child, Parent, how
from coterie.experiment.code import Environment
from coterie.experiment.config import Config, load, to_dict
from coterie.storage import Blobs
from coterie.storage.files import make_folder

READY = 120.0  # seconds in which a child must have loaded code and data
DEATHS = 3  # in a row, after which the run fails
Numbers = dict[str, int | float]


@dataclass(frozen=True)
class Job:
    """What the child is told first. folder: of what is installed here; blobs: where models are exchanged."""

    config: dict[str, Any]
    folder: Path
    code: Path
    blobs: Path
    data_dir: Path | None


class Said(BaseModel):
    """What the child says. refused: why the run cannot be assembled. note: what it does, before an answer."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    refused: str = ""
    hint: str = ""
    note: str = ""
    initial: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    task: Literal["classification", "regression"] = "classification"
    trainer: str = ""
    measured: Numbers | None = None
    baseline: dict[str, int | float | Numbers | list[int | float] | list[Numbers]] | None = None


class Away:
    """Stands for the run's Problem and trainer; close it by `with`. For one thread, but for `end`.

    config: its folder is where what is installed here starts. scratch: a folder to work in. Raises
    ConfigError with what the code raises when it is loaded.
    """

    def __init__(self, config: Config, code: Environment, scratch: Path, data_dir: Path | None) -> None:
        make_folder(scratch)
        self.scratch = tempfile.TemporaryDirectory(prefix=".run-", dir=scratch)
        self.home = Path(self.scratch.name)
        self.blobs, self.code = Blobs(self.home / "blobs"), code
        self.job = Job(
            to_dict(config), config.folder, code.folder.absolute(), self.blobs.folder.absolute(), data_dir
        )
        self.ending: CoterieError | None = None
        try:
            told = self._start()
            self.task, self.name, self.note = told.task, told.trainer, told.note
            self.initial = _model(self.blobs, told.initial)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the child, and remove what it worked with."""
        self.child.end()
        self.scratch.cleanup()

    def end(self, error: CoterieError) -> None:
        """Have whoever waits for an answer get this error. From any thread."""
        self.ending = error
        self.child.kill()

    def check(self, inputs: Tensor, targets: Tensor, classes: int | None) -> None:
        """The child has checked it when it assembled the run."""

    def measure(self, model: Tree, inputs: Tensor, targets: Tensor) -> dict[str, float]:  # noqa: ARG002
        """As `Problem.measure`; the child has the same rows."""
        told = self._ask(("measure", self.blobs.write(model, lasting=False).digest))
        self.blobs.keep(())
        return {name: value for name, value in (told.measured or {}).items() if name in ("loss", "accuracy")}

    def baseline(self, name: str, samples: int, rounds: int, note: Callable[[str], None]) -> dict[str, Any]:
        """As `baselines.BASELINES`, by name."""
        return dict(self._ask((name, samples, rounds), note).baseline or {})

    def _ask(self, question: Any, note: Callable[[str], None] = lambda text: None) -> Said:
        """What it answers. A child that dies is replaced, and asked again. Raises RunError."""
        for _ in range(DEATHS):
            with suppress(EOFError, OSError, ValidationError):
                self.child.send(question)
                while (told := self._next()).note:
                    note(told.note)
                return told
            code = self.child.end()
            self._start()
        raise RunError(f"the code of the run died {DEATHS} times while it was asked ({how(code)})")

    def _start(self) -> Said:
        self.child, self.said = Child("away", self.job, self.home, self.code), list[bytes]()
        if self.ending is None and not connection.wait([self.child.pipe], READY):
            raise ConfigError(f"the code that travels with the run was not loaded after {READY:g} s")
        try:
            told = self._next()
        except (EOFError, OSError, ValidationError) as error:
            said = f"the code that travels with the run ends its process ({how(self.child.end())})"
            raise ConfigError(said) from error
        if told.refused:
            raise ConfigError(f"the code that travels with the run: {told.refused}", told.hint)
        return told

    def _next(self) -> Said:
        if self.ending is not None:
            raise self.ending
        while not self.said:
            try:
                self.said += self.child.lines()
            except EOFError:
                if self.ending is not None:
                    raise self.ending from None
                raise
        return Said.model_validate_json(self.said.pop(0))


def live(handle: int) -> None:
    """The child's life: assemble, then answer."""
    parent = Parent(handle)
    job: Job = parent.hear()
    blobs = Blobs(job.blobs)
    try:
        config = replace(load(job.config), folder=job.code, system={})  # devices are real here
        torch.set_num_threads(config.run["threads"])
        dataset = load_dataset(replace(config, folder=job.folder), job.data_dir)
        os.chdir(job.blobs.parent)
        parts = assemble(config, data_dir=job.data_dir, dataset=dataset)
    except CoterieError as error:
        parent.tell(refused=str(error.args[0]), hint=error.hint)
        return
    except Exception as error:
        parent.tell(refused=f"{type(error).__name__}: {error}")
        return
    initial = blobs.write(parts.initial, lasting=False).digest
    parent.tell(initial=initial, task=parts.problem.task, trainer=parts.trainer.name, note=parts.note)
    with suppress(EOFError, OSError):
        while True:
            what, *given = parent.hear()
            if what == "measure":
                parent.tell(measured=parts.problem.measure(blobs.read(given[0]), *parts.test))
            else:
                samples, rounds = given
                made = BASELINES[what](parts, samples, rounds, lambda text: parent.tell(note=text))
                parent.tell(baseline=made)


def _model(blobs: Blobs, digest: str | None) -> Tree:
    """The initial model; it comes from the child, so it is looked at. Raises RunError."""
    model = blobs.read(digest) if digest else None
    parts = [model.get(name) for name in ("params", "buffers")] if isinstance(model, dict) else [None]
    for part in parts:
        if not isinstance(part, dict) or not all(isinstance(leaf, Tensor) for leaf in part.values()):
            raise RunError("the code that travels with the run gives no model")
    return model
