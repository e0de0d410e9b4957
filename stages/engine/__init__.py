"""What every solver shares."""
