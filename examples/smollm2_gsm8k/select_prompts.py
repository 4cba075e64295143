"""Keep the prompts that a model answers well sometimes: the others, of which all responses are right or all wrong, teach a
policy gradient nothing.

    python -m hybridflow.evaluate MODEL --data train.parquet --responses 16 --temperature 1 --output DIR reward.name=gsm8k
    python examples/smollm2_gsm8k/select_prompts.py train.parquet DIR/rows.parquet selected.parquet [--least 1 --most 15]
"""

from __future__ import annotations

import argparse

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

CORRECT = 1.0


def main() -> None:
    """Read the evaluated rows, count, and write the prompts whose count is within the bounds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", help="the file that was evaluated")
    parser.add_argument("rows", help="rows.parquet of the evaluation")
    parser.add_argument("selected", help="where the kept prompts go")
    parser.add_argument("--least", type=int, default=1, help="right responses of a kept prompt, at least")
    parser.add_argument("--most", type=int, help="right responses at most; by default one less than there are responses")
    options = parser.parse_args()
    rows = pq.read_table(options.rows, columns=["prompt_id", "reward"])
    right = pc.cast(pc.greater_equal(rows["reward"], CORRECT), pa.int64())
    counts = pa.table({"prompt_id": rows["prompt_id"], "right": right}).group_by("prompt_id")
    counts = counts.aggregate([("right", "sum"), ("right", "count")]).sort_by("prompt_id")
    most = pc.subtract(counts["right_count"], 1) if options.most is None else options.most
    kept = pc.and_(pc.greater_equal(counts["right_sum"], options.least), pc.less_equal(counts["right_sum"], most))
    prompts = pq.read_table(options.prompts)
    selected = prompts.take(counts.filter(kept)["prompt_id"])
    pq.write_table(selected, options.selected)
    mean = pc.sum(counts["right_sum"]).as_py() / pc.sum(counts["right_count"]).as_py()
    print(f"{len(selected)} of {len(prompts)} prompts kept; {mean:.1%} of the responses to all are right")


if __name__ == "__main__":
    main()
