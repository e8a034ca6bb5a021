"""Parts of self-contained HTML pages: text, tables, line charts and heat maps."""
