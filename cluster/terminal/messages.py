"""Text of a run's progress and of its events, one line each."""

from typing import Any

from pipeline.text import plural
from trainer.labels.measures import describe


def progress_line(row: dict[str, Any]) -> str:
    """Return the progress at a row of the metrics. A narrow terminal cuts the end off, so the most important comes first."""
    # Time shares other than the step itself: the data wait always, the rest from 0.5 % on.
    parts = [
        f"{name.replace('_', ' ')} {share:.0%}"
        for name, share in row["time"].items()
        if name == "data_wait" or (name != "step" and share >= 0.005)
    ]
    return (
        f"step {row['step'] + 1}/{row['total_steps']}  loss {row['loss']:.4f}  {row['img_per_s']:,.0f} img/s  "
        f"{', '.join(parts)}  workers {row['world_size']}  lr {row['lr']:.2e}  epoch {row['epoch']}"
    )


def event_line(event: dict[str, Any]) -> str:
    """Return the text of an event, see `trainer.run.events`."""
    kind = event["event"]
    if kind == "failure":
        if not event["again"]:
            action = "giving up, because the run makes no progress"
        else:
            action = "the other workers go on" if event.get("in_place") else "restarting the workers"
        return f"{event['cause']}: {action}"
    if kind == "leaving":
        action = "its workers leave" if event.get("in_place") else "the workers save their state and stop"
        return f"{event['cause']}: {action}"
    if kind == "not_joined":
        return f"a new worker could not join: {event['cause']}"
    if kind == "waiting":
        return f"{event['cause']}: waiting for more nodes"
    if kind == "micro_batch":
        return (
            f"micro_batch auto: {event['samples']} samples at a time, of {event['most']} per worker and step"
        )
    if kind == "grown":
        return f"the dataset has grown to {plural(event['samples'], 'sample')}: from step {event['step']} on, epochs have all of them"
    if kind == "evaluated":
        return _evaluation_line(event)
    workers = plural(event["world_size"], "worker")
    if event["step"] == 0:
        text = f"attempt {event['attempt']}: {workers} from step 0"
    else:
        verb = "resumes" if event["world_size"] == 1 else "resume"
        text = f"attempt {event['attempt']}: {workers} {verb} at step {event['step']}"
    if "redone" in event:
        text += f"; {plural(event['redone'], 'step')} repeated, {event['gap_s']:g} s without training"
    return text


def _evaluation_line(event: dict[str, Any]) -> str:
    if "knn_step" in event:
        return f"step {event['knn_step']}: k-NN {describe(event, 'knn')}"
    text = f"step {event['step']}: {describe(event, 'val')}"
    return text + (f", {plural(int(event['val_bad']), 'bad sample')}" if event["val_bad"] else "")
