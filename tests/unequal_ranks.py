"""Two ranks with unequal work: one has eight long rows, the other two short ones whose rewards failed (all masked)."""

import lightning
from builders import OneBatch, config, scored
from lightning.pytorch.strategies import ModelParallelStrategy

from rlkd.algorithms import KDRL
from rlkd.pipeline.collate import collate


def main(_argv) -> None:
    for updates in (1, 2):
        settings = config(
            *("trainer.devices=2", "trainer.micro_batch_tokens=48", "rollout.max_tokens=12"),
            f"trainer.updates_per_iteration={updates}",
        )
        module = KDRL(settings)
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=2,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
            enable_progress_bar=False,
        )
        rank = trainer.global_rank
        rows = [scored(i, 12, float(i % 2)) for i in range(8)] if rank == 0 else [scored(i, 1, None) for i in range(2)]
        trainer.fit(module, OneBatch(collate([module.algorithm.advantages(rows)], 0)))
        print(f"rank {rank} trained {module.row['tokens/trained']:.0f} tokens in {updates} updates")
