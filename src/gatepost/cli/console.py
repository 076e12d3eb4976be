"""``gatepost console``: a link to the pages of the running gate."""

from __future__ import annotations

from datetime import UTC, datetime

from gatepost import config, control
from gatepost.cli import DONE
from gatepost.cli.terminal import ConfigOption, JsonOption, say, say_json
from gatepost.config.values import address_text
from gatepost.console.login import LINK_S, Login
from gatepost.gate import privileges


def console(*, config_path: ConfigOption = None, as_json: JsonOption = False) -> int:
    """Print a link that opens the running gate's pages in a browser; it is good for ten minutes.

    From another machine: forward the port first, as in ssh -L 8025:127.0.0.1:8025 mx.example.com, and open the link
    there. Exit code: 0 there is a link, 2 no gate's console answers, or its key cannot be read.
    """
    loaded = config.load_file(config.find(config_path))
    control.status(loaded.console_address)
    with privileges.acting_as(privileges.owner_of(loaded.data)):
        login = Login.in_data(loaded.data)
    host, port = loaded.console_address
    shown = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  compared, not bound
    link = f"http://{address_text(shown, port)}/login?token={login.link_token(datetime.now(UTC).timestamp())}"
    if as_json:
        say_json({"link": link, "good_for_s": LINK_S})
    else:
        say(link)
    return DONE
