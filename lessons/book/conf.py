"""The book: Sphinx makes pages of the notebooks as they are committed. Run by `make book`."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
about = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = html_title = about["name"]
author = about["authors"][0]["name"]
extensions = ["myst_nb"]
exclude_patterns = ["src", "book", "guard", "README.md"]
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_merge_streams = True

html_theme = "sphinx_book_theme"
html_theme_options = {"navbar_persistent": []}
html_static_path = [str(ROOT / "build/mathjax"), "book.css"]
html_css_files = ["book.css"]
html_show_copyright = html_show_sphinx = False
mathjax_path = "tex-svg.js"  # beside the pages, which so need no network
