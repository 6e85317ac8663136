"""The JSON Schema of the policy language, for editors; made from the table of fields.

`python -m pyqemu_ifconf.schema` prints it. The policy's own check finds more: a schema cannot
compare two places of the text, nor see how a value is written.
"""

from __future__ import annotations

import json
from collections.abc import Set

from pyqemu_ifconf import kinds
from pyqemu_ifconf.field import Field, Where
from pyqemu_ifconf.fields import fields_of, lacking
from pyqemu_ifconf.kinds.base import KindSpec
from pyqemu_ifconf.made import nat as made_nat
from pyqemu_ifconf.policy import MATCH_KEYS
from pyqemu_ifconf.values import Schema

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def policy_schema() -> Schema:
    """Return the JSON Schema (draft 2020-12) of one policy file."""
    return {
        "$schema": DIALECT,
        "title": "The policy of pyqemu-ifup",
        **_object("top"),
        "$defs": {
            "network": _network(),
            "rule": _rule(),
            "vm": _object("vm"),
            "nic": _nic(),
            "user": _object("user"),
            "nat": _nat(),
        },
    }


def schema_text() -> str:
    """Return the JSON Schema as the text of its file."""
    return json.dumps(policy_schema(), indent=2, ensure_ascii=False) + "\n"


def _object(where: Where) -> Schema:
    fields = fields_of(where)
    required = [name for name, field in fields.items() if field.required]
    return {
        "type": "object",
        "properties": {name: _property(field) for name, field in fields.items()},
        **({"required": required} if required else {}),
        "additionalProperties": False,
    }


def _property(field: Field) -> Schema:
    schema = field.type.schema()
    if field.where == "port":
        schema = {"anyOf": [{"const": "none"}, schema]}
    sentence = f"{field.name} must be {field.type.words}"
    return {"description": field.about, **_saying(sentence, schema)}


def _saying(sentence: str, schema: Schema) -> Schema:
    """Return the schema of a value, with what an editor is to say if the value is wrong.

    `errorMessage` is a key of the language servers for JSON and YAML. Others pass it over.
    """
    told: Schema = {"errorMessage": sentence, **schema}
    for key in ("anyOf", "allOf"):
        if isinstance(parts := schema.get(key), list):
            told[key] = [_saying(sentence, part) for part in parts]
    if isinstance(items := schema.get("items"), dict) and "$ref" not in items:
        told["items"] = _saying(sentence, items)
    return told


def _network() -> Schema:
    """Return the schema of a network: one key names its kind, and excludes keys of other kinds."""
    cases: list[tuple[Schema, tuple[KindSpec, ...]]] = [
        ({"required": [key]}, kinds.named_by(key)) for key in kinds.naming_keys()
    ]
    naming = [case for case, _ in cases]
    for spec in kinds.said():
        said: Schema = {"properties": {"kind": {"const": spec.name}}, "required": ["kind"]}
        cases.append((said, (spec,)))
    excluded = [(case, _excluded(lacking(specs))) for case, specs in cases]
    made = _excluded(lacking((made_nat.KIND,), made_nat.WITHOUT))
    return {
        **_object("network"),
        **({"oneOf": naming} if len(naming) > 1 else naming[0]),
        "allOf": [
            {"if": case, "then": {"properties": others}}
            for case, others in (*excluded, ({"required": ["nat"]}, made))
            if others
        ],
    }


def _excluded(keys: Set[str]) -> Schema:
    """Return the schemas of `keys` for a network that cannot have them."""
    return {
        name: {"const": "none"} if field.where == "port" else False
        for name, field in fields_of("network").items()
        if name in keys
    }


def _rule() -> Schema:
    """Return the schema of a rule: a match key, and a network with settings, or no network."""
    settings = [name for name, field in fields_of("rule").items() if field.where == "port"]
    return {
        **_object("rule"),
        "anyOf": [{"required": [key]} for key in MATCH_KEYS],
        "oneOf": [
            {"required": ["network"], "properties": {"deny": False, "leave": False}},
            *(
                {
                    "required": [one],
                    "properties": dict.fromkeys(("network", other, *settings), False),
                }
                for one, other in (("deny", "leave"), ("leave", "deny"))
            ),
        ],
    }


def _nat() -> Schema:
    """Return the schema of nat: it has `ipv4`, `ipv6` or both, and some keys need `ipv4`."""
    needs_ipv4: Schema = {
        "properties": {"dhcp": {"const": False}, "forward": {"type": "array", "maxItems": 0}}
    }
    return {
        **_object("nat"),
        "anyOf": [{"required": ["ipv4"]}, {"required": ["ipv6"]}],
        "if": {"not": {"required": ["ipv4"]}},
        "then": needs_ipv4,
    }


def _nic() -> Schema:
    """Return the schema of a NIC: on a network with a tap and settings, or on one in user mode."""
    fields = fields_of("nic")
    of_taps = ("tap", *(name for name, field in fields.items() if field.where == "port"))
    return {
        **_object("nic"),
        "oneOf": [
            {"required": ["network"], "properties": {"user": False}},
            {
                "required": ["user"],
                "properties": {
                    **dict.fromkeys(("network", *of_taps), False),
                    "queues": {"const": 1},
                },
            },
        ],
    }


if __name__ == "__main__":
    print(schema_text(), end="")
