"""The relay tester: an independent witness of what a server does for strangers, ours or anybody's.

Why: a server that relays for strangers is found by those who abuse it within hours; this finds it first.  It imports
    nothing of policy, verdict, facts, gate and backend, and no parser of addresses: what it shared with the accused
    would be blind in both.
Trust: the server under test is hostile in every octet.
Promise: no mail is sent unless the person names an own address for it; one host a run.
Sources: see ``forms``.
"""

from __future__ import annotations

from gatepost.probe.reply import Outcome
from gatepost.probe.report import DEFAULT_OUTSIDE, Attempt, Delivery, ProbeSettings, Report, Round, Target, Verdict
from gatepost.probe.round import Progress
from gatepost.probe.target import target_of
from gatepost.probe.tester import probe

__all__ = [
    "probe",
    "ProbeSettings",
    "DEFAULT_OUTSIDE",
    "Target",
    "target_of",
    "Report",
    "Round",
    "Attempt",
    "Delivery",
    "Verdict",
    "Outcome",
    "Progress",
]
