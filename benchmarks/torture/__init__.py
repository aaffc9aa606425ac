"""Torture: what is damaged, killed, interrupted or run twice at once is right, or refused clearly."""
