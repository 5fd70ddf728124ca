"""Components of TorchX: ``torchx run ferro.ddp -j 2x2 --script train.py``.

TorchX 0.7 imports this module by the entry points of the group ``torchx.components``. No other module of the package imports it.
TorchX reads the annotations from the source. They must be names, or ``Optional``, ``Dict`` and ``List`` of names.
"""

import re
from typing import Dict, List, Optional

import torchx
from torchx import specs
from torchx.components import dist
from torchx.specs.finder import ComponentValidationException
from torchx.version import __version__ as _torchx_version

__all__ = ["ddp"]

_NODES_AND_WORKERS = re.compile(r"(?:(?:(?P<least>\d+):)?(?P<nodes>\d+)x)?(?P<workers>\d+)")
_TORCHRUN = "torchrun "


def ddp(
    *script_args: str,
    script: Optional[str] = None,
    m: Optional[str] = None,
    image: str = torchx.IMAGE,
    name: str = "/",
    h: Optional[str] = None,
    cpu: int = 2,
    gpu: int = 0,
    memMB: int = 1024,
    j: str = "1x2",
    env: Optional[Dict[str, str]] = None,
    max_retries: int = 0,
    max_restarts: int = 0,
    rdzv_port: int = 29500,
    rdzv_backend: str = "c10d",
    mounts: Optional[List[str]] = None,
    debug: bool = False,
    tee: int = 3,
) -> specs.AppDef:
    """Distributed training on one or more nodes, launched by ferrorun.

    The job has one role and one agent per node, as that of TorchX's own ``dist.ddp``. Further options of ferrorun are given as
    variables, for example ``--env PET_WARM_WORKERS=8,PET_SHUTDOWN_TIMEOUT=25``.

    Args:
        script_args: arguments of the script or module
        script: script to run. Give this or -m
        m: module to run
        image: image of the containers, where the scheduler has images
        name: EXPERIMENT/RUN, EXPERIMENT/, /RUN or RUN. RUN is that of the script or module if it is not given
        h: name of a resource that is registered with TorchX. It replaces cpu, gpu and memMB
        cpu: CPUs of a node
        gpu: GPUs of a node
        memMB: memory of a node in MB
        j: WORKERS, NODESxWORKERS or MIN:MAXxWORKERS. WORKERS is the number of workers of one node
        env: variables of the agents and workers (NAME=VALUE,NAME=VALUE)
        max_retries: how often the scheduler may start the job again
        max_restarts: how often ferrorun may start the workers again after a failure
        rdzv_port: port of the rendezvous on the first node. A job on one node takes a free port
        rdzv_backend: c10d or static
        mounts: mounts of the containers (type=<bind/volume>,src=/host,dst=/job[,readonly])
        debug: set variables that make torch report more
        tee: streams of the workers that go to the console and to log files. 0: none, 1: stdout, 2: stderr, 3: both

    Returns:
        The definition of the job.

    Raises:
        ComponentValidationException: if the arguments do not describe a job. TorchX shows the message and ends with code 1.
    """
    if (script is None) == (m is None):
        raise ComponentValidationException(
            f"--script is {script!r} and -m is {m!r}. Give one of them: --script train.py, or -m package.module"
        )
    _check_size(j)
    if max_restarts < 0:
        raise ComponentValidationException(f"--max_restarts is {max_restarts}. Give 0 or a positive number")
    app = dist.ddp(
        *script_args,
        script=script,
        m=m,
        image=image,
        name=name,
        h=h,
        cpu=cpu,
        gpu=gpu,
        memMB=memMB,
        j=j,
        env=env,
        max_retries=max_retries,
        rdzv_port=rdzv_port,
        rdzv_backend=rdzv_backend,
        mounts=mounts,
        debug=debug,
        tee=tee,
    )
    (role,) = app.roles
    *options, command = role.args
    if not command.startswith(_TORCHRUN):
        raise ComponentValidationException(
            f"dist.ddp of TorchX {_torchx_version} begins its command with {command.split()[0]!r}, not with torchrun. "
            "ferro.ddp needs TorchX 0.7"
        )
    # exec: the scheduler's signals go to ferrorun, without a shell in between.
    role.args = [*options, f"exec ferrorun --max_restarts {max_restarts} {command.removeprefix(_TORCHRUN)}"]
    return app


def _check_size(j: str) -> None:
    found = _NODES_AND_WORKERS.fullmatch(j)
    if found is None:
        raise ComponentValidationException(
            f"-j is {j!r}. Give WORKERS, NODESxWORKERS or MIN:MAXxWORKERS, for example 4, 2x4 or 1:2x4"
        )
    nodes = int(found["nodes"] or 1)
    least = int(found["least"] or nodes)
    if not (1 <= least <= nodes and int(found["workers"]) >= 1):
        raise ComponentValidationException(
            f"-j is {j!r}. Each number must be at least 1, and the minimum of nodes at most the maximum"
        )
