"""The job `drain_journals`: publishes what lost runs left on this disk, without a stream.

Belongs here: Dagster's side of it. Does not belong here: publishing (collector.recovery), and when it is started
(defs.sensors).

A collector does the same at its start. This is for a disk where none will start: its machine came back while another
one collects, or the store came back after the session's last run had ended.
"""

import dagster as dg

from polygon_pipeline.collector.journal import JournalError
from polygon_pipeline.collector.lease import LeaseHeld
from polygon_pipeline.collector.recovery import Recovered, drain
from polygon_pipeline.datasets import catalog
from polygon_pipeline.datasets.wording import count
from polygon_pipeline.defs.resources import LakeResource, PolygonResource
from polygon_pipeline.lake.errors import STORE_ERRORS, LakeError, permanent_error
from polygon_pipeline.market import calendar


@dg.op
def publish_journals(context: dg.OpExecutionContext, polygon: PolygonResource, lake: LakeResource) -> None:
    """Publishes the journals of lost runs in JOURNAL_DIR and completes their accounts."""
    wanted, opened, runs = polygon.settings(), lake.open(), 0
    try:
        opened.claim(wanted.feed)
        for found in drain(opened, wanted.feed, wanted.journal_dir, f"drain_journals-{context.run_id[:8]}"):
            runs += 1
            told = f"{found.waited_bytes:,} bytes waited, {found.account.bars:,} bars in all"
            context.log.info(f"run {found.header.run} is on the lake: {told}")
            _report(context, found)
    except (LeaseHeld, LakeError, JournalError) as error:
        raise dg.Failure(str(error), allow_retries=False) from None
    except STORE_ERRORS as error:
        fault = permanent_error(error, opened.uri) or error
        raise dg.Failure(f"The journals in {wanted.journal_dir} wait on: {fault}") from error
    context.log.info(f"{count(runs, 'journal')} of earlier runs published from {wanted.journal_dir}")


def _report(context: dg.OpExecutionContext, found: Recovered) -> None:
    """Materializes the raw assets of the days that got bars, so that their datasets follow."""
    for day, channels in sorted(found.account.days.items()):
        if calendar.session(day) is None:
            continue  # its bars are on the lake, but it has no partition
        for channel, counted in sorted(channels.items()):
            context.log_event(
                dg.AssetMaterialization(
                    catalog.RAW[channel].name,
                    description=f"what run {found.header.run} had not published: {counted.bars:,} bars in all",
                    partition=day.isoformat(),
                    metadata={
                        "feed": found.header.feed,
                        "bars": counted.bars,
                        "objects": counted.objects,
                        "revisions": counted.revisions,
                        "frames": found.account.frames,
                        "quarantined": found.account.quarantined,
                        "last_received_at": str(found.account.last_received_at),
                    },
                )
            )


@dg.job(
    description="Publishes what lost runs left in JOURNAL_DIR of the machine that runs this; opens no stream. Started "
    "by leftover_journals_sensor, or by hand on a machine that came back."
)
def drain_journals() -> None:
    publish_journals()
