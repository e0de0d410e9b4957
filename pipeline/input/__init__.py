"""What a run reads: a source, its files, rows of any format, their pictures."""
