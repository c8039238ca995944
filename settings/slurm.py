"""What SLURM says of this process: its rank, if srun started several, and its job.

Reference: the output environment variables in srun's manual, slurm.schedmd.com/srun.html.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

RENDEZVOUS = """\
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))
export MASTER_ADDR MASTER_PORT"""
"""Lines of a batch script that say where processes meet. Jobs that share a node get different
ports, all below 32768, where the ports begin that Linux gives to outgoing connections."""


def adopt_srun_ranks(environ: MutableMapping[str, str] = os.environ) -> None:
    """Sets torchrun's variables from srun's in a step of several tasks; those that are set win.

    In a step of one task nothing is set: a batch script's own process and `srun --pty bash` also
    have SLURM_PROCID and SLURM_NTASKS, but run train.py once.
    """
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "")
    if "WORLD_SIZE" in environ or "RANK" in environ or not tasks.isdecimal() or int(tasks) < 2:
        return
    environ["WORLD_SIZE"] = tasks
    for name, source in {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID"}.items():
        if source in environ:
            environ[name] = environ[source]
    per_node = _tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = environ.get("SLURM_NODEID", "")
    if node.isdecimal() and int(node) < len(per_node):
        environ["LOCAL_WORLD_SIZE"] = str(per_node[int(node)])


def started_by_srun(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Returns whether this process has its rank from srun, and not from torchrun: of a torchrun in
    a batch script, which is task 0 itself, the process of rank 0 sees two zeros."""
    if "TORCHELASTIC_RUN_ID" in environ:
        return False
    return "RANK" in environ and environ["RANK"] == environ.get("SLURM_PROCID")


def slurm_job() -> str | None:
    """Returns this job's number, which a requeue keeps, and its cluster; None outside SLURM.

    Tasks of an array have numbers of their own.
    """
    job, cluster = (os.environ.get(f"SLURM_{name}", "") for name in ("JOB_ID", "CLUSTER_NAME"))
    return f"{job} {cluster}".strip() if job.isdecimal() else None


def was_requeued() -> bool:
    """Returns whether this is a job of SLURM that ran before and was put back into the queue."""
    return slurm_job() is not None and os.environ.get("SLURM_RESTART_COUNT", "0") != "0"


def _tasks_per_node(text: str) -> list[int]:
    """Returns the tasks of each node: `2(x3),1` is [2, 2, 2, 1]; [] for what is not such a list."""
    if not re.fullmatch(r"\d{1,6}(\(x\d{1,6}\))?(,\d{1,6}(\(x\d{1,6}\))?)*", text):
        return []
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in parts for _ in range(int(nodes or 1))]
