"""`mm serve`: a model behind OpenAI's API, and a page to talk with it.

Only argument parsing happens before the first heavy import, so that `--help` and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mm.arguments import Parser

if TYPE_CHECKING:
    from mm.serve.app import Server

KEY = "MM_API_KEY"


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until it is interrupted; returns 0. Raises ValueError or OSError."""
    args = _parse(list(sys.argv[1:] if argv is None else argv))
    key = args.api_key or os.environ.get(KEY)
    if not (_is_local(args.host) or key):
        raise ValueError(f"--host {args.host}: others can reach this address, so a key is needed: --api-key, or {KEY}")
    if not Path(args.model).exists():
        raise ValueError(f"no model at {args.model}: give the directory of a trained model")
    with _listening(args.host, args.port) as listening:  # before the model is loaded: this may fail
        server = _server(args, key)
        try:
            return _serve(server, args, listening)
        finally:
            server.close()


def _serve(server: Server, args: argparse.Namespace, listening: socket.socket) -> int:
    import contextlib
    import logging
    import signal

    from mm.serve.run import http_server

    logging.basicConfig(level=args.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        server.wait()
    except RuntimeError as error:
        raise ValueError(str(error)) from error
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    kinds = ", ".join(("text", *server.model.media_specs()))
    print(f"{server.name} ({kinds}) at http://{shown}:{port}/  API at http://{shown}:{port}/v1", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends it as Ctrl-C does
    with contextlib.suppress(KeyboardInterrupt):  # how uvicorn says, once all is done, that it was interrupted
        http_server(server, host, port).run(sockets=[listening])
    return 0


def _server(args: argparse.Namespace, key: str | None) -> Server:
    import torch

    import mm
    from mm.serve.app import Server
    from mm.serve.limits import MediaLimits, ServeLimits

    slots = args.slots
    limits = ServeLimits(
        slots=slots,
        per_client=slots if args.per_client is None else args.per_client,
        max_length=args.max_length,
        cache_tokens=args.cache_tokens,
        deadline_seconds=args.deadline,
    )
    media = MediaLimits(hosts=tuple(args.media_host))
    model = mm.load(args.model)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        model = model.to(device)
    except (RuntimeError, AssertionError) as error:  # how torch says that there is no such device
        raise ValueError(f"--device {device}: {str(error).splitlines()[0]}") from error
    name = args.name or Path(args.model).resolve().name
    hosts = () if _is_local(args.host) else (args.host,)
    return Server(model, name, limits, media, key, hosts)


def _listening(host: str, port: int) -> socket.socket:
    if not 0 <= port < 2**16:  # the system takes others too, less a multiple of 2**16
        raise ValueError(f"--port {port}: give a number from 0 to {2**16 - 1}")
    try:
        [family, *_, address] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address[:2], family=family, backlog=1024)
    except socket.gaierror as error:
        raise ValueError(f"--host {host}: {error.strerror}") from error
    except OSError as error:
        raise ValueError(f"--host {host} --port {port}: {os.strerror(error.errno or 0)}") from error


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser(
        "mm serve",
        usage="mm serve MODEL [--host H] [--port P] [--api-key K] [options]",
        description="Serve a model over OpenAI's API (chats with images, sounds and videos, completions, embeddings), "
        "with a page to talk with it.",
        examples=[
            "mm serve runs/demo/model",
            "mm serve runs/demo/model --host 0.0.0.0 --port 8000 --api-key SECRET",
        ],
        notes="Media come with a request, as data: URLs or uploads. An address that others can reach needs a key, "
        "which browsers ask for as a password.",
    )
    parser.add_argument("model", metavar="MODEL", help="directory of a model, ours or a published one")
    parser.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen at (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, metavar="P", help="port; 0 takes a free one (%(default)s)")
    parser.add_argument("--api-key", metavar="K", help=f"what every request must give (or in the variable {KEY})")
    parser.add_argument("--name", metavar="N", help="what requests call the model (default: its directory's name)")
    parser.add_argument("--slots", type=int, default=16, metavar="N", help="requests at work at a time (%(default)s)")
    parser.add_argument(
        "--per-client", type=int, metavar="N", help="of those, how many for one address (default: all of them)"
    )
    parser.add_argument(
        "--max-length", type=int, default=4096, metavar="N", help="largest context, with its answer (%(default)s)"
    )
    parser.add_argument(
        "--cache-tokens", type=int, default=32_768, metavar="N", help="positions kept for all requests (%(default)s)"
    )
    parser.add_argument(
        "--deadline", type=float, default=120.0, metavar="S", help="seconds that an answer may take (%(default)s)"
    )
    parser.add_argument(
        "--media-host", action="append", default=[], metavar="H", help="media may be fetched from here; may be repeated"
    )
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    parser.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info", help="(%(default)s)"
    )
    return parser.parse_args(argv)
