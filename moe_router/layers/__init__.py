"""Layers that process only the tokens routed to them. Start with `moe.py`."""
