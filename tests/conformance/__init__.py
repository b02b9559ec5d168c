"""The Autobahn test suite's fuzzing client against the client endpoint of a node. Run by ``make conformance``."""
