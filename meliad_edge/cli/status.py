"""``meliad-edge status``: what runs on devices."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

from meliad_edge.cli.options import HostOrFleet, Json, KnownHosts
from meliad_edge.cli.output import print_json, print_table, require_extra, say
from meliad_edge.errors import PartialFailureError


def command(host: HostOrFleet, known_hosts: KnownHosts = None, json: Json = False) -> None:
    """Say which model a device runs, whether it is on probation, and what it could go back to."""
    require_extra("asyncssh", "deploy")
    from meliad_edge.device.fleet import read_inventory
    from meliad_edge.device.remote import ask_all, read_status
    from meliad_edge.device.ssh import Address

    is_fleet = host.endswith(".toml")
    devices = [device.address for device in read_inventory(Path(host))] if is_fleet else [Address.parse(host)]
    answers = ask_all(devices, known_hosts, read_status)
    if not is_fleet and answers[0].error is not None:
        raise answers[0].error
    if json:
        records = [
            {"host": str(a.address), "error": None if a.error is None else str(a.error), **(a.value or {})}
            for a in answers
        ]
        print_json({"devices": records} if is_fleet else records[0])
    else:
        print_table(
            ("device", "model", "version", "since", "watch", "failures", "can go back to"),
            [_row(str(answer.address), answer.value) for answer in answers if answer.value is not None],
        )
        for answer in answers:
            for name, slot in (answer.value or {}).get("slots", {}).items():
                if slot["failure"]:
                    say(f"slot {name}", f"{answer.address}: version {slot['version']} was given up: {slot['failure']}")
    failed = [answer.error for answer in answers if answer.error is not None]
    for error in failed:
        say("failed", str(error))
    if failed:
        msg = f"{len(failed)} of {len(answers)} devices gave no answer; each was reported above"
        raise PartialFailureError(msg)


def _row(host: str, status: dict[str, Any]) -> tuple[str, ...]:
    slots, service = status["slots"], status["service"]
    current = slots.get(status["current"])
    others = [slot for name, slot in slots.items() if name != status["current"] and slot["confirmed"]]
    back = f"{others[0]['name']} {others[0]['version']}" if others else "none"
    watch = "not running" if service is None else service["state"]
    failures = "" if service is None else str(service["restarts"])
    if current is None:
        return host, "none", "", "", watch, failures, back
    since = datetime.datetime.fromtimestamp(current["installed_at"]).isoformat(" ", "minutes")
    name = current["name"] + (" (on probation)" if status["trial"] else "")
    return host, name, str(current["version"]), since, watch, failures, back
