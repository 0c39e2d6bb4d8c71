"""Several processes, started by torchrun: set-up, gradients that are shared, decisions that all take together."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from volo.config import TrainConfig
from volo.layers import ClassBlock, Outlooker, Transformer

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """The processes of a run and this one's place among them."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """This process writes files and reports."""
        return self.rank == 0


def launched_by_torchrun() -> bool:
    """Whether this process is one of several that torchrun (or whoever sets all its variables) started.

    A batch system may set RANK or WORLD_SIZE for purposes of its own: some of the variables mean nothing.
    """
    numbers = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    return all(number.isdecimal() for number in numbers) and bool(os.environ.get("MASTER_ADDR"))


def is_main_process() -> bool:
    """Whether this process prints and writes for all: the first of those that torchrun started, or the only one."""
    return not launched_by_torchrun() or os.environ["RANK"] == "0"


@contextmanager
def join_world(device: str = "auto", *, patience: timedelta = timedelta(minutes=30)) -> Iterator[World]:
    """Join the other processes where torchrun (or the caller) started some, and leave them at the end.

    device: "auto" (cuda where there is one, else cpu), or any name torch knows. Each process takes the GPU of its
    LOCAL_RANK. `patience` is how long one waits for the others before it gives up. Raises ValueError for a device that is
    not there.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        chosen = torch.device(kind)
    except RuntimeError as error:
        raise ValueError(f"device {device!r} is not known to torch; use auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch sees no GPU here; use --train.device cpu, or auto")
    is_launched = launched_by_torchrun()
    local_rank = int(os.environ.get("LOCAL_RANK", 0)) if is_launched else 0
    if chosen.type == "cuda":
        index = chosen.index if chosen.index is not None else local_rank
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"process {local_rank} of this machine wants GPU {index}, but there are {torch.cuda.device_count()}: "
                "start torchrun with --nproc-per-node no larger than that"
            )
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    mine = is_launched and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized()
    if mine:
        # gloo beside nccl: decisions are taken between the host programs, without waiting for the GPUs.
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=patience)
    try:
        joined = dist.is_initialized()
        yield World(dist.get_rank() if joined else 0, dist.get_world_size() if joined else 1, chosen)
    finally:
        if mine:
            dist.destroy_process_group()


@contextmanager
def main_first(world: World) -> Iterator[None]:
    """The first process does it, then all others: for what is downloaded into a common cache."""
    if world.size > 1 and not world.is_main:
        dist.barrier()
    yield
    if world.size > 1 and world.is_main:
        dist.barrier()


def main_only(world: World, work: Callable[[], T]) -> T:
    """What `work` returns in the first process, which alone does it, for all of them; nobody returns before it is done.

    All processes must call it. Where `work` raises, all raise: the others a ValueError that points to the first one.
    """
    if world.size == 1:
        return work()
    box: list[Any] = [False, None]
    try:
        if world.is_main:
            box = [True, work()]
    finally:
        dist.broadcast_object_list(box, src=0)
    is_done, result = box
    if not is_done:
        raise ValueError("stopped, for the reason the first process gives")
    return result


def gather_from_all(mine: T, world: World) -> list[T]:
    """What every process has, by rank; all of them call it."""
    found: list[Any] = [mine] * world.size
    if world.size > 1:
        dist.all_gather_object(found, mine)
    return found


def agree_on_start(checkpoint: dict[str, Any] | None, world: World) -> dict[str, Any] | None:
    """The checkpoint that the first process has found, for all of them: other machines need not see its folder.

    All processes must call it, each with what it has found itself (None: nothing); nobody returns before all have called.
    Raises ValueError where only others have found one: a run would begin anew though it has been under way.
    """
    if world.size == 1:
        return checkpoint
    mine = None
    if checkpoint is not None:
        mine = checkpoint["step"], checkpoint["history"]["seconds"], socket.gethostname()
    found = gather_from_all(mine, world)
    others = sorted({entry[2] for entry in found if entry is not None})
    if found[0] is None and others:
        raise ValueError(
            f"{', '.join(others)} has the checkpoint of this run (last.pt), but the first process, which writes it, does not see "
            "one. Let the machines change places (torchrun numbers them by name, or by --local-addr; with --node-rank as "
            "you say), copy the run folder to the first one, or put it where all of them see it"
        )
    if all(entry == found[0] or (entry and found[0] and entry[:2] == found[0][:2]) for entry in found):
        return checkpoint
    return main_only(world, lambda: checkpoint)


def prepare_batch_norm(task: nn.Module, config: TrainConfig, world: World) -> nn.Module:
    """SyncBatchNorm in place of BatchNorm where the recipe asks for it and there are several processes.

    Raises ValueError on a CPU, where torch has no SyncBatchNorm.
    """
    if config.batch_norm != "sync" or world.size == 1:
        return task
    if world.device.type != "cuda":
        raise ValueError(
            f"batch_norm = 'sync' needs GPUs, and this run is on {world.device.type} with {world.size} processes. Use --train.batch_norm frozen "
            "(statistics fixed, as for fine-tuning; those of a segmentation model's decoder are each process's own), or train (each process "
            "has its own)"
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(task)


def shard(module: nn.Module, world: World) -> None:
    """FSDP2: every block's parameters, gradients and optimizer state are spread over the processes."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in [m for m in module.modules() if isinstance(m, (Outlooker, Transformer, ClassBlock))]:
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


class ShardedModel(nn.Module):
    """A sharded task as a model that is evaluated, images -> output: only the forward of the task itself gathers weights.

    Every process takes part in each forward pass of any, so those that are done (`in_step`) keep the others company with
    a `blank` batch, whose output nobody looks at.
    """

    def __init__(self, task: nn.Module, blank: Tensor) -> None:
        super().__init__()
        self.task, self.blank = task, blank

    def forward(self, images: Tensor) -> Tensor:
        _anyone(True)
        return self.task({"image": images})["output"]

    def in_step(self, batches: Iterable[T]) -> Iterator[T]:
        yield from batches
        while _anyone(False):
            with torch.inference_mode():
                self.task({"image": self.blank})


def in_step(model: nn.Module, batches: Iterable[T]) -> Iterable[T]:
    """`batches` to evaluate `model` on, of which every process may have another number; all of them use up theirs."""
    return model.in_step(batches) if isinstance(model, ShardedModel) else batches


def _anyone(mine: bool) -> bool:
    """Whether any process says so; all of them must call it."""
    answer = torch.tensor(int(mine))
    dist.all_reduce(answer, op=dist.ReduceOp.MAX)
    return bool(answer)


def replicate(task: nn.Module, config: TrainConfig, world: World) -> nn.Module:
    """The task as it is called in training: itself, or in DDP, which also hands the first process's BatchNorm statistics
    to all before each step."""
    if world.size == 1 or config.parallel == "fsdp":
        return task
    return DistributedDataParallel(
        task,
        device_ids=[world.device] if world.device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def gradient_sync(wrapped: nn.Module, enabled: bool) -> AbstractContextManager[None]:
    """Around a micro batch: gradients go to the other processes only after the last one of a step."""
    if isinstance(wrapped, DistributedDataParallel):
        return nullcontext() if enabled else wrapped.no_sync()
    if hasattr(wrapped, "set_requires_gradient_sync"):  # FSDP2
        wrapped.set_requires_gradient_sync(enabled)  # type: ignore[operator]
    return nullcontext()


def mean_over_ranks(values: Tensor, world: World) -> Tensor:
    if world.size > 1:
        dist.all_reduce(values)
        values /= world.size
    return values


def least_over_ranks(value: int, world: World) -> int:
    """The smallest of the values that the processes have; all of them must call it."""
    if world.size == 1:
        return value
    least = torch.tensor(value)
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least)


def share_buffers(module: nn.Module, world: World) -> None:
    """Everybody takes the first process's BatchNorm statistics: before an evaluation that is spread over all."""
    if world.size > 1:
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


class Vote:
    """All processes agree on what to do at a step boundary, without waiting for each other.

    What is said at one boundary is heard by all at the next: the exchange runs beside the step between them.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._pending: tuple[Any, Tensor] | None = None

    def __call__(self, signal_number: int, save: bool) -> tuple[int, bool]:
        """(largest signal number any process has received, 0 for none; whether any process wants to save)."""
        if self._world.size == 1:
            return signal_number, save
        heard = self.close()
        ballot = torch.tensor([signal_number, int(save)])
        self._pending = (dist.all_reduce(ballot, op=dist.ReduceOp.MAX, async_op=True), ballot)
        return heard

    def close(self) -> tuple[int, bool]:
        """Wait for the exchange under way."""
        if self._pending is None:
            return 0, False
        work, ballot = self._pending
        self._pending = None
        work.wait()
        return int(ballot[0]), bool(ballot[1])


def own_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What this process holds: of a sharded tensor its own part."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def gather_full(tree: Any, world: World) -> Any:
    """Nested dicts and lists with every sharded tensor made whole, on the CPU of the first process; None on the others.

    All processes must call it.
    """
    if isinstance(tree, DTensor):
        whole = tree.full_tensor().detach()
        return whole.cpu() if world.is_main else None
    if isinstance(tree, dict):
        return {key: gather_full(value, world) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(gather_full(value, world) for value in tree)
    return tree


def load_weights_into(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a whole state dict into a module whose parameters may be sharded."""
    own = module.state_dict()
    module.load_state_dict({name: _shard_like(own.get(name), value) for name, value in weights.items()})


def load_optimizer_into(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a whole optimizer state into an optimizer whose parameters may be sharded."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, values in state["state"].items():
        state["state"][index] = {key: _shard_like(parameters[index], value) for key, value in values.items()}
    optimizer.load_state_dict(state)


def _shard_like(own: Tensor | None, value: Any) -> Any:
    """This process's part of a whole tensor where `own`, of the same shape, is sharded; everything else as it is."""
    if isinstance(own, DTensor) and isinstance(value, Tensor) and value.shape == own.shape:
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
    return value
