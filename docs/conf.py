"""The pages of normkit: sphinx-build -W docs build-docs, from the root of the checkout, with the extra `docs`."""

import re
from collections.abc import Callable
from typing import Any

import normkit
from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

project, author, release = "normkit", "The normkit developers", normkit.__version__
extensions = ["myst_parser", "numpydoc", "sphinx.ext.autosummary", "sphinx_gallery.gen_gallery"]
exclude_patterns = ["**sg_execution_times.rst"]
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(torch|jax)\..*")]  # pages of others are not read
templates_path = ["_templates"]
highlight_language = "none"  # where a block does not say
default_role = "autolink"  # a link where a word in backquotes is a name, else only slanted

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

autodoc_inherit_docstrings = False
autodoc_typehints = "none"  # docstrings have them in words
numpydoc_show_class_members = False

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "filename_pattern": "$^",  # none is run: some take minutes, and their pictures are in the checkout
    "download_all_examples": False,
    "notebook_extensions": [],
    "show_signature": False,
}

html_theme = "pydata_sphinx_theme"
html_static_path = ["_static"]
html_css_files = ["normkit.css"]
html_show_sourcelink = html_copy_source = False
html_title = project
html_math_renderer = "mathml"
html_sidebars = {"*": []}  # only pages of the gallery and of the reference have neighbors to show
html_theme_options = {
    "show_prev_next": False,
    "header_links_before_dropdown": 7,
    "footer_end": [],
    "secondary_sidebar_items": {"*": ["page-toc"], "gallery/*": ["page-toc"], "generated/*": []},
}


def keep_formulas(_app: Sphinx, _what: str, _name: str, _of: Any, _options: Any, lines: list[str]) -> None:
    """What a docstring has indented before its first section is a formula, and stays as it is written."""
    end = next((k for k, line in enumerate(lines) if re.fullmatch("-+", line)), len(lines))
    lines[:end] = re.sub(r"(?m)^(\S.*)\n\n(?= )", r"\1\n\n::\n\n", "\n".join(lines[:end])).split("\n")


def lead_links(_app: Sphinx, _page: str, source: list[str]) -> None:
    """Links that leave this folder: to a page of the gallery, or plain words, as the repository has no address yet."""

    def led(found: re.Match[str]) -> str:
        words, path = found.groups()
        example = re.fullmatch(r"examples/(\w+)\.py", path)
        return f"[{words}](gallery/{example[1]}.rst)" if example else words

    source[0] = re.sub(r"\[([^\]]*)\]\(\.\./([^)]*)\)", led, source[0])


def as_mathml(block: bool) -> tuple[Callable[..., None], None]:
    """Formulas as browsers know them, without a script."""

    def visit(self: Any, node: nodes.Element) -> None:
        self.body.append(tex2mathml(node.astext(), as_block=block))
        raise nodes.SkipNode

    return visit, None


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", keep_formulas, priority=400)  # before numpydoc
    app.connect("source-read", lead_links)
    app.add_html_math_renderer("mathml", as_mathml(block=False), as_mathml(block=True))
