"""The part of vLLM's HTTP interface that TRL uses, as vLLM 0.22 documents it, over a model that transformers runs.

Weights come through a queue in place of NCCL: `WeightQueue` stands for vLLM's class on the trainer's side.
"""

import json
import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from transformers import AutoModelForCausalLM

INFO: dict[str, Any] = {
    "model_config": {"logprobs_mode": "processed_logprobs"},
    "weight_transfer_config": {"backend": "nccl"},
}


class WeightQueue:
    """What the trainer calls to send weights: `NCCLWeightTransferEngine` of vLLM before 0.28."""

    tensors: "queue.Queue[tuple[str, torch.Tensor]]" = queue.Queue()

    @classmethod
    def trainer_send_weights(cls, iterator: Iterator[tuple[str, torch.Tensor]], trainer_args: Any) -> None:
        for name, tensor in iterator:
            cls.tensors.put((name, tensor.detach().clone()))


class VllmServer:
    """A server on a free port of 127.0.0.1, and the requests that it got, by path."""

    def __init__(self, folder: Path, info: dict[str, Any] | None) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.info = info
        self.requests: list[tuple[str, Any]] = []
        self.lock = threading.Lock()
        self.generator = torch.Generator().manual_seed(1)
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), self._make_handler())
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"

    def sent(self, path: str) -> list[Any]:
        """Return the bodies that were sent to a path."""
        return [body for to, body in self.requests if to == path]

    def _make_handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._reply(None)

            def do_POST(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                self._reply(json.loads(self.rfile.read(length) or b"{}"))

            def _reply(self, body: Any) -> None:
                path = urlsplit(self.path).path
                with server.lock:
                    server.requests.append((path, body))
                    answer = server.answer(path, body)
                content = json.dumps(answer if answer is not None else {"detail": "Not Found"}).encode()
                self.send_response(200 if answer is not None else 404)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        return Handler

    def answer(self, path: str, body: Any) -> Any:
        match path:
            case "/health" | "/start_weight_update" | "/finish_weight_update" | "/reset_prefix_cache":
                return {}
            case "/v1/models":
                return {"data": [{"id": "small"}]}
            case "/server_info":
                return None if self.info is None else {"vllm_config": self.info}
            case "/update_weights":
                return self._take_weights(body["update_info"])
            case "/v1/completions":
                return {
                    "choices": [self._complete(prompt, body) for prompt in body["prompt"] for _ in range(body["n"])]
                }
        return None

    def _take_weights(self, announced: dict[str, Any]) -> dict[str, Any]:
        weights = dict(self.model.named_parameters())
        for name, dtype, shape in zip(announced["names"], announced["dtype_names"], announced["shapes"], strict=True):
            found, tensor = WeightQueue.tensors.get(timeout=30)
            assert (found, str(tensor.dtype), list(tensor.shape)) == (name, f"torch.{dtype}", shape)
            weights[name].data.copy_(tensor)
        return {}

    @torch.no_grad()
    def _complete(self, prompt: list[int], body: dict[str, Any]) -> dict[str, Any]:
        ids, found = list(prompt), []
        while len(ids) < len(prompt) + body["max_tokens"]:
            logits = self.model(torch.tensor([ids])).logits[0, -1]
            if body["temperature"] == 0:
                token, chances = int(logits.argmax()), logits.log_softmax(-1)
            else:
                chances = (logits / body["temperature"]).log_softmax(-1)
                token = int(torch.multinomial(chances.exp(), 1, generator=self.generator))
            ids.append(token)
            found.append(float(chances[token]))
            if token in body["stop_token_ids"]:
                break
        answer = ids[len(prompt) :]
        names = [f"token_id:{token}" for token in answer]
        return {
            "prompt_token_ids": prompt,
            "token_ids": answer,
            "logprobs": {"tokens": names, "token_logprobs": found, "top_logprobs": [None] * len(names)},
        }


@contextmanager
def serving(folder: Path, info: dict[str, Any] | None = INFO) -> Iterator[VllmServer]:
    """Serve the model in `folder`; `info` is what `/server_info` says, None where that is not served."""
    server = VllmServer(folder, info)
    thread = threading.Thread(target=server.http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
