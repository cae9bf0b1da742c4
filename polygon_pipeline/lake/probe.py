"""Whether a store keeps the conditions that the lease and the lake's claim rest on.

Belongs here: trying that on one small object. Does not belong here: the lease (collector.lease) and the claim
(lake.store).
"""

from __future__ import annotations

import obstore
from obstore.exceptions import AlreadyExistsError, PreconditionError

from polygon_pipeline.lake import layout
from polygon_pipeline.lake.store import Lake


class ConditionIgnored(Exception):
    """The store writes what it was told not to: two collectors could hold one lease. The text says which condition."""


def probe(lake: Lake, content: bytes) -> None:
    """Lists, writes and reads layout.DOCTOR_KEY, under conditions that hold and that do not.

    content: other than the last time. Nothing is deleted, because a bucket's policy may forbid it. Raises the store's
    errors, and ConditionIgnored. A local lake's lease rests on a lock of the system, so that only creating is tried.
    """
    lake.folders("ledger/")
    for may_exist in (True, False):
        try:
            obstore.put(lake.store, layout.DOCTOR_KEY, b"{}", mode="create")
        except AlreadyExistsError:
            continue
        if not may_exist:
            raise ConditionIgnored("an object that exists is written again by If-None-Match: *")
    if lake.is_s3:
        old = obstore.head(lake.store, layout.DOCTOR_KEY)["e_tag"]
        if old is None:
            raise ConditionIgnored("objects have no ETag, so that If-Match has nothing to compare")
        obstore.put(lake.store, layout.DOCTOR_KEY, content, mode={"e_tag": old})
        try:
            obstore.put(lake.store, layout.DOCTOR_KEY, content, mode={"e_tag": old})
        except PreconditionError:
            pass
        else:
            raise ConditionIgnored("an object that has changed is written by If-Match with its earlier ETag")
    else:
        lake.put(layout.DOCTOR_KEY, content)
    if lake.get(layout.DOCTOR_KEY) != content:
        raise ConditionIgnored("what was written is not what is read")
