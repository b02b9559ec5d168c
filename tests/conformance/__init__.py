"""The Autobahn test suite's fuzzing client against the edge of a node. Run by ``make conformance``."""
