"""How a server's database comes to the newest tables (Alembic); run when it is opened, never by hand.

One file in `versions` for each change; a released one is never edited. `tables.py` is what they end with.
"""

__all__: list[str] = []
