"""Docstrings are as numpydoc wants them, and every public name has an example."""

import sys

import normkit
from numpydoc.validate import validate

NOT_WANTED = "SA01"  # a section of what to see also: where there is more to see, the text says so
errors = [
    f"{name}: {code} {message}"
    for name in normkit.__all__
    if name != "__version__"
    for code, message in validate(f"normkit.{name}")["errors"]
    if code != NOT_WANTED
]
sys.exit("\n".join(errors) or 0)
