"""What is wrong with a setting, in words: an error of pydantic becomes the full path, what is wrong and what would be right."""

from __future__ import annotations

import difflib
from typing import Any, get_args

from sivae.config.section import TAGS, Section


def sentence(item: dict[str, Any], schema: type[Section]) -> str:
    """One pydantic error as `full.path: what is wrong; what would be right`."""
    section, path = _walk(item["loc"], schema)
    where, kind = ".".join(path), item["type"]
    if kind == "extra_forbidden":
        known = sorted(section.model_fields) if section else []
        close = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.8)
        kind_of = next(
            (f" of `{section.model_fields[tag].default}`" for tag in TAGS if section and tag in section.model_fields),
            "",
        )
        hint = f"did you mean `{close[0]}`?" if close else f"remove it; known here: {', '.join(known)}"
        return f"{where}: unknown setting{kind_of}; {hint}"
    if kind == "missing":
        return f"{where}: is missing; give it in the YAML file or as {where}=value"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tag = item["ctx"]["discriminator"].strip("'")
        known = item["ctx"].get("expected_tags") or "one of the known ones"
        return f"{where}.{tag}: must be one of {known}"
    if kind == "value_error":
        # Our own checks start with the key they speak of, relative to the section they stand in.
        return f"{where}.{item['ctx']['error']}" if where else str(item["ctx"]["error"])
    message, value = item["msg"][0].lower() + item["msg"][1:], item["input"]
    if "storage_options" in path:
        return f"{where}: {message}"
    hint = ""
    if kind == "string_type" and isinstance(value, (bool, int, float)):  # YAML's no is False
        # Not the value: 12:30 has become 750.
        hint = f"; to have it as text put it in quotes: '{where}=\"...\"'"
    return f"{where}: {message}, not {value!r}{hint}"


def _walk(location: tuple[Any, ...], schema: type[Section]) -> tuple[type[Section] | None, list[str]]:
    """The section that holds the last key, and the path without pydantic's tags of unions."""
    section: type[Section] | None = schema
    path: list[str] = []
    for index, part in enumerate(location):
        members = (
            _members(section.model_fields[path[-1]].annotation)
            if section and path and path[-1] in section.model_fields
            else []
        )
        by_tag = {
            str(field.default): member
            for member in members
            for name, field in member.model_fields.items()
            if name in TAGS
        }
        if part in by_tag:
            section = by_tag[part]
            continue
        if len(members) == 1 and index:
            section = members[0]
        path.append(str(part))
    return section, path


def _members(annotation: Any) -> list[type[Section]]:
    """The section classes inside an annotation: itself, or the members of a union."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [member for part in get_args(annotation) for member in _members(part)]
