"""How the journal's tables came to be what they are, one step a version; Alembic runs what is missing."""
