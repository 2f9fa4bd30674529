"""Some hundred interleavings of instances, storage and providers: `python -m tests.interleavings` is the longer proof."""

from __future__ import annotations

import pytest

from tests import interleavings
from tests.interleavings import Violation, World, run_seed, run_seeds

RUNS = 200


def test_nothing_is_paid_for_twice_and_everybody_gets_the_same_answer() -> None:
    """Instances are killed, stopped and cut off, answers get lost; the books balance after every run."""
    tally = run_seeds(range(RUNS))
    assert tally.violations == []
    assert tally.runs == RUNS
    assert tally.videos > RUNS * 0.8


def test_a_seed_can_be_repeated() -> None:
    """The same seed makes the same calls at the same moments."""
    traces = [run_seed(7, is_traced=True).trace for _ in range(2)]
    assert len(traces[0]) > 20
    assert traces[0] == traces[1]


def test_the_books_notice_a_storage_whose_move_is_no_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a move replaces what is there, as an upload does, something is paid for twice before long."""

    def overwrite(world: World, call: interleavings.Call) -> interleavings.Answer:
        bucket = call.body["bucketId"]
        content = world.objects.pop(f"{bucket}/{call.body['sourceKey']}", None)
        if content is None:
            return interleavings.NO_OBJECT
        world.objects[f"{bucket}/{call.body['destinationKey']}"] = content
        return 200, {"message": "Successfully moved"}

    monkeypatch.setattr(World, "do_move", overwrite)
    assert any(run_seeds(range(seed, seed + 1)).violations for seed in range(60))


def test_a_violation_comes_with_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever repeats a seed that fails sees which calls led there."""
    monkeypatch.setattr(World, "do_move", lambda world, call: interleavings.INTERNAL)
    monkeypatch.setattr(interleavings, "MAX_RUN_S", 60.0)
    with pytest.raises(Violation, match="waits for ever") as caught:
        run_seed(0)
    assert caught.value.trace == []
    with pytest.raises(Violation) as caught:
        run_seed(0, is_traced=True)
    assert any(" move " in line for line in caught.value.trace)
