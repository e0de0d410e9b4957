"""The app behind ``latentmill view``: output folders browsed on a local page."""
