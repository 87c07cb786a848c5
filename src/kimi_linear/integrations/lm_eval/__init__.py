"""Our models in EleutherAI's lm-eval: a model class "kimi-linear", and tasks that need no network.

Importing this registers the model, after which lm-eval finds it by name:

    import kimi_linear.integrations.lm_eval as ours
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    simple_evaluate(
        model="kimi-linear",
        model_args={"pretrained": "a/checkpoint"},
        tasks=["kimi_linear_offline"],
        task_manager=TaskManager(include_path=ours.task_dir()),
    )

The tasks, together `kimi_linear_offline`: `kimi_held_out` (bits per byte of the addresses that no training of ours
reads), `kimi_last_word` (the last word of a passage of them), `kimi_recall` (the value of a key, out of 4, 8 or 16
pairs), `kimi_copy` (4 to 16 words) and `kimi_arithmetic`. All but the first come from scripts/build_eval_tasks.py.

Needs lm-eval >= 0.4.13.
"""

from pathlib import Path

from kimi_linear.integrations.lm_eval.model import KimiLinearEvalLM

__all__ = ["KimiLinearEvalLM", "task_dir"]


def task_dir() -> str:
    """Return the directory of the offline tasks, for lm-eval's `include_path`.

    Example:
        >>> Path(task_dir(), "kimi_recall.yaml").is_file()
        True
    """
    return str(Path(__file__).parent / "tasks")
