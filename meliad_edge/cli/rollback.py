"""``meliad-edge rollback``: the model before the current one, on a device or a fleet."""

from __future__ import annotations

from pathlib import Path

from meliad_edge.cli.options import HostOrFleet, Json, KnownHosts
from meliad_edge.cli.output import print_json, require_extra, say
from meliad_edge.errors import PartialFailureError


def command(host: HostOrFleet, known_hosts: KnownHosts = None, json: Json = False) -> None:
    """Let the model before the current one run again; called twice, it comes back."""
    require_extra("asyncssh", "deploy")
    from meliad_edge.device.fleet import read_inventory
    from meliad_edge.device.remote import ask_all, roll_back
    from meliad_edge.device.ssh import Address

    is_fleet = host.endswith(".toml")
    devices = [device.address for device in read_inventory(Path(host))] if is_fleet else [Address.parse(host)]
    answers = ask_all(devices, known_hosts, roll_back)
    if not is_fleet and answers[0].error is not None:
        raise answers[0].error
    for answer in answers:
        if answer.error is not None:
            say("failed", str(answer.error))
        else:
            say("runs", f"{answer.address}: {answer.value['name']} version {answer.value['version']}")
    if json:
        records = [
            {"host": str(a.address), "error": None if a.error is None else str(a.error), "slot": a.value}
            for a in answers
        ]
        print_json({"devices": records} if is_fleet else records[0])
    if failed := sum(answer.error is not None for answer in answers):
        msg = f"{failed} of {len(answers)} devices did not go back; each was reported above"
        raise PartialFailureError(msg)
