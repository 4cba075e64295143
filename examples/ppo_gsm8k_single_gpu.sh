#!/usr/bin/env bash
# PPO on GSM8K with one GPU of 24 GB: Qwen2.5-0.5B-Instruct, rule reward. Everything above the command can be set from outside:
#
#   bash examples/ppo_gsm8k_single_gpu.sh                                                            # as it is
#   MODEL_PATH=Qwen/Qwen2.5-1.5B-Instruct TRAIN_BATCH_SIZE=64 PPO_MINI_BATCH_SIZE=16 bash examples/ppo_gsm8k_single_gpu.sh
#   NUM_GPUS=8 TRAIN_BATCH_SIZE=1024 PPO_MINI_BATCH_SIZE=256 TENSOR_PARALLEL=2 GPU_MEMORY=0.6 bash examples/ppo_gsm8k_single_gpu.sh
#   bash examples/ppo_gsm8k_single_gpu.sh algorithm.kl_in=reward model.lora_rank=16 --dry-run         # and any key behind it
#
# The data: python examples/gsm8k/prepare.py --local_dir ~/data/gsm8k
set -euo pipefail

MODEL_PATH=${MODEL_PATH:-Qwen/Qwen2.5-0.5B-Instruct}
CRITIC_PATH=${CRITIC_PATH:-$MODEL_PATH}
TRAIN_FILES=${TRAIN_FILES:-$HOME/data/gsm8k/train.parquet}
VALIDATION_FILES=${VALIDATION_FILES:-$HOME/data/gsm8k/test.parquet}
NUM_NODES=${NUM_NODES:-1}
NUM_GPUS=${NUM_GPUS:-1}                        # of each node
TRAIN_BATCH_SIZE=${TRAIN_BATCH_SIZE:-128}      # prompts of a step
PPO_MINI_BATCH_SIZE=${PPO_MINI_BATCH_SIZE:-64} # prompts of an update
RESPONSES_PER_PROMPT=${RESPONSES_PER_PROMPT:-1}
MAX_PROMPT_TOKENS=${MAX_PROMPT_TOKENS:-512}
MAX_RESPONSE_TOKENS=${MAX_RESPONSE_TOKENS:-256}
ACTOR_LR=${ACTOR_LR:-1e-6}
CRITIC_LR=${CRITIC_LR:-1e-5}
ENGINE=${ENGINE:-vllm}
TENSOR_PARALLEL=${TENSOR_PARALLEL:-1}
GPU_MEMORY=${GPU_MEMORY:-0.4}                  # share of the GPU for the engine
TOTAL_EPOCHS=${TOTAL_EPOCHS:-20}
SAVE_EVERY=${SAVE_EVERY:-20}
VALIDATE_EVERY=${VALIDATE_EVERY:-5}
TRACKERS=${TRACKERS:-[console, tensorboard]}
RUN_NAME=${RUN_NAME:-qwen2.5_0.5b_ppo_gsm8k}

exec "${PYTHON:-python3}" -m hybridflow.train \
    algorithm=ppo \
    algorithm.responses_per_prompt="$RESPONSES_PER_PROMPT" \
    algorithm.prompts_per_update="$PPO_MINI_BATCH_SIZE" \
    algorithm.kl_in=none \
    algorithm.dual_clip=3.0 \
    model.path="$MODEL_PATH" \
    data.train_files="[$TRAIN_FILES]" \
    data.validation_files="[$VALIDATION_FILES]" \
    data.prompts_per_step="$TRAIN_BATCH_SIZE" \
    data.max_prompt_tokens="$MAX_PROMPT_TOKENS" \
    data.max_response_tokens="$MAX_RESPONSE_TOKENS" \
    actor.learning_rate="$ACTOR_LR" \
    critic.path="$CRITIC_PATH" \
    critic.learning_rate="$CRITIC_LR" \
    rollout.engine="$ENGINE" \
    rollout.tensor_parallel="$TENSOR_PARALLEL" \
    rollout.gpu_memory_utilization="$GPU_MEMORY" \
    placement.pools.main="${NUM_NODES}x${NUM_GPUS}" \
    run.total_epochs="$TOTAL_EPOCHS" \
    run.folder="outputs/$RUN_NAME" \
    checkpoint.every_steps="$SAVE_EVERY" \
    validation.every_steps="$VALIDATE_EVERY" \
    trackers.names="$TRACKERS" \
    "$@"
