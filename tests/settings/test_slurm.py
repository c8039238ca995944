"""Ranks of processes that srun started."""

from __future__ import annotations

import pytest

from settings.slurm import adopt_srun_ranks, started_by_srun

STEP = {
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
}


def adopted(environ: dict[str, str]) -> dict[str, str]:
    """What is added or changed."""
    after = dict(environ)
    adopt_srun_ranks(after)
    return {name: text for name, text in after.items() if environ.get(name) != text}


def test_a_task_of_several_gets_torchruns_variables() -> None:
    ranks = {"RANK": "6", "WORLD_SIZE": "7", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert adopted(STEP) == ranks
    assert adopted(STEP | {"SLURM_NODEID": "2"})["LOCAL_WORLD_SIZE"] == "2"
    assert started_by_srun(STEP | ranks)


def test_torchrun_under_srun_keeps_its_ranks() -> None:
    assert adopted(STEP | {"RANK": "1", "WORLD_SIZE": "16"}) == {}
    assert not started_by_srun(STEP | {"RANK": "1"})
    in_batch_script = {"SLURM_PROCID": "0", "RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
    assert not started_by_srun(in_batch_script)


@pytest.mark.parametrize("tasks", [{}, {"SLURM_STEP_NUM_TASKS": "1"}])
def test_a_batch_script_and_an_interactive_shell_run_one_process(tasks: dict[str, str]) -> None:
    of_job = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8", "SLURM_NODEID": "0"}
    assert adopted(of_job | tasks) == {}


@pytest.mark.parametrize("text", ["", "2(x", "8,", "9" * 8])
def test_an_unknown_list_of_tasks_leaves_the_processes_of_a_machine_open(text: str) -> None:
    assert "LOCAL_WORLD_SIZE" not in adopted(STEP | {"SLURM_STEP_TASKS_PER_NODE": text})
