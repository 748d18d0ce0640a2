"""What `raylm chat` finds at an address, before it asks anything: a small HTTP server in place of ours."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from raylm.errors import ServingError
from raylm.inference.chat import _connect


@contextmanager
def listing(*models: str, status: int = 200) -> Iterator[str]:
    """The address of a server that lists these models, with this status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = {"object": "list", "data": [{"id": name, "object": "model"} for name in models]}
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(body if status == 200 else {"error": {"message": "starting"}}).encode())

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("wanted", "found"), [("large", "large"), ("polite", "support:polite"), ("support", "support"), (None, "support")]
)
def test_a_name_is_the_model_of_that_name_before_an_adapter_of_it(wanted: str | None, found: str) -> None:
    with listing("support", "support:large", "support:polite", "large") as url:
        assert _connect(url, None, wanted)[1] == found


def test_what_a_server_says_instead_of_its_models_is_an_error_of_one_line() -> None:
    with listing(status=503) as url, pytest.raises(ServingError, match=r"does not list its models: .*starting"):
        _connect(url, None, None)
    with listing("support") as url, pytest.raises(ServingError, match="does not serve other"):
        _connect(url, None, "other")
