"""What engines would trip over in a checkpoint: one list of checks for `inspect` and `doctor`, and a repaired copy."""

from kimi_linear.recipes.checkup.checks import check
from kimi_linear.recipes.checkup.evidence import Evidence, gather
from kimi_linear.recipes.checkup.finding import Finding
from kimi_linear.recipes.checkup.repair import Repair, repair
from kimi_linear.recipes.checkup.values import check_values

__all__ = ["Evidence", "Finding", "Repair", "check", "check_values", "gather", "repair"]
