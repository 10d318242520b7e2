"""check_package.py METADATA: what an index and conda would say of normkit, by its metadata."""

import re
import sys
from collections.abc import Iterator
from email.message import Message
from email.parser import Parser
from pathlib import Path

from pyroma.ratings import rate
from rattler_build import Stage0Recipe, VariantConfig

LINKED = {"nanobind-backend"}  # what the recipe has in the package itself
RECIPE = Path(__file__).parents[1] / "recipe/recipe.yaml"
# What conda-forge has recipes compiled with.
VARIANTS = {"c_stdlib": ["sysroot"], "c_stdlib_version": ["2.28"], "python": ["3.11.*", "3.12.*", "3.13.*"]}
# The project has no address yet, of the web or of mail: the rest has to be complete.
NOT_YET = ["AuthorEmail", "Url"]


def of_metadata(metadata: Message) -> Iterator[str]:
    fields = {name.lower(): metadata.get_all(name) or [] for name in metadata}
    page = metadata.get_payload()
    data = {name: values[0] if len(values) == 1 else values for name, values in fields.items()}
    rating, found = rate({**data, "description": page}, NOT_YET)
    if rating < 10:
        yield from (f"pyroma: {message}" for message in found)
    for link in re.findall(r"\]\(([^)\s]+)\)", str(page)):
        if not link.startswith("https://"):
            yield f"the page of an index has a link to {link}"


def of_recipe(metadata: Message) -> Iterator[str]:
    requirements = metadata.get_all("Requires-Dist") or []
    wanted = {re.split(r"[ <>=]", word)[0] for word in requirements if "extra ==" not in word} - LINKED
    rendered = Stage0Recipe.from_file(RECIPE).render(VariantConfig(VARIANTS))
    if len(rendered) != len(VARIANTS["python"]):
        yield f"{RECIPE.name} gives {len(rendered)} packages, expected one for each of {', '.join(VARIANTS['python'])}"
    for recipe in (variant.recipe.to_dict() for variant in rendered):
        version = recipe["package"]["version"]
        if version != metadata["Version"]:
            yield f"{RECIPE.name} has version {version}, expected {metadata['Version']}"
        run = {str(word).split()[0] for word in recipe["requirements"]["run"]} - {"python"}
        if run != wanted:
            yield f"{RECIPE.name} runs with {', '.join(sorted(run))}, expected {', '.join(sorted(wanted))}"


metadata = Parser().parsestr(Path(sys.argv[1]).read_text("utf-8"))
sys.exit("\n".join([*of_metadata(metadata), *of_recipe(metadata)]) or 0)
