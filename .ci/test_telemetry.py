"""README's one variable turns traces on: a job of the running service arrives at a collector."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.conftest import StartService
from tests.sandbox import Sandbox
from tests.support.requests import short_video, speech_job

pytest.importorskip("fastapi.telemetry", reason="the installed FastAPI has no telemetry of its own")

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


class Collector(ThreadingHTTPServer):
    """Takes traces in, as a collector's OTLP port does."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Intake)
        self.spans: list[Span] = []
        self.came = threading.Event()

    @property
    def url(self) -> str:
        """What OTEL_EXPORTER_OTLP_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.server_port}"

    def take(self, body: bytes) -> None:
        """Keep the spans of one export."""
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]
        if any(span.kind == Span.SPAN_KIND_SERVER and "jobs" in span.name for span in self.spans):
            self.came.set()


class Intake(BaseHTTPRequestHandler):
    """One export."""

    server: Collector

    def do_POST(self) -> None:
        """Traces are kept; metrics and logs are taken in as well."""
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.path == "/v1/traces":
            self.server.take(body)
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Quiet."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    """A collector on a free port."""
    with Collector() as collector:
        thread = threading.Thread(target=collector.serve_forever)
        thread.start()
        yield collector
        collector.shutdown()
        thread.join()


def test_a_job_gives_a_trace(
    collector: Collector, sandbox: Sandbox, start_service: StartService
) -> None:
    """The job's span belongs to the caller's trace, names the route and its status, and holds no key."""
    sandbox.video(short_video())
    service = start_service(
        FASTAPI_OTEL_AUTO_CONFIGURE="true",
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
        OTEL_BSP_SCHEDULE_DELAY="100",  # milliseconds
    )
    headers = {"traceparent": f"00-{TRACE_ID}-00f067aa0ba902b7-01"}
    with httpx.Client(base_url=service.url, trust_env=False, timeout=30) as client:
        assert (
            client.post("/jobs_prompt_tts", json=speech_job(sandbox), headers=headers).status_code
            == 200
        )
    assert collector.came.wait(10), service.log
    [job] = [
        span
        for span in collector.spans
        if span.kind == Span.SPAN_KIND_SERVER and "jobs" in span.name
    ]
    attributes = {attribute.key: attribute.value for attribute in job.attributes}
    assert job.name == "POST /jobs_prompt_tts"
    assert job.trace_id.hex() == TRACE_ID
    assert attributes["http.route"].string_value == "/jobs_prompt_tts"
    assert attributes["http.response.status_code"].int_value == 200
    assert any(span.parent_span_id == job.span_id for span in collector.spans), (
        "what happened inside is traced as well"
    )
    for name in ("ELEVEN_API_KEY", "REPLICATE_API_TOKEN", "SUPABASE_SERVICE_ROLE"):
        assert sandbox.environment()[name] not in str(collector.spans)
