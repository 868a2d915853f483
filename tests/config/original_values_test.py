"""The originals' numbers, key by key, in the configs that reproduce them.

Sources: launch script, reward server and OpenRLHF fork of CapRL-3B; script, reward server and
reward function of CapRL++ (verl); gen_qa.py and the filter of the curation; Eval_CapRL.py; the
README's call of a captioner; the ScaleCap notebooks that CapRL links.
"""

import pytest
from config.values import value_of

JUDGE = {
  "judge.reading": "generate",
  "judge.prompt": "official",
  "judge.temperature": 0.6,
  "judge.max_tokens": 10,
  "judge.draws": 8,
  "judge.replacement": True,
  "judge.independent": True,
  "judge.abstain": "last",
}
ROLLOUT = {
  "data.batch_size": 128,
  "rollout.group_size": 8,
  "rollout.sampling.max_tokens": 4096,
  "rollout.sampling.temperature": 1.0,
  "rollout.sampling.top_p": 1.0,
  "rollout.sampling.repetition_penalty": 1.0,
}
CAPRL_3B = {
  **JUDGE,
  **ROLLOUT,
  "policy.checkpoint": "Qwen/Qwen2.5-VL-3B-Instruct",
  "policy.instruction": "Please describe this image in detail.",
  "policy.template": "checkpoint",  # Qwen2.5-VL's adds "You are a helpful assistant."
  "policy.trainable": "full",
  "policy.min_pixels": 3136,
  "policy.max_pixels": 1_000_000,
  "judge.source": "Qwen/Qwen2.5-3B-Instruct",
  "judge.shuffle": False,
  "judge.abstain_letter": "next",
  "rollout.end_cut": True,
  "reward.accuracy": 2.0,
  "reward.misled": 0.0,
  "reward.length": 0.0,
  "advantage.estimator": "rloo",
  "advantage.whiten": "released",
  "policy_update.loss.surrogate": "reinforce",
  "policy_update.loss.aggregation": "set_token_mean",
  "policy_update.loss.set_captions": 4,
  "policy_update.loss.kl": 0.0,
  "policy_update.loss.entropy": 0.0,
  "policy_update.minibatches": 1,
  "policy_update.epochs": 1,
  "optimizer.name": "adamw",
  "optimizer.learning_rate": 1e-6,
  "optimizer.schedule": "cosine",
  "optimizer.schedule_steps": 75_285 * 8 // 1024 * 30,
  "optimizer.warmup_steps": 20,
  "optimizer.warmup_from_zero": True,
  "optimizer.final_fraction": 0.1,
  "optimizer.b1": 0.9,
  "optimizer.b2": 0.95,
  "optimizer.weight_decay": 0.0,
  "optimizer.clip_norm": 1.0,
  "data.shape_buckets": 1,
  "seed": 42,
  "train.steps": 1800,
  "checkpoint.every_steps": 50,
}
CAPRL_PP = {
  **JUDGE,
  **ROLLOUT,
  "policy.instruction": " Please describe this image in detail.",
  "policy.param_dtype": "bfloat16",
  "policy.min_pixels": None,
  "policy.max_pixels": None,
  "judge.shuffle": True,
  "judge.abstain_letter": "F",
  "rollout.end_cut": False,
  "reward.accuracy": 1.0,
  "reward.length": 0.2,
  "reward.length_full_tokens": 2048,
  "reward.length_zero_tokens": 3072,
  "advantage.estimator": "rloo",
  "advantage.whiten": "none",
  "policy_update.loss.surrogate": "clip",
  "policy_update.loss.clip_low": 0.2,
  "policy_update.loss.clip_high": 0.2,
  "policy_update.loss.dual_clip": 3.0,
  "policy_update.loss.aggregation": "sequence_mean",
  "policy_update.loss.kl": 0.0,
  "policy_update.minibatches": 1,
  "policy_update.epochs": 1,
  "optimizer.learning_rate": 1e-5,
  "optimizer.schedule": "constant",
  "optimizer.schedule_steps": None,
  "optimizer.warmup_steps": 20,
  "optimizer.warmup_from_zero": True,
  "optimizer.b1": 0.9,
  "optimizer.b2": 0.999,
  "optimizer.weight_decay": 0.01,
  "optimizer.clip_norm": 1.0,
  "optimizer.moment_dtype": "bfloat16",
}
ORIGINALS = {
  "caprl_3b": CAPRL_3B,
  "caprl_3b_v5e16": CAPRL_3B,
  "gpu_h100x8": CAPRL_3B,
  "caprl_internvl35_8b": CAPRL_3B
  | {
    "policy.checkpoint": "OpenGVLab/InternVL3_5-8B-HF",
    "policy.min_pixels": None,
    "policy.max_pixels": None,
  },
  "caprl_qwen3vl_4b": CAPRL_PP
  | {
    "policy.checkpoint": "Qwen/Qwen3-VL-4B-Instruct",
    "judge.source": "Qwen/Qwen3-4B-Instruct-2507",
  },
  "caprl_qwen3vl_2b": CAPRL_PP
  | {
    "policy.checkpoint": "Qwen/Qwen3-VL-2B-Instruct",
    "judge.source": "Qwen/Qwen3-4B-Instruct-2507",
  },
  "ablations/judge_writes_scores": {
    "judge.sees_image": True,
    "judge.source": "Qwen/Qwen2.5-VL-3B-Instruct",
    "judge.score_prompt": "official",
    "judge.score_weights": "factuality=0.30,temporal_alignment=0.25,coverage=0.25,"
    "hallucination_penalty=0.20",
    "judge.score_unread": "zero",
    "judge.temperature": 0.2,
    "judge.max_tokens": 256,
  },
  "caption_caprl": {
    "policy.checkpoint": "internlm/CapRL-3B",
    "policy.instruction": "Please describe this image in detail.",
    "policy.template": "checkpoint",
    "policy.max_pixels": None,
    "caption.temperature": 1.0,
    "caption.top_p": 1.0,
    "caption.top_k": 0,
    "caption.repetition_penalty": 1.0,
    "caption.max_tokens": 2048,
  },
  "prism": {
    "policy.instruction": "Please describe this image in detail",  # no full stop
    "policy.template": "bare",
    "policy.min_pixels": None,
    "policy.max_pixels": None,
    "judge.source": "internlm/CapRL-Eval-3B",
    "prism.captions": 4,
    "prism.captions_per": "question",
    "prism.temperature": 1.0,
    "prism.top_p": 1.0,
    "prism.max_tokens": 2048,
    "prism.answers": "write",
    "prism.answer_temperature": 1.0,
    "prism.answer_tokens": 2048,
  },
  "curate_official": {
    "generator.checkpoint": "Qwen/Qwen2.5-VL-72B-Instruct",
    "generator.max_pixels": None,
    "answerer.checkpoint": "Qwen/Qwen2.5-VL-3B-Instruct",
    "answerer.max_pixels": None,
    "curate.prompt": "official",
    "curate.temperature": 0.1,
    "curate.repetition_penalty": 1.05,
    "curate.max_tokens": 2048,
    "curate.answers.protocol": "official",
    "curate.answers.permutations": 4,
    "curate.answers.none_of_above": True,
    "curate.min_visual": 0.75,
    "curate.max_blind": 0.25,
    "curate.similar_bits": None,
    "curate.similar_questions": None,
    "curate.repeated_questions": True,
    "curate.min_side": 1,
    "curate.benchmarks": (),
  },
  "pretrain_caprl": {
    "pretrain_policy.vision": "Qwen/Qwen2.5-VL-3B-Instruct",
    "pretrain_policy.language": "Qwen/Qwen2.5-3B-Instruct",
    "pretrain.order": ("align", "further", "instruct"),
  },
}
NUMBERS = [(name, key, value) for name, found in ORIGINALS.items() for key, value in found.items()]


@pytest.mark.parametrize("name, key, value", NUMBERS, ids=lambda x: str(x)[:40])
def test_the_original_has(name, key, value):
  assert value_of(name, key) == value
