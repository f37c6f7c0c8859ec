"""A stand-in for the vendor's package, for tests on machines without it."""

IS_STANDIN = True
