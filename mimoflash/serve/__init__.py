"""Serving: the HTTP API and the page; the terminal."""

from mimoflash.serve.app import ServerSettings, make_app
from mimoflash.serve.registry import named
from mimoflash.serve.server import run_server
from mimoflash.serve.store import MEMORY

__all__ = ["MEMORY", "ServerSettings", "make_app", "named", "run_server"]
