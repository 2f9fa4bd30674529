"""The running service keeps its own contract: schemathesis asks whatever the document allows, and what it forbids."""

import urllib.parse
from typing import Any

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS

import main
from tests.sandbox import Sandbox, Service
from tests.support.requests import short_video

UNFIT_CHECKS = (
    "not_a_server_error",  # 500 is a stated answer; judged below
    "positive_data_acceptance",  # only the model asked for knows which seconds and sizes it takes
)


schema = schemathesis.openapi.from_dict(main.app.openapi())


def stay_inside(case: Any, sandbox: Sandbox) -> None:
    """Lead every URL that may be fetched to the sandbox: nobody else is to be asked."""
    sandbox.video(short_video())  # so that nobody looks for the picture
    body = case.body
    if case.path == "/debug/head" and isinstance(body, dict) and str(body.get("url", "")).startswith("http"):
        body["url"] = f"{sandbox.url}/{urllib.parse.quote(body['url'], safe='')}"


def check(case: Any, service: Service, sandbox: Sandbox, accept: str) -> None:
    """One request: status, content type, headers and body of its answer are as stated, and it is no failure of ours."""
    stay_inside(case, sandbox)
    response = case.call(base_url=service.url, headers={"Accept": accept})
    checks = [check for check in CHECKS.get_all() if check.__name__ not in UNFIT_CHECKS]
    case.validate_response(response, checks=checks)
    assert response.status_code < 500, response.text


limits = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@schema.parametrize()
@limits
def test_no_answer_lies_outside_of_the_contract(case: Any, running_service: Service, running_sandbox: Sandbox) -> None:
    """Whatever is asked, the answer is one that the document states."""
    check(case, running_service, running_sandbox, "application/json")


@schema.parametrize()
@limits
def test_no_event_stream_lies_outside_of_the_contract(
    case: Any, running_service: Service, running_sandbox: Sandbox
) -> None:
    """So it is for those who ask for events."""
    check(case, running_service, running_sandbox, "text/event-stream")
