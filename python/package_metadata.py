"""What pyproject.toml leaves to this script: the version, dependencies, and the README as an index shows it."""

import os
import re
import sysconfig
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Code, which stays as it is, or an image or a link whose address is none of the web.
RELATIVE = re.compile(
    r"```.*?```|`[^`\n]*`|(?P<image>!?)\[(?P<words>[^\]]*)\]\((?!https?:)(?P<path>[^)\s]+)\)(?P<lines>\n*)", re.DOTALL
)


def version() -> str:
    """The one that CMakeLists.txt gives the project."""
    found = re.search(r"^project\(normkit VERSION ([\d.]+)", (ROOT / "CMakeLists.txt").read_text("utf-8"), re.MULTILINE)
    assert found, "CMakeLists.txt has no project(normkit VERSION ...)"
    return found[1]


def dependencies() -> list[str]:
    """NumPy, and what has nanobind where that is not linked in, which pyproject.toml decides by the same conditions."""
    linked = os.environ.get("NORMKIT_LINKED") == "1" or sysconfig.get_config_var("Py_GIL_DISABLED")
    return ["numpy>=2.0", *([] if linked else ["nanobind-backend>=1.0"])]


def index_page(text: str, repository: str | None) -> str:
    """Markdown whose links into the repository are whole addresses; without an address, their words, and no images."""

    def replaced(found: re.Match[str]) -> str:
        image, words, path, lines = found.group("image", "words", "path", "lines")
        if path is None:
            return found[0]
        if repository is None:
            return "" if image else words + lines
        return f"{image}[{words}]({repository}/{'raw' if image else 'blob'}/HEAD/{path}){lines}"

    return RELATIVE.sub(replaced, text)


def dynamic_metadata(_settings: Mapping[str, object], project: Mapping[str, dict[str, str]]) -> dict[str, object]:
    """The hook that scikit-build-core calls, with the table `project` of pyproject.toml."""
    page = index_page((ROOT / "README.md").read_text("utf-8"), project.get("urls", {}).get("Repository"))
    readme = {"content-type": "text/markdown", "text": page}
    return {"version": version(), "dependencies": dependencies(), "readme": readme}


def dynamic_wheel(_settings: Mapping[str, object]) -> dict[str, bool]:
    """The fields that a wheel may have other than the sdist it was made of."""
    return {"dependencies": True}
