"""`python -m normkit` prints what `normkit.show_config()` prints."""

from argparse import ArgumentParser

from . import show_config

ArgumentParser("python -m normkit", description="Prints what normkit.show_config() prints.").parse_args()
show_config()
