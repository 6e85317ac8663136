"""The JSON Schema: it is fresh, and agrees with our own verdict on every sample."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

from lab.checkout import ROOT
from pyqemu_ifconf.failure import PolicyInvalid
from pyqemu_ifconf.field import Field
from pyqemu_ifconf.fields import all_fields
from pyqemu_ifconf.kinds.bridge import BridgePlace
from pyqemu_ifconf.load import Source, _compose, check_policy, parse_policy
from pyqemu_ifconf.nodes import Errors, List, Map, Node, Scalar
from pyqemu_ifconf.policy import Attach, Caller, Deny, decide
from pyqemu_ifconf.schema import policy_schema, schema_text
from pyqemu_ifconf.values import NUMBER

pytestmark = pytest.mark.each_python

TESTS = ROOT / "tests"
CONF = TESTS.parent / "conf"
SAMPLES = sorted((TESTS / "samples").glob("*.yaml"))
WITHIN = [path for path in SAMPLES if not path.name.startswith("beyond-")]
BEYOND = [path for path in SAMPLES if path.name.startswith("beyond-")]


def plain_data(node: Node | None) -> object:
    """Return what a reader of our dialect makes of `node`: a plain number or truth is one."""
    if isinstance(node, Map):
        return {key.text: plain_data(value) for key, value in node.pairs if isinstance(key, Scalar)}
    if isinstance(node, List):
        return [plain_data(item) for item in node.items]
    if not isinstance(node, Scalar):
        return None
    if node.plain and NUMBER.fullmatch(node.text):
        return int(node.text)
    if node.plain and node.text in ("true", "false"):
        return node.text == "true"
    return node.text


def is_right(path: Path) -> bool:
    try:
        parse_policy([Source(path.name, path.read_bytes())])
    except PolicyInvalid:
        return False
    return True


def schema_says(path: Path) -> bool:
    data = plain_data(_compose(path.read_text(), Errors(path.name)))
    return bool(Draft202012Validator(policy_schema()).is_valid(data))


def test_schema_is_a_schema() -> None:
    Draft202012Validator.check_schema(policy_schema())


def test_committed_schema_is_fresh() -> None:
    committed = (CONF / "policy.schema.json").read_text()
    assert committed == schema_text(), (
        "make it anew: cd conf && python -m pyqemu_ifconf.schema > policy.schema.json"
    )
    assert json.loads(committed) == policy_schema()


@pytest.mark.parametrize("field", all_fields(), ids=lambda field: field.name)
def test_every_field_is_in_the_schema_and_in_a_good_sample(field: Field) -> None:
    good = "".join(path.read_text() for path in SAMPLES if path.name.startswith("good-"))
    schema = schema_text()
    assert f'"{field.name}": {{' in schema
    assert f"{field.name}:" in good


@pytest.mark.parametrize("path", WITHIN, ids=lambda path: path.stem)
def test_schema_agrees_with_our_verdict(path: Path) -> None:
    good = path.name.startswith("good-")
    assert good or path.name.startswith("bad-")
    assert (is_right(path), schema_says(path)) == (good, good)


@pytest.mark.parametrize("path", BEYOND, ids=lambda path: path.stem)
def test_what_is_beyond_a_schema_is_wrong_all_the_same(path: Path) -> None:
    assert path.read_text().startswith("# "), "the first line says why it is beyond a schema"
    assert not is_right(path)


def test_the_sample_policy_is_right() -> None:
    path = CONF / "policy.yaml"
    policy = parse_policy([Source("policy.yaml", path.read_bytes())])
    assert (len(policy.networks), len(policy.rules), len(policy.vms)) == (5, 8, 1)
    assert schema_says(path)
    for field in all_fields():
        assert f"{field.name} " in path.read_text() or f"{field.name}:" in path.read_text()


def test_check_reads_the_sample_policy(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_bytes((CONF / "policy.yaml").read_bytes())
    path.chmod(0o644)
    assert check_policy([str(path)]).files == (str(path),)


def test_the_first_policy_is_right_and_so_is_what_becomes_of_it() -> None:
    """It denies each tap, without a network; with the # taken off, web0 goes to lan."""
    text = (CONF / "first.yaml").read_text()
    denied = decide(parse_policy([Source("first.yaml", text.encode())]), Caller("web0"))
    assert isinstance(denied, Deny)
    head, version, body = text.partition("version: 1\n")
    opened = re.sub(r"^# ", "", body, flags=re.MULTILINE)
    assert opened.count("#") == 0
    policy = parse_policy([Source("first.yaml", (head + version + opened).encode())])
    attached = decide(policy, Caller("web0"))
    assert isinstance(attached, Attach) and attached.port.place == BridgePlace("br0")
    assert isinstance(decide(policy, Caller("db0")), Deny)


@pytest.mark.parametrize(
    ("name", "wrong"), [("mtu", "[]"), ("vlan", "4095"), ("isolated", "yes"), ("kind", "ovs")]
)
def test_an_editor_is_told_our_own_sentence(tmp_path: Path, name: str, wrong: str) -> None:
    """Of each field, what `check` says of a wrong value is what the schema has for an editor."""
    schema = policy_schema()
    defs = schema["$defs"]
    assert isinstance(defs, dict)
    told = {
        name: field["errorMessage"]
        for where in (schema, *defs.values())
        for name, field in where["properties"].items()
        if isinstance(field, dict)
    }
    assert told["mtu"] == "mtu must be a whole number from 68 to 65521 or bridge"
    text = f"version: 1\nnetworks: {{lan: {{bridge: br0, {name}: {wrong}}}}}\n"
    with pytest.raises(PolicyInvalid) as caught:
        parse_policy([Source("p.yaml", text.encode())])
    (error,) = caught.value.errors
    assert error.message.startswith(told[name]), (error.message, told[name])
    (met,) = Draft202012Validator(schema).iter_errors(plain_data(_compose(text, Errors("p.yaml"))))
    assert met.schema["errorMessage"] == told[name]


@pytest.mark.parametrize("name", ["policy.yaml", "first.yaml"])
def test_the_samples_name_their_schema(name: str) -> None:
    """As the language servers for YAML look for it, where it is installed."""
    line = "# yaml-language-server: $schema=/usr/local/share/pyqemu-ifup/policy.schema.json\n"
    assert (CONF / name).read_text().startswith(line)
