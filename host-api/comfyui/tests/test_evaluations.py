import pytest

from dpt.evaluations import Evaluations, refusal

SIGMAS = [8.0, 4.0, 2.0, 1.0, 0.0]


def seen(evaluated, sampler="sample_euler", sigmas=SIGMAS, **options):
    evaluations = Evaluations(sigmas, sampler, options)
    return [evaluations.see(sigma) for sigma in evaluated]


def test_a_sampler_of_one_evaluation_by_step():
    assert seen([8, 4, 2, 1]) == [(0, 0), (1, 0), (2, 0), (3, 0)]


def test_evaluations_between_sigmas_are_within_their_step():
    """DPM-2, DPM++ SDE, SEEDS."""
    assert seen([8, 5.6, 4, 2.8, 2.5, 2, 1.4, 1]) == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (3, 0)]


def test_heun_evaluates_at_the_next_sigma_before_it_gets_there():
    found = seen([8, 4, 4, 2, 2, 1, 1], "sample_heun")
    assert found == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]


def test_heun_that_stops_before_zero_does_so_in_the_last_step_too():
    assert seen([8, 4, 4, 2], "sample_heun", [8.0, 4.0, 2.0]) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_heunpp2_evaluates_at_the_next_two():
    found = seen([8, 4, 2, 4, 2, 1, 2, 1, 1], "sample_heunpp2")
    assert found == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (3, 0)]


def test_seeds_2_with_r_of_1_is_like_heun():
    expected = [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
    assert seen([8, 4, 4, 2, 2, 1, 1], "sample_seeds_2", r=1.0) == expected
    assert seen([8, 4, 4, 2, 2, 1, 1], "sample_exp_heun_2_x0") == expected


def test_a_second_evaluation_at_the_same_sigma_is_within_the_step():
    assert seen([8, 8, 4, 4]) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_a_sampler_that_goes_back_starts_steps_again():
    """Restart sampling."""
    assert seen([8, 4, 2, 4, 2, 1]) == [(0, 0), (1, 0), (2, 0), (1, 0), (2, 0), (3, 0)]


def test_equal_sigmas_are_steps_of_their_own():
    assert seen([2, 2, 1], sigmas=[2.0, 2.0, 1.0, 0.0]) == [(0, 0), (1, 0), (2, 0)]


def test_churned_sigmas():
    """Karras et al.: gamma = min(s_churn / steps, sqrt(2) - 1) within [s_tmin, s_tmax]."""
    assert seen([8 * 1.25, 4 * 1.25, 2 * 1.25, 1], s_churn=1.0, s_tmin=1.5) == [(0, 0), (1, 0), (2, 0), (3, 0)]
    assert seen([8 * 2**0.5], s_churn=100.0) == [(0, 0)]


def test_sigmas_of_half_precision_are_known():
    assert seen([8 * (1 + 4e-5), 4 * (1 - 4e-5)]) == [(0, 0), (1, 0)]
    assert seen([8 * 1.01, 8]) == [(0, 1), (0, 0)]


def test_an_empty_schedule():
    assert Evaluations([]).count == 0
    assert Evaluations([1.0]).count == 0


@pytest.mark.parametrize("name", ["sample_unipc", "sample_unipc_bh2", "sample_sa_solver", "sample_sa_solver_pece"])
def test_predictor_correctors_lose_a_correction_of_the_latents(name):
    assert "condition-only" in refusal(name, condition_only=False)
    assert refusal(name, condition_only=True) is None


@pytest.mark.parametrize("name", ["dpm_fast_function", "dpm_adaptive_function"])
def test_samplers_with_sigmas_of_their_own(name):
    assert all("its own sigmas" in refusal(name, condition_only) for condition_only in (False, True))


def test_other_samplers_are_not_refused():
    assert refusal("sample_euler", condition_only=False) is None
    assert refusal("anything", condition_only=True) is None
