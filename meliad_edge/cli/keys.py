"""``meliad-edge keys``: whose bundles a machine accepts, and the keys that sign them."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated

import typer

from meliad_edge.cli.options import Json
from meliad_edge.cli.output import print_json, print_table, say

app = typer.Typer(help="Make, list and trust the keys that sign bundles.", no_args_is_help=True)


@app.command()
def make(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the key, for example line3.")],
    expires: Annotated[
        datetime.datetime | None,
        typer.Option(formats=["%Y-%m-%d"], help="Last day that devices accept it.  [default: for ever]"),
    ] = None,
) -> None:
    """Make a key pair on this machine."""
    from meliad_edge.keys_folder import keys_folder
    from meliad_edge.signing import make_key

    key = make_key(name, None if expires is None else expires.date(), keys_folder())
    public = keys_folder() / f"{name}.pub"
    say("key", f"{key.public.name} ({key.public.id}); the private half never leaves {keys_folder()}")
    say("saved", f"{public}      next, on each device: meliad-edge keys trust {public.name}")


@app.command("list")
def list_keys(json: Json = False) -> None:
    """List the keys made here and those this machine trusts."""
    from meliad_edge.keys_folder import keys_folder
    from meliad_edge.signing import own_keys, trusted_keys

    folder = keys_folder()
    rows = [("signs here", key) for key in own_keys(folder)] + [("trusted", key) for key in trusted_keys(folder)]
    if json:
        print_json(
            [
                {"name": key.name, "id": key.id, "use": use, "expires": key.expires and key.expires.isoformat()}
                for use, key in rows
            ]
        )
    else:
        print_table(
            ("name", "id", "use", "expires"),
            [(key.name, key.id, use, str(key.expires or "never")) for use, key in rows],
            caption=f"{folder}; a machine that trusts a key runs signed bundles only",
        )


@app.command()
def trust(
    file: Annotated[Path, typer.Argument(metavar="FILE.pub", help="Public key that keys make wrote.")],
) -> None:
    """Accept bundles signed with this key, and from now on no unsigned ones."""
    from meliad_edge.keys_folder import keys_folder
    from meliad_edge.signing import trust as trust_key

    key = trust_key(file, keys_folder())
    say("trusted", f"{key.name} ({key.id}), expires {key.expires or 'never'}; unsigned bundles are refused from now on")
