"""Ranks of processes that SLURM's srun started, one task per process, without torchrun.

Reference: the output environment variables in srun's manual, slurm.schedmd.com/srun.html.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

MASTER_ADDR = 'export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"'
MASTER_PORT = "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))"
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
    """Returns whether this process has its rank from srun."""
    return "RANK" in environ and environ["RANK"] == environ.get("SLURM_PROCID")


def _tasks_per_node(text: str) -> list[int]:
    """Returns the tasks of each node: `2(x3),1` is [2, 2, 2, 1]; [] for what is not such a list."""
    if not re.fullmatch(r"\d{1,6}(\(x\d{1,6}\))?(,\d{1,6}(\(x\d{1,6}\))?)*", text):
        return []
    parts = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in parts for _ in range(int(nodes or 1))]
