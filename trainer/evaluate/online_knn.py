"""k-NN evaluation during pre-training: measure a copy of the encoder in a background thread, without stopping training."""

import threading

import torch
from torch import nn

from pipeline.arrays import Ints
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.decode.decoder import Decoder
from pipeline.errors import UserError
from pipeline.loading.loader import centred_batch
from pipeline.text import plural
from trainer.config.device import autocast
from trainer.config.schema import PretrainConfig
from trainer.evaluate.accuracy import check_labels
from trainer.evaluate.knn import knn_means, knn_votes
from trainer.evaluate.reconstruct import evenly_spaced_ids
from trainer.labels.labels import check_val
from trainer.labels.scores import mean_average_precision, r2_and_mae
from trainer.models.classifier import Encoder
from trainer.weights.init import ENCODER_PREFIXES


class OnlineKnn:
    """Predict labels of the validation dataset's query images by their nearest reference images of the training dataset.

    Features are the class tokens. Both sets are spread evenly over their datasets. For rank 0: `start` copies the encoder
    and starts a thread, `poll` returns its result, `close` stops it.
    """

    def __init__(
        self, config: PretrainConfig, dataset: Dataset, decoder: Decoder, device: torch.device
    ) -> None:
        """Raises UserError if a dataset has no labels, or if the two have different kinds of labels or classes."""
        assert config.knn is not None
        self.config = config
        self.queries = open_dataset(config.knn.val, already_reached=True)
        check_val(dataset, self.queries)
        # Opened again, because the thread needs an index cache of its own.
        self.reference = open_dataset(dataset.store.url, already_reached=True)
        self.query_ids = evenly_spaced_ids(self.queries, config.knn.asked)
        self.reference_ids = evenly_spaced_ids(dataset, config.knn.known)
        self.decoder, self.device = decoder, device
        self.encoder = Encoder(config.model.encoder).to(device).requires_grad_(False)
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.thread: threading.Thread | None = None
        self.closing = threading.Event()
        self.result: dict[str, float] = {}
        self.error: Exception | None = None

    def start(self, step: int, model: nn.Module) -> None:
        """Copy the encoder as it is after `step` steps and evaluate it; do nothing while an evaluation is running."""
        if self.thread:
            return
        state = model.state_dict()
        encoder = {name: state[name] for name in state if name.startswith((*ENCODER_PREFIXES, "norm."))}
        self.encoder.load_state_dict(encoder)
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))  # wait for the copy
        self.thread = threading.Thread(target=self._evaluate, args=(step,), name="knn", daemon=True)
        self.thread.start()

    def poll(self, wait: bool = False) -> dict[str, float]:
        """Return the result of an evaluation that has ended, once: its step, `knn_step`, and what was measured.

        That is `knn_top1` in percent for one class per image; `knn_map` in percent for several; `knn_r2` and `knn_mae` for
        numbers. Query images that cannot be read count as wrong classes; the other measures leave them out.

        Returns an empty dict if there is none. Raises the error of an evaluation that failed.

        Args:
            wait: wait for the evaluation that is running.
        """
        if not self.thread or (self.thread.is_alive() and not wait):
            return {}
        self.thread.join()
        self.thread = None
        if self.error:
            raise self.error
        return self.result

    def close(self) -> None:
        """Abort the evaluation that is running, and wait for its thread."""
        self.closing.set()
        if self.thread:
            self.thread.join()

    def _evaluate(self, step: int) -> None:
        self.result = {}
        try:
            with torch.cuda.stream(self.stream), torch.no_grad():
                bank, labels = self._features(self.reference, self.reference_ids)
                queries, query_labels = self._features(self.queries, self.query_ids)
                if not self.closing.is_set():
                    measured = self._measure(queries, query_labels, bank, labels)
                    self.result = {**measured, "knn_step": step}
        except Exception as error:
            self.error = error

    def _measure(
        self, queries: torch.Tensor, query_labels: torch.Tensor, bank: torch.Tensor, labels: torch.Tensor
    ) -> dict[str, float]:
        manifest = self.queries.manifest
        if manifest.labels == "class":
            votes = knn_votes(queries, bank, labels, len(manifest.classes))
            hits = (votes.argmax(dim=1) == query_labels).sum().item()
            # Unreadable query images are among the ids but not among the hits: they count as wrong.
            return {"knn_top1": 100 * hits / len(self.query_ids)}
        predicted, actual = (
            knn_means(queries, bank, labels).cpu().numpy(),
            query_labels.double().cpu().numpy(),
        )
        if manifest.labels == "numbers":
            return dict(zip(("knn_r2", "knn_mae"), r2_and_mae(predicted, actual), strict=True))
        if not actual.any():
            raise UserError(
                f"{self.queries.store.url}: none of {plural(len(actual), 'query image')} has any class, so mAP is not defined: "
                "raise knn.asked"
            )
        return {"knn_map": mean_average_precision(predicted, actual)}

    def _features(self, dataset: Dataset, ids: Ints) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features float32[n, width] and labels (see `Batch`) of the samples that can be read."""
        features, labels = [], []
        for i in range(0, len(ids), self.config.micro_batch_size):
            if self.closing.is_set():
                break
            batch = centred_batch(dataset, self.decoder, ids[i : i + self.config.micro_batch_size])
            check_labels(batch.labels)
            good = (batch.weights > 0).to(self.device)
            with autocast(self.config, self.device):
                features.append(self.encoder(batch.images.to(self.device))[:, 0][good].float())
            labels.append(batch.labels.to(self.device)[good])
        return torch.cat(features), torch.cat(labels)
