"""Sums with a calculator: the model may call a tool before it answers."""

from __future__ import annotations

import ast
import operator

from hybridflow.environments.tools import ToolEnvironment

OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def calculate(expression: str) -> int:
    """Compute an expression of whole numbers.

    Args:
        expression: For example 12+34.
    """
    return _value(ast.parse(expression, mode="eval").body)


def _value(node: ast.expr) -> int:
    match node:
        case ast.BinOp(left, kind, right) if type(kind) in OPERATIONS:
            return int(OPERATIONS[type(kind)](_value(left), _value(right)))
        case ast.Constant(int() as number):
            return number
    raise ValueError("only whole numbers, +, - and * are allowed")


class Calculator(ToolEnvironment):
    """The reward is 1 where the last message is the right number."""

    tools = (calculate,)

    def score(self, message: dict[str, object]) -> float:
        """Compare with the ground truth."""
        return float(str(message["content"]).strip() == str(self.row["ground_truth"]))
