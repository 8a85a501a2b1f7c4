"""The watchtower: re-executes committed jobs and convicts what is wrong."""
