"""A site's policy: what may run there, on which data, how private it must be and what may leave.

The file policy.toml at the site; whoever runs the federation cannot change it. Nothing here runs code or
measures anything: `refusal`, `allowed_metrics` and `redacted` judge, the site acts. Left out means:

    signers     any operator that is enrolled here
    configs     any that such an operator signed
    code        none travels ("never"); else what such an operator signed ("signed"), or packages' digests
    modules     a config may name no code of this machine ("package.module:Name", "file.py:Name")
    datasets, metrics, privacy, limits   no restriction
    tracebacks  the type of an exception, without its message
"""

from __future__ import annotations

import builtins
import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from coterie.errors import ConfigError
from coterie.security.files import read_text

_FROZEN = ConfigDict(frozen=True, extra="forbid", strict=True)
_CODE = re.compile(r".+:[^\W\d]\w*|.+\.py(:.*)?", re.DOTALL)  # package.module:Name, file.py:Name
_TIME = r"([01]\d|2[0-3]):([0-5]\d)"
_BROUGHT = (
    "model.kind",
    "backend.trainer.fit",
)  # what names code of the package, when one travels with the run
_EXCEPTION = re.compile(r"([A-Za-z_]\w*\.)*([A-Za-z_]\w*)(?=:|$)")

_Glob = Annotated[str, StringConstraints(min_length=1, max_length=1000)]
_Digest = Annotated[str, StringConstraints(pattern=r"^(sha256:)?[0-9a-f]{64}$")]
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_Signer = Annotated[str, StringConstraints(pattern=rf"^(ed25519:[0-9a-f]{{64}}|{_NAME})$")]
_Window = Annotated[str, StringConstraints(pattern=rf"^{_TIME}-({_TIME}|24:00)$")]
_Gpu = Annotated[str, StringConstraints(pattern=r"^([0-9]{1,3}|(GPU|MIG)-[0-9A-Za-z/-]{1,100})$")]
_Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Privacy(BaseModel):
    """The least that a run must promise."""

    model_config = _FROZEN
    clipping_norm: _Positive | None = None  # at most
    noise_multiplier: _Positive | None = None  # at least
    secure_aggregation: bool = False  # required


class Limits(BaseModel):
    """What a run may use here; the site's process enforces it."""

    model_config = _FROZEN
    cpu: _Positive | None = None  # cores
    gpu: Annotated[int, Field(ge=0)] | None = None  # how many
    gpus: tuple[_Gpu, ...] | None = None  # which, as CUDA_VISIBLE_DEVICES names them
    gpu_memory: Annotated[float, Field(gt=0, le=1)] | None = None  # share of each GPU's
    memory: _Positive | None = None  # GB
    bandwidth: _Positive | None = None  # MB/s
    hours: tuple[_Window, ...] | None = None  # "22:00-06:00", local time


class Policy(BaseModel):
    """What a site allows; the default is safe."""

    model_config = _FROZEN
    signers: tuple[_Signer, ...] | None = None  # operators' names, or "ed25519:" and a public key
    configs: tuple[_Digest, ...] | None = None
    code: Literal["never", "signed"] | tuple[_Digest, ...] = "never"
    modules: tuple[_Glob, ...] = ()
    datasets: tuple[_Glob, ...] | None = None
    metrics: tuple[_Glob, ...] | None = None
    tracebacks: Literal["full", "type only", "none"] = "type only"
    privacy: Privacy = Privacy()
    limits: Limits = Limits()

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read policy.toml. Raises ConfigError naming the file, the key and the nearest valid one."""
        try:
            found = tomllib.loads(read_text(path))
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}: not TOML: {str(error)[:200]}") from None
        return cls.read(found, str(path))

    @classmethod
    def read(cls, found: Mapping[str, Any], where: str = "policy") -> Self:
        """A policy from a mapping with the keys of policy.toml. Raises ConfigError."""
        _check_keys(cls, found, f"{where}: ")
        for name, section in (("privacy", Privacy), ("limits", Limits)):
            if isinstance(found.get(name), dict):
                _check_keys(section, found[name], f"{where}: {name}.")
        try:
            return cls.model_validate(_tuples(found))
        except ValidationError as error:
            # of a union's errors the deepest: of the member that the value was meant as
            worst = max(error.errors(include_url=False), key=lambda each: len(each["loc"]))
            at = ".".join(
                str(part) for part in worst["loc"] if not str(part).startswith(("literal[", "tuple["))
            )
            said = f"{at} = {repr(worst['input'])[:80]}: {worst['msg'][:200]}"
            raise ConfigError(f"{where}: {said}") from None


@dataclass(frozen=True, slots=True)
class Job:
    """What a site is asked to run.

    signer: the operator whose signature of the config is right; None: nobody's. signer_key: their public key.
    privacy: {"clipping_norm", "noise_multiplier", "secure_aggregation"} as the run promises them.
    datasets, metrics: names of what it reads here and of what it needs to learn.
    """

    run: str
    config: Mapping[str, Any]
    config_digest: str
    signer: str | None = None
    code_digest: str | None = None
    datasets: Sequence[str] = ()
    privacy: Mapping[str, Any] | None = None
    metrics: Sequence[str] = ()
    signer_key: bytes = b""


def refusal(policy: Policy, job: Job, now: datetime | None = None) -> str:
    """Why a site will not run this, naming the rule and what would satisfy it; "" when it will.

    now: local time, to judge the hours too; without it they are not, for a run may wait for them.
    """
    return next(_refusals(policy, job, now), "")


def allowed_metrics(policy: Policy, metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that may leave."""
    return {name: value for name, value in metrics.items() if _matches(name, policy.metrics)}


def redacted(policy: Policy, traceback_text: str) -> str:
    """What may leave of an exception's traceback.

    "full": all of it. "type only": the names of the exceptions' types, the last one first raised: no path,
    line, value or message. "none": nothing.
    """
    if policy.tracebacks == "full":
        return traceback_text
    if policy.tracebacks == "none":
        return ""
    return " < ".join(reversed(list(_types(traceback_text)))) or "an exception"


def _refusals(policy: Policy, job: Job, now: datetime | None) -> Iterator[str]:
    if job.signer is None and not job.signer_key:
        yield "policy signers: the config is not signed; have an enrolled operator sign it"
    key = f"ed25519:{job.signer_key.hex()}"
    if policy.signers is not None and not {job.signer, key} & set(policy.signers):
        yield f"policy signers: {job.signer or key} is not among them; {_or(policy.signers)} may sign"
    if policy.configs is not None and _hex(job.config_digest) not in map(_hex, policy.configs):
        yield f"policy configs: {_hex(job.config_digest)[:12]} is not among the configs that may run here"
    if job.code_digest is not None and policy.code == "never":
        yield "policy code: no code may travel here; use what is installed, or ask the site to list it"
    elif job.code_digest and policy.code != "signed" and _hex(job.code_digest) not in map(_hex, policy.code):
        yield f"policy code: the package {_hex(job.code_digest)[:12]} is not among those that may run here"
    for where, spec in _code_named(job.config):
        if not _matches(spec, policy.modules) and not (job.code_digest and where in _BROUGHT):
            yield f"policy modules: {where} = {spec[:80]!r} names code; {_or(policy.modules)} may be named"
    for name in job.datasets:
        if not _matches(name, policy.datasets):
            yield f"policy datasets: {name[:80]!r} is not open to runs; {_or(policy.datasets or ())} is"
    yield from _too_open(policy.privacy, job.privacy or {})
    for name in job.metrics:
        if not _matches(name, policy.metrics):
            yield f"policy metrics: {name[:80]!r} may not leave; {_or(policy.metrics or ())} may"
    hours = policy.limits.hours
    if now is not None and hours is not None and not any(_within(each, now) for each in hours):
        yield f"policy limits.hours: it is {now:%H:%M} here; runs may compute at {_or(hours)}"


def _too_open(least: Privacy, promised: Mapping[str, Any]) -> Iterator[str]:
    norm, noise = _number(promised.get("clipping_norm")), _number(promised.get("noise_multiplier"))
    # written so that NaN, which is neither more nor less, is refused
    if least.clipping_norm is not None and not (norm is not None and 0 < norm <= least.clipping_norm):
        yield f"policy privacy.clipping_norm: {_said(norm)}; clip updates to at most {least.clipping_norm:g}"
    if least.noise_multiplier is not None and not (noise is not None and noise >= least.noise_multiplier):
        yield f"policy privacy.noise_multiplier: {_said(noise)}; add at least {least.noise_multiplier:g}"
    if least.secure_aggregation and promised.get("secure_aggregation") is not True:
        yield "policy privacy.secure_aggregation: it is required; turn it on in the config"


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _said(value: float | None) -> str:
    return "the run has none" if value is None else f"the run has {value:g}"


def _or(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "") or "nothing"


def _hex(digest: str) -> str:
    return digest.removeprefix("sha256:")


def _matches(name: str, globs: Sequence[str] | None) -> bool:
    """Does one of the globs match? A path that climbs out of a folder matches none of them."""
    if globs is None:
        return True
    return ".." not in re.split(r"[/\\]", name) and any(fnmatchcase(name, glob) for glob in globs)


def _within(window: str, now: datetime) -> bool:
    start, end = window.split("-")
    time = f"{now:%H:%M}"
    return start <= time < end if start < end else time >= start or time < end


def _code_named(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Every text in a config that names code, or would be tried as if it did, with where it stands."""
    open_values: list[tuple[str, str, Any]] = [("", "", config)]
    while open_values:
        at, key, value = open_values.pop()
        if isinstance(value, Mapping):
            open_values += [(f"{at}.{name}".lstrip("."), name, each) for name, each in value.items()]
        elif isinstance(value, list | tuple):
            open_values += [(f"{at}[{index}]", key, each) for index, each in enumerate(value)]
        elif isinstance(value, str):
            loaded = key == "fit" or (key in ("kind", "dataset") and ":" in value)
            if loaded or _CODE.fullmatch(value):
                yield at, value


def _types(text: str) -> Iterator[str]:
    """The exception types of a traceback, in the order that it shows them.

    A type stands where a block's frames, which are indented, end. The lines after it may be a message's, so
    what does not look like an exception's name is not passed on.
    """
    inside = False
    for line in text.splitlines():
        if line == "Traceback (most recent call last):":
            inside = True
        elif inside and not line.startswith(" "):
            inside = False
            found = _EXCEPTION.match(line)
            known = found and (
                found[2].endswith(("Error", "Exception", "Warning")) or hasattr(builtins, found[2])
            )
            yield found[2] if found and known else "an exception"


def _check_keys(model: type[BaseModel], found: Mapping[str, Any], where: str) -> None:
    known = sorted(model.model_fields)
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(str(name).lower().replace("-", "_"), known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            hint += f"there are: {', '.join(known)}"
            raise ConfigError(f"{where}{str(name)[:80]}: unknown key", hint)


def _tuples(value: Any) -> Any:
    """TOML's lists as the tuples that strict models take."""
    if isinstance(value, Mapping):
        return {name: _tuples(each) for name, each in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
