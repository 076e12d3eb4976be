"""What may be tested, and with which names."""

from __future__ import annotations

import math
from ipaddress import ip_address

import pytest

from gatepost.errors import GatepostError
from gatepost.probe import ProbeSettings, Target, target_of
from gatepost.probe.target import BUDGET_S_MAX, LOCAL_DOMAINS_MAX, WAIT_S_MAX, checked, domain_name

TARGETS = {
    "mx.example.com": Target("mx.example.com", 25),
    "MX.Example.COM.:2525": Target("mx.example.com", 2525),
    "localhost": Target("localhost", 25),
    "192.0.2.1": Target("192.0.2.1", 25),
    "192.0.2.1:26": Target("192.0.2.1", 26),
    "2001:db8::1": Target("2001:db8::1", 25),
    "[2001:DB8::1]": Target("2001:db8::1", 25),
    "[2001:db8::1]:587": Target("2001:db8::1", 587),
    "bücher.example": Target("xn--bcher-kva.example", 25),
}


@pytest.mark.parametrize("written", TARGETS)
def test_one_host_is_named(written):
    assert target_of(written) == TARGETS[written]
    assert target_of(written, 10) == Target(TARGETS[written].host, 10)
    assert target_of(str(TARGETS[written])) == TARGETS[written]


@pytest.mark.parametrize(
    "written",
    [
        "192.0.2.0/24", "192.0.2.1,192.0.2.2", "*.example.com", "192.0.2.1-9", "2001:db8::/32", "", ":25", "a b",
        "a\r\nb",
        "mx.example.com:0", "mx.example.com:65536", "mx.example.com:99999", "mx.example.com:x", "[mx", "-a.example",
        "a..example", "user@mx.example.com", "http://mx.example.com", f"{'a' * 64}.example", "1.2.3", "3221225985",
    ],
)  # fmt: skip
def test_what_is_not_one_host_is_refused(written):
    with pytest.raises(GatepostError):
        target_of(written)


def test_a_name_is_at_most_253_octets():
    longest = ".".join(["a" * 63] * 3 + ["b" * 61])
    assert len(longest) == 253
    assert domain_name(longest) == longest
    assert domain_name(longest + "b") == ""


@pytest.mark.parametrize(
    "settings",
    [
        {"local_domains": ("exa mple.com",)},
        {"local_domains": tuple(f"d{n}.example" for n in range(LOCAL_DOMAINS_MAX + 1))},
        {"local_domains": ("example.com",), "outside": "you@example.com"},
        {"local_domains": ("example.com",), "deliver": "you@EXAMPLE.com"},
        {"outside": "nobody"},
        {"outside": "a%b@elsewhere.test"},
        {"outside": "a!b@elsewhere.test"},
        {"outside": "a@b@elsewhere.test"},
        {"outside": "a>\r\nDATA@elsewhere.test"},
        {"outside": "{ours}@elsewhere.test"},
        {"outside": f"{'a' * 65}@elsewhere.test"},
        {"deliver": "you"},
        {"reverse_path": "you there@elsewhere.test"},
        {"hello": "mx example"},
        {"hello": "x\r\nMAIL"},
        {"hello": "x" * 256},
        {"source": ip_address("192.0.2.1"), "families": (6,)},
        {"pause_s": -1.0},
        {"pause_s": math.nan},
        {"pause_s": WAIT_S_MAX + 1},
        {"timeout_s": 0.0},
        {"timeout_s": math.inf},
        {"budget_s": 0.0},
        {"budget_s": BUDGET_S_MAX + 1},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(GatepostError):
        checked(ProbeSettings(**settings))


def test_settings_are_brought_into_one_form():
    made = checked(
        ProbeSettings(
            local_domains=("Example.COM", "example.com.", "bücher.example"),
            deliver="<You@Elsewhere.Test>",
            reverse_path="me@elsewhere.test",
            pause_s=WAIT_S_MAX,
            timeout_s=WAIT_S_MAX,
            budget_s=BUDGET_S_MAX,
        )
    )
    assert made.local_domains == ("example.com", "xn--bcher-kva.example")
    assert (made.outside, made.deliver) == ("You@elsewhere.test",) * 2
    assert made.reverse_path == "<me@elsewhere.test>"
    assert checked(ProbeSettings(reverse_path="<>")).reverse_path == "<>"
    most = tuple(f"d{n}.example" for n in range(LOCAL_DOMAINS_MAX))
    assert checked(ProbeSettings(local_domains=most)).local_domains == most
