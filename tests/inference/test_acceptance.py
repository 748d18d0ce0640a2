"""vLLM's counters of speculation as differences and rates."""

import pytest

from raylm.inference.acceptance import Acceptance

TEXT = """\
# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="m"} 10.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="m"} 6.0
# TYPE vllm:spec_decode_num_draft_tokens_total counter
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="m"} 48.0
# TYPE vllm:spec_decode_num_accepted_tokens_total counter
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="m"} 12.0
# TYPE vllm:spec_decode_num_accepted_tokens_per_pos_total counter
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="1"} 4.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="m",position="0"} 8.0
"""


def test_rates_follow_from_the_text_of_metrics() -> None:
    found = Acceptance.from_text(TEXT)
    assert found == Acceptance(drafts=16, draft_tokens=48, accepted_tokens=12, per_position=(8, 4))
    assert found.rate == 0.25
    assert found.mean_length == 1.75
    assert found.rate_per_position == (0.5, 0.25)
    assert found.as_json()["mean_accepted_length"] == 1.75


def test_a_span_is_the_difference_of_two_readings() -> None:
    later = Acceptance(drafts=20, draft_tokens=60, accepted_tokens=20, per_position=(12, 8))
    assert later.since(Acceptance.from_text(TEXT)) == Acceptance(4, 12, 8, (4, 4))
    assert later.since(Acceptance()) == later


@pytest.mark.parametrize("text", ["", "vllm:num_requests_running 3\n"])
def test_without_speculation_there_are_no_rates(text: str) -> None:
    found = Acceptance.from_text(text)
    assert found == Acceptance()
    assert (found.rate, found.mean_length, found.rate_per_position) == (None, None, ())
