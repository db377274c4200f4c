"""Sends the pages: which address shows what, and who may ask. Every question is a GET, and nothing of what is shown is ever
written to or run.

It listens on loopback unless told otherwise, and then answers only to names of this machine, so that a page elsewhere cannot read it
through the user's browser. Reading and drawing are done in threads, so that one slow storage does not stop the others' pages.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any

from aiohttp import web

from krrst_dist import storage
from krrst_dist.artifacts import ArtifactError
from krrst_dist.explorer import answers, downloads
from krrst_dist.explorer.library import Library
from krrst_dist.explorer.request import Answer, NotThere, Page, Request, encoded

POLICY = ("default-src 'none'; style-src 'self' 'unsafe-inline'; script-src 'self'; img-src 'self' data:; connect-src 'self'; "
          "form-action 'self'; base-uri 'none'; frame-ancestors 'none'")
log = logging.getLogger(__name__)
PAGES: dict[str, Page] = {
    "/": answers.show_overview, "/tables": answers.show_tables, "/trials": answers.show_trials, "/experiments": answers.show_experiments,
    "/trial/{part}": answers.show_trial, "/compare": answers.show_compare, "/sets": answers.show_sets, "/set": answers.show_set,
    "/image.png": downloads.show_image, "/points.json": downloads.show_points, "/download/{part}": downloads.download}


def application(library: Library, *, hosts: frozenset[str] | None) -> web.Application:
    """The web application. hosts: names that it answers to; None: all."""
    app = web.Application(middlewares=[_guard(hosts)])
    for path, page in PAGES.items():
        app.router.add_get(path, _handler(library, page))
    app.router.add_get("/static/{part}", _static)
    app.router.add_get("/{part:.*}", _handler(library, answers.show_nothing))
    return app


def serve(app: web.Application, listening: socket.socket) -> None:
    """Answer until Ctrl-C."""
    web.run_app(app, sock=listening, print=None, access_log=None)


def hosts_of(address: str) -> frozenset[str] | None:
    """The names that a server at an address answers to: those of loopback for loopback, else all."""
    loopback = address == "localhost" or (_is_ip(address) and ipaddress.ip_address(address).is_loopback)
    return frozenset({"localhost", "127.0.0.1", "[::1]", address}) if loopback else None


def _handler(library: Library, page: Page) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    def answer(request: Request) -> tuple[int, Answer]:
        if page is not downloads.show_image:
            library.refresh()
        try:
            return 200, page(request)
        except NotThere as error:
            return 404, request.page("base.html", "", "Not there", problem=f"{error}.")
        except FileNotFoundError:
            return 404, request.page("base.html", "", "Not there", problem="It was there when this page was made, and has gone since.")
        except (ArtifactError, storage.StorageError) as error:
            return 422, request.page("base.html", "", "Cannot be read", problem=str(error))
        except Exception as error:
            log.exception("%s", request)
            return 500, request.page("base.html", "", "An error of ours", problem=f"{type(error).__name__}: {error}; its traceback is on "
                                     f"the explorer's terminal, please report it.")

    async def handle(asked: web.Request) -> web.StreamResponse:
        request = Request(library, {name: value for name, value in asked.query.items() if name != "method_"},
                          asked.query.getall("method_", []), asked.match_info.get("part", ""))
        status, found = await asyncio.to_thread(answer, request)
        if isinstance(found, str):
            return web.Response(body=encoded(found), status=status, content_type="text/html", charset="utf-8",
                                headers={"Cache-Control": "no-store"})
        saved = {"Content-Disposition": f'attachment; filename="{found.name}"'} if found.name else {"Cache-Control": "max-age=60"}
        return web.Response(body=found.body, content_type=found.kind, headers=saved)

    return handle


def _guard(hosts: frozenset[str] | None) -> Any:
    @web.middleware
    async def guard(request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
        if hosts is not None and request.host.rpartition(":")[0] not in hosts and request.host not in hosts:
            raise web.HTTPForbidden(text=f"This server answers to {', '.join(sorted(hosts))} only.\n")
        response = await handler(request)
        response.headers.update({"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"})
        return response

    return guard


async def _static(request: web.Request) -> web.StreamResponse:
    kinds = {"style.css": "text/css", "live.js": "text/javascript", "set.js": "text/javascript"}
    name = request.match_info["part"]
    if name not in kinds:
        raise web.HTTPNotFound
    return web.Response(text=static(name), content_type=kinds[name], headers={"Cache-Control": "max-age=60"})


def static(name: str) -> str:
    """A file of ours that pages refer to."""
    return resources.files(__package__).joinpath("static", name).read_text()


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
