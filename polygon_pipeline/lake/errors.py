"""What goes wrong with the lake's store, and what is told of it.

Belongs here: which errors are the store's, which of them are permanent, and their words. Does not belong here: what is
tried again, and for how long (collector.collector).
"""

from __future__ import annotations

import re
from collections.abc import Callable

from obstore.exceptions import BaseError, NotFoundError, PermissionDeniedError, UnauthenticatedError

# obstore raises Python's own error for a missing object, and its own for a missing bucket.
NOT_FOUND = (NotFoundError, FileNotFoundError)

# Of an error's text, in one line.
_LONGEST = 400

# What a store's faults look like: obstore's own errors, and a local disk's.
STORE_ERRORS = (BaseError, OSError)

# S3's codes, by what is to be corrected. R2 has a code of its own for a wrong region.
_WRONG_REGION = {"PermanentRedirect", "TemporaryRedirect", "IllegalLocationConstraintException", "InvalidRegionName"}
_BARE = "Received redirect without LOCATION"  # obstore's word for it, which leaves the answer out
_BOTO3 = re.compile(r"An error occurred \((\w+)\) when calling the \w+ operation[^:]*: ?(.*)")
_LOGGED_OUT = ("SSOTokenLoadError", "UnauthorizedSSOTokenError")  # boto3's, where obstore asks it for credentials
_REFUSED = {"AccessDenied", "AllAccessDisabled", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"}
_REFUSED_CERTIFICATE = re.compile(r"InvalidCertificate\(\s*(\w+)")
# Refusals that say nothing about the credentials: this machine's clock is wrong, they have expired and their successors
# are on the way, or the service that hands them out is away.
_PASSING = ("RequestTimeTooSkewed", "RequestExpired", "ExpiredToken", "External AWS credential provider")


class LakeError(Exception):
    """The lake cannot be used as it is configured; the text says what to correct."""


class NoCredentials(LakeError):
    """No credentials were found; the service that hands them out may be away."""


def permanent_error(
    error: BaseException, uri: str, bucket_region: Callable[[], str | None] = lambda: None
) -> LakeError | None:
    """The same error as a LakeError that says what to correct, or None where it may pass by itself.

    bucket_region: asked only where the region is wrong and the answer does not say which is right.
    """
    text = str(error)
    code, message = _answered(text) or ("", "")
    if isinstance(error, NOT_FOUND) or code == "NoSuchBucket":
        advice = "does not exist. Create the bucket or correct LAKE_URI."
    elif code in _WRONG_REGION or (code == "AuthorizationHeaderMalformed" and "region" in message) or _BARE in text:
        named = re.search("<Region>(.+?)</Region>", text)
        region = named[1] if named else bucket_region() or "its own"
        advice = f"is in another region. Set AWS_DEFAULT_REGION, or the profile's region, to {region}."
    elif code.startswith("KMS.") or (code == "AccessDenied" and "kms:" in message):
        advice = (
            "is encrypted with a KMS key that cannot be used. Enable the key, and allow these credentials "
            "kms:GenerateDataKey and kms:Decrypt."
        )
    elif any(name in text for name in _LOGGED_OUT):
        advice = "cannot be reached, because the login has ended. Log in again, or give a collector a role."
    elif any(sign in text for sign in _PASSING):
        return None
    elif (
        isinstance(error, PermissionDeniedError | UnauthenticatedError | PermissionError)
        or code in _REFUSED  # a list's refusal has no class of its own
    ):
        advice = "refuses these credentials. Check AWS_* and that they may get, put and list objects there."
    else:
        return None
    return LakeError(f"{uri} {advice} ({brief(error)})")


def brief(error: BaseException) -> str:
    """An error in one line, in S3's own words where there are some: obstore appends its whole chain of causes."""
    text = str(error).strip()
    if answered := _answered(text):
        request = re.search(r"Error performing (\S+ [^\s?]+)", text)
        return f"{request[1] if request else 'S3'}: {': '.join(answered)}"[:_LONGEST]
    line = text.splitlines()[0][:_LONGEST] if text else type(error).__name__
    refused = _REFUSED_CERTIFICATE.search(text)
    return f"{line}: the certificate is refused ({refused[1]}; AWS_CA_BUNDLE names more to trust)" if refused else line


def _answered(text: str) -> tuple[str, str] | None:
    """The code and the message of S3's answer, within obstore's error text or boto3's."""
    found = re.search(r"<Code>([^<]+)</Code>(?:.*?<Message>([^<]*)</Message>)?", text, re.DOTALL) or _BOTO3.search(text)
    return (found[1], found[2] or "") if found else None
