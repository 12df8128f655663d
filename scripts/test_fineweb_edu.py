"""Tests of fineweb_edu.sh against a server of this machine; skipped where curl is missing.

    python3 scripts/test_fineweb_edu.py        (python3 -m unittest discover -s scripts runs the tests of all scripts)
"""

from __future__ import annotations

import hashlib
import http.server
import shutil
import struct
import subprocess
import threading
import unittest
from pathlib import Path

from testing import HERE, InFolder


class ShardServer(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, with ranges, and with the header that names their SHA-256 where `says_checksum`."""

    folder: Path
    says_checksum = True
    requests: list[str] = []

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            return self.send_error(404)
        data, first = path.read_bytes(), 0
        if self.headers["Range"]:
            first = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        self.requests.append(f"{self.command} {path.name} {first}")
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
        if self.says_checksum:
            self.send_header("X-Linked-ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[first:])

    def log_message(self, *_: object) -> None:
        pass


@unittest.skipUnless(shutil.which("curl"), "curl is missing")
class FinewebEdu(InFolder):
    def setUp(self) -> None:
        super().setUp()
        (self.folder / "server").mkdir()
        self.names = ["edu_fineweb_val_000000.bin"] + [f"edu_fineweb_train_{i:06d}.bin" for i in (1, 2)]
        for name in self.names:
            data = struct.pack("<256i", 20240520, 1, 3000, *[0] * 253) + name.encode()[:20] * 300
            (self.folder / "server" / name).write_bytes(data)
        self.handler = type("Handler", (ShardServer,), {"folder": self.folder / "server", "requests": []})
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self.handler)
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{server.server_port}"

    def fetch(self, *arguments: object) -> subprocess.CompletedProcess:
        words = ["bash", HERE / "fineweb_edu.sh", "-o", self.folder / "out", "-n", 2, "-u", self.url, *arguments]
        return subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=60)

    def assert_fetched(self) -> None:
        self.assertEqual(sorted(p.name for p in (self.folder / "out").iterdir()), sorted(self.names))
        for name in self.names:
            self.assertEqual((self.folder / "out" / name).read_bytes(), (self.folder / "server" / name).read_bytes())

    def test_fetches_resumes_and_checks(self) -> None:
        (self.folder / "out").mkdir()
        half = (self.folder / "server" / self.names[1]).read_bytes()[:2000]
        (self.folder / "out" / f"{self.names[1]}.part").write_bytes(half)
        done = self.fetch()
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assert_fetched()
        self.assertIn(f"GET {self.names[1]} 2000", self.handler.requests)
        self.handler.requests.clear()
        self.assertEqual(self.fetch().returncode, 0)
        self.assertFalse([r for r in self.handler.requests if r.startswith("GET")])

    def test_checksums_from_a_file(self) -> None:
        self.handler.says_checksum = False
        self.assert_one_line_error(self.fetch(), "no SHA256SUMS")
        sums = [hashlib.sha256((self.folder / "server" / n).read_bytes()).hexdigest() + f"  {n}\n" for n in self.names]
        (self.folder / "server" / "SHA256SUMS").write_text("".join(sums[:2]))
        self.assert_one_line_error(self.fetch(), "has no SHA-256 of edu_fineweb_train_000002.bin")
        (self.folder / "server" / "SHA256SUMS").write_text("".join(sums))
        self.assertEqual(self.fetch().returncode, 0)
        self.assert_fetched()

    def test_damage_is_seen(self) -> None:
        (self.folder / "out").mkdir()
        (self.folder / "out" / f"{self.names[0]}.part").write_bytes(b"x" * 100)
        self.assert_one_line_error(self.fetch(), self.names[0], "SHA-256")
        self.assertEqual(self.fetch().returncode, 0)
        self.assert_fetched()
        (self.folder / "out" / self.names[2]).write_bytes(b"y")
        self.assert_one_line_error(self.fetch(), self.names[2], "delete it")

    def test_errors(self) -> None:
        self.assert_one_line_error(self.fetch("-n", "0"), "-n '0'")
        self.assert_one_line_error(self.fetch("-n", "x"), "-n 'x'")
        self.assert_one_line_error(self.fetch("-q"), "unknown option -q")
        self.assert_one_line_error(self.fetch("more"), "unexpected argument 'more'")
        self.assertIn("-u URL", self.fetch("-h").stdout)
        (self.folder / "server" / self.names[2]).unlink()
        self.assert_one_line_error(self.fetch(), self.names[2])


if __name__ == "__main__":
    unittest.main()
