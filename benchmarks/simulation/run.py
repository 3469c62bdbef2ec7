"""Coterie against pfl, Flower and a plain PyTorch loop: the same work, interleaved, in one run.

    python benchmarks/simulation/run.py                        everything (about an hour on two cores)
    python benchmarks/simulation/run.py --models softmax,mlp --systems pfl,loop,coterie --repeats 3
    python benchmarks/simulation/run.py --variant "mine: backend.trainer=vectorised, backend.workers=2"

Every system trains the same clients, from the same weights, on the same batches in the same order, and must
end with the same loss. All processes are started and warmed up first; then they take turns, one repetition
each, so that a machine that drifts is unfair to nobody. README.md says how to read the table.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import json
import os
import platform
import queue
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from environments import HERE, VENVS, python_of
from work import COHORT, MODELS

CORES = len(os.sched_getaffinity(0))
RESULTS = HERE / "results"

# glibc keeps and reuses freed memory instead of giving it back to the system. The same for every process.
MALLOC = {
    "MALLOC_TRIM_THRESHOLD_": str(4 << 30),
    "MALLOC_TOP_PAD_": str(64 << 20),
    "MALLOC_MMAP_MAX_": "0",
}


@dataclass(frozen=True)
class System:
    """A way to train. group: what --systems may call it. threads: OMP_NUM_THREADS of its processes."""

    script: str
    group: str
    options: dict[str, Any]
    environment: str = ""  # a rival's; "": the one that runs this file
    threads: int = 1
    precision: str = "float32"
    extra: bool = False  # only when asked for by its own name


def coterie(*settings: str, **more: Any) -> System:
    """A variant of Coterie. settings: as after --set."""
    return System("on_coterie.py", "coterie", {"set": list(settings)}, **more)


def pfl(threads: int = 1, processes: int = 1, **more: Any) -> System:
    """A setting of pfl. more: what `System` and on_pfl.py take."""
    options = {"threads": threads, "processes": processes}
    options |= {name: more.pop(name) for name in ("compile", "amp") if name in more}
    return System("on_pfl.py", "pfl", options, "pfl", threads, **more)


SYSTEMS = {
    "peak": System("on_peak.py", "peak", {"threads": CORES}, threads=CORES),
    "pfl": pfl(),
    "pfl-threads": pfl(threads=CORES),
    "pfl-processes": pfl(processes=CORES),
    "pfl-compiled": pfl(compile=True, extra=True),
    "pfl-bf16": pfl(processes=CORES, amp=True, precision="bfloat16", extra=True),
    "flower": System("on_flower.py", "flower", {"actors": CORES}, "flwr"),
    "loop": System("on_loop.py", "loop", {"processes": CORES}),
    "coterie": coterie(),
    "coterie-loop": coterie("backend.trainer=loop"),
    "coterie-vectorised": coterie("backend.trainer=vectorised"),
    "coterie-threads": coterie(f"backend.threads={CORES}"),
    "coterie-workers": coterie(f"backend.workers={CORES}"),
    "coterie-compiled": coterie(f"backend.workers={CORES}", "backend.compile=true"),
    "coterie-bf16": coterie(f"backend.workers={CORES}", "backend.precision=bfloat16", precision="bfloat16"),
}


class Failed(Exception):
    """A system's process ended, or said nothing for too long."""


class Process:
    """A running system, with all that it starts. It dies with the driver, and leaves nobody behind."""

    def __init__(self, name: str, system: System, work: Path, log: Path, timeout: float) -> None:
        self.name, self.system, self.log, self.timeout = name, system, log, timeout
        python = python_of(system.environment) if system.environment else Path(sys.executable)
        self.started = time.perf_counter()
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [str(python), str(HERE / system.script), str(work), json.dumps(system.options)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                bufsize=1,
                env=environment(system),
                cwd=work,
                start_new_session=True,
            )
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def hear(self) -> dict[str, Any]:
        """The next line that it says. Raises Failed with the end of its log."""
        try:
            line = self.lines.get(timeout=self.timeout)
        except queue.Empty:
            raise Failed(f"{self.name} said nothing for {self.timeout:.0f} s; its log: {self.log}") from None
        if line is None:
            tail = "\n    ".join(self.log.read_text(errors="replace").strip().splitlines()[-6:])
            raise Failed(f"{self.name} ended; its log, {self.log}, ends with:\n    {tail}")
        return json.loads(line)  # type: ignore[no-any-return]

    def go(self) -> dict[str, Any]:
        """Let it run its next rounds; what it says after them."""
        try:
            self.process.stdin.write("go\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]
        except BrokenPipeError:
            pass  # hear() says why
        return self.hear()

    def end(self) -> None:
        """Wait a little for it to end by itself, then kill it and everything that it started."""
        tree = descendants(self.process.pid)
        if self.process.stdin:
            self.process.stdin.close()
        try:
            self.process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pid in tree:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cpu(self) -> float:
        """CPU seconds that it and its descendants have used."""
        return sum(map(cpu_seconds, [self.process.pid, *descendants(self.process.pid)]))

    def _listen(self) -> None:
        for line in self.process.stdout:  # type: ignore[union-attr]
            self.lines.put(line)
        self.lines.put(None)


def environment(system: System) -> dict[str, str]:
    """The variables of every child: the driver's own, the malloc settings, and its number of threads."""
    dropped = ("PYTHON", "MALLOC_") if system.environment else ("MALLOC_",)  # a rival has its own packages
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    own = {"OMP_NUM_THREADS": str(system.threads), "MKL_NUM_THREADS": str(system.threads)}
    return {**kept, **MALLOC, **own, "TORCHINDUCTOR_CACHE_DIR": str(VENVS / "compiled")}


def descendants(pid: int) -> list[int]:
    """The processes below one, deepest last."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                after = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(after[1]), []).append(int(entry.name))
    found, level = [], [pid]
    while level:
        level = [child for each in level for child in parents.get(each, [])]
        found += level
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, 0 when it has gone."""
    try:
        after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(after[11]) + int(after[12])) / os.sysconf("SC_CLK_TCK")


def adopt() -> None:
    """Make orphans of our children our own children, for `sweep` (Linux)."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def sweep(seconds: float = 5) -> None:
    """Kill and collect whatever is left of our children's children. Our own have ended."""
    end = time.monotonic() + seconds
    while (left := descendants(os.getpid())) and time.monotonic() < end:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.02)


@dataclass
class Outcome:
    """What one system did on one model."""

    rates: list[float] = field(default_factory=list)  # clients a second, one a repetition
    start_seconds: float = 0.0
    warm_seconds: float = 0.0
    loss: float | None = None
    note: str = ""
    skipped: str = ""
    failed: str = ""

    def facts(self) -> dict[str, Any]:
        return {
            **vars(self),
            "median": statistics.median(self.rates) if self.rates else None,
        }


def measure(model: str, names: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """All systems on one model: start, warm up, take turns, compare losses."""
    rounds = options.rounds or MODELS[model].rounds
    allotments = [options.warm_up, *[rounds] * options.repeats, 1]
    folder = Path(tempfile.mkdtemp(prefix="bench-"))
    processes: dict[str, Process] = {}
    outcomes = {name: Outcome() for name in names}
    peaks: list[dict[str, float]] = []
    idle = 0.0
    try:
        meta = prepared(model, folder, allotments, options)
        for name in [*names, "peak"]:
            log = RESULTS / f"{model}.{name}.log"
            processes[name] = Process(name, SYSTEMS[name], folder, log, options.timeout)
            warm(processes, name, outcomes)
        alive = [name for name in names if name in processes]
        for repeat in range(options.repeats):
            turn = repeat % max(len(alive), 1)
            for name in [*alive[turn:], *alive[:turn]]:
                if name not in processes:
                    continue
                others = [each for other, each in processes.items() if other != name]
                before, start = sum(each.cpu() for each in others), time.perf_counter()
                said = attempt(processes, name, outcomes)
                used, took = sum(each.cpu() for each in others) - before, time.perf_counter() - start
                if said:
                    idle = max(idle, used / took / CORES) if took > 0.5 else idle
                    outcomes[name].rates.append(rounds * COHORT / said["seconds"])
            peaks.append(processes["peak"].go())
        for name in [name for name in names if name in processes]:
            if attempt(processes, name, outcomes):
                last = attempt(processes, name, outcomes, processes[name].hear)
                if last:
                    outcomes[name].loss, outcomes[name].note = last["loss"], last.get("note", "")
    finally:
        for process in processes.values():
            process.end()
        sweep()
        shutil.rmtree(folder, ignore_errors=True)
    peak = {kind: max(each[kind] for each in peaks) for kind in ("float32", "bfloat16")} if peaks else {}
    return {
        "model": model,
        "work": meta,
        "rounds": rounds,
        "repeats": options.repeats,
        "peak_gflops": peak,
        "idle_share": idle,
        "systems": {name: outcome.facts() for name, outcome in outcomes.items()},
    }


def prepared(model: str, folder: Path, allotments: list[int], options: argparse.Namespace) -> dict[str, Any]:
    """Write the work folder in a process of its own; its facts."""
    said = {"allotments": allotments, "data_dir": options.data_dir, "seed": options.seed}
    command = [sys.executable, str(HERE / "prepare.py"), model, str(folder), json.dumps(said)]
    limits = {"env": environment(SYSTEMS["coterie"]), "timeout": options.timeout}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, **limits)
    except subprocess.TimeoutExpired as late:
        raise SystemExit(f"preparing the work of {model} took longer than {late.timeout:.0f} s") from None
    if done.returncode:
        raise SystemExit(f"cannot prepare the work of {model}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def warm(processes: dict[str, Process], name: str, outcomes: dict[str, Outcome]) -> None:
    """Wait until a system is ready and let it run its warm-up rounds; the others are idle."""
    process = processes[name]
    said = attempt(processes, name, outcomes, process.hear)
    ready = time.perf_counter()
    if said and "skip" not in said and attempt(processes, name, outcomes) and name in outcomes:
        outcomes[name].start_seconds = ready - process.started
        outcomes[name].warm_seconds = time.perf_counter() - ready
    elif said and "skip" in said:
        outcomes[name].skipped = said["skip"]
        processes.pop(name).end()


def attempt(
    processes: dict[str, Process], name: str, outcomes: dict[str, Outcome], what: Any = None
) -> dict[str, Any] | None:
    """A system's next answer; None when it failed, which is noted and ends it."""
    try:
        return (what or processes[name].go)()  # type: ignore[no-any-return]
    except Failed as error:
        print(f"  FAILED: {error}", file=sys.stderr, flush=True)
        if name not in outcomes:
            raise SystemExit(f"{name} failed") from None
        outcomes[name].failed = str(error)
        processes.pop(name).end()
        return None


def disagreements(result: dict[str, Any], tolerance: float) -> list[str]:
    """Systems whose final loss differs from the plain loop's (or else the first system's).

    The tolerance is relative to the loss or to how far it fell, whichever is smaller: a system that trains
    nothing must not pass.
    """
    losses = {name: facts["loss"] for name, facts in result["systems"].items() if facts["loss"] is not None}
    if not losses:
        return []
    reference = losses.get("loop", next(iter(losses.values())))
    fallen = result["work"]["initial_loss"] - reference
    room = tolerance * min(reference, fallen)
    return [
        f"{result['model']}: {name} ends with loss {loss:.6g}, not {reference:.6g} (+-{max(room, 0):.2g})"
        for name, loss in losses.items()
        if not abs(loss - reference) <= room
    ]


def best(result: dict[str, Any], group: str, precision: str = "float32") -> str | None:
    """The fastest system of a group, by its median."""
    rated = {
        name: facts["median"]
        for name, facts in result["systems"].items()
        if facts["median"] and SYSTEMS[name].group == group and SYSTEMS[name].precision == precision
    }
    return max(rated, key=rated.__getitem__) if rated else None


def ratio(result: dict[str, Any], name: str, rival: str | None) -> tuple[float, float, float] | None:
    """Median, least and greatest ratio of two systems' rates, repetition by repetition."""
    if rival is None:
        return None
    pairs = zip(result["systems"][name]["rates"], result["systems"][rival]["rates"], strict=False)
    each = [mine / theirs for mine, theirs in pairs]
    return (statistics.median(each), min(each), max(each)) if each else None


RIVALS = ("pfl", "flower", "loop")


def rows(result: dict[str, Any]) -> list[list[str]]:
    """The table of one model."""
    rivals = {group: best(result, group) for group in RIVALS}
    made = []
    for name, facts in result["systems"].items():
        if not facts["rates"]:
            reason = facts["skipped"] or facts["failed"]
            made.append([name, f"{'skipped' if facts['skipped'] else 'FAILED'}: {short(reason)}"])
            continue
        share = facts["median"] * result["work"]["flops"] / 1e9 / result["peak_gflops"]["float32"]
        row = [name, spread(facts["median"], min(facts["rates"]), max(facts["rates"]))]
        for rival in rivals.values():
            found = ratio(result, name, rival) if rival != name else None
            row.append(spread(*found, unit="x") if found else "-")
        loss = "FAILED" if facts["loss"] is None else f"{facts['loss']:.5f}"
        made.append(
            [*row, f"{100 * share:.1f} %", f"{facts['start_seconds'] + facts['warm_seconds']:.1f} s", loss]
        )
    return made


HEADER = ["system", "clients/s", "x pfl", "x Flower", "x loop", "of f32 peak", "start + warm-up", "loss"]


def spread(median: float, low: float, high: float, unit: str = "") -> str:
    """ "12.3x (11.9-12.8)": a median with its range."""
    return f"{figures(median)}{unit} ({figures(low)}-{figures(high)})"


def figures(value: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def short(text: str) -> str:
    """The first line, not too long."""
    line = text.partition("\n")[0]
    return line if len(line) <= 90 else line[:87] + "..."


def shown(result: dict[str, Any], markdown: bool) -> str:
    """One model's table as text, or as Markdown."""
    work, peak = result["work"], result["peak_gflops"]
    title = (
        f"{result['model']}: {work['parameters']:,} parameters, "
        f"{work['flops'] / 1e9:.3g} GFLOP a client, {work['origin']}; "
        f"{result['repeats']} repetitions of {result['rounds']} rounds; "
        f"peak {peak.get('float32', 0):.0f} GFLOP/s float32, {peak.get('bfloat16', 0):.0f} bfloat16; "
        f"waiting systems used at most {100 * result['idle_share']:.1f} % of the machine"
    )
    table = [HEADER, *rows(result)]
    if markdown:
        lines = ["| " + " | ".join([*row, *[""] * (len(HEADER) - len(row))]) + " |" for row in table]
        return f"**{result['model']}** ({title.partition(': ')[2]})\n\n" + "\n".join(
            [lines[0], "|" + " --- |" * len(HEADER), *lines[1:]]
        )
    whole = [row for row in table if len(row) == len(HEADER)]
    widths = [max(len(row[i]) for row in (whole if i else table)) for i in range(len(HEADER))]
    text = [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)) for row in table
    ]
    return "\n".join([title, *(line.rstrip() for line in text)])


def summary(results: list[dict[str, Any]]) -> str:
    """The best float32 and bfloat16 variants of Coterie against each rival's best, and geometric means."""
    lines = []
    for precision in ("float32", "bfloat16"):
        mine = [(result, best(result, "coterie", precision)) for result in results]
        if not any(name for _, name in mine):
            continue
        lines.append(
            f"Coterie's best in {precision} against each rival's best in float32 (median of paired ratios):"
        )
        for group in RIVALS:
            found = {r["model"]: ratio(r, name, best(r, group)) for r, name in mine if name}
            each = {model: value[0] for model, value in found.items() if value}
            if each:
                mean = statistics.geometric_mean(each.values())
                listed = ", ".join(f"{model} {figures(value)}x" for model, value in each.items())
                lines.append(f"  {group:7s} geometric mean {figures(mean)}x: {listed}")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """CPU model, cores, memory and versions."""
    info = Path("/proc/cpuinfo").read_text()
    lines = dict(line.split(":", 1) for line in info.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    kinds = [kind for kind in ("avx2", "avx512f", "amx_bf16") if kind in fields.get("flags", "").split()]
    return {
        "cpu": fields.get("model name", platform.processor()),
        "instructions": kinds,
        "cores": CORES,
        "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def versions(groups: set[str]) -> dict[str, str]:
    """Versions of what was compared, from each environment itself."""
    ask = "import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in %r}))"
    found: dict[str, str] = {}
    for rival, names in (
        ("", ["torch", "numpy", "coterie"]),
        ("pfl", ["pfl", "torch"]),
        ("flwr", ["flwr", "ray", "torch"]),
    ):
        if rival and rival not in groups:
            continue
        python = str(python_of(rival)) if rival else sys.executable
        said = json.loads(subprocess.check_output([python, "-c", ask % names], text=True))
        if said["torch"].partition("+")[0] != found.get("torch", said["torch"]).partition("+")[0]:
            raise SystemExit(
                f"torch is {said['torch']} for {rival} but {found['torch']} here: not the same work"
            )
        found |= {name: version for name, version in said.items() if name not in found}
    return found


def selected(text: str) -> list[str]:
    """--systems: names and groups; "" is all but the extras."""
    if not text:
        return [name for name, system in SYSTEMS.items() if not system.extra and name != "peak"]
    chosen: list[str] = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        of_group = [name for name, system in SYSTEMS.items() if system.group == word and not system.extra]
        exact = word.removeprefix("=")
        found = of_group if of_group and word == exact else [exact] if exact in SYSTEMS else []
        if not found or "peak" in found:
            raise SystemExit(
                f"--systems {word}: no such system; there are: {', '.join(n for n in SYSTEMS if n != 'peak')}"
            )
        chosen += [name for name in found if name not in chosen]
    return chosen


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default=",".join(MODELS), help="comma-separated (default: all)")
    parser.add_argument(
        "--systems", default="", help="names or groups; '=pfl' is that system alone (default: all)"
    )
    parser.add_argument(
        "--variant", action="append", default=[], metavar="NAME: a.b=c, ...", help="one more of Coterie"
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed repetitions of each system")
    parser.add_argument("--rounds", type=int, default=0, help="rounds a repetition (default: by model)")
    parser.add_argument("--warm-up", type=int, default=2, help="rounds before the first repetition")
    parser.add_argument("--tolerance", type=float, default=0.02, help="of the final loss, relative")
    parser.add_argument("--timeout", type=float, default=900, help="seconds a system may take for one answer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", default=os.environ.get("COTERIE_DATA"), help="default: COTERIE_DATA")
    parser.add_argument("--out", type=Path, help="the JSON file (default: results/<date>.json)")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument(
        "--show", type=Path, metavar="JSON", help="print an earlier run's tables and measure nothing"
    )
    options = parser.parse_args()
    for variant in options.variant:
        name, _, settings = variant.partition(":")
        given = [each.strip() for each in settings.split(",") if each.strip()]
        precision = "bfloat16" if any("bfloat16" in each for each in given) else "float32"
        SYSTEMS[name.strip()] = coterie(*given, precision=precision)
    for model in options.models.split(","):
        if model not in MODELS:
            raise SystemExit(f"--models {model}: no such model; there are: {', '.join(MODELS)}")
    return options


def main() -> int:
    options = arguments()
    if options.show:
        stored = json.loads(options.show.read_text())
        for name, settings in stored["variants"].items():
            SYSTEMS.setdefault(name, coterie(*settings["set"], precision=settings["precision"]))
        print("\n\n".join(shown(result, options.markdown) for result in stored["models"]))
        print("\n" + summary(stored["models"]))
        return 0
    adopt()
    RESULTS.mkdir(exist_ok=True)
    asked = [variant.partition(":")[0].strip() for variant in options.variant]
    names = list(dict.fromkeys([*selected(options.systems), *asked]))
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions({SYSTEMS[name].environment for name in names}),
        "malloc": MALLOC,
        "settings": {"cohort": COHORT, "tolerance": options.tolerance, "seed": options.seed},
        "variants": {
            name: {**SYSTEMS[name].options, "precision": SYSTEMS[name].precision}
            for name in names
            if SYSTEMS[name].group == "coterie"
        },
        "models": [],
    }
    out = options.out or RESULTS / f"{report['date'].replace(':', '').partition('+')[0]}.json"
    print(", ".join(f"{key} {value}" for key, value in {**report["machine"], **report["versions"]}.items()))
    if options.data_dir is None:
        print("COTERIE_DATA is not set: synthetic data of the same shapes")
    wrong = []
    for model in options.models.split(","):
        result = measure(model, names, options)
        report["models"].append(result)
        out.write_text(json.dumps(report, indent=1))
        print("\n" + shown(result, options.markdown), flush=True)
        wrong += disagreements(result, options.tolerance)
        wrong += [f"{model}: {name} failed" for name, facts in result["systems"].items() if facts["failed"]]
    print("\n" + summary(report["models"]))
    print(f"\nwritten to {out}")
    for line in wrong:
        print(f"WRONG: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that finally clauses run
    sys.exit(main())
