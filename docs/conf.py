"""Sphinx' configuration. Everything is local: no script, font or inventory is loaded from a network, unless DOCS_INTERSPHINX is set."""

import os
from xml.sax.saxutils import escape

from docutils import nodes
from latex2mathml.converter import convert
from lightning.pytorch import Callback
from lightning.pytorch.core.hooks import DataHooks
from sphinx.application import Sphinx

import etflight

project = "etflight"
author = copyright = "the authors of etflight"
version = release = etflight.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.intersphinx", "sphinx_copybutton"]
exclude_patterns = ["notebooks/models", "build", "notebooks/results", "notebooks/figures"]
myst_enable_extensions = ["dollarmath", "deflist", "colon_fence", "attrs_inline", "fieldlist"]
myst_heading_anchors = 4
nb_execution_mode = "off"
copybutton_exclude = ".linenos, .gp, .go"
copybutton_prompt_text = ">>> "

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_ivar = True
napoleon_custom_sections = ["Source"]
suppress_warnings = ["misc.highlighting_failure"]  # shell cells of notebooks
add_module_names = False

nitpicky = True
# The libraries below have documentation of their own, which is reached with DOCS_INTERSPHINX=1.
_others = (
    "torch|lightning|numpy|torchmetrics|matplotlib|PIL|collections|pathlib|typing|abc|functools|datetime|np|nn|optional"
)
_inner = (
    r"etflight\.(data\.(sources|files|unlabelled)|callbacks\.features|classifier)"  # types that only signatures name
)
nitpick_ignore_regex = [("py:.*", rf"({_others}|{_inner})(\..*)?")]
intersphinx_timeout = 10
intersphinx_mapping = (
    {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "lightning": ("https://lightning.ai/docs/pytorch/stable", None),
        "torchmetrics": ("https://lightning.ai/docs/torchmetrics/stable", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "matplotlib": ("https://matplotlib.org/stable", None),
    }
    if os.environ.get("DOCS_INTERSPHINX")
    else {}
)

html_theme = "furo"
html_title = "etflight"
html_static_path = ["_static"]
html_css_files = ["style.css"]
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}


def _inline_math(translator, node: nodes.math) -> None:
    _write_math(translator, node, "inline")


def _block_math(translator, node: nodes.math_block) -> None:
    _write_math(translator, node, "block")


def _write_math(translator, node, display: str) -> None:
    """Equations become MathML while the pages are built: browsers draw it themselves, with no script and no font of ours."""
    mathml = convert(node.astext(), display=display)
    label = escape(node.astext(), {'"': "&quot;"})
    mathml = mathml.replace("<math ", f'<math aria-label="{label}" ', 1)
    translator.body.append(mathml if display == "inline" else f'<div class="equation">{mathml}</div>')
    raise nodes.SkipNode


def _keep_together(app: Sphinx, name: str, source: list[str]) -> None:
    """A number and its deviation stay on one line of a table."""
    source[0] = source[0].replace(" ± ", "\u00a0±\u00a0")


def _whole_first_line(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Napoleon takes a property's words before a colon for a type: put them back."""
    if what == "property" and lines and lines[-1].startswith(":type: "):
        lines[0] = f"{lines.pop().removeprefix(':type: ')}: {lines[0]}"


def _leave_out_hooks(app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object) -> bool | None:
    """What the trainer calls, and nobody else, is not listed."""
    return True if hasattr(Callback, name) or hasattr(DataHooks, name) else None


def setup(app: Sphinx) -> None:
    """Register MathML as the writer of equations."""
    app.connect("autodoc-skip-member", _leave_out_hooks)
    app.connect("source-read", _keep_together)
    app.connect("autodoc-process-docstring", _whole_first_line, priority=900)
    app.add_html_math_renderer("mathml", (_inline_math, None), (_block_math, None))
    app.config.html_math_renderer = "mathml"
