"""What a trading day becomes: the catalog of datasets, and one module with its SQL for each. Knows no Dagster."""
