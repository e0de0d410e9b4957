"""What a run writes: columns, Parquet, commits, the published dataset."""
