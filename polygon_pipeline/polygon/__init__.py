"""The vendor, Polygon (now Massive): its messages, its stream, its history. Knows nothing of storage."""
