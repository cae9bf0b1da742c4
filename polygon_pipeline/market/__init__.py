"""What a bar, a session and a trading day are. Knows no vendor, no storage and no Dagster."""
