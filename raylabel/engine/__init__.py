"""Runs a stage: pending work units, workers, committed shards. The only place that imports ray."""
