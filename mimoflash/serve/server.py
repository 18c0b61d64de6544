"""The server as a process: where it listens, what it logs, how it ends."""

import logging
import socket
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import uvicorn

from mimoflash.engine import Engine
from mimoflash.serve.app import ServerSettings, make_app
from mimoflash.serve.observe import JsonLines


def run_server(
    places: Mapping[str, str], open_engine: Callable[[str], Engine], settings: ServerSettings, *,
    host: str = "127.0.0.1", port: int = 8000, drain: int = 30, log_json: bool = False, replicas: int = 1,
) -> None:
    """Serves until SIGTERM or Ctrl-C: then nothing new is taken in, and what is under way has `drain` seconds.
    Arguments as in `make_app`; with several `replicas` each model has so many engines on Ray, and each of them takes
    the settings' capacity. Raises OSError where it cannot listen, ValueError where a single model cannot be loaded, and
    what `on_ray` raises.
    """
    _check_free(host, port)  # models may take long to load
    engines: AbstractContextManager[Callable[[str], Engine]] = nullcontext(open_engine)
    if replicas > 1:
        from mimoflash.serve.replicas import on_ray

        engines = on_ray(open_engine, replicas, min(settings.most_loaded, len(places)))
        settings = replace(settings, capacity=settings.capacity * replicas)
    _log_to_stderr(log_json)
    with engines as opener:
        app = make_app(places, opener, settings)
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


def _check_free(host: str, port: int) -> None:
    """Raises OSError where nothing can listen."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as uvicorn does
            probe.bind(address)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}; give another --host or --port") from None


_LEVELS = {  # Ray tells much of what it does
    "mimoflash": logging.INFO, "uvicorn.error": logging.INFO, "ray": logging.ERROR, "ray.serve": logging.WARNING,
}


def _log_to_stderr(as_json: bool) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if as_json else logging.Formatter("%(levelname).1s %(asctime)s %(message)s"))
    for name, level in _LEVELS.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
