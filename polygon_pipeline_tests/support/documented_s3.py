"""An S3 server on loopback that answers as the documentation of AWS, R2 or MinIO says, where no server here does.

Belongs here: regions, temporary credentials, KMS and racing conditional writes, each as it is documented, and what was
asked for. Does not belong here: a server that stores (s3_server), and faults of the network (faulty_s3).

    https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
    https://docs.aws.amazon.com/AmazonS3/latest/userguide/conditional-writes.html
    https://developers.cloudflare.com/r2/api/s3/api/
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit
from uuid import uuid4
from xml.sax.saxutils import escape

import boto3

from polygon_pipeline.lake.s3 import S3Access
from polygon_pipeline.lake.store import Lake, open_lake

BUCKET = "a-bucket"
KMS_REFUSAL = (
    "User: arn:aws:sts::123456789012:assumed-role/collector/i-0123456789abcdef0 is not authorized to perform: "
    "kms:GenerateDataKey on resource: arn:aws:kms:eu-west-1:123456789012:key/0123 because no identity-based policy "
    "allows the kms:GenerateDataKey action"
)


class WrongRegion(Enum):
    """What is answered to a request that is signed for another region than the bucket's."""

    AWS = 301, "PermanentRedirect", "The bucket must be addressed using the specified endpoint.", ""
    AWS_SIGNATURE = (
        400,
        "AuthorizationHeaderMalformed",
        "The authorization header is malformed; the region is wrong; expecting '{region}'",
        "<Region>{region}</Region>",
    )
    R2 = 400, "InvalidRegionName", "The region name is not valid: it must be one of: auto, us-east-1", ""


class Asked(NamedTuple):
    """A request; headers in lower case."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]


class _Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes = b""


@dataclass
class DocumentedS3:
    """One bucket. token: the session token that is good now (empty: no session), others have expired. conflicts: so
    many of the next conditional writes are answered as if they had met another. kms: objects are encrypted, and their
    ETags are no MD5. refusal: why the KMS key may not be used."""

    url: str
    regions: tuple[str, ...] = ("us-east-1",)
    wrong_region: WrongRegion = WrongRegion.AWS
    token: str = ""
    conflicts: int = 0
    refusal: str = ""
    asked: list[Asked] = field(default_factory=list)
    objects: dict[str, tuple[bytes, str]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def lake(self, region: str = "us-east-1", session: boto3.Session | None = None) -> Lake:
        used = session or boto3.Session("test-key", "test-secret", region_name=region)
        return open_lake(f"s3://{BUCKET}/lake", lambda: S3Access(used, self.url))

    def answer(self, asked: Asked, content: bytes) -> _Answer:
        with self.lock:
            self.asked.append(asked)
            return self._refusal(asked) or self._answer(asked, content)

    def _refusal(self, asked: Asked) -> _Answer | None:
        home = self.regions[0]
        scope = re.search(r"Credential=[^/]+/\d+/([^/]+)/s3/", asked.headers.get("authorization", ""))
        if scope is None or scope[1] not in self.regions:
            status, code, message, more = self.wrong_region.value
            headers = {} if self.wrong_region is WrongRegion.R2 else {"x-amz-bucket-region": home}
            return _error(status, code, message.format(region=home), more.format(region=home), headers)
        if asked.headers.get("x-amz-security-token", "") != self.token:
            return _error(400, "ExpiredToken", "The provided token has expired.")
        if self.refusal and asked.method == "PUT":
            return _error(403, "AccessDenied", self.refusal)
        return None

    def _answer(self, asked: Asked, content: bytes) -> _Answer:
        key = unquote(asked.path).removeprefix(f"/{BUCKET}").lstrip("/")
        if not key:
            return self._list(asked.query.get("prefix", [""])[0])
        found = self.objects.get(key)
        if asked.method == "PUT":
            expected, absent = asked.headers.get("if-match"), asked.headers.get("if-none-match")
            if self.conflicts and (expected or absent):
                self.conflicts -= 1
                return _error(409, "ConditionalRequestConflict", "A conflicting operation occurred. Retry the upload.")
            if expected and not found:
                return _error(404, "NoSuchKey", "The specified key does not exist.")
            if (absent and found) or (expected and found and found[1] != expected):
                return _error(412, "PreconditionFailed", "At least one of the preconditions did not hold.")
            self.objects[key] = content, f'"{uuid4().hex}"'
            return _Answer(200, self._headers(self.objects[key][1]))
        if not found:
            return _error(404, "NoSuchKey", "The specified key does not exist.")
        return _Answer(200, self._headers(found[1]), found[0])

    def _headers(self, etag: str) -> dict[str, str]:
        return {
            "ETag": etag,
            "Last-Modified": "Mon, 26 Jan 2026 18:30:00 GMT",
            "x-amz-server-side-encryption": "aws:kms",
            "x-amz-server-side-encryption-aws-kms-key-id": "arn:aws:kms:eu-west-1:123456789012:key/0123",
        }

    def _list(self, prefix: str) -> _Answer:
        entries = "".join(
            f"<Contents><Key>{escape(key)}</Key><LastModified>2026-01-26T18:30:00.000Z</LastModified>"
            f"<ETag>{escape(etag)}</ETag><Size>{len(content)}</Size></Contents>"
            for key, (content, etag) in sorted(self.objects.items())
            if key.startswith(prefix)
        )
        body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>"
        return _Answer(200, {"Content-Type": "application/xml"}, body.encode())


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


@contextmanager
def documented_s3(
    regions: tuple[str, ...] = ("us-east-1",), wrong_region: WrongRegion = WrongRegion.AWS
) -> Iterator[DocumentedS3]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # one packet an answer

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            headers = {name.lower(): value for name, value in self.headers.items()}
            content = self.rfile.read(int(headers.get("content-length", "0")))
            answer = served.answer(Asked(self.command, parts.path, parse_qs(parts.query), headers), content)
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body)

        do_HEAD = do_PUT = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with _Server(("127.0.0.1", 0), Handler) as server:
        served = DocumentedS3(f"http://127.0.0.1:{server.server_port}", regions, wrong_region)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()


def _error(status: int, code: str, message: str, more: str = "", headers: dict[str, str] | None = None) -> _Answer:
    # The line break is AWS's.
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message>{more}</Error>'
    )
    return _Answer(status, {"Content-Type": "application/xml", **(headers or {})}, body.encode())
