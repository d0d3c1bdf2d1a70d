"""Slurm's own programs are asked with patience that ends, and numbers of the environment are read with care."""

import pytest

from megatron_ads.errors import ConfigError
from megatron_ads.launching import slurm_job
from megatron_ads.launching.environment import meeting_place
from megatron_ads.launching.slurm_job import ask_slurm, max_restarts, wants_placement_check


def test_what_went_wrong_with_a_program_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask_slurm("true") is None
    assert ask_slurm("false") == "false ended with status 1"
    assert ask_slurm("sh", "-c", "echo first >&2; echo second >&2; exit 3") == "first second"
    monkeypatch.setattr(slurm_job, "_ANSWER_SECONDS", 0.2)
    assert ask_slurm("sleep", "30") == "sleep did not answer in 0 s"


def test_a_number_that_is_none_is_refused() -> None:
    assert max_restarts({}) == max_restarts({"MEGATRON_ADS_MAX_RESTARTS": ""}) == 3
    with pytest.raises(ConfigError, match="MEGATRON_ADS_MAX_RESTARTS is 'some'; it must be a whole number"):
        max_restarts({"MEGATRON_ADS_MAX_RESTARTS": "some"})
    with pytest.raises(ConfigError, match="MASTER_PORT is '-1'"):
        meeting_place({"MASTER_PORT": "-1"})
    assert meeting_place({"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}) == ("10.0.0.1", "29500")
    host, port = meeting_place({"MASTER_ADDR": "", "MASTER_PORT": ""})
    assert host and int(port)


@pytest.mark.parametrize(
    ("environment", "wanted", "said"),
    [
        ({}, False, ""),
        ({"MEGATRON_ADS_CHECK_PLACEMENT": "0"}, False, ""),
        ({"MEGATRON_ADS_CHECK_PLACEMENT": "1"}, True, ""),
        ({"MEGATRON_ADS_REHEARSE": "1"}, True, "MEGATRON_ADS_REHEARSE is now called MEGATRON_ADS_CHECK_PLACEMENT"),
        ({"MEGATRON_ADS_REHEARSE": "0"}, False, ""),
    ],
)
def test_the_former_name_of_the_placement_check_still_works_and_names_the_new_one(
    capsys: pytest.CaptureFixture[str], environment: dict[str, str], wanted: bool, said: str
) -> None:
    assert wants_placement_check(environment) is wanted
    assert said in capsys.readouterr().out if said else capsys.readouterr().out == ""
