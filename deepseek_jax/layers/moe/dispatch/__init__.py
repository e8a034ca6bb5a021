"""How tokens reach their experts: one file a kind."""
