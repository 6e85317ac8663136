"""What pyqemu-ifctl prints with --json, held against the schema that is published for it."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

SCHEMA = Path(__file__).resolve().parents[2] / "ifctl/answers.schema.json"


def read_answer(verb: str, printed: str) -> Any:
    """Return the object that `verb` has printed. Raises where the schema does not know it so."""
    found = json.loads(printed)
    _validator(verb).validate(found)
    return found


@functools.cache
def _validator(verb: str) -> Draft202012Validator:
    schema = json.loads(SCHEMA.read_text())
    for each in schema["$defs"].values():
        _take_in(each, schema["$defs"])
    _close(schema)
    return Draft202012Validator({**schema, "$ref": f"#/$defs/{verb}"})


def _take_in(schema: dict[str, Any], definitions: dict[str, Any]) -> None:
    """Put the keys of what a definition has by allOf in it, so that both are closed as one."""
    for part in schema.pop("allOf", ()):
        other = definitions[part["$ref"].removeprefix("#/$defs/")]
        schema["properties"] = {**other["properties"], **schema["properties"]}
        schema["required"] = [*other["required"], *schema["required"]]


def _close(schema: Any) -> None:
    """Let no object have other keys than are told: for a test a new one is a mistake."""
    if isinstance(schema, list):
        for each in schema:
            _close(each)
    elif isinstance(schema, dict):
        for each in list(schema.values()):
            _close(each)
        if isinstance(schema.get("properties"), dict) and "required" in schema:
            schema["additionalProperties"] = False
