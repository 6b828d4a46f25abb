"""Engines that answer from a record, over HTTP on this machine alone, in the exact formats that the real ones publish.

    /v1/completions, /v1/models   vLLM 0.33.0 vllm/entrypoints/openai/{completion,models}/protocol.py
                                  SGLang 0.5.23 srt/entrypoints/openai/protocol.py
    /metrics                      prometheus_client's text of vllm/v1/spec_decode/metrics.py and metrics/loggers.py
    /server_info                  SGLang 0.5.23 srt/entrypoints/http_server.py, the keys that a probe reads

What an engine counts is settled by the verify steps that it is given, so what a probe must read is known. Faults come
in the order they are given, one a request.
"""

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Steps = Mapping[str, Sequence[int]]
"""prompt -> accepted drafts of each verify step"""
BORN = 1.7e9
DROP, CUT, SLOW, GARBAGE, ABORT = "drop", "cut", "slow", "garbage", "abort"
NAP = 0.6
"""seconds of a slow answer"""


@dataclass
class Replayed:
    """What both engines have: models, completions, and the faults that are still to come."""

    steps: Steps
    num_draft_tokens: int
    model: str = "llama"
    faults: list[str | int] = field(default_factory=list)
    """of completions; a number is a status code"""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of a GET."""
        if path == "/v1/models":
            adapter = {"id": "adapter", "object": "model", "parent": self.model, "root": "adapter"}
            base = {"id": self.model, "object": "model", "parent": None, "root": f"models/{self.model}"}
            return 200, json.dumps({"object": "list", "data": [base, adapter]})
        return 404, json.dumps({"detail": "Not Found"})

    def complete(self, body: Mapping[str, Any], fault: str | int) -> dict[str, Any]:
        """The answer to one completion, which is counted whether or not it arrives."""
        prompt = body["prompt"] if isinstance(body["prompt"], str) else " ".join(map(str, body["prompt"]))
        accepted = tuple(self.steps[prompt])
        emitted = 1 + sum(a + 1 for a in accepted)
        with self.lock:
            self.note(accepted, emitted)
        choice = {"index": 0, "text": " text", "logprobs": None, "finish_reason": "length"}
        choice |= {"finish_reason": "abort"} if fault == ABORT else {}
        usage = {"prompt_tokens": 3, "total_tokens": 3 + emitted, "completion_tokens": emitted}
        answer = {"id": "cmpl-0", "object": "text_completion", "created": int(BORN), "model": self.model}
        return answer | {"choices": [choice], "usage": usage} | self.more(accepted, emitted, body)

    def note(self, accepted: Sequence[int], emitted: int) -> None:
        """Count an answer."""

    def more(self, accepted: Sequence[int], emitted: int, body: Mapping[str, Any]) -> dict[str, Any]:
        """What this engine adds to an answer."""
        return {}

    def error(self, status: int) -> dict[str, Any]:
        """The body beside a status code."""
        return {"error": {"message": "no room", "type": "ServiceUnavailable", "param": None, "code": status}}


@dataclass
class ReplayedVllm(Replayed):
    """Counters of two engines and of another model, which have counted before; they lag behind by `lag` looks."""

    speculates: bool = True
    detailed: bool = False
    lag: int = 1
    busy: int = 0
    foreign: int = 0
    """tokens that each answer generates for somebody else"""
    restarts: bool = False
    """after the first answer"""
    torn: bool = False
    """counters by position that contradict the others"""
    seen: list[tuple[tuple[int, ...], int]] = field(default_factory=list)
    looks: int = 0

    def note(self, accepted: Sequence[int], emitted: int) -> None:
        self.seen.append((tuple(accepted), emitted + self.foreign))
        self.looks = 0

    def more(self, accepted: Sequence[int], emitted: int, body: Mapping[str, Any]) -> dict[str, Any]:
        if not self.detailed:
            return {"metrics": None}
        counts = [list(accepted).count(a) for a in range(self.num_draft_tokens + 1)]
        told = {"acceptance_histogram": counts, "num_spec_steps": len(accepted), "num_spec_tokens": len(counts) - 1}
        told |= {"num_accepted_draft_tokens": sum(accepted), "num_draft_tokens": len(accepted) * (len(counts) - 1)}
        told |= {"mean_acceptance_length": 1 + sum(accepted) / max(1, len(accepted)), "draft_acceptance_rate": 0.0}
        return {"metrics": {"time_to_first_token_ms": 1.0, "speculative_decoding": told}}

    def get(self, path: str) -> tuple[int, str]:
        if path == "/version":
            return 200, json.dumps({"version": "0.33.0"})
        return (200, self.exposition()) if path == "/metrics" else super().get(path)

    def exposition(self) -> str:
        """The text of `/metrics`."""
        with self.lock:
            self.looks += 1
            seen = self.seen if self.looks > self.lag else self.seen[:-1]
            restarted = self.restarts and len(seen) > 0
            history, born = (0, BORN + 60) if restarted else (1000, BORN)
            steps = [a for accepted, _ in seen for a in accepted]
            generated = sum(emitted for _, emitted in seen)
        counts = {
            "vllm:spec_decode_num_drafts": (len(steps), "Number of spec decoding drafts."),
            "vllm:spec_decode_num_draft_tokens": (len(steps) * self.num_draft_tokens, "Number of draft tokens."),
            "vllm:spec_decode_num_accepted_tokens": (sum(steps), "Number of accepted tokens."),
        }
        if not self.speculates:
            counts = {}
        counts["vllm:generation_tokens"] = (generated, "Number of generation tokens processed.")
        lines = [self._gauge("vllm:num_requests_running", self.busy), self._gauge("vllm:num_requests_waiting", 0)]
        for name, (count, words) in counts.items():
            lines += self._counter(name, words, {"": count}, history, born)
        if self.speculates:
            reached = {str(i): sum(a > i for a in steps) + self.torn * len(steps) for i in range(self.num_draft_tokens)}
            name = "vllm:spec_decode_num_accepted_tokens_per_pos"
            lines += self._counter(name, "Accepted tokens per draft position.", reached, history, born)
        return "\n".join(lines) + "\n"

    def _gauge(self, name: str, value: int) -> str:
        head = f"# HELP {name} Number of requests.\n# TYPE {name} gauge\n"
        return head + f'{name}{{engine="0",model_name="{self.model}"}} {float(value)}'

    def _counter(self, name: str, words: str, counts: Mapping[str, int], history: int, born: float) -> list[str]:
        """Both halves of a counter: its total, and when it began."""
        lines = []
        for half, kind in (("total", "counter"), ("created", "gauge")):
            lines += [f"# HELP {name}_{half} {words}", f"# TYPE {name}_{half} {kind}"]
            for place, count in counts.items():
                label = f',position="{place}"' if place else ""
                # what was counted before stands with engine 1, which answered it
                for engine, model, value in (("0", self.model, count), ("1", self.model, history), ("0", "other", 7)):
                    told = float(value) if half == "total" else born
                    lines.append(f'{name}_{half}{{engine="{engine}",model_name="{model}"{label}}} {told!r}')
        return lines


@dataclass
class ReplayedSglang(Replayed):
    """Every answer with its own counts."""

    speculates: bool = True
    topk: int = 1
    num_nodes: int = 0
    """of a tree; a chain has one a draft and the root"""
    is_old: bool = False
    """a release that does not send counts, and knows only the older name of its information"""

    @property
    def nodes(self) -> int:
        return self.num_nodes or self.num_draft_tokens + 1

    def get(self, path: str) -> tuple[int, str]:
        if path != ("/get_server_info" if self.is_old else "/server_info"):
            return super().get(path)
        drafting = {"speculative_algorithm": "EAGLE3", "speculative_num_steps": self.num_draft_tokens}
        drafting |= {"speculative_eagle_topk": self.topk, "speculative_num_draft_tokens": self.nodes}
        info = {"model_path": self.model, **(drafting if self.speculates else dict.fromkeys(drafting))}
        states = [{"avg_spec_accept_length": 2.5, "last_gen_throughput": 100.0}]
        return 200, json.dumps({**info, "internal_states": states, "version": "0.5.23", "frontend": "python"})

    def more(self, accepted: Sequence[int], emitted: int, body: Mapping[str, Any]) -> dict[str, Any]:
        if self.is_old or not body.get("return_spec_tokens_details") or not accepted:
            return {"metadata": {"weight_version": "default"}}
        proposed = len(accepted) * (self.nodes - 1)
        told = {
            "spec_accept_rate": sum(accepted) / proposed,
            "spec_accept_length": emitted / len(accepted),
            "spec_cap_length": 0.0,
            "spec_block_accept_length": 0.0,
            "spec_num_correct_drafts": sum(accepted),
            "spec_num_proposed_drafts": proposed,
            "spec_verify_ct": len(accepted),
            "spec_correct_drafts_histogram": [list(accepted).count(a) for a in range(max(accepted) + 1)],
            "spec_cap_lens_histogram": [],
        }
        return {"metadata": {"weight_version": "default"}, "sglext": {"spec_tokens_details": told}}

    def error(self, status: int) -> dict[str, Any]:
        return {"object": "error", "message": "no room", "type": "ServiceUnavailable", "param": None, "code": status}


class _Handler(BaseHTTPRequestHandler):
    """Answers for one engine, with its faults."""

    engine: Replayed
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        status, text = self.engine.get(self.path)
        self._send(status, text.encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.engine.lock:
            fault = self.engine.faults.pop(0) if self.engine.faults else ""
        if isinstance(fault, int):
            self._send(fault, json.dumps(self.engine.error(fault)).encode())
            return
        whole = json.dumps(self.engine.complete(body, fault)).encode()
        if fault == SLOW:
            time.sleep(NAP)
        if fault != DROP:
            text = b"<html>" if fault == GARBAGE else whole
            self._send(200, text, len(text) // 2 if fault == CUT else len(text))
        self.close_connection = bool(fault)

    def _send(self, status: int, text: bytes, sent: int | None = None) -> None:
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text[:sent])
        except ConnectionError:
            self.close_connection = True  # whoever asked has stopped waiting


@contextmanager
def serve(engine: Replayed) -> Iterator[str]:
    """The URL at which it listens, on the loopback interface."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"engine": engine}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
