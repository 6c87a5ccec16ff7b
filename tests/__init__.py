"""The test suite; a package so that no other `tests` package can take its place."""
