"""What a feed may leave out."""

from __future__ import annotations

import json

from polygon_pipeline.market.bars import Channel
from polygon_pipeline.simulator.feed import Omitting
from polygon_pipeline.simulator.synthetic import SyntheticFeed, SyntheticMarket
from polygon_pipeline_tests.support.bars import DAY


def test_an_omitting_feed_leaves_out_all_versions_of_the_chosen_bars_and_sends_all_others() -> None:
    whole = list(SyntheticFeed(SyntheticMarket(("KIMpL", "UHT")), DAY, [Channel.MINUTE], revised_share=0.5))
    lost = {(event.ticker, event.start_ms) for event in whole[100:110]}
    feed = Omitting(whole, lambda event: (event.ticker, event.start_ms) in lost)
    left = [event for event in whole if (event.ticker, json.loads(event.payload)["s"]) not in lost]
    assert list(feed) == left
    assert list(feed) == left, "it can be iterated more than once"
    assert len(left) < len(whole) - len(lost), "the chosen bars include revised ones"
