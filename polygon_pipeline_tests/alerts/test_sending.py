"""A word to a webhook and a mailbox, both real: what arrives, and errors that show no address."""

from __future__ import annotations

from pathlib import Path

import pytest

from polygon_pipeline.alerts import sending
from polygon_pipeline.alerts.sending import NotSent, mail, post
from polygon_pipeline_tests.support.receivers import SECRET_PATH, mail_server, webhook
from polygon_pipeline_tests.support.s3_server import free_ports
from polygon_pipeline_tests.support.tls_server import tls_server

_PASSWORD = "a-mail-secret"
_LOGIN = f"me%40example.com:{_PASSWORD}@"


def _refused_post(url: str) -> str:
    with pytest.raises(NotSent) as refused:
        post(url, "text")
    assert "secret" not in str(refused.value)
    assert refused.value.__suppress_context__, "a traceback would show the library's own words"
    return str(refused.value)


def _refused_mail(url: str, *recipients: str) -> str:
    with pytest.raises(NotSent) as refused:
        mail(url, "from@example.com", recipients or ("to@example.com",), "subject", "text")
    assert "secret" not in str(refused.value)
    assert refused.value.__suppress_context__
    return str(refused.value)


def test_a_webhook_gets_the_text_as_json() -> None:
    with webhook() as receiver:
        post(receiver.url, 'two lines,\n"one" with quotes ✓')
        assert receiver.texts == ['two lines,\n"one" with quotes ✓']


@pytest.mark.parametrize("status", [302, 307, 400, 404, 429, 500])
def test_an_answer_that_is_no_success_is_named_and_leads_nowhere(status: int) -> None:
    with webhook() as receiver, webhook() as elsewhere:
        receiver.answers, receiver.leads_to = status, elsewhere.url
        assert str(status) in _refused_post(receiver.url)
        assert elsewhere.texts == []


def test_a_webhook_that_is_away_is_not_sent_to_and_its_address_not_shown() -> None:
    [port] = free_ports(1)
    assert "cannot be reached" in _refused_post(f"http://127.0.0.1:{port}{SECRET_PATH}")
    assert "cannot be reached" in _refused_post(f"http://127.0.0.1:{port}/a secret with spaces")


def test_a_webhook_whose_certificate_nobody_trusts_gets_nothing(tmp_path: Path) -> None:
    with tls_server(tmp_path) as server:
        assert "cannot be reached" in _refused_post(f"{server.url}{SECRET_PATH}")


def test_a_mail_reaches_all_its_recipients() -> None:
    with mail_server() as server:
        mail(server.url(), "from@example.com", ["one@example.com", "two@example.com"], "Subject ✓", "text ✓\nmore")
        [found] = server.mails
    assert (found["From"], found["To"]) == ("from@example.com", "one@example.com, two@example.com")
    assert found["Subject"] == "Subject ✓"
    assert found.get_content().splitlines() == ["text ✓", "more"]
    assert found["Date"]
    assert found["Message-ID"]


def test_a_mail_server_that_wants_a_login_gets_the_one_of_the_url() -> None:
    with mail_server() as server:
        server.password = _PASSWORD.encode()
        mail(server.url(_LOGIN), "from@example.com", ["to@example.com"], "subject", "text")
        assert server.logins == [(b"me@example.com", _PASSWORD.encode())]
        assert len(server.mails) == 1
        server.password = b"another"
        assert "refuses the login (535)" in _refused_mail(server.url(_LOGIN))


def test_a_recipient_that_is_refused_costs_the_others_nothing_and_is_spoken_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with mail_server() as server:
        server.refused = {"gone-secret@example.com"}
        mail(server.url(), "from@example.com", ["to@example.com", "gone-secret@example.com"], "subject", "text")
        assert len(server.mails) == 1
        assert "1 of 2 recipients" in caplog.text
        assert "every recipient" in _refused_mail(server.url(), "gone-secret@example.com")
    assert "secret" not in caplog.text


def test_a_mail_server_elsewhere_gets_neither_login_nor_mail_without_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "_is_this_machines", lambda _: False)
    with mail_server() as server:
        assert "cannot be used" in _refused_mail(server.url(_LOGIN))
        assert (server.logins, server.mails) == ([], [])


def test_a_mail_server_that_is_away_or_not_trusted_gets_nothing(tmp_path: Path) -> None:
    [port] = free_ports(1)
    assert "cannot be used" in _refused_mail(f"smtp://{_LOGIN}127.0.0.1:{port}")
    with tls_server(tmp_path) as server:
        assert "cannot be used" in _refused_mail(server.url.replace("https://", f"smtps://{_LOGIN}"))
