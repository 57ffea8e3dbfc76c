"""Read configs from YAML recipes with overrides, and compare configs when a run is resumed.

Unknown keys, wrong types and impossible values raise one UserError that lists all of them.
"""

import difflib
import re
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.errors import UserError
from trainer.config.schema import FinetuneConfig, LinprobeConfig, PretrainConfig, RunConfig

CONFIG_TYPES: dict[str, type[RunConfig]] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "linprobe": LinprobeConfig,
}

# Keys that may change when a run is resumed: they do not affect the result.
FREE_ON_RESUME = (
    "workers",
    "micro_batch",
    "compile",
    "log_every",
    "knn",
    "evaluate_every",
    "checkpoint",
    "data.grow",
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

# Keys that earlier versions did not have, with the values at which they change nothing. They are left out of what is
# compared, so that runs, snapshots and studies of earlier versions are still recognised.
LATER_KEYS: dict[str, tuple[Any, ...]] = {
    "model.channels": (3,),
    "model.pixel_dtype": ("uint8",),
    "model.pixel_bits": (16,),
    "model.pixel_mean": (None,),
    "model.pixel_std": (None,),
    "data.normalise": (None, "imagenet"),
}

PROJECT_ROOT = Path(__file__).parents[2]  # contains recipes/, in a checkout and in an installation
ConfigT = TypeVar("ConfigT", bound=RunConfig)


def load_config(
    config_type: type[ConfigT],
    path: str | Path,
    overrides: tuple[str, ...] = (),
    keys: dict[str, Any] | None = None,
) -> ConfigT:
    """Read and validate a config; the arguments are those of `read_recipe`. Raise one UserError that lists all mistakes."""
    return parse_config(config_type, read_recipe(path, overrides, keys), str(path), overrides)


def read_recipe(
    path: str | Path, overrides: tuple[str, ...] = (), keys: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Read a recipe's YAML as a tree, without validating it.

    Args:
        path: a YAML file. `recipes/…` that does not exist in the working directory is looked up in the installation.
        overrides: `key.key=value` strings; they have the last word.
        keys: a tree that is merged over the file, before the overrides.

    Raises UserError if the file cannot be read or an override is malformed.
    """
    file = Path(path)
    if file.parts[:1] == ("recipes",) and not file.exists():
        file = PROJECT_ROOT / file
    try:
        tree = yaml.safe_load(file.read_text()) or {}
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such config; the recipes that come with maestream are in recipes/"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of config keys to values, got a {type(tree).__name__}")
    for key, value in (keys or {}).items():
        # `init` replaces the recipe's: a step of one run means nothing for another.
        merge = isinstance(value, dict) and isinstance(tree.get(key), dict) and key != "init"
        tree[key] = tree[key] | value if merge else value
    for override in overrides:
        _apply_override(tree, override)
    return tree


def keys_from_options(init: str | None, val: str | None) -> dict[str, Any]:
    """Return the config keys that the command-line options --init and --val set."""
    keys: dict[str, Any] = {"data": {"val": val}} if val else {}
    if init:
        keys["init"] = "scratch" if init == "scratch" else {"run": init}
    return keys


def with_overrides(config: ConfigT, overrides: tuple[str, ...], where: str) -> ConfigT:
    """Return the config with `key.key=value` overrides applied. Raise UserError, prefixed with `where`, on mistakes."""
    tree = config.model_dump()
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(type(config), tree, where)


def parse_config(
    config_type: type[ConfigT], tree: dict[str, Any], where: str, overrides: tuple[str, ...] = ()
) -> ConfigT:
    """Validate a tree. Raise one UserError that lists all mistakes.

    Args:
        where: the tree's file, named in the message.
        overrides: those that were applied to the tree. A wrong value of one is reported as its mistake, not the file's.
    """
    try:
        return config_type.model_validate(tree)
    except ValidationError as error:
        found = [_describe_error(config_type, e, overrides) for e in error.errors()]
        mistakes = [f"{source}: {text}" for source, text in found if source]
        if in_file := [text for source, text in found if not source]:
            mistakes.append(f"{where}: {'; '.join(in_file)}")
        raise UserError("; ".join(mistakes)) from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"{override}: an override has the form key=value, for example epochs=10")
    *parents, leaf = key.split(".")
    for parent in parents:
        tree = tree.setdefault(parent, {})
        if not isinstance(tree, dict):
            raise UserError(f"{override}: {parent} is a value and has no keys")
    try:
        tree[leaf] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(f"{override}: the value is not valid YAML") from None


def _describe_error(config_type: type[BaseModel], error: Any, overrides: tuple[str, ...]) -> tuple[str, str]:
    """Describe one pydantic error in terms of config keys.

    Returns the override that set the wrong key, "" if none did, and the description. An override's value is left out where
    it is more than the wrong value: it may contain a secret.
    """
    path = [str(part) for part in error["loc"]]
    if path == ["init"] and error["type"] == "missing":
        missing = (
            "init is missing: pass --init RUN for a pre-trained encoder, or --init scratch for random weights"
        )
        return "", missing
    # For a union pydantic adds the name of the member that it tried, which is not a key of the config.
    path = [
        part
        for part in path
        if "[" not in part
        and "-" not in part
        and part not in ("InitConfig", "NormaliseConfig", "int", "float")
    ]
    key = ".".join(path)
    override = _override_of(key, overrides)
    source = f"{override.partition('=')[0]}=…" if override else ""
    if error["type"] == "extra_forbidden":
        model = _model_at(config_type, path[:-1])
        similar = difflib.get_close_matches(path[-1], model.model_fields, n=1)
        hint = f"did you mean {similar[0]}?" if similar else f"valid keys are {', '.join(model.model_fields)}"
        return source, f"unknown key {key}: {hint}"
    message = _plain_message(error["msg"])
    override_has_key = override.startswith(f"{key}=")
    about_several_keys = isinstance(error["input"], dict)  # then the message has the values
    if not about_several_keys:
        message += f", got {error['input']!r}"
        source = " ".join(override.split()) if override_has_key else source
    return source, message if override_has_key or not key else f"{key}: {message}"


def _override_of(key: str, overrides: tuple[str, ...]) -> str:
    """Return the last `key.key=value` override that set `key` or a part of the config that contains it; "" if none did."""
    for override in reversed(overrides):
        if f"{key}.".startswith(f"{override.partition('=')[0]}."):
            return override
    return ""


def _plain_message(message: str) -> str:
    """Return pydantic's message in plain words, for example "expected a number"."""
    message = message.removeprefix("Value error, ")
    message = re.sub(r"Input should be (?=greater|less)", "expected a number ", message)
    message = message.replace("Input should be a valid integer", "expected an integer")
    message = message.replace("Input should be ", "expected ").replace("a valid ", "a ")
    return re.sub(r", unable to parse .*|, got a number with .*| or instance of \w+", "", message)


def _model_at(config_type: type[BaseModel], path: list[str]) -> type[BaseModel]:
    """Return the config model that holds the keys below `path`."""
    for key in path:
        if key not in config_type.model_fields:
            continue
        annotation = config_type.model_fields[key].annotation
        members = (annotation, *get_args(annotation))
        config_type = next(m for m in members if isinstance(m, type) and issubclass(m, BaseModel))
    return config_type


def dump_config(config: RunConfig) -> str:
    """Return the config as YAML, with all defaults filled in."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def fixed_values(config: RunConfig) -> dict[str, Any]:
    """Return the values that must not change when a run is resumed, by dotted key."""
    return {
        key: value
        for key, value in _flatten(config.model_dump()).items()
        if not any(key == free or key.startswith(free + ".") for free in FREE_ON_RESUME)
        and value not in LATER_KEYS.get(key, ())
    }


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """List the values outside FREE_ON_RESUME that differ between two configs, as "key: old → new"."""
    a, b = fixed_values(old), fixed_values(new)

    def shown(values: dict[str, Any], key: str) -> Any:
        return values.get(key, LATER_KEYS.get(key, (None,))[-1])

    return [
        f"{key}: {shown(a, key)} → {shown(b, key)}"
        for key in dict.fromkeys([*a, *b])
        if a.get(key) != b.get(key)
    ]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
