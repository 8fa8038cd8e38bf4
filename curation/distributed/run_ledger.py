"""A training worker's side of the run's memory: the ledger and, if the run keeps one, its score log."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from curation.data import score_log
from curation.data.score_log import LoggedStep, ScoreLog
from curation.distributed.ledger_client import LedgerClient
from curation.distributed.ready_batches import LoopSpec, Ready
from curation.ledger import LedgerSpec
from curation.recipe import TrainRecipe
from curation.selector import Rows
from curation.training.collectives import gather, ranks

LEDGER = "score"
"""The name of the run's ledger."""
WEIGHTS = "weight"
"""The name of the further one that keeps the weights, where scores are logged."""
SNAPSHOTS_KEPT = 2


def ledger_specs(recipe: TrainRecipe) -> dict[str, LedgerSpec]:
    """What the run's ledgers keep; of weights the same statistic as of scores."""
    kept = recipe.ledger
    specs = {LEDGER: LedgerSpec(kept.statistic, decay=kept.decay, variance=kept.variance)}
    return specs | ({WEIGHTS: LedgerSpec(kept.statistic, decay=kept.decay)} if recipe.logs_scores else {})


class RunLedger:
    """One rank's way. What is collective is called by all ranks."""

    def __init__(self, spec: LoopSpec, *, tag: str | None, device: torch.device):
        """Take the ledger back to a snapshot, or to its beginning; what a former attempt still sends is refused.

        `device` is the process group's. Collective.
        """
        self._handles, self._device = spec.ledger, device
        rank = ranks().rank
        attempt = self._agreed(LedgerClient.restore(spec.ledger, tag) if rank == 0 else 0)
        self._client = LedgerClient(spec.ledger, writer=f"rank-{rank}", attempt=attempt)
        self._client.open()
        barrier()  # an ema waits for all that have opened, so all open before any records
        self._score_log: ScoreLog | None = None
        if spec.recipe.logs_scores:
            output = spec.recipe.output
            attempt = self._agreed(score_log.next_attempt(output) if rank == 0 else 0)
            self._score_log = ScoreLog(output, rank=rank, attempt=attempt)

    def record(self, ready: Ready) -> None:
        """What a step made of this rank's rows."""
        addresses, values = ready.picked.recorded
        used = ready.picked.trained.numpy()
        self._client.record(LEDGER, addresses.numpy(), values.numpy(), step=ready.number, used=used)
        if self._score_log is not None:
            logged = _logged(ready)
            self._client.record(WEIGHTS, logged.addresses, logged.weights, step=ready.number)
            self._score_log.add(logged)

    def recall(self, addresses: torch.Tensor) -> Rows:
        """The ledger's columns (n,) of addresses, as they stand after all ranks' last step. Collective."""
        self.settle()
        return self.remembered(addresses)

    def settle(self) -> None:
        """Wait until the ledger has what all ranks recorded. Collective."""
        self._client.flush()
        barrier()

    def remembered(self, addresses: torch.Tensor) -> Rows:
        """The ledger's columns (n,) of addresses, as far as it has been told."""
        columns = self._client.read(LEDGER, addresses.numpy())
        return {name: torch.from_numpy(column.astype(np.float32)) for name, column in columns.items()}

    def save(self, tag: str) -> None:
        """Keep what all ranks have recorded under a tag. Collective; it is there when rank 0 has returned."""
        self._client.flush()
        if self._score_log is not None:
            self._score_log.flush()
        barrier()
        if ranks().rank == 0:
            self._client.snapshot(tag)

    def forget_old(self) -> None:
        """Drop all but the newest tags."""
        self._client.forget(self._handles.states()[0]["tags"][:-SNAPSHOTS_KEPT])

    def close(self) -> None:
        """Wait until the ledger has all that was recorded."""
        self._client.close()

    def _agreed(self, rank_0_says: int) -> int:
        return int(gather(torch.tensor([rank_0_says], device=self._device))[0])


def barrier() -> None:
    """Wait for all ranks, if there are others."""
    if dist.is_initialized():
        dist.barrier()


def _logged(ready: Ready) -> LoggedStep:
    """This rank's rows as the score log has them; those that could not be used are left out."""
    scores, weights = ready.picked.chosen.scores.cpu(), ready.picked.chosen.row_weights.cpu()
    usable = torch.isfinite(scores) & ready.ok
    return LoggedStep(
        ready.number + 1, ready.addresses[usable].numpy(), scores[usable].numpy(), weights[usable].numpy()
    )
