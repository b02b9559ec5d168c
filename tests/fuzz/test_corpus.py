"""Run the fuzz targets with all kept inputs, and with the input of each bug that was found."""

from __future__ import annotations

from twisted.trial.unittest import SynchronousTestCase

from tests.fuzz.targets import HERE, KINDS, TARGETS


class CorpusTest(SynchronousTestCase):
    def check(self, name: str) -> None:
        target = TARGETS[name]
        self.assertGreater(len(target.inputs), 20)
        for path in target.inputs:
            try:
                target.run(path.read_bytes())
            except Exception as e:
                raise AssertionError(f"python -m tests.fuzz {name} --again {path}: {e!r}") from e

    def test_frames(self) -> None:
        self.check("frames")

    def test_jsonrpc(self) -> None:
        self.check("jsonrpc")

    def test_opening(self) -> None:
        self.check("opening")

    def test_no_other_files(self) -> None:
        """An input in the wrong directory would never be run."""
        for kind in KINDS:
            for folder in (HERE / kind).iterdir():
                self.assertIn(folder.name, TARGETS)

    def test_corpus_is_small(self) -> None:
        for name in TARGETS:
            files = list((HERE / "corpus" / name).iterdir())
            self.assertLessEqual(len(files), 100, name)
            self.assertLessEqual(sum(path.stat().st_size for path in files), 100_000, name)
