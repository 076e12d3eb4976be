"""``gatepost completion`` and ``gatepost version``."""

from __future__ import annotations

import sys
from typing import Annotated, Literal

from cyclopts import Parameter

from gatepost import __version__
from gatepost.cli import DONE, build
from gatepost.cli.terminal import JsonOption, UnusedConfigOption, say_json


def completion(
    shell: Annotated[Literal["bash", "zsh", "fish"], Parameter(help="For which shell.")],
    /,
    *,
    config_path: UnusedConfigOption = None,  # noqa: ARG001  every command takes it
) -> int:
    """Print the completion script for a shell.

    For bash: gatepost completion bash > ~/.local/share/bash-completion/completions/gatepost. For zsh: into a file
    _gatepost in a directory of $fpath. For fish: > ~/.config/fish/completions/gatepost.fish.
    """
    sys.stdout.write(build().generate_completion(shell=shell).rstrip("\n") + "\n")
    return DONE


def version(*, config_path: UnusedConfigOption = None, as_json: JsonOption = False) -> int:  # noqa: ARG001  as above
    """Print the version."""
    if as_json:
        say_json({"version": __version__})
    else:
        sys.stdout.write(f"{__version__}\n")
    return DONE
