"""Both kinds of lake behave alike, and errors name what to correct."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from datetime import UTC, datetime, timedelta
from hashlib import md5
from pathlib import Path
from typing import Any

import boto3
import obstore
import pytest
from botocore.credentials import ReadOnlyCredentials
from botocore.exceptions import CredentialRetrievalError
from obstore.exceptions import (
    AlreadyExistsError,
    GenericError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)

from polygon_pipeline.lake import layout
from polygon_pipeline.lake.errors import NOT_FOUND, STORE_ERRORS, LakeError, brief, permanent_error
from polygon_pipeline.lake.s3 import S3Access
from polygon_pipeline.lake.store import CONCURRENCY, Lake, for_each, open_lake
from polygon_pipeline.market.bars import Channel, ticker_error
from polygon_pipeline_tests.support.bars import DAY, NOON
from polygon_pipeline_tests.support.documented_s3 import (
    BUCKET,
    KMS_REFUSAL,
    WrongRegion,
    documented_s3,
)
from polygon_pipeline_tests.support.lakes import local_lake, no_s3
from polygon_pipeline_tests.support.s3_server import SeaweedFS, strict_s3
from polygon_pipeline_tests.support.waiting import until

# Objects


def test_an_object_can_be_stored_read_and_replaced(lake: Lake) -> None:
    assert lake.get("a/b.json") is None
    lake.put("a/b.json", b"one")
    assert lake.get("a/b.json") == b"one"
    lake.put("a/b.json", b"two\x00\xff")
    assert lake.get("a/b.json") == b"two\x00\xff"
    lake.put("a/empty", b"")
    assert lake.get("a/empty") == b""


def test_a_local_file_can_be_put(lake: Lake, tmp_path: Path) -> None:
    content = b"0123456789abcdef" * 600_000  # more than one part of an upload in parts
    (tmp_path / "source").write_bytes(content)
    lake.put("datasets/x/data.parquet", tmp_path / "source")
    assert lake.get("datasets/x/data.parquet") == content


def test_keys_are_those_below_the_folder_sorted(lake: Lake) -> None:
    assert lake.keys("raw-data/2026-01-26/") == []
    for key in ("raw-data/2026-01-26/B/2", "raw-data/2026-01-26/B/1", "raw-data/2026-01-26/A/9", "raw-data/x", "y"):
        lake.put(key, b"")
    for prefix in ("raw-data/2026-01-26/", "raw-data/2026-01-26"):
        assert lake.keys(prefix) == ["raw-data/2026-01-26/A/9", "raw-data/2026-01-26/B/1", "raw-data/2026-01-26/B/2"]
    assert lake.keys("raw-data/2026-01-2") == [], "a prefix is whole folders"


def test_many_keys_are_all_listed_and_got(lake: Lake) -> None:
    wanted = {f"many/{number:04d}": str(number).encode() for number in range(1100)}  # more than a page

    async def put(key: str) -> None:
        await lake.store.put_async(key, wanted[key])

    asyncio.run(for_each(wanted, put))
    assert lake.keys("many/") == sorted(wanted)
    found: dict[str, bytes] = {}
    lake.get_many(list(wanted), lambda key, content: found.update({key: content}))
    assert found == wanted


def test_getting_no_keys_does_nothing_and_a_missing_key_is_an_error(lake: Lake) -> None:
    lake.get_many([], lambda key, content: pytest.fail(f"there is no {key}"))
    lake.put("here", b"")
    with pytest.raises(NOT_FOUND):
        lake.get_many(["here", "missing"], lambda key, content: None)


TICKERS = ["BRK.B", "KIMpL", "KIMPL", "A B", "A%2FB", "A%B", "A#B", "A?B", "A*B", "A+B", "A:B", "~", "É", "A&B=C", "$"]


def test_every_ticker_has_its_own_keys_in_its_own_spelling(lake: Lake) -> None:
    assert [ticker for ticker in TICKERS if ticker_error(ticker)] == []
    for ticker in TICKERS:
        lake.put(layout.raw_key(Channel.MINUTE, DAY, ticker, NOON), ticker.encode())
    keys = lake.keys(layout.raw_prefix(Channel.MINUTE, DAY))
    found: dict[str, bytes] = {}
    lake.get_many(keys, lambda key, content: found.update({key: content}))
    assert {layout.parse_raw_key(key): content for key, content in found.items()} == {
        (ticker, NOON): ticker.encode() for ticker in TICKERS
    }


def test_a_url_shows_where_an_object_is(file_lake: Lake, s3_lake: Lake, seaweedfs: SeaweedFS, tmp_path: Path) -> None:
    file_lake.put("a/b.json", b"local")
    assert file_lake.url("a/b.json") == (tmp_path / "lake/a/b.json").as_uri()
    assert (tmp_path / "lake/a/b.json").read_bytes() == b"local"
    s3_lake.put("a/b.json", b"remote")
    bucket, _, key = s3_lake.url("a/b.json").removeprefix("s3://").partition("/")
    assert seaweedfs.client().get_object(Bucket=bucket, Key=key)["Body"].read() == b"remote"
    assert (file_lake.is_s3, s3_lake.is_s3) == (False, True)


def test_two_lakes_in_one_bucket_do_not_see_each_other(seaweedfs: SeaweedFS) -> None:
    bucket = seaweedfs.new_bucket()
    one, other, whole = (open_lake(f"s3://{bucket}/{prefix}", seaweedfs.access) for prefix in ("one", "one2/", ""))
    one.put("a", b"1")
    other.put("a", b"2")
    assert (one.keys(""), one.get("a"), other.get("a")) == (["a"], b"1", b"2")
    assert whole.keys("") == ["one/a", "one2/a"]


# Claims


def test_a_lake_accepts_one_feed_and_refuses_another(lake: Lake) -> None:
    lake.claim("simulated")
    lake.claim("simulated")
    with pytest.raises(LakeError, match="never mixed") as refused:
        lake.claim("polygon")
    assert lake.uri in str(refused.value)
    assert "LAKE_URI" in str(refused.value)
    lake.claim("simulated")


def test_the_error_for_wrong_credentials_names_what_to_check(seaweedfs: SeaweedFS) -> None:
    bucket = seaweedfs.new_bucket()
    for key, secret in ((seaweedfs.access_key, "wrong"), ("another-key", seaweedfs.secret_key)):
        session = boto3.Session(key, secret, region_name="us-east-1")
        lake = open_lake(f"s3://{bucket}", lambda session=session: S3Access(session, seaweedfs.endpoint_url))  # type: ignore[misc]
        with pytest.raises(LakeError, match=r"refuses these credentials.*AWS_\*") as refused:
            lake.claim("polygon")
        assert f"s3://{bucket}" in str(refused.value)
        assert secret not in str(refused.value)


@pytest.mark.slow
def test_the_error_for_a_missing_bucket_names_what_to_do() -> None:
    session = boto3.Session("key", "secret", region_name="us-east-1")
    with strict_s3() as url:
        lake = open_lake("s3://no-such-bucket/prefix", lambda: S3Access(session, url))
        with pytest.raises(LakeError, match=r"does not exist\. Create the bucket or correct LAKE_URI") as refused:
            lake.claim("polygon")
        assert "s3://no-such-bucket/prefix" in str(refused.value)
        session.client("s3", endpoint_url=url).create_bucket(Bucket="no-such-bucket")
        lake.claim("polygon")
        assert lake.keys("") == ["feed.json"]


def test_a_folder_that_is_a_file_cannot_be_claimed(tmp_path: Path) -> None:
    lake = local_lake(tmp_path / "lake")
    (tmp_path / "lake").rmdir()
    (tmp_path / "lake").write_bytes(b"")
    with pytest.raises(Exception, match=str(tmp_path)):
        lake.claim("polygon")


def test_temporary_faults_are_distinguished_from_permanent_ones() -> None:
    assert permanent_error(GenericError("connection refused"), "s3://bucket") is None
    assert permanent_error(TimeoutError(), "s3://bucket") is None
    for sign in ("RequestTimeTooSkewed", "ExpiredToken"):
        assert permanent_error(PermissionDeniedError(f"403: <Code>{sign}</Code>"), "s3://bucket") is None
    missing = permanent_error(GenericError("404: <Code>NoSuchBucket</Code>"), "s3://bucket")
    assert missing
    assert "Create the bucket" in str(missing)
    skewed = "403 Forbidden: <Code>RequestTimeTooSkewed</Code><Message>The clock is wrong.</Message>"
    assert permanent_error(PermissionDeniedError(skewed), "s3://bucket") is None
    denied = permanent_error(PermissionError("read only"), "file:///lake")
    assert denied
    assert "read only" in str(denied)


def test_a_credential_service_that_is_away_is_no_refusal(seaweedfs: SeaweedFS) -> None:
    class Credentials:
        away = True

        def get_frozen_credentials(self) -> ReadOnlyCredentials:
            if self.away:
                raise CredentialRetrievalError(provider="iam-role", error_msg="the metadata service is away")
            return ReadOnlyCredentials(seaweedfs.access_key, seaweedfs.secret_key, None)

    session, credentials = seaweedfs.address.session(), Credentials()
    session.get_credentials = lambda: credentials  # type: ignore[method-assign,assignment,return-value]
    lake = open_lake(f"s3://{seaweedfs.new_bucket()}", lambda: S3Access(session, seaweedfs.endpoint_url))
    with pytest.raises(STORE_ERRORS):  # which a collector tries again
        lake.claim("polygon")
    credentials.away = False
    lake.claim("polygon")


def test_an_error_is_shortened_to_one_line() -> None:
    assert brief(ValueError("first\nsecond")) == "first"
    assert brief(ValueError("")) == "ValueError"
    assert len(brief(ValueError("x" * 10_000))) <= 400


def test_an_error_of_s3_is_shortened_to_the_request_and_s3s_own_words() -> None:
    answer = '<?xml version="1.0"?>\n<Error><Code>SlowDown</Code><Message>Reduce your rate.</Message></Error>'
    request = "Error performing GET http://127.0.0.1/b?list-type=2 in 5ms"
    error = GenericError(f"Generic S3 error: {request} - Server returned: {answer}\n\nDebug source")
    assert brief(error) == "GET http://127.0.0.1/b: SlowDown: Reduce your rate."


# Opening


@pytest.mark.parametrize(
    "uri", ["", "lake", "/var/lake", "http://host/lake", "s3:", "s3://", "s3:///key", "file://host/lake"]
)
def test_an_invalid_lake_uri_is_refused_with_the_valid_forms(uri: str) -> None:
    with pytest.raises(LakeError, match=r"LAKE_URI is .* must be s3://bucket/prefix or file:///absolute/path"):
        open_lake(uri, no_s3)


def test_a_local_lakes_path_is_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LakeError, match="file:///absolute/path"):
        open_lake("file:lake", no_s3)


def test_a_local_folder_is_created_and_may_have_any_name(tmp_path: Path) -> None:
    root = tmp_path / "my lake" / "100% É"
    lake = open_lake(root.as_uri(), no_s3)
    lake.put("a", b"1")
    assert (root / "a").read_bytes() == b"1"
    assert lake.local_root == root


def test_without_credentials_the_error_names_the_variables_to_set() -> None:
    with pytest.raises(LakeError, match="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
        open_lake("s3://bucket", lambda: S3Access(boto3.Session()))


def test_an_s3_lake_is_opened_without_a_request() -> None:
    lake = open_lake("s3://bucket", lambda: S3Access(boto3.Session("key", "secret"), "http://127.0.0.1:1"))
    assert lake.url("a") == "s3://bucket/a"


# As AWS, R2 and MinIO are documented to answer


@pytest.mark.fault("S3: a wrong region")
@pytest.mark.parametrize("answer", list(WrongRegion))
def test_a_bucket_in_another_region_is_told_with_the_region_to_set(answer: WrongRegion) -> None:
    home = "auto" if answer is WrongRegion.R2 else "eu-west-1"
    with documented_s3((home,), answer) as s3:
        expected = "its own" if answer is WrongRegion.R2 else home  # R2's own words say which
        with pytest.raises(LakeError, match=f"another region. Set AWS_DEFAULT_REGION.* to {expected}") as refused:
            s3.lake().claim("polygon")
        assert len(str(refused.value).splitlines()) == 1
        assert answer is not WrongRegion.R2 or "must be one of: auto" in str(refused.value)
        s3.lake(region=home).claim("polygon")


def test_a_bucket_whose_region_nobody_tells_is_still_told_to_be_in_another_region() -> None:
    error = GenericError("Received redirect without LOCATION, this normally indicates an incorrectly configured region")
    assert "another region" in str(permanent_error(error, "s3://bucket"))


def test_a_profile_that_does_not_exist_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    with pytest.raises(LakeError, match=r"s3://bucket cannot be reached .*AWS_\*.*no-such-profile") as refused:
        open_lake("s3://bucket", lambda: S3Access(boto3.Session()))
    assert len(str(refused.value).splitlines()) == 1


def test_a_profile_without_its_secret_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-key")
    with pytest.raises(LakeError, match="AWS_SECRET_ACCESS_KEY"):
        open_lake("s3://bucket", lambda: S3Access(boto3.Session()))


@pytest.mark.fault("S3: a KMS key that may not be used")
def test_a_kms_key_that_may_not_be_used_is_named_with_the_right_that_is_missing() -> None:
    with documented_s3() as s3:
        s3.refusal = KMS_REFUSAL
        with pytest.raises(
            LakeError, match=r"encrypted with a KMS key.*not authorized to perform: kms:GenerateDataKey"
        ):
            s3.lake().claim("polygon")


def test_an_etag_that_is_no_md5_conditions_the_next_write_all_the_same() -> None:
    with documented_s3() as s3:
        lake = s3.lake()
        first = obstore.put(lake.store, "a", b"1", mode="create")
        assert s3.objects["lake/a"][1] != f'"{md5(b"1").hexdigest()}"'
        obstore.put(lake.store, "a", b"2", mode={"e_tag": first["e_tag"]})
        with pytest.raises(PreconditionError):
            obstore.put(lake.store, "a", b"3", mode={"e_tag": first["e_tag"]})
        assert lake.get("a") == b"2"


class _Role:
    """A profile whose temporary credentials come from a command, as those of single sign-on tools do, and which boto3
    therefore renews by itself, from ten minutes before their end on."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._credentials = folder / "credentials.json"
        (folder / "config").write_text(f"[profile role]\ncredential_process = cat {self._credentials}\n")
        monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "config"))

    def session(self) -> boto3.Session:
        return boto3.Session(profile_name="role", region_name="us-east-1")

    def give(self, token: str) -> None:
        end = datetime.now(UTC) + timedelta(minutes=5)
        content = {"Version": 1, "AccessKeyId": "k", "SecretAccessKey": "s", "SessionToken": token}
        self._credentials.write_text(json.dumps({**content, "Expiration": end.isoformat()}))


@pytest.mark.fault("S3: expired credentials")
def test_temporary_credentials_that_expire_are_renewed_within_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    role = _Role(tmp_path, monkeypatch)
    with documented_s3() as s3:
        role.give("first")
        s3.token = "first"
        lake = s3.lake(session=role.session())
        lake.put("a", b"1")
        role.give("second")
        s3.token = "second"
        until(lambda: _is_stored(lake, b"2"), "the second token is used", seconds=5)
        assert {asked.headers["x-amz-security-token"] for asked in s3.asked} == {"first", "second"}


def _is_stored(lake: Lake, content: bytes) -> bool:
    with contextlib.suppress(*STORE_ERRORS):
        lake.put("a", content)
        return lake.get("a") == content
    return False


@pytest.mark.fault("S3: expired credentials")
def test_credentials_that_have_expired_are_told_in_a_line_and_may_be_renewed_yet() -> None:
    with documented_s3() as s3:
        s3.token = "another-session"
        lake = s3.lake()
        with pytest.raises(STORE_ERRORS) as expired:
            lake.claim("polygon")
        assert brief(expired.value).endswith("feed.json: ExpiredToken: The provided token has expired.")
        assert permanent_error(expired.value, lake.uri) is None


def test_a_login_that_has_ended_is_told_from_wrong_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sso = "sso_start_url = https://nowhere.invalid\nsso_region = us-east-1\nsso_account_id = 1\nsso_role_name = r\n"
    (tmp_path / "config").write_text(f"[profile desk]\n{sso}")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    session = boto3.Session(profile_name="desk", region_name="us-east-1")
    lake = open_lake("s3://bucket", lambda: S3Access(session, "http://127.0.0.1:1"))
    with pytest.raises(LakeError, match=r"the login has ended\. Log in again"):
        lake.claim("polygon")


@pytest.mark.fault("S3: no credentials for now")
def test_credentials_that_cannot_be_had_for_now_are_no_reason_to_give_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    role = _Role(tmp_path, monkeypatch)
    role.give("first")
    with documented_s3() as s3:
        s3.token = "first"
        lake = s3.lake(session=role.session())
        lake.claim("polygon")
        (tmp_path / "credentials.json").unlink()
        with pytest.raises(UnauthenticatedError, match="CredentialRetrievalError") as failed:
            until(lambda: lake.claim("polygon"), "new credentials are asked for")
        assert permanent_error(failed.value, lake.uri) is None
        role.give("first")
        until(lambda: _is_stored(lake, b"1"), "the credentials are back", seconds=5)


def test_a_refused_list_is_permanent_like_a_refused_write() -> None:
    listing = GenericError(
        "Error performing list request: 403 Forbidden: <Code>AccessDenied</Code><Message>No</Message>"
    )
    asked_by_boto3 = "An error occurred (AccessDenied) when calling the ListObjectsV2 operation: Access Denied"
    for error in (listing, GenericError(asked_by_boto3)):
        assert "refuses these credentials" in str(permanent_error(error, "s3://bucket"))


@pytest.mark.fault("S3: versions and delete markers")
@pytest.mark.parametrize("versions_of", ["SeaweedFS", "moto"])
def test_a_versioned_bucket_keeps_conditions_over_versions_and_delete_markers(
    seaweedfs: SeaweedFS, versions_of: str
) -> None:
    with contextlib.ExitStack() as servers:
        if versions_of == "moto":
            url = servers.enter_context(strict_s3())
            session = boto3.Session("key", "secret", region_name="us-east-1")
            client, bucket = session.client("s3", endpoint_url=url), "a-bucket"
            client.create_bucket(Bucket=bucket)
            lake = open_lake(f"s3://{bucket}/lake", lambda: S3Access(session, url))
        else:
            client, bucket = seaweedfs.client(), seaweedfs.new_bucket()
            lake = open_lake(f"s3://{bucket}/lake", seaweedfs.access)
        client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": "Enabled"})
        first = obstore.put(lake.store, "a", b"1", mode="create")
        obstore.put(lake.store, "a", b"2", mode={"e_tag": first["e_tag"]})
        for mode in ("create", {"e_tag": first["e_tag"]}):
            with pytest.raises((AlreadyExistsError, PreconditionError)):
                obstore.put(lake.store, "a", b"3", mode=mode)  # type: ignore[arg-type]
        client.delete_object(Bucket=bucket, Key="lake/a")
        assert (lake.get("a"), lake.keys("")) == (None, []), "a delete marker is no object"
        obstore.put(lake.store, "a", b"4", mode="create")
        assert (lake.get("a"), lake.keys("")) == (b"4", ["a"])


# What R2 and MinIO document of PutObject, GetObject and ListObjectsV2, and what every client sends.
_COMMON_HEADERS = {"accept-encoding", "amz-sdk-invocation-id", "amz-sdk-request"}
_COMMON_HEADERS |= {"accept", "authorization", "content-length", "host", "user-agent", "if-match", "if-none-match"}
_COMMON_AMZ = {"x-amz-content-sha256", "x-amz-date", "x-amz-security-token"}
_COMMON_QUERIES = {"list-type", "prefix", "delimiter", "start-after", "continuation-token", "max-keys", "encoding-type"}


def test_a_lake_asks_for_nothing_that_r2_and_minio_do_not_have() -> None:
    with documented_s3(("auto",), WrongRegion.R2) as s3:
        lake = s3.lake(region="auto")
        lake.claim("polygon")
        lake.put("a", b"1")
        etag = obstore.put(lake.store, "b", b"1", mode="create")["e_tag"]
        obstore.put(lake.store, "b", b"2", mode={"e_tag": etag})
        assert lake.keys("") == ["a", "b", "feed.json"]
        lake.get_many(["a", "b"], lambda key, content: None)
        sent = {name for asked in s3.asked for name in asked.headers}
        assert sent <= _COMMON_HEADERS | _COMMON_AMZ
        assert {name for asked in s3.asked for name in asked.query} <= _COMMON_QUERIES
        assert all(asked.path.startswith(f"/{BUCKET}") for asked in s3.asked), "the bucket is in the path"


# Many at a time


def test_every_item_is_processed_once_and_never_more_than_the_limit_at_a_time() -> None:
    done: list[int] = []
    at_work = most = 0

    async def work(item: int) -> None:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        await asyncio.sleep(0)
        at_work -= 1
        done.append(item)

    asyncio.run(for_each(range(1000), work))
    assert sorted(done) == list(range(1000))
    assert most == CONCURRENCY


def test_the_first_error_cancels_the_others_and_is_raised_itself() -> None:
    ended = threading.Event()

    async def work(item: int) -> None:
        if item == 5:
            raise ValueError("the fifth")
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            ended.set()
            raise

    with pytest.raises(ValueError, match="the fifth"):
        asyncio.run(for_each(range(10), work))
    assert ended.is_set()


def test_a_lake_of_a_newer_format_is_refused_and_left_as_it_is(file_lake: Lake) -> None:
    newer = b'{"feed": "polygon", "format": 2}'
    file_lake.put(layout.FEED_KEY, newer)
    with pytest.raises(LakeError, match="format 2"):
        file_lake.claim("polygon")
    assert file_lake.get(layout.FEED_KEY) == newer


def test_a_lake_from_before_formats_had_a_number_has_the_first(file_lake: Lake) -> None:
    file_lake.put(layout.FEED_KEY, b'{"feed":"polygon"}')
    file_lake.claim("polygon")
    assert file_lake.get(layout.FEED_KEY) == b'{"feed":"polygon"}'
    with pytest.raises(LakeError, match="never mixed"):
        file_lake.claim("simulated")


def test_a_lake_says_which_feed_fills_it_where_that_is_known(file_lake: Lake) -> None:
    assert file_lake.feed() is None
    file_lake.claim("simulated")
    assert file_lake.feed() == "simulated"
    file_lake.put(layout.FEED_KEY, b"{")
    assert file_lake.feed() is None


def test_a_claim_that_was_made_is_not_written_again(lake: Lake) -> None:
    lake.claim("polygon")
    before = lake.store.head(layout.FEED_KEY)
    lake.claim("polygon")
    assert lake.store.head(layout.FEED_KEY) == before


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1}', b"\x00" * 20, b"[" * 100_000])
@pytest.mark.parametrize("feed", ["polygon", "simulated"])
def test_a_claim_that_cannot_be_read_is_left_and_the_error_says_how_to_mend_it(
    file_lake: Lake, content: bytes, feed: str
) -> None:
    file_lake.put(layout.FEED_KEY, content)
    with pytest.raises(LakeError) as refused:
        file_lake.claim(feed)
    text = str(refused.value)
    assert file_lake.url(layout.FEED_KEY) in text
    assert '{"feed":"polygon","format":1} if it is real data' in text
    assert '{"feed":"simulated","format":1} if it is simulated' in text
    assert file_lake.get(layout.FEED_KEY) == content


@pytest.mark.parametrize("root", layout.DATA_ROOTS)
def test_a_simulated_feed_never_claims_a_lake_with_data_and_no_claim(lake: Lake, root: str) -> None:
    lake.put(f"{root}2026-01-26/SPY/x.json", b"{}")
    with pytest.raises(LakeError, match=r"holds data of another program \(.*x\.json\)"):
        lake.claim("simulated")
    assert lake.get(layout.FEED_KEY) is None
    lake.claim("polygon")


def test_an_empty_lake_with_folder_markers_and_other_things_can_be_claimed(lake: Lake) -> None:
    lake.put("raw-data/marker", b"")
    lake.put("logs/today.txt", b"something")
    lake.claim("simulated")


@pytest.mark.slow
def test_of_two_feeds_that_claim_a_lake_at_once_one_is_refused(s3_lake: Lake) -> None:
    """Between its look and its claim, the other one claims."""
    put = obstore.put

    def late(*args: Any, **kwargs: Any) -> Any:
        put(s3_lake.store, layout.FEED_KEY, b'{"feed":"polygon","format":1}')
        return put(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(obstore, "put", late)
        with pytest.raises(LakeError, match="never mixed"):
            s3_lake.claim("simulated")
    assert s3_lake.get(layout.FEED_KEY) == b'{"feed":"polygon","format":1}'
