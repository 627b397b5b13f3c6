"""Settings from a file, overrides or a plain tree, and back."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, TypeVar

import fsspec
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import TypeAdapter, ValidationError

from sivae.config.model import ConvModel, MlpModel, ModelSettings, StyleModel, TranslationModel
from sivae.config.run import Config
from sivae.config.section import ConfigError, Section
from sivae.config.sentences import sentence

Settings = TypeVar("Settings", bound=Section)


def load(path: str, overrides: Iterable[str] = (), schema: type[Settings] = Config) -> Settings:
    """Read a YAML file (path or fsspec URL), apply `key.path=value` overrides, validate.

    Raises ConfigError in one sentence for a missing or unreadable file, a malformed override or a wrong setting.
    """
    try:
        with fsspec.open(path, "r") as file:
            text = file.read()
    except Exception as error:  # noqa: BLE001 (drivers of object stores raise their own kinds)
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ConfigError(
            f"{path}: cannot be read ({reason}); give the path of a YAML file such as configs/digits.yaml"
        ) from None
    try:
        # OmegaConf's loader, not plain YAML: it reads 2e-4 as a number.
        tree = OmegaConf.create(text)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: is not valid YAML ({' '.join(str(error).split())})") from None
    if not OmegaConf.is_dict(tree) or not any(section in tree for section in schema.model_fields):
        raise ConfigError(f"{path}: holds no settings; see configs/digits.yaml for an example")
    for section, command in (("data", "train"), ("density", "toy2d")):
        if section in tree and section not in schema.model_fields:
            raise ConfigError(
                f"{path}: is for `sivae {command}`, as it has `{section}`; give that command, or another file"
            )
    for override in overrides:
        if "=" not in override or override.startswith("="):
            raise ConfigError(f"{override}: an override is written key.path=value, for example schedule.batch_size=64")
        try:
            tree = OmegaConf.merge(tree, OmegaConf.from_dotlist([_as_meant(override)]))
        except (yaml.YAMLError, OmegaConfBaseException, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(f"{override}: cannot be applied ({' '.join(str(error).split())})") from None
    try:
        return parse(OmegaConf.to_container(tree, resolve=True), schema)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None


def _as_meant(override: str) -> str:
    """What a person at a shell means where YAML reads something else. Raises ConfigError where nobody can tell."""
    key, _, value = override.partition("=")
    if value.strip() == "???":  # OmegaConf's sign for a value to come, which changes nothing
        raise ConfigError(f"{override}: ??? is no value")
    if re.fullmatch(r"[+-]?0[0-7_]+", value):
        raise ConfigError(f"{override}: YAML reads a number that begins with 0 to the base of 8; leave the 0 out")
    # `digits:` is no mapping, and ` #` in a path begins no comment.
    if re.fullmatch(r"\w+:", value) or (re.search(r"\s#", value) and value[0] not in "'\"[{"):
        return f"{key}='{value.replace(chr(39), 2 * chr(39))}'"
    return override


def parse(tree: dict[str, Any], schema: type[Settings] = Config) -> Settings:
    """Validate a plain tree of settings. Raises ConfigError naming the full path of what is wrong."""
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("; ".join(sentence(item, schema) for item in error.errors())) from None


def parse_model(tree: dict[str, Any]) -> MlpModel | ConvModel | StyleModel | TranslationModel:
    """Validate the settings of a model alone, as checkpoints and exported models hold them."""
    try:
        return TypeAdapter(ModelSettings).validate_python(tree)
    except ValidationError as error:
        raise ConfigError(
            "; ".join(f"model.{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        ) from None


def dump(config: Config) -> dict[str, Any]:
    """The resolved settings as a plain tree, without what may hold secrets: `storage_options`, passwords and queries in URLs."""
    tree = config.model_dump(mode="json", exclude={"run": {"storage_options"}, "data": {"storage_options"}})
    for section, key in (("run", "directory"), ("run", "init_from"), ("data", "url"), ("evaluate", "data")):
        if url := tree[section][key]:
            # In a local path a question mark is a letter like any other.
            masked = re.sub(r"^(?!file:|local:)([^?]*://[^?]*)\?.*", r"\1?...", url)
            tree[section][key] = re.sub(r"//[^/\s]+@", "//...@", masked)
    return tree


def dump_yaml(config: Config) -> str:
    return yaml.safe_dump(dump(config), sort_keys=False)
