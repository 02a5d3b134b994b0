"""Reinforcement learning with verifiable rewards: GPPO, or PPO/GRPO clip, clip-higher, CISPO.

    torchrun --nproc-per-node N -m megatron_klear.train_rl CONFIG.yaml [a.b=c ...]

Imports inside the functions keep torch out until the settings have been judged.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_klear.config import Settings
from megatron_klear.session.launch import StopRequest, leave, run_entry

if TYPE_CHECKING:
    from megatron_klear.data import DataCursor, PromptData
    from megatron_klear.session.session import Session


def train(session: Session, prompts: PromptData, cursor: DataCursor, heldout: PromptData | None) -> None:
    """The RL step in the paper's order."""
    from megatron_klear.evaluation.during_training import write_heldout
    from megatron_klear.session.closing import told_at_once
    from megatron_klear.session.evaluation import Evaluation
    from megatron_klear.session.groups import step_groups
    from megatron_klear.session.left_out import left_out_sample
    from megatron_klear.session.metrics import rollout_metrics, update_metrics
    from megatron_klear.session.off_policy import left_out_mismatch, off_policy
    from megatron_klear.session.policy import filtered, minibatches, objective, old_logprobs
    from megatron_klear.trainer import policy_minibatch

    settings = session.settings
    with (
        Evaluation(session, heldout, write_heldout) as evaluation,
        step_groups(session, prompts, evaluation.rollouts) as ledger,
        told_at_once(),
    ):
        rollouts = evaluation.rollouts
        with ledger.publishing(session.step):
            rollouts.publish(version=session.step)
        with ledger.sharing_engines():
            evaluation.at_start()
        for step in session.steps():
            groups = ledger.groups(step, cursor, rollouts)  # x ~ D, M responses, rewards, Eq. 4
            rollouts.hand_to_trainer()  # the memory of GPUs that engines share
            kept = [] if settings.scheduling.rollout_only else filtered(groups, settings.algorithm)  # Section 5.2.5
            old = old_logprobs(session, kept)  # pi_old, by the trainer
            weights, mismatch = off_policy(session, kept, old, published=step - 1, proof=rollouts.proof)
            others = left_out_sample(groups, kept, step=step)
            theirs = old_logprobs(session, others, phase="left out logprobs")
            rest = left_out_mismatch(session, others, theirs, published=step - 1, proof=rollouts.proof)
            reports = []
            for minibatch in minibatches(kept, settings.rl):  # several updates per rollout batch
                weighted = policy_minibatch(minibatch, old, settings.algorithm, weights)  # Eqs. 7, 13, 14
                with session.phase("train"):
                    reports.append(
                        session.trainer.update(
                            weighted, objective(settings.algorithm), step=step, temperature=settings.rollout.temperature
                        )  # Eqs. 11, 12
                    )
            session.trainer.advance_schedule_to(step * session.updates_per_step)
            ledger.trained(step)
            with ledger.publishing(step) as goes_on:
                if goes_on:
                    rollouts.publish(version=step)
            if goes_on:  # else the step is the last one of this life, and the next one evaluates
                with ledger.sharing_engines():
                    evaluation.when_due(step)
            session.keep_examples(rollouts.examples(groups, step), step)
            session.finish_step(step, {**rollout_metrics(groups, kept), **rest, **mismatch, **update_metrics(reports)})
        with ledger.sharing_engines():
            evaluation.at_end()


def main(settings: Settings, stop: StopRequest) -> None:
    """Read the data, open the session, train, report."""
    from megatron_klear.data import DataCursor, load_prompts, require_disjoint
    from megatron_klear.model.precision import require_hardware
    from megatron_klear.session.grading import require_gradable
    from megatron_klear.session.session import Session
    from megatron_klear.session.tokenizer import run_tokenizer

    require_hardware(settings)
    chat = run_tokenizer(settings)

    def load(files: tuple[str, ...], setting: str) -> PromptData:
        data = load_prompts(
            files, chat, max_prompt_tokens=settings.data.max_prompt_tokens, oversize=settings.data.oversize,
            setting=setting,
        )  # fmt: skip
        require_gradable(data, setting, settings)
        return data

    prompts = load(settings.data.prompts, "data.prompts")
    heldout = load(settings.data.heldout, "data.heldout") if settings.data.heldout else None
    if heldout is not None:
        require_disjoint(heldout.keys(), {"data.prompts": prompts.keys()})
    cursor = DataCursor(
        len(prompts),
        settings.rl.prompts_per_step,
        seed=settings.run.seed,
        shuffle=settings.data.shuffle,
        fingerprint=prompts.fingerprint,
        setting="data.prompts",
        batch_setting="rl.prompts_per_step",
    )
    updates = settings.rl.prompts_per_step // settings.rl.minibatch_prompts
    with Session("rl", settings, stop, chat=chat, total_steps=settings.rl.steps, updates_per_step=updates) as session:
        session.restore_cursor(cursor)
        session.describe(f"{len(prompts)} prompts, {len(prompts.dropped_ids)} dropped for their length")
        train(session, prompts, cursor, heldout)
        session.export()
        session.write_report()


if __name__ == "__main__":
    leave(run_entry("rl", main))
