"""The server as a process: where it listens, what it logs, how it ends."""

import logging
import sys
from collections.abc import Callable, Mapping

import uvicorn

from mimoflash.engine import Engine
from mimoflash.serve.app import ServerSettings, make_app
from mimoflash.serve.observe import JsonLines


def run_server(
    places: Mapping[str, str], open_engine: Callable[[str], Engine], settings: ServerSettings, *,
    host: str = "127.0.0.1", port: int = 8000, drain: int = 30, log_json: bool = False,
) -> None:
    """Serves until SIGTERM or Ctrl-C: then nothing new is taken in, and what is under way has `drain` seconds.
    Arguments as in `make_app`. Raises OSError where it cannot listen, ValueError where a single model cannot be loaded.
    """
    _log_to_stderr(log_json)
    app = make_app(places, open_engine, settings)
    if len(places) == 1:  # else each when it is asked for
        app.state.registry.load(next(iter(places)))
    config = uvicorn.Config(
        app, host=host, port=port, timeout_graceful_shutdown=drain, log_config=None, access_log=False,
        server_header=False,
    )
    server = uvicorn.Server(config)
    server.run()
    if not server.started:
        raise OSError(f"the server could not start on {host}:{port}: see above")


def _log_to_stderr(as_json: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if as_json else logging.Formatter("%(levelname).1s %(asctime)s %(message)s"))
    for name in ("mimoflash", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
