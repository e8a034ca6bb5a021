"""HTML out of text that nobody vouched for, and the page around it."""

import base64
import hashlib
import html
import pathlib
from collections.abc import Iterable, Sequence

_HERE = pathlib.Path(__file__).parent
STYLE = 'page.css'
SCRIPT = 'page.js'


def escape(value: object) -> str:
  """Any value as text in HTML or in a quoted attribute; what HTML cannot hold is shown as �."""
  text = ''.join(c if c >= ' ' or c in '\n\t' else '�' for c in str(value))
  # A lone surrogate, which JSON can carry, has no UTF-8.
  return html.escape(text.encode('utf-8', 'replace').decode('utf-8'), quote=True)


def table(
  headers: Sequence[str], rows: Iterable[Sequence[object]], caption: str = '', numeric: int = 0
) -> str:
  """A table that scrolls sideways where it does not fit.

  Args:
    headers: of the columns.
    rows: cells, escaped here.
    caption: above the table.
    numeric: how many columns at the end hold numbers, aligned to the right.
  """
  first = len(headers) - numeric

  def line(cells: Sequence[object], tag: str) -> str:
    parts = []
    for at, cell in enumerate(cells):
      name = 'th scope="row"' if tag == 'td' and at == 0 else tag
      kind = ' class="number"' if at >= first else ''
      close = name.split()[0]
      parts.append(f'<{name}{kind}>{escape(cell)}</{close}>')
    return f'<tr>{"".join(parts)}</tr>'

  title = f'<caption>{escape(caption)}</caption>' if caption else ''
  body = '\n'.join(line(row, 'td') for row in rows)
  head = line(headers, 'th').replace('<th', '<th scope="col"')
  # Whatever scrolls can be reached with the keyboard.
  return (
    '<div class="scroll" tabindex="0" role="region" '
    f'aria-label="{escape(caption or headers[0])}"><table>{title}'
    f'<thead>{head}</thead><tbody>\n{body}\n</tbody></table></div>'
  )


def section(name: str, title: str, *parts: str) -> str:
  """A part of the page that the contents link to.

  Args:
    name: of the anchor.
    title: heading, escaped here.
    parts: HTML.
  """
  body = '\n'.join(part for part in parts if part)
  return (
    f'<section id="{name}" aria-labelledby="{name}-title">\n'
    f'<h2 id="{name}-title">{escape(title)}</h2>\n{body}\n</section>'
  )


def paragraph(text: str, kind: str = '') -> str:
  """A paragraph of plain text."""
  return f'<p{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>{escape(text)}</p>'


def code(text: str, label: str) -> str:
  """A block of source text."""
  return f'<pre tabindex="0" aria-label="{escape(label)}"><code>{escape(text)}</code></pre>'


def tiles(figures: Iterable[tuple[str, str, str]]) -> str:
  """A row of large numbers: (what, number, remark)."""
  parts = [
    f'<div class="tile"><dt>{escape(what)}</dt><dd>{escape(number)}'
    f'<small>{escape(remark)}</small></dd></div>'
    for what, number, remark in figures
  ]
  return f'<dl class="tiles">{"".join(parts)}</dl>'


def document(title: str, lead: str, sections: Sequence[tuple[str, str, str]]) -> str:
  """A whole page that loads nothing: its policy forbids the network and any other script.

  Args:
    title: of the page.
    lead: HTML under the title.
    sections: (anchor, title, HTML as `section` gives it).
  """
  style = (_HERE / STYLE).read_text(encoding='utf-8')
  script = (_HERE / SCRIPT).read_text(encoding='utf-8')
  digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
  policy = (
    f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
  )
  contents = ''.join(f'<a href="#{name}">{escape(label)}</a>' for name, label, _ in sections)
  body = '\n'.join(part for _, _, part in sections)
  return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
{lead}
</header>
<nav aria-label="Contents">{contents}</nav>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""
