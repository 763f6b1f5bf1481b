"""Scoring reuses the forward that TRL takes for the old log-probabilities, wherever it need not know the ratio first."""

import pytest

from tests.vllm.plans import RATIO_RUNS, SYNCED_RUNS

RUNS = (*RATIO_RUNS, *SYNCED_RUNS)


def num_passes(name):
    """
    Of each chunk of a batch. A ratio of the whole sequence scales its score afterwards; the scoring pass starts from the ratios
    of single tokens, which follow from the other forward, unless the loss averages them.
    """
    return 2 if "-token_" in name and not name.endswith("-averaged") else 1


@pytest.mark.parametrize("name", RUNS)
def test_scoring_adds_a_forward_only_where_the_ratio_of_every_token_must_be_known_first(run_named, name):
    run = run_named(name)

    num_chunks = run.recorded("num_chunks")
    assert set(num_chunks) == {2}
    assert run.recorded("num_forwards") == [num_passes(name) * chunks for chunks in num_chunks]


@pytest.mark.parametrize("name", RUNS)
def test_the_old_log_probabilities_are_those_of_trl(run_named, name):
    errors = run_named(name).recorded("largest_logp_error")

    assert len(errors) in (2, 3)
    assert max(errors) < 1e-5  # nats
