"""Every error of a policy, with its place and its whole text."""

from __future__ import annotations

import pytest
import yaml

from lab.checkout import ROOT
from pyqemu_ifconf import load
from pyqemu_ifconf.failure import PolicyError, PolicyInvalid, Status
from pyqemu_ifconf.load import SIZE_MAX, Source, parse_policy, render

pytestmark = pytest.mark.each_python

SAMPLES = ROOT / "tests" / "samples"
LOADERS = {"c": getattr(yaml, "CSafeLoader", yaml.SafeLoader), "python": yaml.SafeLoader}

HEAD = "version: 1\n"
LAN = HEAD + "networks: {lan: {bridge: br0}}\n"

# The one error of each sample: LINE:COLUMN: message.
SAMPLE_ERRORS = [
    (
        "bad-bridge-dots",
        "3:17: bridge must be the name of a bridge, not ..; a name is 1 to 15 bytes of 0x21 "
        "to 0x7e, without / and :, not . or ..",
    ),
    (
        "bad-bridge-list",
        "3:17: bridge must be the name of a bridge, not a list; a name is 1 to 15 bytes of "
        "0x21 to 0x7e, without / and :, not . or ..",
    ),
    (
        "bad-bridge-number-too-long",
        "3:17: bridge must be the name of a bridge, not 1234567890123456; a name is 1 to 15 "
        "bytes of 0x21 to 0x7e, without / and :, not . or ..",
    ),
    (
        "bad-bridge-slash",
        "3:17: bridge must be the name of a bridge, not br/0; a name is 1 to 15 bytes of "
        "0x21 to 0x7e, without / and :, not . or ..",
    ),
    (
        "bad-bridge-too-long",
        "3:17: bridge must be the name of a bridge, not a-bridge-too-far; a name is 1 to 15 "
        "bytes of 0x21 to 0x7e, without / and :, not . or ..",
    ),
    ("bad-empty", "1:1: the file is empty; a policy has at least version: 1"),
    ("bad-external-ids-empty", "3:36: external_ids is empty; leave it out, or write none"),
    ("bad-external-ids-key-empty", '3:37: external_ids has a key that is not one line of text: ""'),
    (
        "bad-external-ids-linux",
        "3:35: external_ids are for Open vSwitch, but network lan has kind: linux; remove one",
    ),
    ("bad-external-ids-list", "3:36: external_ids must be a mapping of keys to text, not a list"),
    (
        "bad-external-ids-ours",
        "3:37: external_ids key pyqemu-network is one that pyqemu-ifup writes itself "
        "(pyqemu-*, vm-name, vm-pid); take another",
    ),
    ("bad-external-ids-value-empty", '3:40: external_ids a must be one line of text, not ""'),
    ("bad-external-ids-value-list", "3:40: external_ids a must be one line of text, not a list"),
    (
        "bad-external-ids-vm-name",
        "3:37: external_ids key vm-name is one that pyqemu-ifup writes itself (pyqemu-*, "
        "vm-name, vm-pid); take another",
    ),
    (
        "bad-external-ids-vm-pid",
        "3:37: external_ids key vm-pid is one that pyqemu-ifup writes itself (pyqemu-*, "
        "vm-name, vm-pid); take another",
    ),
    ("bad-isolated-number", "3:32: isolated must be true or false, not 1; write true"),
    (
        "bad-isolated-quoted",
        '3:32: isolated must be true or false, not "true"; take the quotes away',
    ),
    ("bad-isolated-yes", "3:32: isolated must be true or false, not yes; write true"),
    ("bad-kind", "3:28: kind must be linux or openvswitch, not ovs"),
    ("bad-list", "1:1: a policy must be a mapping with version, networks and rules, not a list"),
    ("bad-macvtap-bridge", "3:23: network dmz has both parent and bridge; keep one of them"),
    ("bad-macvtap-isolated", "3:23: network dmz has parent:, and so no isolated; remove it"),
    ("bad-macvtap-mode", "3:29: mode must be bridge, vepa, private or passthru, not hairpin"),
    (
        "beyond-macvtap-trunk",
        "4:23: network dmz has parent:, and its guests are in one VLAN, or in all; write vlan: "
        "VID, or vlan: any",
    ),
    ("bad-mtu-65522", "3:27: mtu must be a whole number from 68 to 65521 or bridge, not 65522"),
    ("bad-mtu-67", "3:27: mtu must be a whole number from 68 to 65521 or bridge, not 67"),
    (
        "bad-mtu-full-width",
        "3:27: mtu must be a whole number from 68 to 65521 or bridge, not １５００",
    ),
    ("bad-mtu-hex", "3:27: mtu must be a whole number from 68 to 65521 or bridge, not 0x5dc"),
    ("bad-mtu-negative", "3:27: mtu must be a whole number from 68 to 65521 or bridge, not -1"),
    (
        "bad-mtu-quoted",
        '3:27: mtu must be a whole number from 68 to 65521 or bridge, not "1500"; take the '
        "quotes away",
    ),
    (
        "bad-mtu-underscore",
        "3:27: mtu must be a whole number from 68 to 65521 or bridge, not 1_500; write 1500",
    ),
    ("bad-mtu-word", "3:27: mtu must be a whole number from 68 to 65521 or bridge, not jumbo"),
    (
        "bad-network-name",
        "3:3: a network cannot be named a/b; a name is 1 to 63 ASCII letters, digits, dots, "
        "hyphens and underscores, a letter or digit first",
    ),
    ("bad-network-scalar", "3:8: network lan must be a mapping with bridge or parent, not br0"),
    ("bad-networks-list", "2:11: networks must be a mapping of names to networks, not a list"),
    ("bad-no-bridge", "3:3: network lan has none of bridge and parent; give one of them"),
    ("bad-no-version", "1:1: version is missing; write version: 1"),
    (
        "bad-ovsdb-host-name",
        "3:29: ovsdb must be unix:/PATH or tcp:ADDRESS:PORT, not tcp:localhost:6640; the "
        "address is a number such as 127.0.0.1 or [::1], the port 1 to 65535",
    ),
    (
        "bad-ovsdb-linux",
        "3:35: ovsdb is for Open vSwitch, but network lan has kind: linux; remove one",
    ),
    (
        "bad-ovsdb-no-port",
        "3:29: ovsdb must be unix:/PATH or tcp:ADDRESS:PORT, not tcp:127.0.0.1; the address "
        "is a number such as 127.0.0.1 or [::1], the port 1 to 65535",
    ),
    (
        "bad-ovsdb-relative",
        "3:29: ovsdb must be unix:/PATH or tcp:ADDRESS:PORT, not unix:db.sock; the address "
        "is a number such as 127.0.0.1 or [::1], the port 1 to 65535",
    ),
    (
        "bad-ovsdb-ssl",
        "3:29: ovsdb must be unix:/PATH or tcp:ADDRESS:PORT, not ssl:127.0.0.1:6640; the "
        "address is a number such as 127.0.0.1 or [::1], the port 1 to 65535",
    ),
    ("bad-rule-both-with-settings", "5:31: the rule has both network and deny; keep one of them"),
    ("bad-rule-all-three", "5:41: the rule has network, deny and leave; keep one of them"),
    ("bad-rule-both-leave", "5:31: the rule has both network and leave; keep one of them"),
    ("bad-rule-both", "5:31: the rule has both network and deny; keep one of them"),
    ("bad-rule-bridge", "5:31: a rule has no key bridge; bridge belongs to a network"),
    ("bad-rule-deny-empty", '5:23: deny must be the reason, one line of text, not ""'),
    ("bad-rule-deny-list", "5:23: deny must be the reason, one line of text, not a list"),
    ("bad-rule-deny-settings", "5:27: a deny rule takes no port settings; remove vlan"),
    ("bad-rule-glob-blank", '5:11: tap must be visible ASCII without blanks, not "web 0"'),
    ("bad-rule-glob-control", '5:10: vm must be visible text, not "a\\tb"'),
    ("bad-rule-glob-empty-set", "5:11: tap web[!] is not a glob: [!] is an empty set"),
    (
        "bad-rule-glob-empty",
        '5:11: tap has an empty glob, which matches nothing; for all, write "*"',
    ),
    ("bad-rule-glob-mapping", "5:11: tap must be a glob or a list of globs, not a mapping"),
    ("bad-rule-glob-not-ascii", '5:11: mac must be visible ASCII without blanks, not "５2:*"'),
    (
        "bad-rule-glob-open",
        "5:11: tap web[0-9 is not a glob: its [ has no ]; to match a [ itself, write [[]",
    ),
    ("bad-rule-globs-empty", "5:11: tap has an empty list of globs, which matches nothing"),
    ("bad-rule-leave-false", "5:24: leave must be true, not false; take leave out"),
    ("bad-rule-leave-settings", "5:30: a leave rule takes no port settings; remove mtu"),
    ("bad-rule-leave-yes", "5:24: leave must be true, not yes; write true"),
    ("bad-rule-neither", "5:5: the rule has none of network, deny and leave; give one of them"),
    ("bad-rule-network-list", "5:26: network must be the name of a network, not a list"),
    (
        "bad-rule-no-match",
        "5:5: the rule has no match key; give at least one of tap, vm, netdev, mac or user",
    ),
    ("bad-rule-scalar", "5:5: a rule must be a mapping such as {tap: web*, network: lan}, not lan"),
    (
        "bad-scalar",
        '1:1: a policy must be a mapping with version, networks and rules, not "version 1"',
    ),
    ("bad-timeout-0", "2:10: timeout must be a whole number from 1 to 300, not 0"),
    ("bad-timeout-301", "2:10: timeout must be a whole number from 1 to 300, not 301"),
    ("bad-timeout-none", "2:10: timeout must be a whole number from 1 to 300, not none"),
    ("bad-timeout-octal", "2:10: timeout must be a whole number from 1 to 300, not 010; write 10"),
    (
        "bad-trunk-0",
        "3:37: trunk must be VIDs from 1 to 4094 and ranges of them such as 30-39, not 0",
    ),
    ("bad-trunk-empty", "3:36: trunk has no VID; for a port without tagged VLANs, write vlan: VID"),
    (
        "bad-trunk-range-4095",
        "3:37: trunk must be VIDs from 1 to 4094 and ranges of them such as 30-39, not 4090-4095",
    ),
    ("bad-trunk-scalar", "3:36: trunk must be a list of VIDs and ranges, not 20; write [20]"),
    ("bad-trunk-twice", "3:41: VID 20 is twice in trunk: in 20 and in 20"),
    ("bad-txqueuelen", "3:34: txqueuelen must be a whole number from 0 to 1000000, not 1000001"),
    ("bad-unknown-key", "3:22: network lan has no key mtuu; did you mean mtu?"),
    ("bad-version-2", "1:10: version 2 is not known here; this program reads 1"),
    ("bad-version-quoted", '1:10: version must be 1, not "1"; take the quotes away'),
    ("bad-bridge-conf-yes", "2:14: bridge_conf must be true or false, not yes; write true"),
    ("bad-max-taps-0", "3:32: max_taps must be a whole number from 1 to 1023, not 0"),
    ("bad-max-taps-1024", "3:32: max_taps must be a whole number from 1 to 1023, not 1024"),
    (
        "bad-tap-name-dots",
        "3:32: tap_name must be the name of a tap, in which one %d may stand for a number, "
        "not ..; letters, digits, dots, hyphens and underscores, "
        "a letter or digit first; at most 15 bytes, 11 beside a %d",
    ),
    (
        "bad-tap-name-long",
        "3:32: tap_name must be the name of a tap, in which one %d may stand for a number, "
        "not abcdefghijklmnop; letters, digits, dots, hyphens and underscores, "
        "a letter or digit first; at most 15 bytes, 11 beside a %d",
    ),
    (
        "bad-tap-name-option",
        "3:32: tap_name must be the name of a tap, in which one %d may stand for a number, "
        "not -%d; letters, digits, dots, hyphens and underscores, "
        "a letter or digit first; at most 15 bytes, 11 beside a %d",
    ),
    (
        "bad-tap-name-shell",
        "3:32: tap_name must be the name of a tap, in which one %d may stand for a number, not "
        '"$(id)"; letters, digits, dots, hyphens and underscores, '
        "a letter or digit first; at most 15 bytes, 11 beside a %d",
    ),
    (
        "bad-tap-name-percent",
        "3:32: tap_name must be the name of a tap, in which one %d may stand for a number, "
        "not t%s; letters, digits, dots, hyphens and underscores, "
        "a letter or digit first; at most 15 bytes, 11 beside a %d",
    ),
    (
        "bad-tap-name-room",
        "3:32: tap_name must be the name of a tap, in which one %d may stand for a number, "
        "not abcdefghijkl%d; letters, digits, dots, hyphens and underscores, "
        "a letter or digit first; at most 15 bytes, 11 beside a %d",
    ),
    (
        "bad-tap-name-slash",
        "3:32: tap_name must be the name of a tap, in which one %d may stand for a number, "
        "not t/%d; letters, digits, dots, hyphens and underscores, "
        "a letter or digit first; at most 15 bytes, 11 beside a %d",
    ),
    (
        "bad-tap-name-two",
        "3:32: tap_name must be the name of a tap, in which one %d may stand for a number, "
        "not t%d%d; letters, digits, dots, hyphens and underscores, "
        "a letter or digit first; at most 15 bytes, 11 beside a %d",
    ),
    (
        "bad-users-at",
        '3:30: users must be a list of login names and @groups, not "@"; name each, or a group',
    ),
    (
        "bad-users-blank",
        '3:42: deny_users must be a list of login names and @groups, not "bob smith"; name '
        "each, or a group",
    ),
    (
        "bad-users-glob",
        '3:30: users must be a list of login names and @groups, not "*"; name each, or a group',
    ),
    ("bad-users-list", "3:30: users must be a list of login names and @groups, not a list"),
    ("bad-users-mapping", "3:29: users must be a list of login names and @groups, not a mapping"),
    (
        "bad-users-none",
        "3:29: users must be a list of login names and @groups, not none; write [none]",
    ),
    (
        "bad-users-scalar",
        "3:29: users must be a list of login names and @groups, not alice; write [alice]",
    ),
    ("bad-vlan-0", "3:28: vlan must be a VID from 1 to 4094 or a mapping with trunk, not 0"),
    ("bad-vlan-4095", "3:28: vlan must be a VID from 1 to 4094 or a mapping with trunk, not 4095"),
    (
        "bad-vlan-list",
        "3:28: vlan must be a VID from 1 to 4094 or a mapping with trunk, not a list; write "
        "{trunk: [...]}",
    ),
    ("bad-vlan-native-0", "3:37: native must be a whole number from 1 to 4094, not 0"),
    ("bad-vlan-native-alone", "3:28: vlan has no trunk; write vlan: 10"),
    (
        "bad-vlan-range",
        "3:28: vlan must be a VID from 1 to 4094 or a mapping with trunk, not 10-20; write "
        "{trunk: [10-20]}",
    ),
    ("bad-vlan-unknown-key", "3:29: vlan has no key tag; the keys are native and trunk"),
    (
        "beyond-anchor",
        "3:11: an anchor (&all) is not part of the policy language; leave it out, or put a "
        "text that begins with & in quotes",
    ),
    ("beyond-directive", "2:1: a % directive stands before this; leave it out"),
    ("beyond-duplicate-key", "4:1: key timeout is given twice; first at beyond-duplicate-key:3"),
    (
        "beyond-external-ids-of-a-linux-network",
        "6:31: external_ids are for Open vSwitch, but network lan "
        "(beyond-external-ids-of-a-linux-network:4) has kind: linux; remove one",
    ),
    (
        "beyond-glob-range-backwards",
        "4:11: tap web[9-0] is not a glob: the range 9-0 in [9-0] runs backwards",
    ),
    ("beyond-invisible", '4:10: vm must be visible text, not "web\\u200b*"'),
    ("beyond-merge", "4:9: a merge key (<<) is not part of the policy language; write it out"),
    (
        "beyond-port-too-high",
        "4:29: ovsdb must be unix:/PATH or tcp:ADDRESS:PORT, not tcp:127.0.0.1:65536; the "
        "address is a number such as 127.0.0.1 or [::1], the port 1 to 65535",
    ),
    ("beyond-range-backwards", "4:37: the range 39-30 runs backwards; write 30-39"),
    ("beyond-second-document", "3:1: a second document; a policy file has one"),
    ("beyond-tab", "2:9: a tab; put spaces here"),
    (
        "beyond-tag",
        "2:10: a tag (!!int) is not part of the policy language; leave it out, or put a text "
        "that begins with ! in quotes",
    ),
    ("beyond-unknown-network", "4:26: there is no network lan; the policy defines no network"),
    ("beyond-vid-in-two-ranges", "4:44: VID 35 is twice in trunk: in 30-39 and in 35"),
    (
        "bad-nic-addr-function",
        "3:42: addr must be a PCI slot such as 0x8, or slot and function such as "
        "0x8.1, not 0x1.8; in hexadecimal, at most 1f.7",
    ),
    (
        "bad-nic-addr",
        "3:42: addr must be a PCI slot such as 0x8, or slot and function such as "
        "0x8.1, not 0x20; in hexadecimal, at most 1f.7",
    ),
    ("bad-nic-both", "3:36: the NIC has both network and user; keep one of them"),
    (
        "bad-nic-bus",
        '3:41: bus must be a bus of QEMU\'s, not "pci 0"; such as pcie.0 or the id of a port',
    ),
    ("bad-nic-forward-key", "3:65: forward has no key via; the keys are from and to"),
    (
        "bad-nic-forward-mapping",
        '3:38: forward must be a list such as [{from: 127.0.0.1:2222/tcp, to: ":22"}], '
        "not a mapping",
    ),
    (
        "bad-nic-forward-no-protocol",
        '3:46: from must be [ADDRESS:]PORT/tcp or /udp, the address IPv4, not "22"; write 22/tcp',
    ),
    (
        "bad-nic-forward-no-to",
        "3:39: forward has an entry without to; a list such as [{from: "
        '127.0.0.1:2222/tcp, to: ":22"}] is one',
    ),
    (
        "bad-nic-forward-scalar",
        '3:39: forward must be a list such as [{from: 127.0.0.1:2222/tcp, to: ":22"}], not 22',
    ),
    (
        "bad-nic-forward-to",
        '3:58: to must be "[ADDRESS]:PORT", the address IPv4, not "22"; write ":22"',
    ),
    (
        "bad-nic-id",
        "3:40: id must be an id of QEMU's, not 0net; a letter, then letters, digits, "
        "dots, hyphens and underscores",
    ),
    ("bad-nic-key", "3:36: a NIC has no key macaddr; did you mean addr?"),
    (
        "bad-nic-list",
        "3:21: a NIC must be a mapping such as {network: lan} or {user: {}}, not a list",
    ),
    (
        "bad-nic-mac-multicast",
        "3:41: mac must be the MAC of a device, not 53:54:00:12:34:56; six pairs of "
        "hexadecimal digits such as 52:54:00:12:34:56, the second digit even",
    ),
    (
        "bad-nic-mac-short",
        "3:41: mac must be the MAC of a device, not 52:54:00:12:34; six pairs of "
        "hexadecimal digits such as 52:54:00:12:34:56, the second digit even",
    ),
    ("bad-nic-model", '3:43: model must be the model of a NIC, not "a,b"'),
    ("bad-nic-neither", "3:21: the NIC has neither network nor user; give one of them"),
    ("bad-nic-queues-0", "3:44: queues must be a whole number from 1 to 64, not 0"),
    ("bad-nic-queues-65", "3:44: queues must be a whole number from 1 to 64, not 65"),
    (
        "bad-nic-scalar",
        "3:21: a NIC must be a mapping such as {network: lan} or {user: {}}, not lan",
    ),
    (
        "bad-nic-tap-glob",
        '3:41: tap must be the name of a tap, not "web*"; at most 15 bytes, none of / '
        ": * ? [ ] %, not . or ..",
    ),
    (
        "bad-nic-tap-long",
        "3:41: tap must be the name of a tap, not abcdefghijklmnop; at most 15 bytes, "
        "none of / : * ? [ ] %, not . or ..",
    ),
    (
        "bad-nic-tap-number",
        "3:41: tap must be the name of a tap, not web%d; at most 15 bytes, none of / : "
        "* ? [ ] %, not . or ..",
    ),
    (
        "bad-nic-user-hostname",
        "3:39: hostname must be a host name, not -web; letters, digits, dots and "
        "hyphens, at most 32",
    ),
    (
        "bad-nic-user-ipv4-short",
        "3:35: ipv4 must be an IPv4 subnet such as 10.0.2.0/24, or false, not "
        "10.0.2.0/30; its host part zero, its length at most 27",
    ),
    (
        "bad-nic-user-ipv4",
        "3:35: ipv4 must be an IPv4 subnet such as 10.0.2.0/24, or false, not "
        "10.0.2.2; its host part zero, its length at most 27",
    ),
    (
        "bad-nic-user-ipv6",
        "3:35: ipv6 must be an IPv6 subnet such as fd00:2::/64, or false, not "
        "10.0.2.0/24/1; its host part zero, its length at most 126",
    ),
    (
        "bad-nic-user-key",
        "3:29: user: has no key net; the keys are ipv4, ipv6, restrict, hostname, "
        "dns, search and forward",
    ),
    (
        "bad-nic-user-list",
        "3:28: user must be a mapping such as {} or {ipv4: 10.0.2.0/24}, not a list",
    ),
    ("bad-nic-user-queues", "3:32: a NIC in user mode has one pair of queues"),
    ("bad-nic-user-restrict", "3:39: restrict must be true or false, not yes; write true"),
    ("bad-nic-user-tap", "3:32: a NIC in user mode has no tap; remove tap"),
    (
        "bad-nic-user-true",
        "3:28: user must be a mapping such as {} or {ipv4: 10.0.2.0/24}, not true",
    ),
    ("bad-nic-user-vlan", "3:32: a NIC in user mode has no tap; remove vlan"),
    ("bad-nic-vectors", "3:45: vectors must be a whole number from 0 to 2048 or auto, not many"),
    ("bad-nic-vlan", "3:42: vlan must be a VID from 1 to 4094 or a mapping with trunk, not 0"),
    ("bad-vms-key", "2:24: guest web1 has no key memory; the keys are nics and users"),
    ("bad-vms-list", "2:6: vms must be a mapping of names to guests, not a list"),
    (
        "bad-vms-name",
        '2:7: a guest cannot be named "web 1"; a name is 1 to 63 ASCII letters, '
        "digits, dots, hyphens and underscores, a letter or digit first",
    ),
    ("bad-vms-nics-mapping", "2:20: nics must be a list of NICs, not a mapping"),
    ("bad-vms-no-nics", "2:7: guest web1 has no nics; write nics: [{network: NAME}]"),
    ("bad-vms-scalar", "2:13: guest web1 must be a mapping with nics, not lan"),
    (
        "beyond-forward-address",
        "5:42: from must be [ADDRESS:]PORT/tcp or /udp, the address IPv4, not 127.0.0.256:22/tcp",
    ),
    (
        "beyond-forward-port",
        "5:42: from must be [ADDRESS:]PORT/tcp or /udp, the address IPv4, not 65536/tcp",
    ),
    ("beyond-forward-twice", "5:62: forward has this from twice: 22/tcp"),
    (
        "beyond-nic-external-ids",
        "5:31: external_ids are for Open vSwitch, but network sw "
        "(beyond-nic-external-ids:3) has kind: linux; remove one",
    ),
    (
        "beyond-nic-id-twice",
        "5:43: the guest has another NIC with the id net1, at beyond-nic-id-twice:5; "
        "give each its own",
    ),
    (
        "beyond-nic-mac-twice",
        "5:73: another NIC has the mac 52:54:00:00:00:0a too, at beyond-nic-mac-twice:5",
    ),
    (
        "beyond-nic-mac-zero",
        "5:37: mac must be the MAC of a device, not 00:00:00:00:00:00; six pairs of "
        "hexadecimal digits such as 52:54:00:12:34:56, the second digit even",
    ),
    ("beyond-nic-network", "5:27: there is no network lam; did you mean lan?"),
    (
        "beyond-nic-tap-made-twice",
        "6:14: another NIC has the tap b-0 too, at beyond-nic-tap-made-twice:5; give "
        "it another tap",
    ),
    ("beyond-nic-tap-twice", "6:36: another NIC has the tap web0 too, at beyond-nic-tap-twice:5"),
    (
        "beyond-user-ipv4-host-part",
        "5:31: ipv4 must be an IPv4 subnet such as 10.0.2.0/24, or false, not "
        "10.0.2.2/24; its host part zero, its length at most 27",
    ),
    ("bad-nat-dhcp-key", "2:66: dhcp has no key ranges; did you mean range?"),
    (
        "bad-nat-dhcp-word",
        "2:65: dhcp must be true, false, or a mapping with range and hosts, not yes",
    ),
    ("bad-nat-dns-domain", "2:73: domain must be a domain name, not -lab"),
    ("bad-nat-dns-key", "2:65: dns has no key domains; did you mean domain?"),
    ("bad-nat-dns-word", "2:64: dns must be true, false, or a mapping with domain, not lab.test"),
    ("bad-nat-empty", "2:34: nat has neither ipv4 nor ipv6; write ipv4: 192.168.76.1/24"),
    (
        "bad-nat-external-ids",
        "2:34: a network with nat: is a Linux bridge of its own; remove external_ids",
    ),
    (
        "bad-nat-forward",
        '2:68: forward must be a list such as [{from: 127.0.0.1:2222/tcp, to: ":22"}], '
        "not a mapping",
    ),
    (
        "bad-nat-host-number",
        "2:66: host must be PORT/tcp, PORT-PORT/tcp, or /udp, not 8080; write 8080/tcp",
    ),
    (
        "bad-nat-host-one",
        "2:65: host must be any, or a list such as [8080/tcp, 5000-5009/udp], not 22/tcp; "
        "write [22/tcp]",
    ),
    ("bad-nat-host-protocol", "2:66: host must be PORT/tcp, PORT-PORT/tcp, or /udp, not 22/sctp"),
    (
        "bad-nat-host-word",
        "2:65: host must be any, or a list such as [8080/tcp, 5000-5009/udp], not all",
    ),
    (
        "bad-nat-hosts-address",
        "2:95: the address of 52:54:00:00:00:01 must be an IPv4 address, not web1",
    ),
    ("bad-nat-hosts-list", "2:73: hosts must be a mapping of MACs to addresses, not a list"),
    ("bad-nat-hosts-mac", "2:74: hosts has web1, which is not the MAC of a device"),
    (
        "bad-nat-ipv4-31",
        "2:46: ipv4 must be this host's address and length, such as 192.168.76.1/24, "
        "not 10.0.0.1/31; of a host, its length 8 to 30",
    ),
    (
        "bad-nat-ipv4-no-length",
        "2:46: ipv4 must be this host's address and length, such as 192.168.76.1/24, "
        "not 10.0.0.1; of a host, its length 8 to 30",
    ),
    (
        "bad-nat-ipv6-48",
        "2:46: ipv6 must be this host's address and 64, such as fd00:76::1/64, not "
        "fd00::1/48; of a host, its length 64",
    ),
    ("bad-nat-ipv6-no-dhcp", "2:64: dhcp is for IPv4, and nat has no ipv4; remove dhcp"),
    ("bad-nat-key", "2:59: nat: has no key dhcpd; did you mean dhcp?"),
    ("bad-nat-kind", "2:34: a network with nat: is a Linux bridge of its own; remove kind"),
    ("bad-nat-list", "2:39: nat must be a mapping such as {ipv4: 192.168.76.1/24}, not a list"),
    ("bad-nat-outbound", "2:69: outbound must be true or false, not maybe"),
    ("bad-nat-ovsdb", "2:34: a network with nat: is a Linux bridge of its own; remove ovsdb"),
    ("bad-nat-range", "2:73: range must be a range such as 192.168.76.100-199, not 10.0.0.2"),
    ("bad-nat-scalar", "2:39: nat must be a mapping such as {ipv4: 192.168.76.1/24}, not true"),
    ("bad-nat-vlan", "2:34: a network with nat: is a Linux bridge of its own; remove vlan"),
    (
        "beyond-nat-bridge-name",
        "4:25: the bridge lab* of a network with nat: has other characters than letters, digits, "
        "., _ and -, a letter or digit first",
    ),
    (
        "beyond-nat-bridge-shared",
        "4:25: the bridge labbr0 of a network with nat: is its own, and network lan "
        "(beyond-nat-bridge-shared:5) has it too",
    ),
    ("beyond-nat-forward-nowhere", '4:59: a forward to "":22: it names no guest'),
    ("beyond-nat-forward-outside", "4:59: a forward to 10.0.1.2:22: it is not in 10.0.0.0/24"),
    (
        "beyond-nat-host-outside",
        "4:56: hosts gives 52:54:00:00:00:01 the address 10.0.0.1: it is this host's own",
    ),
    ("beyond-nat-host-port", "4:57: host must be PORT/tcp, PORT-PORT/tcp, or /udp, not 65536/udp"),
    ("beyond-nat-host-range", "4:57: host must be PORT/tcp, PORT-PORT/tcp, or /udp, not 80-22/tcp"),
    ("beyond-nat-hosts-twice", "4:56: hosts gives 10.0.0.2 to two MACs"),
    (
        "beyond-nat-ipv4-link-local",
        "4:37: ipv4 must be this host's address and length, such as 192.168.76.1/24, "
        "not 169.254.1.1/24; of a host, its length 8 to 30",
    ),
    (
        "beyond-nat-ipv4-number",
        "4:37: ipv4 must be this host's address and length, such as 192.168.76.1/24, "
        "not 10.0.0.256/24; of a host, its length 8 to 30",
    ),
    (
        "beyond-nat-ipv6-network",
        "4:37: ipv6 must be this host's address and 64, such as fd00:76::1/64, not "
        '"fd00::/64"; of a host, its length 64',
    ),
    (
        "beyond-nat-network-address",
        "4:37: ipv4 must be this host's address and length, such as 192.168.76.1/24, "
        "not 10.0.0.0/24; of a host, its length 8 to 30",
    ),
    ("beyond-nat-range-backwards", "4:56: the range 10.0.0.9-10.0.0.2 runs backwards"),
    ("beyond-nat-range-outside", "4:56: range has 10.0.1.2: it is not in 10.0.0.0/24"),
    (
        "beyond-nat-rule-vlan",
        "5:32: network lab (beyond-nat-rule-vlan:4) has nat:, and so no vlan; remove it",
    ),
    (
        "beyond-nat-subnets",
        "5:26: its subnet 10.0.0.128/25 overlaps 10.0.0.0/24 of network lab (beyond-nat-subnets:4)",
    ),
    (
        "bad-nic-user-dns-name",
        "3:34: dns must be an IPv4 address of the guest's subnet, not lab.test",
    ),
    (
        "bad-nic-user-hostname-33",
        "3:39: hostname must be a host name, not a-name-of-more-than-32-bytes.test; "
        "letters, digits, dots and hyphens, at most 32",
    ),
    (
        "bad-nic-user-ipv4-28",
        "3:35: ipv4 must be an IPv4 subnet such as 10.0.2.0/24, or false, not "
        "10.0.2.0/28; its host part zero, its length at most 27",
    ),
    (
        "bad-nic-user-ipv4-quoted-false",
        "3:35: ipv4 must be an IPv4 subnet such as 10.0.2.0/24, or false, not "
        '"false"; its host part zero, its length at most 27',
    ),
    (
        "bad-nic-user-ipv4-true",
        "3:35: ipv4 must be an IPv4 subnet such as 10.0.2.0/24, or false, not true; its "
        "host part zero, its length at most 27",
    ),
    (
        "bad-nic-user-search-dash",
        "3:38: search must be a list of domains such as [lab.test], not -lab",
    ),
    (
        "bad-nic-user-search-list",
        "3:38: search must be a list of domains such as [lab.test], not a list",
    ),
    (
        "bad-nic-user-search-word",
        "3:37: search must be a list of domains such as [lab.test], not lab.test; write [lab.test]",
    ),
    (
        "beyond-nic-tap-bridge",
        "5:37: tap br0 is the bridge of network lan (beyond-nic-tap-bridge:3); give "
        "the NIC another tap",
    ),
    (
        "beyond-user-dns-broadcast",
        "4:34: dns leads to 10.0.2.255, which is no host of the guest's subnet "
        "10.0.2.0/24; take one of it, or leave the address out",
    ),
    (
        "beyond-user-dns-elsewhere",
        "4:34: dns leads to 10.0.3.3, which is no host of the guest's subnet "
        "10.0.2.0/24; take one of it, or leave the address out",
    ),
    (
        "beyond-user-forward-elsewhere",
        "4:57: forward leads to 10.0.2.15, which is no host of the guest's subnet "
        "10.1.0.0/16; take one of it, or leave the address out",
    ),
    ("beyond-user-without-both", "4:42: user: has neither IPv4 nor IPv6; leave one of them out"),
    (
        "bad-vms-users",
        "2:31: users must be a list of login names and @groups, not alice; write [alice]",
    ),
    ("beyond-user-without-ipv4", "4:42: without IPv4 there is no forward; remove it"),
]

# What the samples do not show: several errors, or texts that are odd as files.
TEXT_ERRORS = [
    ("nothing", "", ["1:1: the file is empty; a policy has at least version: 1"]),
    ("a comment", "# x\n\n", ["1:1: the file is empty; a policy has at least version: 1"]),
    ("only a mark", "---\n", ["1:4: a policy must be a mapping with version, networks and rules, "
                              "not empty"]),
    ("half-written", "version: 1\nnetw", [
        "2:1: a key without its colon; the file may be cut short"
    ]),
    ("half a list", "version: 1\nrules: [{tap: x\n", ["2:9: this { is never closed"]),
    ("half a trunk", "version: 1\nrules: [a, b", ["2:8: this [ is never closed"]),
    ("half a quote", 'version: 1\nrules: "a\n', ["2:8: these quotes are never closed"]),
    ("NUL", "version: 1\nx\0", ["2:2: character U+0000 is not allowed"]),
    ("DEL", "version: \x7f1\n", ["1:10: character U+007F is not allowed"]),
    ("escape", "# \x1b[2J\n", ["1:3: character U+001B is not allowed"]),
    ("lone CR", "version: 1 # x\rtimeout: 1", ["1:15: character U+000D is not allowed"]),
    ("turned", "version: 1 # \u202e\n", ["1:14: character U+202E is not allowed"]),
    ("line separator", "# a\u2028version: 1\n", ["1:4: character U+2028 is not allowed"]),
    ("second BOM", "\ufeff\ufeffversion: 1\n", ["1:1: character U+FEFF is not allowed"]),
    ("BOM and error", "\ufeffversoin: 1\n", [
        "1:1: the policy has no key versoin; did you mean version?",
        "1:1: version is missing; write version: 1",
    ]),
    ("CRLF", "version: 1\r\ntimeout: 0\r\n", [
        "2:10: timeout must be a whole number from 1 to 300, not 0"
    ]),
    ("tab in front", "networks:\n\tlan: {}\n", ["2:1: a tab; put spaces here"]),
    ("tab before a comment", "version: 1\t# x\n", ["1:11: a tab; put spaces here"]),
    ("star", "rules:\n - tap: *\n", [
        '2:9: a text that begins with * must be in quotes, as in tap: "*"'
    ]),
    ("star and dash", HEAD + "rules:\n - tap: [a, *-x]\n   deny: x", [
        "3:13: an alias (*-x) is not part of the policy language; write it out, or put a glob that "
        "begins with * in quotes"
    ]),
    ("bracket", "rules:\n - tap: [ab]*\n   network: lan\n", [
        '2:9: a glob that begins with [ must be in quotes, as in tap: "[ab]*"'
    ]),
    ("at", "rules:\n - tap: @a\n", ["2:9: a text that begins with @ must be in quotes"]),
    ("percent", "rules:\n - tap: %a\n", ["2:9: a text that begins with % must be in quotes"]),
    ("exclamation mark", HEAD + "rules:\n - tap: !web\n   deny: x\n", [
        "3:9: a tag (!web) is not part of the policy language; leave it out, or put a text that "
        "begins with ! in quotes"
    ]),
    ("known tag", "version: !!int 1", [
        "1:10: a tag (!!int) is not part of the policy language; leave it out, or put a text that "
        "begins with ! in quotes"
    ]),
    ("17 levels", HEAD + "rules: " + "[" * 16 + "]" * 16, [
        "2:23: this is deeper than 16 levels"
    ]),
    ("16 levels", HEAD + "rules: " + "[" * 15 + "]" * 15, [
        "2:9: a rule must be a mapping such as {tap: web*, network: lan}, not a list"
    ]),
    ("a key that is a list", HEAD + "? [a]\n: b\n", [
        "2:3: a key must be one word, not a list"
    ]),
    ("too large", HEAD + "#" * SIZE_MAX, ["1:1: the policy is larger than 256 KiB in all"]),
    ("value missing", HEAD + "networks:\n  lan:\n    bridge:\n    mtu:\n", [
        "4:12: bridge is empty; it must be the name of a bridge",
        "5:9: mtu is empty; it must be a whole number from 68 to 65521 or bridge",
    ]),
    ("network missing", HEAD + "networks:\n  lan:\n", [
        "3:7: network lan must be a mapping with bridge or parent, not empty"
    ]),
    ("version of later days", "version: 2\nplaces: {}\n", [
        "1:10: version 2 is not known here; this program reads 1"
    ]),
    ("version 01", "version: 01\n", ["1:10: version must be 1, not 01; write 1"]),
    ("long number", "version: " + "9" * 5000, [
        "1:10: version " + "9" * 60 + "... is not known here; this program reads 1"
    ]),
    ("long mtu", HEAD + "networks: {lan: {bridge: br0, mtu: " + "9" * 5000 + "}}", [
        "2:36: mtu must be a whole number from 68 to 65521 or bridge, not " + "9" * 60 + "..."
    ]),
    ("number with a date", HEAD + "timeout: 2001-01-01\n", [
        "2:10: timeout must be a whole number from 1 to 300, not 2001-01-01"
    ]),
    ("quoted vlan", HEAD + "networks: {lan: {bridge: br0, vlan: '100'}}", [
        '2:37: vlan must be a VID from 1 to 4094 or a mapping with trunk, not "100"; '
        "take the quotes away"
    ]),
    ("network twice in a file", HEAD + "networks:\n  a: {bridge: b}\n  a: {bridge: c}\n", [
        "4:3: network a is given twice; first at policy.yaml:3"
    ]),
    ("key twice in a rule", LAN + "rules:\n - tap: a\n   tap: b\n   network: lan\n", [
        "5:4: key tap is given twice; first at policy.yaml:4"
    ]),
    ("external id twice", HEAD + "networks: {l: {bridge: b, external_ids: {a: x, a: y}}}", [
        "2:48: key a is given twice; first at policy.yaml:2"
    ]),
    ("upper case key", HEAD + "networks: {l: {bridge: b, MTU: 1500}}", [
        "2:27: network l has no key MTU; did you mean mtu?"
    ]),
    ("hyphen", HEAD + "networks: {l: {bridge: b, external-ids: {a: b}}}", [
        "2:27: network l has no key external-ids; did you mean external_ids?"
    ]),
    ("misspelt isolated", LAN + "rules: [{tap: a, network: lan, isolatd: true}]", [
        "3:32: a rule has no key isolatd; did you mean isolated?"
    ]),
    ("key of no kind", LAN + "rules: [{tap: a, network: lan, 日本: 1}]", [
        "3:32: a rule has no key 日本; the keys are tap, vm, netdev, mac, user, network, deny, "
        "leave, mtu, vlan, isolated, external_ids, txqueuelen and macs"
    ]),
    ("port setting at the top", HEAD + "mtu: 1500\n", [
        "2:1: the policy has no key mtu; mtu belongs to a network, a rule or a NIC"
    ]),
    ("match key on a network", HEAD + "networks: {l: {bridge: b, netdev: x}}", [
        "2:27: network l has no key netdev; netdev belongs to a rule"
    ]),
    ("a made name is a bridge's", HEAD + "networks: {lan: {bridge: br-0}}\n"
     "vms: {br: {nics: [{network: lan}]}}\n", [
        "3:19: tap br-0 is the bridge of network lan (policy.yaml:2); give the NIC another tap"
    ]),
    ("all of IPv4 without it", HEAD + "vms: {w: {nics: [{user: {ipv4: false, dns: 10.0.2.3, "
     "forward: [{from: 1/tcp, to: ':1'}]}}]}}\n", [
        "2:39: without IPv4 there is no dns; remove it",
        "2:54: without IPv4 there is no forward; remove it",
    ]),
    ("a wrong subnet has no hosts to speak of", HEAD + "vms: {w: {nics: [{user: {ipv4: 10.0/8, "
     "dns: 10.0.2.3}}]}}\n", [
        "2:32: ipv4 must be an IPv4 subnet such as 10.0.2.0/24, or false, not 10.0/8; its host "
        "part zero, its length at most 27",
    ]),
    ("nearly users", HEAD + "networks: {l: {bridge: b, user: x}}", [
        "2:27: network l has no key user; user belongs to a rule"
    ]),
    ("a bare @", HEAD + "networks: {l: {bridge: b, users: [@staff]}}", [
        "2:35: a text that begins with @ must be in quotes"
    ]),
    ("unknown network, one near", LAN + "rules: [{tap: a, network: lann}]", [
        "3:27: there is no network lann; did you mean lan?"
    ]),
    ("unknown network, none near", LAN + "rules: [{tap: a, network: dmz}]", [
        "3:27: there is no network dmz; the networks are lan"
    ]),
    ("a broken network is known all the same", HEAD + "networks: {l: x}\nrules: "
        "[{tap: a, network: l}]", [
        "2:15: network l must be a mapping with bridge or parent, not x"
    ]),
    ("invisible network name", HEAD + 'networks: {"l\u200bn": {bridge: b}}', [
        '2:12: a network cannot be named "l\\u200bn"; a name is 1 to 63 ASCII letters, digits, '
        "dots, hyphens and underscores, a letter or digit first"
    ]),
    ("denial of two lines", HEAD + "rules:\n - tap: a\n   deny: |\n    x\n    y\n", [
        '4:10: deny must be the reason, one line of text, not "x\\ny\\n"'
    ]),
    ("all at once", HEAD + "timeout: 0\nnetworks: {l: {mtu: 1}}\nrules: [{}, {tap: '['}]\n", [
        "2:10: timeout must be a whole number from 1 to 300, not 0",
        "3:12: network l has none of bridge and parent; give one of them",
        "3:21: mtu must be a whole number from 68 to 65521 or bridge, not 1",
        "4:9: the rule has none of network, deny and leave; give one of them",
        "4:9: the rule has no match key; give at least one of tap, vm, netdev, mac or user",
        "4:13: the rule has none of network, deny and leave; give one of them",
        "4:19: tap [ is not a glob: its [ has no ]; to match a [ itself, write [[]",
    ]),
]  # fmt: skip


@pytest.fixture(params=LOADERS)
def loader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of PyYAML's two parsers in turn: the dialect is one."""
    monkeypatch.setattr(load, "LOADER", LOADERS[request.param])
    return str(request.param)


def errors_of(*texts: tuple[str, bytes]) -> tuple[PolicyError, ...]:
    with pytest.raises(PolicyInvalid) as caught:
        parse_policy([Source(file, data) for file, data in texts])
    assert caught.value.status == Status.POLICY_INVALID
    return caught.value.errors


def test_every_bad_sample_is_in_the_table() -> None:
    bad = {path.stem for path in SAMPLES.glob("b*.yaml")} - {"beyond-syntax", "beyond-alias"}
    assert bad == {name for name, _ in SAMPLE_ERRORS}


@pytest.mark.usefixtures("loader")
@pytest.mark.parametrize(("name", "expected"), SAMPLE_ERRORS)
def test_sample(name: str, expected: str) -> None:
    (error,) = errors_of((name, (SAMPLES / f"{name}.yaml").read_bytes()))
    assert str(error) == f"{name}:{expected}"


@pytest.mark.usefixtures("loader")
@pytest.mark.parametrize(
    ("text", "expected"), [row[1:] for row in TEXT_ERRORS], ids=[row[0] for row in TEXT_ERRORS]
)
def test_text(text: str, expected: list[str]) -> None:
    errors = errors_of(("policy.yaml", text.encode()))
    assert [str(error) for error in errors] == [f"policy.yaml:{one}" for one in expected]


def test_syntax_error_of_the_parser() -> None:
    (error,) = errors_of(("p", (SAMPLES / "beyond-syntax.yaml").read_bytes()))
    assert (error.line, error.column) == (3, 9)
    assert error.message.startswith("not YAML: ")


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"version: 1\nx: \xff\n", "p:2:4: byte 0xff is not UTF-8; save it as UTF-8"),
        (b"version: 1 # \xe4\n", "p:1:14: byte 0xe4 is not UTF-8; save it as UTF-8"),
        (b"# \xed\xa0\x80", "p:1:3: byte 0xed is not UTF-8; save it as UTF-8"),
        ("version: 1".encode("utf-16"), "p:1:1: byte 0xff is not UTF-8; save it as UTF-8"),
    ],
)
def test_not_utf8(data: bytes, expected: str) -> None:
    (error,) = errors_of(("p", data))
    assert str(error) == expected


@pytest.mark.parametrize("escape", ["\\ud800", "\\UFFFFFFFF", "\\0", "\\x1b", "\\u202e"])
@pytest.mark.usefixtures("loader")
def test_escaped_character_is_refused_and_not_printed(escape: str) -> None:
    for error in errors_of(("p", f'version: 1\n"{escape}": 1\n'.encode())):
        assert str(error).isprintable()
        assert render(error).replace("\n", "").isprintable()


def test_files_are_one_policy() -> None:
    policy = parse_policy(
        [
            Source("10.yaml", b"version: 1\nrules: [{tap: a, network: lan}]\n"),
            Source("20.yaml", b"version: 1\ntimeout: 5\nrules: [{tap: b, deny: x}]\n"),
            Source("policy.yaml", b"version: 1\nnetworks: {lan: {bridge: br0}}\n"),
        ]
    )
    assert policy.files == ("10.yaml", "20.yaml", "policy.yaml")
    assert [str(rule.position) for rule in policy.rules] == ["10.yaml:2", "20.yaml:3"]
    assert (list(policy.networks), policy.timeout) == (["lan"], 5)
    assert not policy.bridge_conf


def test_bridge_conf_holds_for_all_files_and_is_given_once() -> None:
    rest = Source("policy.yaml", HEAD.encode())
    given = b"version: 1\nbridge_conf: false\n"
    assert parse_policy([Source("a.yaml", b"version: 1\nbridge_conf: true\n"), rest]).bridge_conf
    (error,) = errors_of(("a.yaml", given), ("b.yaml", given))
    assert str(error) == "b.yaml:2:1: bridge_conf is given twice; first at a.yaml:2"


def test_errors_of_several_files_are_in_their_order() -> None:
    lan = b"version: 1\ntimeout: 5\nnetworks:\n  lan: {bridge: br0}\n"
    errors = errors_of(
        ("b.yaml", lan), ("a.yaml", b"rules: [}\n"), ("policy.yaml", lan), ("z.yaml", b"")
    )
    assert [str(error) for error in errors] == [
        "a.yaml:1:9: not YAML: did not find expected node content (while parsing a flow node)",
        "policy.yaml:2:1: timeout is given twice; first at b.yaml:2",
        "policy.yaml:4:3: network lan is given twice; first at b.yaml:4",
        "z.yaml:1:1: the file is empty; a policy has at least version: 1",
    ]


def test_size_is_of_all_files() -> None:
    half = HEAD.encode() + b"#" * (SIZE_MAX // 2)
    (error,) = errors_of(("a.yaml", half), ("b.yaml", half))
    assert str(error) == "b.yaml:1:1: the policy is larger than 256 KiB in all"
    whole = HEAD.encode() + b"#" * (SIZE_MAX - len(HEAD))
    assert parse_policy([Source("a.yaml", whole)]).rules == ()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "version: 1\ntimeout: 0\n",
            "p:2:10: timeout must be a whole number from 1 to 300, not 0\n"
            "  timeout: 0\n"
            "           ^",
        ),
        (
            'version: 1\nnetworks: {"l": {bridge: br0, 日本: 1}}\n',
            "p:2:31: network l has no key 日本; the keys are bridge, parent, kind, ovsdb, mode, "
            "users, deny_users, max_taps, tap_name, nat, mtu, vlan, isolated, external_ids, "
            "txqueuelen and macs\n"
            '  networks: {"l": {bridge: br0, 日本: 1}}\n'
            "                                ^",
        ),
        (
            "version: 1\nrules: [{vm: 日本, tap: []}]\n",
            "p:2:9: the rule has none of network, deny and leave; give one of them\n"
            "  rules: [{vm: 日本, tap: []}]\n"
            "          ^",
        ),
        (
            "version: 1\nrules: [{vm: [日本], deny: ''}]\n",
            'p:2:26: deny must be the reason, one line of text, not ""\n'
            "  rules: [{vm: [日本], deny: ''}]\n"
            "                             ^",
        ),
        ("a: b\tc", "p:1:5: a tab; put spaces here\n  a: b\tc\n      ^"),
        ("# \tx\x1b", "p:1:5: character U+001B is not allowed\n  # \tx�\n    \t ^"),
        ("", "p:1:1: the file is empty; a policy has at least version: 1\n\n  ^"),
    ],
)
def test_rendered(text: str, expected: str) -> None:
    assert render(errors_of(("p", text.encode()))[0]) == expected


def test_caret_stands_under_the_place_in_a_long_line() -> None:
    text = "version: 1\nrules: [" + "{tap: a, deny: b}, " * 100 + "{tap: a, deni: b}]\n"
    _, line, caret = render(errors_of(("p", text.encode()))[1]).split("\n")
    assert line[caret.index("^") :].startswith("deni: b}]")
    assert len(line) < 130


def test_the_failure_counts_its_errors() -> None:
    with pytest.raises(PolicyInvalid) as caught:
        parse_policy([Source("p", b"timeout: 0\n")])
    assert str(caught.value) == (
        "policy invalid: p:1:1: version is missing; write version: 1 (and 1 more); "
        "run pyqemu-ifctl check"
    )
