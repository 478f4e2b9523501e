"""The site of these pages: ``make docs`` builds it into build/docs with Sphinx, whose warnings are errors."""

project = "GPT-2.5"
extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["conf.py"]
html_theme = "furo"
html_title = "GPT-2.5"
myst_heading_anchors = 3
highlight_language = "none"
html_show_copyright = False
