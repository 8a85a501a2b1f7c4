"""The steps from each version of a watchtower's database to the next, run by Alembic when a store is opened."""
