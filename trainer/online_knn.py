"""k nearest neighbours while an MAE is pre-trained: how good its encoder is by now, without stopping it."""

import threading

import torch
from torch import nn

from pipeline.decode import Decoder
from pipeline.loader import centred_batch
from pipeline.manifest import Dataset, open_dataset
from pipeline.order import Ints
from trainer.classifier import Encoder
from trainer.config import PretrainConfig
from trainer.device import autocast
from trainer.evaluate import check_classes, check_labels
from trainer.initial import ENCODER
from trainer.knn import neighbours_vote
from trainer.reconstruct import spread_ids
from trainer.run import Run


class OnlineKnn:
    """Class tokens of samples spread evenly over the dataset name samples of another, by a copy of the encoder, in a thread.

    For rank 0. `begin` copies, `found` gives what has come out meanwhile."""

    def __init__(self, config: PretrainConfig, dataset: Dataset, decoder: Decoder, run: Run) -> None:
        assert config.knn is not None
        self.val = open_dataset(config.knn.val, known=True)
        self.classes = check_classes(dataset, self.val)
        self.known = open_dataset(dataset.store.url, known=True)  # with a cache of its own
        self.config = config
        self.known_ids = spread_ids(dataset, config.knn.known)
        self.asked_ids = spread_ids(self.val, config.knn.asked)
        self.decoder, self.device = decoder, run.device
        self.encoder = Encoder(config.model.encoder).to(run.device).requires_grad_(False)
        self.stream = torch.cuda.Stream(run.device) if run.device.type == "cuda" else None
        self.thread: threading.Thread | None = None
        self.closing = threading.Event()
        self.result: dict[str, float] = {}
        self.error: Exception | None = None

    def begin(self, step: int, model: nn.Module) -> None:
        """Look at the encoder as it is after `step` steps, unless the last look is not over."""
        if self.thread:
            return
        state = model.state_dict()
        ours = {name: state[name] for name in state if name.startswith((*ENCODER, "norm."))}
        self.encoder.load_state_dict(ours)
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))  # which copies
        self.thread = threading.Thread(target=self._look, args=(step,), name="knn", daemon=True)
        self.thread.start()

    def found(self, wait: bool = False) -> dict[str, float]:
        """`knn_top1` in percent, and of which step, `knn_step`, if that came out since the last call. What went wrong meanwhile
        is raised here."""
        if not self.thread or (self.thread.is_alive() and not wait):
            return {}
        self.thread.join()
        self.thread = None
        if self.error:
            raise self.error
        return self.result

    def close(self) -> None:
        """End a look that is under way."""
        self.closing.set()
        if self.thread:
            self.thread.join()

    def _look(self, step: int) -> None:
        self.result = {}
        try:
            with torch.cuda.stream(self.stream), torch.no_grad():
                bank, labels = self._features(self.known, self.known_ids)
                queries, right = self._features(self.val, self.asked_ids)
                if not self.closing.is_set():
                    votes = neighbours_vote(queries, bank, labels, self.classes)
                    hits = (votes.argmax(dim=1) == right).sum().item()
                    self.result = {"knn_top1": 100 * hits / len(self.asked_ids), "knn_step": step}
        except Exception as error:
            self.error = error

    def _features(self, dataset: Dataset, ids: Ints) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the samples that can be read: what cannot counts as wrong."""
        found, labels = [], []
        for i in range(0, len(ids), self.config.at_once):
            if self.closing.is_set():
                break
            batch = centred_batch(dataset, self.decoder, ids[i : i + self.config.at_once])
            check_labels(batch.labels)
            good = (batch.weights > 0).to(self.device)
            with autocast(self.config, self.device):
                found.append(self.encoder(batch.images.to(self.device))[:, 0][good].float())
            labels.append(batch.labels.to(self.device)[good])
        return torch.cat(found), torch.cat(labels)
