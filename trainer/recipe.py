"""Recipes: configs as YAML, with overrides; and what may differ when a run is resumed.

Unknown keys, wrong types and impossible values are refused with one message that names them all.
"""

import difflib
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.errors import UserError
from trainer.config import FinetuneConfig, LinprobeConfig, PretrainConfig, RunConfig

KINDS: dict[str, type[RunConfig]] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "linprobe": LinprobeConfig,
}

# What may differ when a run is resumed: how it is run, not what it computes.
FREE_ON_RESUME = (
    "workers",
    "micro_batch",
    "compile",
    "log_every",
    "knn",
    "evaluate_every",
    "checkpoint",
    "data.val",
    "data.val_crop",
    "data.decoder",
    "data.threads",
    "data.memory_gb",
    "data.cache",
    "data.cache_gb",
    "data.bad_samples",
    "data.bad_share",
)

SHIPPED = Path(__file__).parents[1]  # has recipes/, in a checkout as in an installation
C = TypeVar("C", bound=RunConfig)


def load_config(
    kind: type[C], path: str | Path, overrides: tuple[str, ...] = (), keys: dict[str, Any] | None = None
) -> C:
    """A config of what `read_recipe` reads. UserError names every mistake at once."""
    return parse_config(kind, read_recipe(path, overrides, keys), str(path))


def read_recipe(
    path: str | Path, overrides: tuple[str, ...] = (), keys: dict[str, Any] | None = None
) -> dict[str, Any]:
    """A recipe's YAML with a tree of `keys` on top, and with `key.key=value` overrides on top of that."""
    file = Path(path)
    if file.parts[:1] == ("recipes",) and not file.exists():
        file = SHIPPED / file
    try:
        tree = yaml.safe_load(file.read_text()) or {}
    except FileNotFoundError:
        raise UserError(f"{path}: no such config; the recipes are in recipes/") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values, this is a {type(tree).__name__}")
    for key, value in (keys or {}).items():
        both = isinstance(value, dict) and isinstance(tree.get(key), dict)
        tree[key] = tree[key] | value if both and key != "init" else value
    for override in overrides:
        _override(tree, override)
    return tree


def with_overrides(config: C, overrides: tuple[str, ...], where: str) -> C:
    """The config with `key.key=value` overrides on top."""
    tree = config.model_dump()
    for override in overrides:
        _override(tree, override)
    return parse_config(type(config), tree, where)


def parse_config(kind: type[C], tree: dict[str, Any], where: str) -> C:
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: " + "; ".join(_describe(kind, e) for e in error.errors())) from None


def _override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"{override}: an override is key=value, epochs=10 say")
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"{override}: {parent} is a value, it has no keys")
    try:
        tree[leaf] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"{override}: the value is not YAML") from None


def _describe(kind: type[BaseModel], error: Any) -> str:
    path = [str(part) for part in error["loc"]]
    key = ".".join(path)
    if key == "init" and error["type"] == "missing":
        return "init: say whose encoder it begins with, --init RUN, or --init scratch"
    # Of several kinds of value pydantic names the one it tried.
    path = [
        part
        for part in path
        if "[" not in part and "-" not in part and part not in ("InitConfig", "int", "float")
    ]
    key = ".".join(path)
    if error["type"] == "extra_forbidden":
        for parent in path[:-1]:
            if parent in kind.model_fields:  # else it names one of several kinds of value
                annotation = kind.model_fields[parent].annotation
                kinds = (annotation, *get_args(annotation))
                kind = next(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
        near = difflib.get_close_matches(path[-1], kind.model_fields, n=1)
        known = f"did you mean {near[0]}?" if near else f"known are {', '.join(kind.model_fields)}"
        return f"there is no key {key}: {known}"
    message = error["msg"].removeprefix("Value error, ")
    if isinstance(error["input"], dict):  # several keys that do not fit together
        return ": ".join(filter(None, [key, message]))
    return f"{key}: {message}, not {error['input']!r}"


def dump_config(config: RunConfig) -> str:
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def fixed_part(config: RunConfig) -> dict[str, Any]:
    """All of a config that may not differ when a run is resumed: key → value."""
    return {
        key: value
        for key, value in _flat(config.model_dump()).items()
        if not any(key == free or key.startswith(free + ".") for free in FREE_ON_RESUME)
    }


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """What differs between two configs besides FREE_ON_RESUME, as "key: old → new"."""
    a, b = fixed_part(old), fixed_part(new)
    return [
        f"{key}: {a.get(key)} → {b.get(key)}" for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)
    ]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
