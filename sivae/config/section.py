"""What all settings are made of."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

TAGS = ("family", "name")  # the settings that say which section of several stands there


class ConfigError(ValueError):
    """A setting is wrong. The message names its full path and what would be right. Every rank raises the same."""

    shared = True


class Section(BaseModel):
    """Strict: no unknown keys, no silent conversion of types, no change after validation."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
