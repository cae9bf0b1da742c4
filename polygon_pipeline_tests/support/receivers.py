"""Who alerts are sent to: a web server that takes a webhook's posts, and a mail server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email import message_from_bytes, policy
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, Envelope, Session

from polygon_pipeline_tests.support.s3_server import free_ports

SECRET_PATH = "/services/a-webhooks-secret-path"


class Webhook(ThreadingHTTPServer):
    """texts: what was posted. answers: the status of every answer; leads_to: where each answer leads, if anywhere."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.texts: list[str] = []
        self.answers = 200
        self.leads_to: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}{SECRET_PATH}"


class _Handler(BaseHTTPRequestHandler):
    server: Webhook

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.answers == 200 and self.path == SECRET_PATH:
            assert self.headers["Content-Type"] == "application/json"
            assert set(body) == {"text"}
            self.server.texts.append(body["text"])
        self.send_response(self.server.answers)
        if self.server.leads_to:
            self.send_header("Location", self.server.leads_to)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def webhook() -> Iterator[Webhook]:
    with Webhook() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class MailServer:
    """mails: what was delivered. logins: who logged in with which password. refused: recipients it does not know."""

    def __init__(self) -> None:
        self.mails: list[EmailMessage] = []
        self.logins: list[tuple[bytes, bytes]] = []
        self.password = b""
        self.refused: set[str] = set()
        [self.port] = free_ports(1)

    def url(self, login: str = "") -> str:
        return f"smtp://{login}127.0.0.1:{self.port}"

    async def handle_RCPT(
        self, _server: object, _session: Session, envelope: Envelope, address: str, _options: list[str]
    ) -> str:
        if address in self.refused:
            return "550 no such mailbox"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _server: object, _session: Session, envelope: Envelope) -> str:
        content = envelope.content
        assert isinstance(content, bytes)
        mail = message_from_bytes(content, policy=policy.default)
        assert isinstance(mail, EmailMessage)
        assert set(envelope.rcpt_tos) <= set(mail["To"].replace(" ", "").split(","))
        self.mails.append(mail)
        return "250 OK"

    def authenticate(self, _server: object, _session: Session, _envelope: Envelope, _how: str, data: Any) -> AuthResult:
        self.logins.append((data.login, data.password))
        accepted = data.password == self.password
        return AuthResult(success=accepted, handled=accepted)  # what is not handled is refused


@contextmanager
def mail_server() -> Iterator[MailServer]:
    found = MailServer()
    controller = Controller(
        found, hostname="127.0.0.1", port=found.port, authenticator=found.authenticate, auth_require_tls=False
    )
    controller.start()
    try:
        yield found
    finally:
        controller.stop()
