"""Build a configured part: its schema is the signature of the function that makes it.

A table maps kinds to functions, a section of a config holds `kind` and the function's keyword arguments.
Nothing is declared twice: a new parameter of a schedule is a new key of `[schedule]`, and None is "none".
This file knows no part.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.util
import inspect
import json
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from datetime import date, time
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Union

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from coterie.core.errors import ConfigError

Maker = Callable[..., Any]
Table = Mapping[str, Maker]
NOTHING: Mapping[str, Any] = MappingProxyType({})
WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    Path: "a path",
    types.NoneType: "'none'",
}


class Setting(NamedTuple):
    """One key of a section: its type in words, and a default of None where it is required or left open."""

    name: str
    type: str
    default: Any
    required: bool


class Part(NamedTuple):
    """One kind of a table: the first line of its docstring and its keys."""

    kind: str
    summary: str
    settings: tuple[Setting, ...]


def build(
    table: Table,
    section: Mapping[str, Any],
    where: str,
    provided: Mapping[str, Any] = NOTHING,
    *,
    by: str = "kind",
) -> Any:
    """Call the function that the section's `kind` names with the section's other keys.

    where: the section's path in the config, for messages ("data.partition").
    provided: arguments that a config must not set (key, examples, ...), passed if the function names them.
    by: the key that names the kind ("optimizer" in a client's table).
    Raises ConfigError for an unknown or missing kind or key and for a value of another type than the
    annotation's; a ConfigError of the function itself passes through, with `where` in front.
    """
    function, settings = choose(table, section, where, by)
    return call(function, settings, where, provided, str(section[by]))


def resolve(
    table: Table,
    section: Mapping[str, Any],
    where: str,
    provided: Collection[str] = (),
    *,
    by: str = "kind",
) -> dict[str, Any]:
    """Check the section as `build` does; return it with every default that a config can express."""
    function, settings = choose(table, section, where, by)
    arguments(function, settings, where, provided, str(section[by]))
    full = {by: section[by]}
    for name, parameter in _parameters(function, provided).items():
        value = settings.get(name, parameter.default)
        if value is not None and _expressible(value):
            full[name] = plain(value, where)
    return full | {name: plain(value, where) for name, value in settings.items()}


def describe(table: Table, provided: Collection[str] = ()) -> tuple[Part, ...]:
    """What a config can write: each kind with its summary and keys, in the table's order."""
    return tuple(
        Part(
            kind,
            (inspect.getdoc(function) or "").partition("\n")[0],
            tuple(
                Setting(name, expected(each.annotation), None if required else each.default, required)
                for name, each in _parameters(function, provided).items()
                for required in [each.default is each.empty]
            ),
        )
        for kind, function in table.items()
    )


def choose(
    table: Table, section: Mapping[str, Any], where: str, by: str = "kind"
) -> tuple[Maker, dict[str, Any]]:
    """Return the function that the section's kind names, and the section's other keys."""
    known = ", ".join(sorted(table))
    if by not in section:
        raise ConfigError(f"{_at(where, by)}: missing", f"write {by} = one of: {known}")
    kind = section[by]
    if not isinstance(kind, str) or kind not in table:
        hint = _did_you_mean(nearest(str(kind), table)) + f"there are: {known}"
        raise ConfigError(f"{_at(where, by)} = {kind!r}: no such {by}", hint)
    return table[kind], {name: value for name, value in section.items() if name != by}


def call(
    function: Maker,
    section: Mapping[str, Any],
    where: str,
    provided: Mapping[str, Any] = NOTHING,
    label: str | None = None,
) -> Any:
    """Check the section against the function's signature and call it; errors as in `build`."""
    values = arguments(function, section, where, provided, label)
    named = inspect.signature(function).parameters
    given = {name: value for name, value in provided.items() if name in named}
    try:
        return function(**values, **given)
    except ConfigError as error:
        message = str(error.args[0])
        if where and not message.startswith((f"{where}.", f"{where}:", f"{where} =", f"{where}[")):
            error.args = (f"{where}: {message}",)
        raise


def arguments(
    function: Maker,
    section: Mapping[str, Any],
    where: str,
    provided: Collection[str] = (),
    label: str | None = None,
) -> dict[str, Any]:
    """Return the section as keyword arguments of `function`, each of its annotated type, or raise."""
    return split([function], section, where, provided, label)[0]


def split(
    functions: Sequence[Maker],
    section: Mapping[str, Any],
    where: str,
    provided: Collection[str] = (),
    label: str | None = None,
) -> list[dict[str, Any]]:
    """Share one section out among several functions by parameter name: [{lr, momentum}, {lr, epochs}].

    A key goes to every function that names it, else to those that take any (**kwargs); a key that none takes
    and a required key that is missing raise ConfigError, which lists the keys of all.
    """
    label = label or " with ".join(function.__name__ for function in functions)
    schemas = [_parameters(function, provided) for function in functions]
    known = {name: parameter for schema in schemas for name, parameter in schema.items()}
    anything = [_takes_anything(function) for function in functions]
    for name in section:
        if name in provided or not (name in known or any(anything)):
            hint = (
                _did_you_mean(nearest(name, known))
                + f"{label} takes: {', '.join(sorted(known)) or 'no keys'}"
            )
            raise ConfigError(f"{_at(where, name)}: unknown key", hint)
    for name, parameter in known.items():
        if parameter.default is parameter.empty and name not in section:
            raise ConfigError(
                f"{_at(where, name)}: missing", f"{label} needs {name}: {expected(parameter.annotation)}"
            )
    return [
        {
            name: convert(value, schema[name].annotation, _at(where, name)) if name in schema else value
            for name, value in section.items()
            if name in schema or (any_key and name not in known)
        }
        for schema, any_key in zip(schemas, anything, strict=True)
    ]


def convert(value: Any, annotation: Any, where: str) -> Any:
    """Return a config's value as the annotated type, or raise ConfigError: "lr = 'fast': expected a number".

    Strict: a whole number is a number, a list may be a tuple, text a path, and "none" is None where the
    annotation has it (TOML has no null); nothing else is converted.
    """
    annotation = _configurable(annotation)
    if _unchecked(annotation):
        return value
    if value == "none" and types.NoneType in typing.get_args(annotation):
        return None
    try:
        # JSON mode, because there alone strictness still lets a list be a tuple.
        return TypeAdapter(annotation).validate_json(json.dumps(value, default=str), strict=True)
    except (ValidationError, PydanticSchemaGenerationError):
        raise ConfigError(f"{where} = {value!r}: expected {expected(annotation)}") from None


def expected(annotation: Any) -> str:
    """An annotation in words: "a number", "one of 'a', 'b'", "a list, each a whole number"."""
    annotation = _configurable(annotation)
    inner = [each for each in typing.get_args(annotation) if each is not Ellipsis]
    origin = typing.get_origin(annotation) or annotation
    if _unchecked(annotation):
        words = "any value"
    elif annotation in WORDS:
        words = WORDS[annotation]
    elif origin is Literal:
        words = "one of " + ", ".join(repr(each) for each in inner)
    elif origin in (Union, types.UnionType):
        words = " or ".join(expected(each) for each in inner)
    elif inspect.isclass(origin) and issubclass(origin, Mapping):
        words = "a table"
    elif inspect.isclass(origin) and issubclass(origin, Collection):
        fixed = issubclass(origin, tuple) and inner and Ellipsis not in typing.get_args(annotation)
        each = " or ".join(dict.fromkeys(expected(one) for one in inner))
        words = "a list" + (f" of {len(inner)}" if fixed else "") + (f", each {each}" if inner else "")
    else:
        words = getattr(annotation, "__name__", str(annotation))
    return words


def plain(value: Any, where: str) -> Any:
    """Copy a value with only what TOML can hold: tuples become lists, paths text and None "none"."""
    if value is None:
        return "none"
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise ConfigError(f"{_at(where, str(name))}: the key {name!r} is not text")
        return {name: plain(each, _at(where, name)) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each, f"{where}[{index}]") for index, each in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if type(value) in (bool, int, float, str) or isinstance(value, date | time):
        return value
    raise ConfigError(
        f"{where} = {value!r}: a config cannot hold a {type(value).__name__}",
        "use text, numbers, true or false, lists and tables",
    )


def load_object(spec: str, where: str, folder: Path = Path()) -> Maker:
    """Import "package.module:Name", or "file.py:Name" with the file in `folder` or else the current one.

    The folder joins the end of sys.path, so that the user's files may import each other.
    Raises ConfigError where the module, the file or the name does not exist.
    """
    module_name, _, name = spec.partition(":")
    said = f"{where} = {spec!r}"
    here = str(folder.resolve())
    if here not in sys.path:
        sys.path.append(here)
    if module_name.endswith(".py"):
        places = [folder.resolve() / module_name, Path.cwd() / module_name]
        module = _load_file(next((path for path in places if path.is_file()), places[0]), said)
    else:
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and f"{module_name}.".startswith(f"{error.name}."):
                raise ConfigError(
                    f"{said}: there is no module {error.name!r}", "write package.module:Name, or file.py:Name"
                ) from None
            raise
    found = getattr(module, name, None)
    if not callable(found):
        guess = nearest(name, [each for each, value in vars(module).items() if callable(value)])
        message = f"{said}: {module_name} has no class or function {name!r}"
        raise ConfigError(message, _did_you_mean(guess).rstrip())
    return typing.cast(Maker, found)


def nearest(name: str, options: Iterable[str]) -> str | None:
    """The option most like `name` (difflib ratio >= 0.6, case and - or _ ignored), or None."""
    folded = {option.lower().replace("-", "_"): option for option in sorted(options)}
    found = difflib.get_close_matches(name.lower().replace("-", "_"), folded, n=1, cutoff=0.6)
    return folded[found[0]] if found else None


def _load_file(path: Path, said: str) -> types.ModuleType:
    if not path.is_file():
        raise ConfigError(f"{said}: there is no file {path}", "the path starts at the folder of the config")
    # The name holds the content's hash: two calls give one class, and an edited file a new one.
    name = f"{path.stem}_{hashlib.sha256(str(path).encode() + path.read_bytes()).hexdigest()[:12]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec
        assert spec.loader
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _parameters(function: Maker, provided: Collection[str]) -> dict[str, inspect.Parameter]:
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return {
        name: each
        for name, each in _signature(function).parameters.items()
        if each.kind in named and name not in provided
    }


def _takes_anything(function: Maker) -> bool:
    return any(each.kind is each.VAR_KEYWORD for each in inspect.signature(function).parameters.values())


def _signature(function: Maker) -> inspect.Signature:
    plain = inspect.signature(function)
    try:
        if is_dataclass(function):  # a field's annotation is written in the module of the class that has it
            hints = typing.get_type_hints(function)
            named = [each.replace(annotation=hints.get(name, Any)) for name, each in plain.parameters.items()]
            return plain.replace(parameters=named)
        return inspect.signature(function, eval_str=True)
    except NameError:  # a name imported for type checkers only: its parameters stay unchecked
        return plain


def _unchecked(annotation: Any) -> bool:
    return annotation in (inspect.Parameter.empty, Any) or isinstance(annotation, str)


def _configurable(annotation: Any) -> Any:
    """A union without the members that no config can hold: `float | Tensor` is `float`."""
    if typing.get_origin(annotation) not in (Union, types.UnionType):
        return annotation
    return Union[tuple(each for each in typing.get_args(annotation) if _has_schema(each))]  # noqa: UP007


def _has_schema(annotation: Any) -> bool:
    try:
        TypeAdapter(annotation)
    except PydanticSchemaGenerationError:
        return False
    return True


def _expressible(value: Any) -> bool:
    try:
        plain(value, "")
    except ConfigError:
        return False
    return True


def _did_you_mean(guess: str | None) -> str:
    return f"did you mean {guess!r}? " if guess else ""


def _at(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name
