"""The command line; no part of the package's API."""
