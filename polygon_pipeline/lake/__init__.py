"""Where things are kept: every key, the store behind them, and the files' formats. Knows no Dagster."""
