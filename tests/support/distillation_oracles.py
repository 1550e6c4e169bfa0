"""Divergences of distributions over tokens, in NumPy float64."""

import numpy as np

from tests.support import oracles


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def kl_divergence(logits, teacher_logits, temperature, mask=None):
    """t^2 sum p log(p / q) over the last axis; 0 where the mask is false."""
    q = log_softmax(np.asarray(logits, np.float64) / temperature)
    p = log_softmax(np.asarray(teacher_logits, np.float64) / temperature)
    found = temperature**2 * (np.exp(p) * (p - q)).sum(-1)
    return found if mask is None else np.where(mask, found, 0.0)


def top_kl_divergence(logits, teacher_ids, teacher_log_probs, temperature, mask=None):
    """The same with the tokens that are not among `teacher_ids` as one event, row by row."""
    q = np.exp(log_softmax(np.asarray(logits, np.float64) / temperature))
    found = np.zeros(len(q))
    for row, (ids, logs) in enumerate(zip(teacher_ids, np.float64(teacher_log_probs))):
        p = np.exp(logs)
        found[row] = (p * (logs - np.log(q[row, ids]))).sum()
        others = np.setdiff1d(np.arange(q.shape[1]), ids)
        if len(others):
            rest = 1 - p.sum()
            found[row] += rest * np.log(rest / q[row, others].sum())
    found *= temperature**2
    return found if mask is None else np.where(mask, found, 0.0)


def top_of(teacher_logits, count, temperature):
    """`(ids, log_probs)` of the `count` likeliest tokens of every row."""
    logs = log_softmax(np.asarray(teacher_logits, np.float64) / temperature)
    ids = np.argsort(-logs, axis=-1)[..., :count].astype("int32")
    return ids, np.take_along_axis(logs, ids, axis=-1).astype("float32")


def distillation_losses(logits, teacher_logits, labels, temperature, alpha):
    """`(loss, kd_loss, task_loss)`, means over the labels that are not -100, of flat rows."""
    counts = labels != -100
    kd = kl_divergence(logits, teacher_logits, temperature, counts).sum() / counts.sum()
    task = oracles.cross_entropy(logits, labels).sum() / counts.sum()
    return alpha * kd + (1 - alpha) * task, kd, task
