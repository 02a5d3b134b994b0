"""A real SGLang server on an engine node, and RL on the other node: what a cluster runs, small."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_klear.config import load_settings
from megatron_klear.observe import names
from tests.slurm.test_engines import two_free_ports

TINY = [
    "model.num_layers=2",
    "model.hidden_size=32",
    "model.ffn_hidden_size=64",
    "model.head_dim=8",
    "rl.steps=2",
    "rl.prompts_per_step=4",
    "rl.minibatch_prompts=4",
    "rollout.responses_per_prompt=4",
    "rollout.max_response_tokens=24",
    "rollout.stop_tokens=[]",
    "algorithm.filter_zero_advantage=false",
    "optimizer.warmup_steps=0",
    "checkpoint.start_from=null",
    "data.heldout=[]",
    "evaluation.at_end=false",
    "reward.workers=1",
    "observe.tensorboard=false",
    "observe.report=false",
]
ON_A_CPU = (
    "--device cpu --attention-backend torch_native --max-total-tokens 4096 --max-running-requests 16 "
    "--load-format dummy --skip-tokenizer-init --skip-server-warmup --sleep-on-idle"
)


def test_a_job_trains_on_responses_of_a_real_server_on_its_engine_node(slurm, data, tmp_path, sglang_settings):
    from megatron_klear.model import hf_config

    run, model, port = tmp_path / "run", tmp_path / "model", two_free_ports()
    arguments = [*TINY, f"run.dir={run}", f"tokenizer.dir={data / 'tokenizer'}", f"data.prompts=[{data}/prompts.jsonl]"]
    settings = load_settings(Path("examples/quickstart_rl.yaml"), arguments, entry="rl", world_size=1)
    model.mkdir()
    (model / "config.json").write_text(json.dumps(hf_config(settings.architecture, dtype="float32")))
    job = slurm.submit(
        "gppo.slurm",
        ["examples/quickstart_rl.yaml", *arguments],
        tmp_path,
        ["--nodes=2"],
        KLEAR_SGLANG_VENV=sglang_settings.venv,
        KLEAR_ENGINE_NODES="1",
        KLEAR_ENGINE_PORT=str(port),
        KLEAR_ENGINE_MODEL=str(model),
        KLEAR_ENGINE_OPTIONS=ON_A_CPU,
        SGLANG_USE_CPU_ENGINE="1",
        HF_HUB_OFFLINE="1",
    )
    fields = job.until(lambda f: f["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"), 300)
    assert (fields["JobState"], fields["ExitCode"]) == ("COMPLETED", "0:0"), job.story()
    story = job.story()
    assert story.count("proved by checksum") == 3, "before the first step and after each"
    assert f"engine 0 (http://127.0.0.1:{port})" in story or f"http://127.0.0.1:{port}" in story
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["phase"] == "rl"]
    assert [row["step"] for row in steps] == [1, 2]
    assert all(0.0 <= row[names.MISMATCH_MAX_ABS] < 1e-4 for row in steps), "float32 and the same weights on both sides"
    assert (run / "logs" / f"engines-{job.number}-0.log").stat().st_size > 0
