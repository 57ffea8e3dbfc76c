"""What scans of tars found and decided, for messages: which images were used, and why samples have no label."""

from collections import Counter
from dataclasses import dataclass, field

from pipeline.dataset.fields import Fields, kept_type
from pipeline.dataset.tar_sample import Candidate
from pipeline.errors import UserError
from pipeline.text import plural

MAX_KINDS = 12  # extensions and reasons that are counted by name
OTHERS = "others"
Reasons = dict[str, tuple[int, str]]  # reason → number of samples, and the first of them


@dataclass
class ScanNotes:
    """Counts over one tar or several."""

    samples: int = 0  # with an image
    labelled: int = 0  # of these
    used: Counter[str] = field(default_factory=Counter)  # extension → images that are used
    unused: Counter[str] = field(
        default_factory=Counter
    )  # extension → images of samples that have a better one
    several: int = 0  # samples with several images
    prefixes: dict[str, str] = field(
        default_factory=dict
    )  # `Candidate.prefix` of images that are used → the first sample
    no_label: Reasons = field(default_factory=dict)
    kept: dict[str, Counter[str]] = field(
        default_factory=dict
    )  # column → values of each kind, see `kept_kind`
    empty: list[str] = field(default_factory=list)  # the first tars without samples
    empty_count: int = 0

    def add_image(self, used: Candidate, candidates: list[Candidate], place: str) -> None:
        """Count the images of a sample. `place` describes it."""
        self.samples += 1
        self.used[used.extension] += 1
        self.prefixes.setdefault(used.prefix, place)
        others = [c.extension for c in candidates if c is not used and not c.problem]
        self.several += bool(others)
        for extension in others:
            is_counted = extension in self.unused or len(self.unused) < MAX_KINDS
            self.unused[extension if is_counted else OTHERS] += 1

    def add_no_label(self, reason: str, place: str, count: int = 1) -> None:
        """Count samples without a label, for which there is a reason."""
        if reason not in self.no_label and len(self.no_label) >= MAX_KINDS:
            reason = OTHERS
        before, first = self.no_label.get(reason, (0, place))
        self.no_label[reason] = before + count, first

    def merge(self, other: "ScanNotes") -> None:
        self.samples += other.samples
        self.labelled += other.labelled
        self.used += other.used
        for extension, count in other.unused.items():
            is_counted = extension in self.unused or len(self.unused) < MAX_KINDS
            self.unused[extension if is_counted else OTHERS] += count
        self.several += other.several
        for prefix, place in other.prefixes.items():
            self.prefixes.setdefault(prefix, place)
        for reason, (count, place) in other.no_label.items():
            self.add_no_label(reason, place, count)
        for name, kinds in other.kept.items():
            self.kept[name] = self.kept.get(name, Counter()) + kinds
        self.empty = (self.empty + other.empty)[:MAX_KINDS]
        self.empty_count += other.empty_count

    def check(self, where: str, fields: Fields) -> None:
        """UserError if it is unclear which images are meant, or nothing has a field that was asked for."""
        self.check_prefixes(where, fields)
        if fields.label and self.samples and not self.labelled:
            reason, (_, place) = next(iter(self.no_label.items()))
            raise UserError(
                f"{where}: no sample has the label that --label {fields.label} names: {reason} ({place})"
            )
        for name, kinds in self.kept.items():
            if not kinds.total():
                path = fields.columns[name]
                raise UserError(f"{where}: no .json file has the field {path} that --keep-json names")

    def check_prefixes(self, where: str, fields: Fields) -> None:
        """UserError if some images have a dot in their names, as in a.rgb.jpg, and others not, or other text before it."""
        if fields.image or len(self.prefixes) < 2:
            return
        (one, first), (two, second) = list(self.prefixes.items())[:2]
        shown = [
            f"{f'.{prefix}' if prefix else ''}.{self._type(prefix)} ({place})"
            for prefix, place in ((one, first), (two, second))
        ]
        raise UserError(
            f"{where}: images have different extensions: {shown[0]} and {shown[1]}. The name of a sample ends at its first "
            "dot: if dots are part of the names, pass --split-at last-dot; otherwise choose with --image "
            f"{one}{'.' * bool(one)}{self._type(one)}"
        )

    def _type(self, prefix: str) -> str:
        return next(e.rpartition(".")[2] for e in self.used if e.rpartition(".")[0] == prefix)

    def types(self) -> dict[str, str]:
        """The type of each kept column, see `KEPT_TYPES`."""
        return {name: kept_type(kinds) for name, kinds in self.kept.items()}

    def lines(self, fields: Fields) -> list[str]:
        """What users may not expect, one line each."""
        lines = []
        if self.several and len(fields.images) != 1:
            lines.append(
                f"{plural(self.several, 'sample')} with several images: used {_counts(self.used)}, not {_counts(self.unused)} "
                "(--image chooses)"
            )
        elif not fields.image and any(prefix for prefix in self.prefixes):
            lines.append(f"the images are the files {_counts(self.used)}")
        lines += [
            f"{plural(count, 'sample')} without a label: {reason} (the first: {place})"
            for reason, (count, place) in self.no_label.items()
        ]
        for name, kinds in self.kept.items():
            found = [kind for kind in kinds if kind and kinds[kind]]
            if kept_type(kinds) == "text" and found != ["text"]:
                counts = ", ".join(f"{kinds[kind]:,} {kind}" for kind in found)
                lines.append(
                    f"the column {name} is text, because its values are of different kinds or lists: {counts}"
                )
        if self.empty_count:
            more = ", …" if self.empty_count > len(self.empty) else ""
            lines.append(f"{plural(self.empty_count, 'tar')} without samples: {', '.join(self.empty)}{more}")
        return lines


def _counts(extensions: Counter[str]) -> str:
    return " and ".join(f".{extension} ({count:,})" for extension, count in extensions.most_common())
