"""Settings of the API pages: ``sphinx-build -W .ci/docs outputs/api``."""

from typing import Any

from sphinx.application import Sphinx

from tgmm_nn import __version__

project, release = "tgmm_nn", __version__
extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
html_theme = "alabaster"
html_show_copyright = False
html_theme_options = {"page_width": "1200px", "sidebar_width": "200px"}

autodoc_default_options = {"members": True, "show-inheritance": True, "inherited-members": True}
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_ivar = False  # as instance variables, names with a trailing underscore would lose it
default_role = "py:obj"  # `fit` in a docstring is a link where there is a page


def leave_out(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what every module, metric or callback can do, and a NamedTuple's fields, which its docstring lists.

    Returns:
        True to leave a member out, None to let autodoc decide.
    """
    obj = getattr(obj, "fget", obj) or obj
    field = (getattr(obj, "__doc__", None) or "").startswith("Alias for field number")
    elsewhere = not (getattr(obj, "__module__", None) or "tgmm_nn").startswith("tgmm_nn")
    return True if field or elsewhere or not hasattr(obj, "__module__") else None


def index_properties_once(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Take a property that a class's docstring lists as an attribute out of the index: it has an entry of its own."""
    for number, line in reversed(list(enumerate(lines))):
        directive, _, attribute = line.partition(":: ")
        if directive == ".. attribute" and isinstance(getattr(obj, attribute, None), property):
            lines.insert(number + 1, "   :no-index:")


def setup(app: Sphinx) -> None:
    """Register what happens to members and docstrings, after napoleon has read these."""
    app.connect("autodoc-skip-member", leave_out)
    app.connect("autodoc-process-docstring", index_properties_once, priority=900)
