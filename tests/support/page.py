"""Starts the operator's page as people do, and asks it as a browser does."""

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from typing import Any, Self

TOKEN = "a-token-that-nobody-guesses"  # noqa: S105 - a test's


class Answer:
    """An answer of the page."""

    def __init__(self, status: int, headers: Any, body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Page:
    """``phonon web`` in a process of its own, on a port that is free."""

    def __init__(self, url: str, namespace: str, *options: str) -> None:
        command = [sys.executable, "-m", "phonon", "web", "--url", url, "--namespace", namespace]
        self.popen = subprocess.Popen(
            [*command, "--port", "0", *options], stdout=subprocess.PIPE, text=True
        )
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        found = re.search(r"http://\S+", line)
        assert found, line
        self.url = found[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.popen.terminate()
        self.popen.wait(20)
        assert self.popen.stdout is not None
        self.popen.stdout.close()

    def ask(self, path: str, body: Any = None, **headers: str) -> Answer:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers)  # noqa: S310 - our own
        try:
            with urllib.request.urlopen(request, timeout=20) as reply:  # noqa: S310 - as above
                return Answer(reply.status, reply.headers, reply.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.headers, error.read())
