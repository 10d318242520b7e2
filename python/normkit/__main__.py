"""`python -m normkit` prints what `normkit.show_config()` prints."""

from . import show_config

show_config()
