"""From the socket to the lake without losing a frame: journal, publisher, account, collector. Knows no Dagster."""
