"""`python slow_server.py FOLDER`: drawn JPEGs at 127.0.0.1:8000, as /7.jpg; odd ones wait for FOLDER/released.

For the cluster's own network, which a server of the test's process is no part of.
"""

import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import drawn_image

RELEASED = Path(sys.argv[1]) / "released"


class Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        number = int(Path(self.path).stem)
        while number % 2 and not RELEASED.exists():
            time.sleep(0.02)
        image = drawn_image(number)
        self.send_response(200)
        self.send_header("Content-Length", str(len(image)))
        self.end_headers()
        self.wfile.write(image)

    def log_message(self, *said: object) -> None:
        pass


ThreadingHTTPServer(("127.0.0.1", 8000), Answers).serve_forever()
