"""Sending a word to a webhook or a mailbox.

Belongs here: the two protocols, and errors without a secret. Does not belong here: what is sent (causes, telling).

A webhook's address is a secret, and so are the mail server's user and password: what the libraries say of an error may
quote them, so nothing of it is passed on.
"""

from __future__ import annotations

import logging
import smtplib
import ssl
import urllib.error
import urllib.request
from collections.abc import Sequence
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from http.client import HTTPException
from ipaddress import ip_address
from urllib.parse import unquote, urlsplit

import msgspec

_TIMEOUT_SECONDS = 10.0
_LOG = logging.getLogger(__name__)


class NotSent(Exception):
    """A receiver did not take a message; the text says why, and no address."""


def post(url: str, text: str) -> None:
    """Posts `{"text": …}`, as Slack and what is compatible with it take it. Raises NotSent."""
    headers = {"Content-Type": "application/json"}
    try:
        request = urllib.request.Request(url, msgspec.json.encode({"text": text}), headers)
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=_TIMEOUT_SECONDS):
            pass
    except urllib.error.HTTPError as error:
        error.close()
        raise NotSent(f"the webhook's server answers {error.code}") from None
    except (OSError, HTTPException, ValueError) as error:
        raise NotSent(f"the webhook's server cannot be reached ({type(error).__name__})") from None


def mail(url: str, sender: str, recipients: Sequence[str], subject: str, text: str) -> None:
    """Sends a mail. url: `smtps://` or `smtp://[user:password@]host[:port]`. Raises NotSent.

    `smtp://` goes over to TLS before anything else, unless the server is this machine's own.
    """
    message = EmailMessage()
    message["Subject"], message["From"], message["To"] = subject, sender, ", ".join(recipients)
    message["Date"], message["Message-ID"] = formatdate(), make_msgid(domain="polygon-pipeline.invalid")
    message.set_content(text)
    try:
        with _mail_server(url) as server:
            refused = server.send_message(message)
    except smtplib.SMTPRecipientsRefused:
        raise NotSent("the mail server refuses every recipient") from None
    except smtplib.SMTPAuthenticationError as error:
        raise NotSent(f"the mail server refuses the login ({error.smtp_code})") from None
    except smtplib.SMTPResponseException as error:
        raise NotSent(f"the mail server answers {error.smtp_code}") from None
    except (smtplib.SMTPException, OSError, ValueError) as error:
        raise NotSent(f"the mail server cannot be used ({type(error).__name__})") from None
    if refused:  # the others have it, and would have it again
        _LOG.warning(f"the mail server refuses {len(refused)} of {len(recipients)} recipients (POLYGON_ALERT_TO)")


def _mail_server(url: str) -> smtplib.SMTP:
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme == "smtps":
        server: smtplib.SMTP = smtplib.SMTP_SSL(
            host, parts.port or 465, timeout=_TIMEOUT_SECONDS, context=ssl.create_default_context()
        )
    else:
        server = smtplib.SMTP(host, parts.port or 587, timeout=_TIMEOUT_SECONDS)
    try:
        if parts.scheme == "smtp" and not _is_this_machines(server):
            server.starttls(context=ssl.create_default_context())
        if parts.username:
            server.login(unquote(parts.username), unquote(parts.password or ""))
    except BaseException:
        server.close()
        raise
    return server


def _is_this_machines(server: smtplib.SMTP) -> bool:
    assert server.sock
    return ip_address(server.sock.getpeername()[0]).is_loopback


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Where an answer leads, the text is not sent."""

    def redirect_request(self, *_: object) -> None:
        return None
