"""An S3 server for tests: moto's, made strict. ``python tests/s3_server.py`` prints its port and serves until it is killed.

moto answers the protocol (conditional puts, multipart uploads, bulk deletes). Around it:

- Signatures are verified with the one key pair that is valid, so that a client that lost its credentials on the way to a
  worker or a decoder process gets a 403, as it would from a real store.
- Writes are done one at a time: moto looks whether an object is there and then puts it, which two clients could do at once.
- Faults: what is posted to ``/_faults`` happens to the next requests that it fits. ``/_requests`` lists what was asked.
"""

import hashlib
import hmac
import json
import re
import socket
import threading
from urllib.parse import parse_qsl, quote

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from tests.s3_keys import ACCESS_KEY, SECRET_KEY

BUCKETS = ("videos", "night", "forbidden")


class Strict:
    """The WSGI application around moto's."""

    def __init__(self, app):
        self._app = app
        self._writing = threading.Lock()
        self._faults = []
        self._requests = []

    def __call__(self, environ, start_response):
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if path == "/_faults":
            self._faults = json.loads(read_body(environ))
            return answer(start_response, "200 OK", b"")
        if path == "/_requests":
            asked, self._requests = self._requests, []
            return answer(start_response, "200 OK", json.dumps(asked).encode())
        self._requests.append([method, path])
        fault = self._take_fault(method, path)
        if fault == "reset":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
            return answer(start_response, "200 OK", b"")
        if isinstance(fault, int):
            return refuse(start_response, fault, "SlowDown" if fault == 503 else "InternalError")
        if not is_signed(environ) or path.startswith("/forbidden"):
            return refuse(start_response, 403, "AccessDenied")
        if fault == "ignore conditions":
            environ.pop("HTTP_IF_NONE_MATCH", None)
        if method in ("GET", "HEAD"):
            return self._app(environ, start_response)
        with self._writing:
            reply = self._app(environ, start_response)
        if fault == "lose the answer":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return reply

    def _take_fault(self, method, path):
        for fault in self._faults:
            if fault["times"] > 0 and re.fullmatch(fault["method"], method) and re.search(fault["path"], path):
                fault["times"] -= 1
                return fault["what"]
        return None


def answer(start_response, status, body):
    start_response(status, [("Content-Length", str(len(body))), ("Content-Type", "application/xml")])
    return [body]


def refuse(start_response, status, code):
    return answer(
        start_response, f"{status} {code}", f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
    )


def read_body(environ):
    return environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))


def is_signed(environ):
    """Return whether a request carries a valid signature of version 4."""
    credential, rest = (
        r"Credential=([^/]+)/((\w+)/([\w-]+)/s3/aws4_request)",
        r"SignedHeaders=([^,]+), ?Signature=(\w+)",
    )
    pattern = rf"AWS4-HMAC-SHA256 {credential}, ?{rest}"
    match = re.fullmatch(pattern, environ.get("HTTP_AUTHORIZATION", ""))
    if match is None or match[1] != ACCESS_KEY:
        return False
    path, _, query = environ["REQUEST_URI"].partition("?")
    pairs = sorted((quote(k, safe="~"), quote(v, safe="~")) for k, v in parse_qsl(query, keep_blank_values=True))
    headers = "".join(f"{name}:{' '.join(header(environ, name).split())}\n" for name in match[5].split(";"))
    canonical = [
        environ["REQUEST_METHOD"],
        path,
        "&".join(f"{key}={value}" for key, value in pairs),
        headers,
        match[5],
        environ["HTTP_X_AMZ_CONTENT_SHA256"],
    ]
    digest = hashlib.sha256("\n".join(canonical).encode()).hexdigest()
    key = b"AWS4" + SECRET_KEY.encode()
    for part in (match[3], match[4], "s3", "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    signed = "\n".join(["AWS4-HMAC-SHA256", environ["HTTP_X_AMZ_DATE"], match[2], digest])
    return hmac.compare_digest(hmac.digest(key, signed.encode(), "sha256").hex(), match[6])


def header(environ, name):
    name = name.upper().replace("-", "_")
    return environ.get(name if name in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{name}", "")


class Quiet(WSGIRequestHandler):
    """Keeps connections open, as S3 does, and logs nothing."""

    protocol_version = "HTTP/1.1"

    def log(self, *args):
        """Log nothing."""


def main():
    """Make the buckets, say the port, and serve."""
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    for bucket in BUCKETS:
        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].create_bucket(bucket, "us-east-1")
    app = Strict(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=Quiet)
    print(server.port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
