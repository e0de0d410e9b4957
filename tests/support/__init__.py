"""What several test files share: toy jobs and stages, tiny models, stores in bad weather."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
"""The checkout."""
