"""Every example in the README and in the docstrings runs."""

import doctest
import importlib
import inspect
import re
from pathlib import Path

import normkit
import pytest

ROOT = Path(__file__).parents[1]
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]
OPTIONAL = ("cupy", "torch", "jax", "dask", "xarray", "ml_dtypes", "matplotlib", "PIL")
DOCTEST = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
PACKAGE = Path(normkit.__file__).parent
MODULES = sorted(
    ".".join(("normkit", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
    if path.name != "__main__.py"
)


def blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)


def wants(block):
    return [library for library in OPTIONAL if re.search(rf"^\s*(import|from) {library}\b", block, re.M)]


def run(block, names, title):
    if ">>>" not in block:
        exec(compile(block, title, "exec"), names)
        return
    test = doctest.DocTestParser().get_doctest(block, names, title, None, None)
    runner = doctest.DocTestRunner(optionflags=DOCTEST)
    runner.run(test, clear_globs=False)
    assert runner.failures == 0
    names.update(test.globs)


@pytest.mark.parametrize(
    ("page", "number"),
    [pytest.param(page, k, id=f"{page.name}-{k}") for page in PAGES for k in range(len(blocks(page)))],
)
def test_page(page, number, tmp_path, monkeypatch):
    """A block runs after those before it, with their names; one that wants another library, where that is installed."""
    monkeypatch.chdir(tmp_path)
    *earlier, block = blocks(page)[: number + 1]
    for library in wants(block):
        pytest.importorskip(library, reason=f"the example wants {library}")
    if "cupy" in wants(block) and not normkit.cuda_available():
        pytest.skip("the example wants a GPU")
    names: dict = {"__name__": page.stem}
    for k, before in enumerate(earlier):
        if not wants(before):
            run(before, names, f"{page.name} block {k}")
    run(block, names, f"{page.name} block {number}")


@pytest.mark.parametrize("name", MODULES)
def test_docstrings(name):
    for library in ("torch", "jax", "dask"):
        if name.startswith(f"normkit.{library}") or name.endswith(f"._{library}"):
            pytest.importorskip(library, reason=f"{library} is not installed")
    module = importlib.import_module(name)
    found = doctest.testmod(module, optionflags=DOCTEST)
    assert found.failed == 0


@pytest.mark.parametrize("name", sorted(normkit.__all__))
def test_public_names_are_documented(name):
    member = getattr(normkit, name)
    if inspect.isroutine(member):
        assert inspect.getdoc(member)


@pytest.mark.parametrize("name", ["normkit", "normkit.torch", "normkit.jax"])
def test_public_names_are_in_the_reference(name):
    """All of them, and each has an example, which `test_docstrings` runs."""
    if name != "normkit":
        pytest.importorskip(name.removeprefix("normkit."))
    module = importlib.import_module(name)
    public = {member for member in module.__all__ if member != "__version__"}
    parts = (ROOT / "docs/api.md").read_text().split(".. currentmodule:: ")
    listed = [word for part in parts if part.split()[0] == name for word in re.findall(r"^   (\w+)$", part, re.M)]
    assert sorted(listed) == sorted(public)
    assert not [member for member in public if ">>>" not in inspect.getdoc(getattr(module, member))]
