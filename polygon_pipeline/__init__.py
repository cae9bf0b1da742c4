"""Collects Polygon (Massive) stock aggregates and turns every trading day into datasets, under Dagster."""
