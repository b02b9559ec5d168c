from __future__ import annotations

import base64
import shutil
import subprocess
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from gateway.cloud import rfc2136
from gateway.cloud.rfc2136 import KeyFileError, TsigKey, parse_key

GOOD = 'key "wsgateway" {\n\talgorithm hmac-sha256;\n\tsecret "c2VjcmV0";\n};\n'

labels = st.text(alphabet="abcdefghijklmnopqrstuvwxyz0123456789_-", min_size=1, max_size=20)
names = st.lists(labels, min_size=1, max_size=4).map(".".join)
#: what may stand between two words
blanks = st.sampled_from([" ", "\n", "\t", " # a comment\n", "// another {\n", "/* one\n more */", "\r\n"])


class ParseTests(SynchronousTestCase):
    def refused(self, text: str) -> str:
        return str(self.assertRaises(KeyFileError, parse_key, text))

    def test_as_tsig_keygen_writes_it(self) -> None:
        self.assertEqual(parse_key(GOOD), TsigKey("wsgateway", "hmac-sha256", b"secret"))

    def test_what_tsig_keygen_writes(self) -> None:
        program = shutil.which("tsig-keygen", path="/usr/sbin:/usr/bin:/usr/local/sbin:/usr/local/bin")
        for algorithm in sorted(rfc2136.KEY_ALGORITHMS):
            written = subprocess.run([program, "-a", algorithm, "gw.example.com"], capture_output=True, check=True)
            key = parse_key(written.stdout.decode())
            self.assertEqual((key.name, key.algorithm), ("gw.example.com", algorithm))
            self.assertGreaterEqual(len(key.secret), 16)

    def test_the_other_way_round_and_without_quotation_marks(self) -> None:
        self.assertEqual(
            parse_key("key Gw. { secret c2VjcmV0; algorithm HMAC-SHA512; };"), TsigKey("gw", "hmac-sha512", b"secret")
        )

    def test_what_is_wrong_is_named(self) -> None:
        for text, said in (
            ("", "not one key"),
            (GOOD + GOOD, "not one key"),
            (GOOD.replace("};", "}"), "not one key"),
            (GOOD.replace("algorithm", "secret"), "not one key"),
            (GOOD.replace("key ", "zone "), "not one key"),
            (GOOD.replace("wsgateway", "a..b"), "no domain name"),
            (GOOD.replace("wsgateway", "a" * 64), "no domain name"),
            (GOOD.replace("wsgateway", ""), "no domain name"),
            (GOOD.replace("sha256", "sha3"), "the algorithm of its key is none of hmac-md5, hmac-sha1"),
            (GOOD.replace("c2VjcmV0", "c2VjcmV"), "no base64"),
            (GOOD.replace("c2VjcmV0", "c2Vj cmV0"), "no base64"),
            (GOOD.replace("c2VjcmV0", ""), "is empty"),
            (GOOD.replace("};", "/* };"), "line 4 has something"),
            (GOOD.replace("hmac", "$mac"), "line 2 has something"),
            (GOOD.replace('c2VjcmV0"', "c2VjcmV0"), "line 3 has something"),
        ):
            self.assertIn(said, self.refused(text), text)

    def test_the_secret_is_never_shown(self) -> None:
        self.assertNotIn("secret'", repr(parse_key(GOOD)))
        self.assertNotIn("c2VjcmV0", self.refused(GOOD.replace("sha256", "sha3")))

    @given(
        names,
        st.sampled_from(sorted(rfc2136.KEY_ALGORITHMS)),
        st.binary(min_size=1, max_size=64),
        st.lists(blanks, min_size=11, max_size=11),
    )
    def test_any_key_with_anything_between_its_words(
        self, name: str, algorithm: str, secret: bytes, between: list[str]
    ) -> None:
        words = [
            "key",
            f'"{name}"',
            "{",
            "algorithm",
            algorithm,
            ";",
            "secret",
            f'"{base64.b64encode(secret).decode()}"',
        ]
        text = "".join(blank + word for blank, word in zip(between, [*words, " ;", "}", ";"], strict=True))
        self.assertEqual(parse_key(text), TsigKey(name, algorithm, secret))

    @given(st.text() | st.text(alphabet='key{};"#/* \nalgorithmsecret-'))
    def test_any_text_is_read_or_refused(self, text: str) -> None:
        try:
            parse_key(text)
        except KeyFileError as e:
            self.assertTrue(str(e).isprintable())

    @given(st.data())
    def test_a_key_of_which_a_part_is_missing_is_refused(self, data: st.DataObject) -> None:
        words = GOOD.split()
        words.pop(data.draw(st.integers(0, len(words) - 1)))
        self.refused(" ".join(words))


class ReadTests(SynchronousTestCase):
    def refused(self, content: bytes) -> str:
        path = Path(self.mktemp())
        path.write_bytes(content)
        error = str(self.assertRaises(KeyFileError, rfc2136.read_key_file, str(path)))
        self.assertTrue(error.startswith(str(path)))
        return error

    def test_a_file(self) -> None:
        path = Path(self.mktemp())
        path.write_text(GOOD)
        self.assertEqual(rfc2136.read_key_file(str(path)).name, "wsgateway")

    def test_a_file_that_cannot_be_read(self) -> None:
        for path, said in (("/no/such/file", "No such file or directory"), ("/", "Is a directory"), ("a\0b", "null")):
            self.assertIn(
                f"cannot be read: {said}",
                str(self.assertRaises(KeyFileError, rfc2136.read_key_file, path)).replace("embedded ", ""),
            )

    def test_a_file_that_is_none(self) -> None:
        self.assertIn("no ASCII", self.refused(b"\xff"))
        self.assertIn("has more than 65536 bytes", self.refused(b" " * 65537))
        self.assertIn('write key "NAME" {', self.refused(b"nonsense"))
