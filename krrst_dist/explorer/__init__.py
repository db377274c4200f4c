"""`krrst explore URI`: a web page over a grid's or a run's folder, on any storage, which is only read.

A small server (aiohttp, which Ray brings along) sends pages that are finished when they arrive (Jinja2), with plain links and forms:
quick with many rows, usable by keyboard, testable without a browser, and the report that is written to a file is the same pages. Data
go one way: `library` reads, `overview`, `trials`, `compare` and `pictures` work out what a page shows, `pages` writes it, `server`
sends it. Neither torch nor Ray; no network.
"""
