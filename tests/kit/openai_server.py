"""An OpenAI-compatible endpoint of known speed, which counts what it is asked."""

import http.server
import json
import threading
import time
from contextlib import contextmanager


class OpenAIServer(http.server.ThreadingHTTPServer):
    """`first`, `each`: seconds until the first token and between tokens. `fails(n)`: whether
    request number n is answered with 500. `most`: requests that were in flight at once."""

    daemon_threads, request_queue_size = True, 64

    def __init__(self, first, each, token="", fails=lambda n: False):
        self.first, self.each, self.token, self.fails = first, each, token, fails
        self.asked, self.running, self.most, self.lock = 0, 0, 0, threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *what):
        """Says nothing."""

    def reply(self, status, body):
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if server.token and self.headers.get("authorization") != f"Bearer {server.token}":
            return self.reply(401, {"error": "wrong token"})
        if not body.get("stream"):
            return self.reply(200, {"model": "known-speed", "choices": [{"text": " x"}]})
        with server.lock:
            server.asked, server.running = server.asked + 1, server.running + 1
            server.most, number = max(server.most, server.running), server.asked
        try:
            if server.fails(number):
                return self.reply(500, {"error": "out of memory"})
            self.stream(body["max_tokens"])
        finally:
            with server.lock:
                server.running -= 1

    def stream(self, tokens):
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("connection", "close")
        self.end_headers()
        for i in range(tokens):
            time.sleep(self.server.each if i else self.server.first)
            usage = {"prompt_tokens": 5, "completion_tokens": i + 1, "total_tokens": i + 6}
            event = {
                "model": "known-speed",
                "choices": [{"index": 0, "text": " x"}],
                "usage": usage,
            }
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
            self.wfile.flush()
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True


@contextmanager
def openai_server(*args, **kwargs):
    server = OpenAIServer(*args, **kwargs)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
