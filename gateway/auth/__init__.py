"""Who may come in: tokens and origins."""
