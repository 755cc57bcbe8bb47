"""The HTML of a report: its frame and its parts. Text is escaped here, pictures come as markup."""

import base64
import hashlib
import html
from collections.abc import Sequence

# The policy keeps a browser from loading anything at all.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# Doubled braces: the text goes through str.format.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #24242a; background: #fff; }}
body {{ max-width: 1240px; margin: 2em auto; padding: 0 1.5em; }}
h1 {{ font-size: 1.7em; margin-bottom: 0.2em; }}
h2 {{ font-size: 1.25em; margin-top: 2em; border-bottom: 1px solid #ddd; padding-bottom: 0.2em; }}
h3 {{ font-size: 1.05em; margin-bottom: 0.4em; }}
table {{ border-collapse: collapse; margin: 0.5em 0; }}
th, td {{ text-align: left; padding: 0.25em 0.9em 0.25em 0; border-bottom: 1px solid #eee; vertical-align: top; }}
td:last-child {{ overflow-wrap: anywhere; }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(360px, 1fr)); gap: 1.2em; }}
.grid.wide {{ grid-template-columns: repeat(auto-fill, minmax(520px, 1fr)); }}
figure {{ margin: 0; }}
figure svg, figure img {{ max-width: 100%; height: auto; }}
figcaption {{ color: #66666e; font-size: 0.9em; }}
pre {{ background: #f6f6f8; padding: 0.8em; overflow-x: auto; font-size: 0.85em; }}
summary {{ cursor: pointer; color: #3a3a72; }}
</style>
</head>
<body>
<h1>{title}</h1>
{sections}
</body>
</html>
"""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts; a header of empty texts is left out."""
    head = "".join(f"<th>{html.escape(text)}</th>" for text in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<table>{f'<tr>{head}</tr>' if any(header) else ''}{body}</table>"


def figure(picture: str, caption: str) -> str:
    """A picture, given as markup, with its caption."""
    return f"<figure>{picture}<figcaption>{html.escape(caption)}</figcaption></figure>"


def details(summary: str, content: str) -> str:
    """Markup that is folded away."""
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


def scripted_page(title: str, sections: str, script: str) -> str:
    """A page of `sections`, markup, with one script, the only one that its policy lets run.

    Raises ValueError for a script that would end its own element.
    """
    if "</script" in script.lower():
        raise ValueError("the script holds </script, which would end it: write it in two parts")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode()
    head, rest = PAGE.format(title=html.escape(title), sections=sections).split(POLICY, 1)
    body, end = rest.rsplit("</body>", 1)
    return f"{head}{POLICY}; script-src 'sha256-{digest}'{body}<script>{script}</script>\n</body>{end}"
