"""Times in rounds, by a clock that is played."""

from __future__ import annotations

from fa4_prefixlm.testing.timing import Timing, time_in_rounds


def test_rounds_are_shuffled_and_led_in() -> None:
    events: list[str] = []

    def clock(run, calls: int) -> float:
        run()
        events.append(f"timed {calls}")
        return 2.0 if events[-2] == "slow" else 0.5

    calls = {name: lambda name=name: events.append(name) for name in ("slow", "fast")}
    timings = time_in_rounds(calls, rounds=5, round_ms=4.0, clock=clock)
    assert timings == {"slow": Timing(2.0, 0.0), "fast": Timing(0.5, 0.0)}
    in_rounds = events[4:]  # after a first look at how long each takes
    assert in_rounds.count("timed 2") == in_rounds.count("timed 8") == 5
    at = in_rounds.index("timed 8")
    assert in_rounds[at - 5 : at] == ["fast"] * 5, "4 calls before, and the one of the clock itself"
    timed = [event for event in in_rounds if event.startswith("timed")]
    rounds = [timed[at : at + 2] for at in range(0, 10, 2)]
    assert all(sorted(own) == ["timed 2", "timed 8"] for own in rounds)
    assert len({tuple(own) for own in rounds}) == 2, "not always in the same order"


def test_a_time_is_the_median_and_its_spread() -> None:
    assert Timing.of([1.0, 9.0, 2.0]) == Timing(2.0, 4.0)
