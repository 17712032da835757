"""Several classifiers as one: students of different teachers are better joined after fine-tuning than taught together (MR-MAE)."""

import numpy as np

AVERAGES = ("probabilities", "logits")


def combine(logits: list[np.ndarray], average: str) -> np.ndarray:
  """One score per image and class.

  Args:
    logits: [N, C] of each model.
    average: "probabilities", each model's softmax; or "logits", which lets a model that is sure
      count for more.

  Returns:
    float64 [N, C]: the mean.
  """
  logits = np.stack(logits).astype(np.float64)
  if average == "probabilities":
    logits = np.exp(logits - logits.max(-1, keepdims=True))
    logits /= logits.sum(-1, keepdims=True)
  return logits.mean(0)


def accuracy(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
  """{"top1", "top5" in [0, 1]} of scores [N, C] for classes int [N]."""
  best = np.argsort(-scores, axis=1, kind="stable")[:, :5]
  hit = best == np.asarray(labels)[:, None]
  return {"top1": float(hit[:, 0].mean()), "top5": float(hit.any(1).mean())}
