"""What is installed is what the sources say, and the page that an index shows has no link that leads nowhere."""

import importlib.metadata
import re
import sys
from pathlib import Path

import normkit
import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (ROOT / "CMakeLists.txt").exists(), reason="no sources beside the tests")

PAGE = """A [link](docs/page.md#part), [one of the web](https://example.org/a), `code[0](x)`.

![a picture](docs/bars.png)

![one of the web](https://example.org/b.png)
"""
WITHOUT_ADDRESS = """A link, [one of the web](https://example.org/a), `code[0](x)`.

![one of the web](https://example.org/b.png)
"""


@pytest.fixture
def package_metadata(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "python")
    yield __import__("package_metadata")
    del sys.modules["package_metadata"]


def test_one_version(package_metadata):
    assert normkit.__version__ == importlib.metadata.version("normkit") == package_metadata.version()


def test_page_without_an_address(package_metadata):
    assert package_metadata.index_page(PAGE, None) == WITHOUT_ADDRESS


def test_page_with_an_address(package_metadata):
    page = package_metadata.index_page(PAGE, "https://example.org/normkit")
    assert re.findall(r"\]\(([^)]*)\)", page) == [
        "https://example.org/normkit/blob/HEAD/docs/page.md#part",
        "https://example.org/a",
        "x",
        "https://example.org/normkit/raw/HEAD/docs/bars.png",
        "https://example.org/b.png",
    ]
