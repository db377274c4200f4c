"""`krrst explore URI`: what lies there is read while the server is still being loaded, as either takes about a second."""

from __future__ import annotations

import gc
import socket
import sys
from importlib.abc import MetaPathFinder
from typing import Annotated

import tyro

from krrst_dist.explorer.library import Library
from krrst_dist.setting_names import ConfigError

Uri = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URI", help="--out of a grid or a run, or a results folder")]


def explore(uri: Uri, host: str = "127.0.0.1", port: int = 8501) -> None:
    """Show results, trials and distilled sets in a browser. Only reads; Ctrl-C ends it.

    Args:
        host: address to listen at. The default is this machine alone; from elsewhere: ssh -L PORT:127.0.0.1:PORT THIS_MACHINE.
        port: 0 takes any that is free.
    """
    library = Library(uri)
    try:
        listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"host = {host!r}, port = {port}: cannot listen there ({error}); give another --port, 0 for any") from None
    sys.meta_path.insert(0, _NoPandas())
    gc.disable()  # what is made from here on is kept: no need to look through it, again and again, for garbage
    library.begin()
    from krrst_dist.explorer.server import application, hosts_of, serve

    library.refresh()
    gc.freeze()
    gc.enable()
    shown = f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{listening.getsockname()[1]}/  shows {uri}; Ctrl-C ends it", flush=True)
    serve(application(library, hosts=hosts_of(host)), listening)


class _NoPandas(MetaPathFinder):
    """Arrow imports pandas, if it is there, with the first column that it converts: half a second for nothing."""

    def find_spec(self, fullname: str, *_: object) -> None:
        if fullname == "pandas":
            raise ModuleNotFoundError(f"{fullname} is not used here", name=fullname)


def explore_main(arguments: list[str]) -> None:
    """`krrst explore URI [--options]`."""
    tyro.cli(explore, args=arguments, prog="krrst explore")
