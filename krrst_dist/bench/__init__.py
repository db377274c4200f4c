"""What things cost: `krrst bench step | update | methods | engine | grid | serial | explorer`.

Timings of one machine mean little on another; what is claimed is the ratio of two things that took turns in one run. All but
`serial` take random numbers of the right shapes and spread for data, which tell nothing of how well anything distils.
"""

from __future__ import annotations

from importlib import import_module

import tyro

_BENCHES = ("step", "update", "methods", "engine", "grid", "serial", "explorer")


def main(arguments: list[str]) -> None:
    """`krrst bench NAME [--options]`. Only the benchmark that is named is loaded: not all need Ray."""
    wanted = [name for name in _BENCHES if name in arguments[:1]] or _BENCHES
    benches = {name: getattr(import_module(f"{__name__}.{name}"), f"bench_{name}") for name in wanted}
    tyro.extras.subcommand_cli_from_dict(benches, args=arguments, prog="krrst bench")
