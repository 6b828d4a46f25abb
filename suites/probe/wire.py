"""One HTTP server and the ways in which it fails: slow, gone, busy, cut short in the middle of an answer.

Every request has one deadline for all of its bytes, and bodies are bounded. What may pass by itself is `Passing`, and
`again` tries it anew with growing pauses; what cannot is told at once.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any, TypeVar
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import ProxyHandler, Request, build_opener

from suites.commands.desk import UsageFault

Result = TypeVar("Result")

PASSING = (408, 409, 425, 429, 500, 502, 503, 504)
"""status codes that another try may not see"""
LARGEST = 64 * 2**20
"""bytes of an answer that are read"""
LONGEST_PAUSE = 30.0
"""seconds between two tries"""

# an engine is asked directly: a proxy of the environment would answer in its place
_OPENER = build_opener(ProxyHandler({}))


class EngineGone(OSError):
    """An engine that does not answer, any more or at all: nothing can be concluded."""


class BadAnswer(UsageFault):
    """An answer that is not in the format its engine publishes, or a request that the engine refuses."""


class Passing(Exception):
    """One try that failed in a way that may pass."""

    def __init__(self, text: str, pause: float = 0.0) -> None:
        super().__init__(text)
        self.pause = pause
        """seconds that the server asks to wait"""


@dataclass(frozen=True)
class Wire:
    """Where an engine listens, and how patiently it is asked."""

    url: str
    timeout: float = 60.0
    """seconds for all of one answer"""
    retries: int = 3
    pause: float = 0.5
    """seconds before the second try; doubled for each one after it"""
    key: str = ""
    """sent as a bearer token where it is not empty"""

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageFault(f"--url is {self.url!r}; an engine listens at http://HOST:PORT")
        if not (0 < self.timeout < float("inf") and self.retries >= 0 and self.pause >= 0):
            raise UsageFault("a time-out is above zero and finite, retries and pauses are not below zero")

    def again(self, work: Callable[[], Result]) -> Result:
        """Do the work until it does not pass over; errors: EngineGone after the last try, and what `work` raises."""
        for number in range(self.retries + 1):
            try:
                return work()
            except Passing as error:
                if number == self.retries:
                    raise EngineGone(f"{self.url}: {error}; tried {number + 1} times") from error
                time.sleep(min(max(error.pause, self.pause * 2**number), LONGEST_PAUSE))
        raise AssertionError("a range of at least one try")

    def json(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One try at an answer that is a JSON object; errors: Passing, BadAnswer."""
        text = self.text(path, body)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise BadAnswer(f"{self.url}{path}: is no JSON ({error}): {text[:80]!r}") from error
        if not isinstance(value, dict):
            raise BadAnswer(f"{self.url}{path}: a JSON {type(value).__name__}, an object is expected")
        return value

    def text(self, path: str, body: dict[str, Any] | None = None) -> str:
        """One try at an answer, GET without a body and POST with one; errors: Passing, BadAnswer."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url.rstrip("/") + path, data, headers)
        until = time.monotonic() + self.timeout
        try:
            with _OPENER.open(request, timeout=self.timeout) as answer:
                return _whole(answer, until).decode("utf-8", "replace")
        except HTTPError as error:
            with error:
                raise _refusal(path, error) from error
        except (OSError, HTTPException) as error:
            raise Passing(f"{path}: {error or type(error).__name__}") from error


def _whole(answer: HTTPResponse, until: float) -> bytes:
    """Every byte that was promised; errors: TimeoutError, Passing where it was cut."""
    parts, held = [], 0
    while part := answer.read1(2**16):
        held += len(part)
        if held > LARGEST:
            raise BadAnswer(f"{answer.url}: more than {LARGEST} bytes")
        if time.monotonic() > until:
            raise TimeoutError("timed out in the middle of an answer")
        parts.append(part)
    if answer.length:
        raise Passing(f"{answer.url}: cut short, {answer.length} bytes of {held + answer.length} never came")
    return b"".join(parts)


def _refusal(path: str, error: HTTPError) -> Exception:
    """What a status code above 399 means; the engine's own words where it gives them."""
    try:
        said = json.loads(error.read(2**16))
        # vLLM nests what SGLang says at the top
        words = str((said.get("error") or said).get("message", ""))
    except (ValueError, AttributeError, OSError, HTTPException):
        words = ""
    text = f"{path}: {error.code} {words or error.reason}"
    if error.code not in PASSING:
        return BadAnswer(f"{error.url}: {error.code} {words or error.reason}")
    asked = error.headers.get("Retry-After", "")
    return Passing(text, float(asked) if asked.isdecimal() else 0.0)
