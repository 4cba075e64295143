"""`python -m hybridflow.data check FILE ...`: what is wrong with data files, row by row."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from functools import partial

from hybridflow.config.schema import DataConfig
from hybridflow.data.chat import tokenizer_at
from hybridflow.data.check import BY_DATA_SOURCE, check_file
from hybridflow.ending import FAILED, MISCONFIGURED, as_process, ended_command, say, show
from hybridflow.errors import HybridflowError
from hybridflow.registry import REWARDS


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the files; returns 0 all rows can be used, 1 some cannot, 2 a file cannot be read, 128 + n stopped by signal n."""
    parser = argparse.ArgumentParser(prog="python -m hybridflow.data")
    command = parser.add_subparsers(required=True).add_parser("check", help="say what is wrong with data files, row by row")
    command.add_argument("files", nargs="+", metavar="FILE", help="Parquet files of prompts, chats, responses or preferences")
    command.add_argument("--tokenizer", metavar="MODEL", help="folder or hub name: checks chat template and lengths too")
    command.add_argument("--max-prompt-tokens", type=int, default=DataConfig.max_prompt_tokens)
    command.add_argument("--max-response-tokens", type=int, default=DataConfig.max_response_tokens)
    rule = "reward.name of the run, by which ground truths are checked; none for a function of your own"
    command.add_argument("--reward", choices=sorted(REWARDS), default=BY_DATA_SOURCE, help=rule)
    return ended_command("The check", partial(_checked, parser.parse_args(arguments)))


def _checked(options: argparse.Namespace) -> int:
    lengths = {"max_prompt_tokens": options.max_prompt_tokens, "max_response_tokens": options.max_response_tokens}
    data = dataclasses.replace(DataConfig(), **lengths)
    is_clean = True
    try:
        tokenizer = tokenizer_at(options.tokenizer, key="--tokenizer") if options.tokenizer else None
        for file in options.files:
            report = check_file(file, tokenizer=tokenizer, data=data, rule=options.reward)
            show("".join(f"{file}: {line}\n" for line in report.lines()))
            is_clean = is_clean and not report.problems and not report.has_pictures and report.num_rows > 0
    except HybridflowError as error:
        say(f"{error}\n")
        return MISCONFIGURED
    return 0 if is_clean else FAILED


if __name__ == "__main__":
    as_process(main)
