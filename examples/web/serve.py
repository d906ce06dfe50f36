"""Serve the page in the browser on this machine, and to nobody else.

    python examples/web/serve.py      # then open the address that it prints

Needs Python only. The page's files are static: any web server that sends .mjs as JavaScript and .wasm as
WebAssembly can serve this folder.
"""

import argparse
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = Path(__file__).parent


class Handler(SimpleHTTPRequestHandler):
    """Sends the files of a folder, each as what it is, whatever this machine thinks that endings mean."""

    extensions_map = {  # noqa: RUF012 - as in the class above
        "": "application/octet-stream",
        ".css": "text/css; charset=utf-8",
        ".html": "text/html; charset=utf-8",
        ".js": "text/javascript; charset=utf-8",
        ".json": "application/json",
        ".mjs": "text/javascript; charset=utf-8",
        ".svg": "image/svg+xml",
        ".wasm": "application/wasm",
    }

    def end_headers(self) -> None:
        """Let the browser ask each time whether a file has changed."""
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Requests that go well are not worth a line."""


def server(port: int) -> ThreadingHTTPServer:
    """A server of the page at `port` of this machine; 0: at any that is free."""
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, directory=PAGE))


def main() -> int:
    """Serve until Ctrl-C; returns the exit code: 0, or 1 where the port is taken."""
    parser = argparse.ArgumentParser(description="Serve the page in the browser on this machine.")
    parser.add_argument("--port", type=int, default=8000, help="(default %(default)s; 0: any that is free)")
    port = parser.parse_args().port
    try:
        page = server(port)
    except (OSError, OverflowError) as error:
        print(f"error: cannot serve at port {port}: {error}; choose another with --port", file=sys.stderr)
        return 1
    with page:
        print(f"open http://localhost:{page.server_port} in a browser; Ctrl-C ends it", flush=True)
        try:
            page.serve_forever()
        except KeyboardInterrupt:
            print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
