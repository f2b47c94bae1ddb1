"""What a swarm is measured against: training with no averaging.

    python reference.py --parts 0 --folder runs/one/peer-0                       # one part of the text
    python reference.py --parts 0,1,2,3 --batches 4 --folder runs/central/peer-0
    # all of the text, and in each step as many bytes as four peers take

``--threads`` lets a step use more than one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from data import load_corpus
from record import Record, write_summary
from training import LocalTrainer, Settings


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", default="0", help="parts of the text to learn from, with commas between them"
    )
    parser.add_argument("--batches", type=int, default=1, help="times the batch of a peer that a step takes")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/alone/peer-0"), help="where to keep the record"
    )
    parser.add_argument("--save-every", type=int, default=100, help="steps between copies of the model")
    parser.add_argument("--started", type=float, help="when the run began (Unix time); default: now")
    parser.add_argument("--threads", type=int, default=1)
    Settings.add_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = Settings.from_options(options)
    allowed = {str(part): part for part in range(settings.peers)}
    if not set(options.parts.split(",")) <= set(allowed):
        parser.error(
            f"--parts {options.parts}: numbers from 0 to {settings.peers - 1}, with commas between them"
        )
    parts = [allowed[part] for part in options.parts.split(",")]
    corpus = load_corpus(settings.peers, Path(settings.text) if settings.text else None)
    text = torch.cat([corpus.parts[part] for part in parts])
    trainer = LocalTrainer(text, settings, seed=parts[0], batches=options.batches)
    record = Record(options.folder, options.started)
    write_summary(options.folder.parent, settings, library="none")
    train(trainer, record, settings.steps, options.save_every)


def train(trainer: LocalTrainer, record: Record, steps: int, save_every: int) -> None:
    """Do all steps."""
    losses = []
    record.write("began")
    record.save(trainer.parameters, trainer)
    while trainer.step < steps:
        losses.append(trainer.train_step())
        if trainer.step % save_every == 0 or trainer.step == steps:
            loss = sum(losses) / len(losses)
            losses.clear()
            record.write("round", step=trainer.step, tokens=trainer.tokens, loss=round(loss, 4))
            print(f"step {trainer.step:5}: {loss:.3f} bits per byte", flush=True)
            record.save(trainer.parameters, trainer)
    record.save(trainer.parameters, trainer, final=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit(130) from None
